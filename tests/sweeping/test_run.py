"""A real sweep on the tiny model, one process a point."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ENTRY = Path(__file__).with_name("entry.py")

pytestmark = pytest.mark.slow


def test_a_sweep_fails_in_a_point_goes_on_and_is_completed(
    sweeping: Any,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAIL_ON", "beta=0.1")
    options = (
        sweeping("command")
        .argument_parser("sweep")
        .parse_intermixed_args(
            [
                *("recipe=dpo", "beta=0.1,0.5,1", "seed=1", "model=hub", f"model.id={tiny_model_folder}"),
                *("model.dtype=float32", "stages.safe.num_steps=2", "evaluation.max_new_tokens=3"),
                *("--min-prompts", "2", "--launch", f"{sys.executable} {ENTRY}", "--jobs", "2"),
            ]
        )
    )
    run = sweeping("command").run
    assert run(options) == 1
    folder = tmp_path / "outputs" / "dpo" / "points"
    failed, *done = (folder / name for name in ("beta-0.1", "beta-0.5", "beta-1"))
    failure = json.loads((failed / "seed1.failed.json").read_text())
    assert failure["tail"][-1] == "RuntimeError: a point that was told to fail"
    summaries = [json.loads((point / "seed1" / "summary.json").read_text()) for point in done]
    assert all((point / "seed1" / "recipe.yaml").exists() for point in done)
    # Both started at once. One judged the base (12 answers) beside its own model, the other waited for the report.
    judged = [
        int(re.findall(r"judged (\d+) answers", (point / "seed1.log").read_text())[0]) for point in done
    ]
    assert sorted(judged) == [12, 24]
    hits = [summary["stages"]["safe"]["reference_cache_hit"] for summary in summaries]
    assert sorted(hits) == [False, True]
    assert summaries[0]["states"]["base"] == summaries[1]["states"]["base"]
    written = [(point / "seed1" / "summary.json").stat().st_mtime_ns for point in done]

    monkeypatch.delenv("FAIL_ON")
    assert run(options) == 0
    assert [(point / "seed1" / "summary.json").stat().st_mtime_ns for point in done] == written
    assert not (failed / "seed1.failed.json").exists()
    log = (failed / "seed1.log").read_text()
    assert "base: evaluated before" in log
    assert "judged 12 answers" in log
    other = json.loads((failed / "seed1" / "summary.json").read_text())
    assert other["stages"]["safe"]["reference_cache_hit"]
    assert other["states"]["base"] == summaries[0]["states"]["base"]
    assert "3 of 3 points done, 0 failed" in (folder.parent / "sweep.html").read_text()
    printed = capsys.readouterr().out
    assert "3 points in" in printed
    assert "2 done before" in printed
