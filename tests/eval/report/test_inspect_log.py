import math
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import pytest

from equipoise.data.errors import EquipoiseError
from equipoise.eval.category_report import CategoryReport
from equipoise.eval.report.inspect_log import main, write_inspect_log

HAS_INSPECT = find_spec("inspect_ai") is not None
needs_inspect = pytest.mark.skipif(
    not HAS_INSPECT, reason="inspect_ai is not installed (the extra inspect has it)"
)


@needs_inspect
@pytest.mark.parametrize("suffix", [".eval", ".json"])
def test_the_log_loads_with_every_sample_and_rate(
    reports: dict[str, CategoryReport], tmp_path: Path, suffix: str, hostile: str
) -> None:
    from inspect_ai.log import read_eval_log

    report = reports["aligned"]
    created = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    path = write_inspect_log(report, tmp_path / f"log{suffix}", created)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    log = read_eval_log(str(path))
    assert log.status == "success"
    assert datetime.fromisoformat(log.eval.created) == created
    assert len(log.samples) == len(report.samples)
    unsafe, refused, likelihood = log.results.scores
    # 9 of the 30 that have a finding, six have none.
    assert unsafe.metrics["unsafe_rate"].value == pytest.approx(0.3)
    assert unsafe.metrics["unsafe_rate/S1"].value == pytest.approx(0.3)
    assert (unsafe.scored_samples, unsafe.unscored_samples) == (30, 6)
    assert unsafe.metrics["unsafe_rate"].metadata["low"] == report.overall_unsafe_rate.low
    assert refused.metrics["over_refusal_rate"].value == pytest.approx(2 / 16)
    assert likelihood.metrics["mean"].value == pytest.approx(report.helpfulness.mean)

    samples = {sample.id: sample for sample in log.samples}
    first = samples["harmful/S1-0"]
    assert (first.scores["unsafe"].value, first.scores["unsafe"].answer) == (1.0, "unsafe")
    assert samples["harmful/S1-5"].scores["unsafe"].value == 0.0
    assert first.output.completion == f"aligned: {hostile}".replace("\ud800", "\\ud800")
    assert first.metadata["category"] == "S1"
    for missing in ("harmful/S1-10", "harmful/S1-11"):
        score = samples[missing].scores["unsafe"]
        assert math.isnan(score.value)
        assert score.reason in {"invalid_response_format", "grader_failed", "scoring_failed"}
    reference = samples["helpfulness/h0"]
    assert reference.output.choices == []
    assert reference.target.startswith("<script>")


def test_another_suffix_is_refused(reports: dict[str, CategoryReport], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.eval or \.json"):
        write_inspect_log(reports["base"], tmp_path / "log.txt")


@needs_inspect
def test_the_command_reads_a_report(
    reports: dict[str, CategoryReport], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from inspect_ai.log import read_eval_log

    reports["tsdi"].to_json(tmp_path / "report.json")
    assert main([str(tmp_path / "report.json"), str(tmp_path / "logs" / "tsdi.eval")]) == 0
    assert read_eval_log(str(tmp_path / "logs" / "tsdi.eval")).eval.task == "equipoise/tsdi"
    assert main([str(tmp_path / "missing.json"), str(tmp_path / "x.eval")]) == 2
    assert "not a readable report" in capsys.readouterr().err


@pytest.mark.skipif(HAS_INSPECT, reason="inspect_ai is installed")
def test_without_inspect_ai_the_error_says_what_to_install(
    reports: dict[str, CategoryReport], tmp_path: Path
) -> None:
    with pytest.raises(EquipoiseError, match=r"equipoise\[inspect\]"):
        write_inspect_log(reports["base"], tmp_path / "log.eval")
    assert list(tmp_path.iterdir()) == []
