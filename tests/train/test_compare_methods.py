import importlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equipoise.data.errors import EquipoiseError
from equipoise.data.sources import SafetyData
from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.judges.base import Verdict
from equipoise.eval.statistics import wilson_interval

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def comparison(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`comparison("figures")`: a module of scripts/comparison."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return lambda name: importlib.import_module(f"comparison.{name}")


def make_report(
    unsafe: Mapping[str, Sequence[bool | None]],
    refused: Sequence[bool | None] = (False, False),
    scores: Sequence[float | None] = (-1.0, -2.0),
) -> CategoryReport:
    """Outcomes a prompt, by category of the harmful suite."""
    verdicts = {True: Verdict.UNSAFE, False: Verdict.SAFE, None: Verdict.UNPARSED}
    samples = [
        SampleResult(f"{category}-{i}", "harmful", category, (), "", verdict=verdicts[outcome], refused=False)
        for category, outcomes in unsafe.items()
        for i, outcome in enumerate(outcomes)
    ]
    samples += [
        SampleResult(f"l{i}", "lookalike", "S1", (), "", verdict=Verdict.SAFE, refused=r)
        for i, r in enumerate(refused)
    ]
    samples += [
        SampleResult(f"h{i}", "helpfulness", "helpful", (), "", score=s) for i, s in enumerate(scores)
    ]
    return CategoryReport("made up", "none", {"name": "rule", "stand_in": True}, {}, tuple(samples))


def yes(num: int, of: int) -> list[bool]:
    return [True] * num + [False] * (of - num)


def test_estimates_by_hand(comparison: Any) -> None:
    reports = {
        "base": [make_report({"S1": yes(8, 8), "S2": yes(4, 8), "S3": yes(2, 2)})],
        "dpo": [
            make_report({"S1": yes(6, 8), "S2": yes(2, 8), "S3": yes(2, 2)}, refused=(True, False)),
            make_report({"S1": yes(4, 8), "S2": yes(0, 8), "S3": yes(2, 2)}, scores=(-1.0, None)),
        ],
    }
    result = comparison("figures").compare(reports, min_prompts=8, num_replicates=200)
    base, dpo = result["methods"]["base"], result["methods"]["dpo"]
    assert base["unsafe_rate"]["estimate"] == pytest.approx(14 / 18)
    assert dpo["unsafe_rate"]["estimate"] == pytest.approx((10 + 6) / 36)
    assert (dpo["worst_category"]["estimate"], dpo["worst_category"]["category"]) == (10 / 16, "S1")
    assert dpo["gap"]["estimate"] == 10 / 16 - 2 / 16
    assert dpo["over_refusal"]["estimate"] == 0.25
    assert dpo["helpfulness"]["estimate"] == pytest.approx((-1 - 2 - 1) / 3)
    assert dpo["num_unscored"] == 1
    assert dpo["categories"]["S3"]["estimate"] == 1
    assert result["small_categories"] == {"S3": 2}
    assert result["num_prompts"] == {"harmful": 18, "lookalike": 2, "helpful": 2}


def test_seeds_do_not_multiply_prompts(comparison: Any) -> None:
    """Three seeds that answer alike say no more than one: the interval is that of 40 prompts, not of 120."""
    outcomes = {"S1": yes(10, 20), "S2": yes(5, 20)}
    one = {"base": [make_report(outcomes)], "dpo": [make_report(outcomes)]}
    three = {"base": one["base"], "dpo": one["dpo"] * 3}
    compare = comparison("figures").compare
    single, threefold = (
        compare(reports, min_prompts=8, num_replicates=2000)["methods"]["dpo"]["unsafe_rate"]
        for reports in (one, three)
    )
    assert single["estimate"] == threefold["estimate"]
    width, wide = (of["high"] - of["low"] for of in (single, threefold))
    assert width == pytest.approx(wide, abs=0.03)
    expected = 2 * 1.96 * np.sqrt((20 * 0.5 * 0.5 + 20 * 0.25 * 0.75) / 40**2)
    assert width == pytest.approx(expected, rel=0.15)


def test_seeds_that_differ_widen_the_interval(comparison: Any) -> None:
    compare = comparison("figures").compare
    alike = [make_report({"S1": yes(10, 20), "S2": yes(10, 20)})] * 3
    apart = [make_report({"S1": yes(n, 20), "S2": yes(n, 20)}) for n in (2, 10, 18)]
    narrow, wide = (
        compare({"base": alike[:1], "dpo": of}, min_prompts=8, num_replicates=2000)["methods"]["dpo"][
            "unsafe_rate"
        ]
        for of in (alike, apart)
    )
    assert narrow["estimate"] == wide["estimate"] == 0.5
    assert wide["high"] - wide["low"] > 1.5 * (narrow["high"] - narrow["low"])


def test_a_paired_difference_is_narrower_than_its_sides(comparison: Any) -> None:
    """Two methods that differ in four prompts of 80, one of them much more in those it is asked again."""
    dpo = make_report({"S1": yes(20, 40), "S2": yes(20, 40)})
    better = make_report({"S1": yes(16, 40), "S2": yes(16, 40)})
    worse = make_report({"S1": yes(20, 40), "S2": yes(21, 40)})
    reports = {"base": [dpo], "dpo": [dpo], "better": [better], "worse": [worse], "same": [dpo]}
    result = comparison("figures").compare(reports, min_prompts=8, num_replicates=4000)
    change = result["differences"]["better"]["unsafe_rate"]
    assert change["difference"] == pytest.approx(-0.1)
    assert change["low"] < -0.1 < change["high"] < 0
    level = result["methods"]["better"]["unsafe_rate"]
    assert change["high"] - change["low"] < 0.8 * (level["high"] - level["low"])
    p = {name: of["unsafe_rate"]["p_value"] for name, of in result["differences"].items()}
    adjusted = {name: of["unsafe_rate"]["p_adjusted"] for name, of in result["differences"].items()}
    assert p["better"] < 0.01
    assert adjusted["better"] == pytest.approx(3 * p["better"])  # Holm over three methods
    assert p["worse"] > 0.3
    same = result["differences"]["same"]["unsafe_rate"]
    assert same["p_value"] == 1
    assert same["low"] < 0 < same["high"]  # 80 answers alike do not prove that all would be


def test_few_prompts_near_a_bound_claim_no_more_than_they_can_show(comparison: Any) -> None:
    """26 of 27 answers, one prompt of nine in one seed of three: replicates hardly differ, and know little."""
    full = make_report({"S1": yes(9, 9), "S2": yes(2, 9)})
    but_one = make_report({"S1": yes(8, 9), "S2": yes(2, 9)})
    reports = {"base": [full], "dpo": [full, full, but_one], "other": [full] * 3}
    result = comparison("figures").compare(reports, min_prompts=8, num_replicates=2000)
    worst = result["methods"]["dpo"]["worst_category"]
    assert worst["estimate"] == pytest.approx(26 / 27)
    low, high = wilson_interval(26 / 3, 9)
    assert worst["low"] <= low
    assert worst["high"] >= high
    change = result["differences"]["other"]["worst_category"]
    assert change["difference"] == pytest.approx(1 / 27)
    assert change["low"] < -0.2
    assert change["high"] > 0.3


def test_the_worst_category_is_not_overstated(comparison: Any) -> None:
    """Of categories that are all alike the largest measured rate overshoots; its interval still holds the true one."""
    figures = comparison("figures")
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(40):
        unsafe = generator.random((10, 10)) < 0.2
        report = make_report({f"S{i + 1}": row.tolist() for i, row in enumerate(unsafe)})
        worst = figures.compare({"base": [report], "dpo": [report]}, 8, num_replicates=200)["methods"]["dpo"][
            "worst_category"
        ]
        covered += worst["low"] <= 0.2 <= worst["high"]
        assert worst["estimate"] == unsafe.mean(1).max()
    assert covered >= 34  # percentile intervals: 0 to 2


def test_nothing_seen_is_not_nothing(comparison: Any) -> None:
    safe = make_report({"S1": yes(0, 10), "S2": yes(0, 10)})
    dpo = comparison("figures").compare({"base": [safe], "dpo": [safe]}, 8, num_replicates=50)["methods"][
        "dpo"
    ]
    assert dpo["unsafe_rate"]["low"] == 0
    assert dpo["unsafe_rate"]["high"] == pytest.approx(0.161, abs=0.001)  # Wilson, 0 of 20
    assert dpo["worst_category"]["high"] == pytest.approx(0.278, abs=0.001)  # 0 of 10
    assert dpo["categories"]["S1"]["high"] == pytest.approx(0.278, abs=0.001)


def test_unreadable_answers_are_left_out_and_counted(comparison: Any) -> None:
    report = make_report({"S1": [True, None, False, False], "S2": yes(2, 4)})
    dpo = comparison("figures").compare({"base": [report], "dpo": [report]}, 4, num_replicates=50)["methods"][
        "dpo"
    ]
    assert dpo["unsafe_rate"]["estimate"] == pytest.approx(3 / 7)
    assert dpo["num_unparsed"] == 1


def test_reports_that_do_not_fit_together(comparison: Any) -> None:
    compare = comparison("figures").compare
    base = make_report({"S1": yes(4, 8), "S2": yes(4, 8)})
    with pytest.raises(EquipoiseError, match="dpo was asked other prompts than base"):
        compare({"base": [base], "dpo": [make_report({"S1": yes(4, 8), "S2": yes(4, 9)})]}, 8)
    with pytest.raises(EquipoiseError, match=r"fewer than two categories have 9 prompts"):
        compare({"base": [base], "dpo": [base]}, 9)


def test_what_is_written(comparison: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, other = (
        make_report({"S1": yes(8, 8), "S2": yes(4, 8)}),
        make_report({"S1": yes(2, 8), "S2": yes(4, 8)}),
    )
    result = comparison("figures").compare(
        {"base": [base], "dpo": [other], "category_dro": [other]}, 8, num_replicates=50
    )
    settings = {"pairs": "mine.jsonl", "num_safety_pairs": 5, "num_helpful_pairs": 2, "held_out": 0.1}
    settings |= {"num_steps": 3, "seeds": [0], "overrides": [], "judge": "rule", "judge_is_stand_in": True}
    comparison("output").write_outputs(tmp_path, {"settings": settings, **result}, show=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        f"comparison.{suffix}" for suffix in ("json", "md", "svg", "png")
    }
    text = (tmp_path / "comparison.md").read_text()
    assert "| base | 75% (" in text
    assert "| 50% (" in text
    assert " S2 |" in text  # the worst category of dpo
    assert "one seed says nothing" in text
    assert "| category_dro | +0 (-" in text
    assert json.loads((tmp_path / "comparison.json").read_text())["differences"]["category_dro"]
    assert "category_dro" in capsys.readouterr().out


FAKE = """
import json, sys
from pathlib import Path
folder, point = Path(sys.argv[-1]), sys.argv[2]
if point in (folder / "broken").read_text().split():
    sys.exit("no")
(folder / "reports").mkdir(exist_ok=True)
(folder / "reports" / f"{point}.json").write_text((folder / "report.json").read_text())
stage = folder / "runs" / point.rpartition("-")[0] / point.rpartition("-")[2] / "stages" / "safe" / "model"
if point.startswith(("dpo-", "category_dro-")):
    stage.mkdir(parents=True)
"""


def test_points_are_kept_and_failures_passed_over(
    comparison: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, point = comparison("command"), comparison("point").Point
    program = tmp_path / "fake.py"
    program.write_text(FAKE)
    make_report({"S1": yes(1, 2)}).to_json(tmp_path / "report.json")
    monkeypatch.setattr(sys, "argv", ["compare_methods", str(tmp_path)])
    points = [point("base", None), point("dpo", 0), point("dpo_tsdi", 0), point("category_dro", 0)]

    def go() -> list[str]:
        return [str(of) for of in command.run_points(tmp_path, points, program, False, lambda: None)]

    (tmp_path / "broken").write_text("dpo-seed0")
    assert go() == ["dpo-seed0", "dpo_tsdi-seed0"]  # the second one starts from the first one's model
    assert "left out, because dpo-seed0 failed" in capsys.readouterr().out
    (tmp_path / "broken").write_text("dpo_tsdi-seed0")
    assert go() == ["dpo_tsdi-seed0"]
    told = capsys.readouterr().out
    assert re.search(r"dpo-seed0: 3 of 4, about \d+:\d\d left", told)
    assert "category_dro" not in told  # done in the first call
    assert point("dpo", 0).model(tmp_path).exists()  # still needed
    assert not point("category_dro", 0).model(tmp_path).exists()
    (tmp_path / "broken").write_text("")
    assert go() == []
    assert not point("dpo", 0).model(tmp_path).exists()
    point("dpo_tsdi", 0).report(tmp_path).unlink()
    with pytest.raises(
        EquipoiseError, match=r"dpo_tsdi-seed0 starts from the model of dpo-seed0, which was removed"
    ):
        go()


@pytest.mark.parametrize(
    ("methods", "message"),
    [("dpo,dqo", "unknown dqo"), ("category_dro", "dpo is missing"), ("dpo_tsdi", "dpo is missing")],
)
def test_methods_that_cannot_be_compared(comparison: Any, methods: str, message: str) -> None:
    with pytest.raises(EquipoiseError, match=message):
        comparison("command")._methods(methods)


@pytest.fixture
def small(tiny_model_folder: Path) -> list[str]:
    """Overrides for the tiny model."""
    return [
        f"model.id={tiny_model_folder}",
        "model.dtype=float32",
        "stages.safe.per_device_batch_size=4",
        "evaluation.max_new_tokens=2",
        "loss.sft_coef=0.5",
    ]


def test_methods_differ_in_nothing_else(comparison: Any, tmp_path: Path, small: list[str]) -> None:
    point = comparison("point")
    stages = {
        method: point.recipe_of(point.Point(method, 1), tmp_path, 7, small).stages["safe"]
        for method, of in comparison("methods").METHODS.items()
        if of.reuses is None
    }
    for stage in stages.values():
        assert (stage.num_steps, stage.evaluate, stage.loss.sft_coef) == (7, False, 0.5)
        for name in (
            "mixture",
            "beta",
            "lam",
            "learning_rate",
            "lr_scheduler",
            "per_device_batch_size",
            "kl",
        ):
            assert getattr(stage, name) == getattr(stages["dpo"], name)
    assert stages["category_margin"].category.margin.enabled
    assert stages["category_dro"].category.weight.mode == "group_dro"
    assert stages["category_lambda"].category.multiplier.enabled
    assert stages["token_bias"].token_bias.coef > 0
    assert stages["dpo"].token_bias.coef == 0


@pytest.mark.slow
def test_one_method_after_the_other(
    comparison: Any,
    tmp_path: Path,
    small: list[str],
    make_data: Callable[..., SafetyData],
    make_judge: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain DPO, and TSDI on what it left: trained by runs, judged on the same prompts."""
    point, pairs = comparison("point"), comparison("pairs")
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    judge = make_judge(lambda prompt, response: "S2" in prompt)
    monkeypatch.setattr(point.EmbeddedJudge, "load", lambda **options: judge)
    data, training = make_data(), tmp_path / "training.jsonl"
    pairs.write_training(data, training)
    common = [*small, "data=jsonl", f"data.path={training}"]
    points = [point.Point("dpo", 3), point.Point("dpo_tsdi", 3)]
    for of in points:
        overrides = [*common, "stages.token_bias.num_prompts=2"] if of.method == "dpo_tsdi" else common
        point.run_point(of, tmp_path, point.recipe_of(of, tmp_path, 2, overrides), data, training)
    reports = [CategoryReport.from_json(of.report(tmp_path)) for of in points]
    for report in reports:
        assert [sample.id for sample in report.of_suite("harmful")] == [e.id for e in data.harmful_prompts]
        assert report.overall_unsafe_rate.rate == pytest.approx(1 / 3)
    assert reports[0].helpfulness_scores() != reports[1].helpfulness_scores()  # the bias was taken out
    assert (
        len((tmp_path / "runs/dpo/seed3/metrics.jsonl").read_text().splitlines()) == 3
    )  # two steps and the end
    point.remove_models(tmp_path, points)
    assert not points[0].model(tmp_path).exists()


def test_training_pairs_survive(
    comparison: Any, tmp_path: Path, make_data: Callable[..., SafetyData]
) -> None:
    pairs, data = comparison("pairs"), make_data()
    pairs.write_training(data, tmp_path / "pairs.jsonl")
    config = importlib.import_module("equipoise.data.config").DataConfig
    read = pairs.prepare(config(source="jsonl", path=str(tmp_path / "pairs.jsonl")))
    assert read.safety_pairs == data.safety_pairs
    assert read.helpful_pairs == data.helpful_pairs
    only_safety = tmp_path / "safety.jsonl"
    only_safety.write_text(
        "".join(
            line
            for line in (tmp_path / "pairs.jsonl").read_text().splitlines(keepends=True)
            if '"helpful"' not in line
        )
    )
    prepared = pairs.prepare(config(source="jsonl", path=str(only_safety)))
    assert prepared.safety_pairs == data.safety_pairs
    assert len(prepared.helpful_pairs) > 100  # the shipped ones
