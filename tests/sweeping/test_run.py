"""A real sweep on the tiny model, one process a point."""

import json
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
                *("recipe=dpo", "beta=0.1,0.5", "seed=1", "model=hub", f"model.id={tiny_model_folder}"),
                *("model.dtype=float32", "stages.safe.num_steps=2", "evaluation.max_new_tokens=3"),
                *("--min-prompts", "2", "--launch", f"{sys.executable} {ENTRY}"),
            ]
        )
    )
    run = sweeping("command").run
    assert run(options) == 1
    folder = tmp_path / "outputs" / "dpo" / "points"
    failed, done = folder / "beta-0.1", folder / "beta-0.5"
    failure = json.loads((failed / "seed1.failed.json").read_text())
    assert failure["tail"][-1] == "RuntimeError: a point that was told to fail"
    summary = json.loads((done / "seed1" / "summary.json").read_text())
    assert (done / "seed1" / "recipe.yaml").exists()
    assert "judged 24 answers" in (done / "seed1.log").read_text()  # 12 of the base, 12 of the trained model
    written = (done / "seed1" / "summary.json").stat().st_mtime_ns

    monkeypatch.delenv("FAIL_ON")
    assert run(options) == 0
    assert (done / "seed1" / "summary.json").stat().st_mtime_ns == written
    assert not (failed / "seed1.failed.json").exists()
    log = (failed / "seed1.log").read_text()
    assert "base: evaluated before" in log
    assert "judged 12 answers" in log  # the base's report was there
    other = json.loads((failed / "seed1" / "summary.json").read_text())
    assert other["stages"]["safe"]["reference_cache_hit"]
    assert not summary["stages"]["safe"]["reference_cache_hit"]
    assert other["states"]["base"] == summary["states"]["base"]
    assert "2 of 2 points done, 0 failed" in (folder.parent / "sweep.html").read_text()
    printed = capsys.readouterr().out
    assert "2 points in" in printed
    assert "1 done before" in printed
