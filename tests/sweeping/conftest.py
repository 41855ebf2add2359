"""Fixtures: the modules of scripts/sweeping in an empty folder, and runs that have ended."""

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.judges.base import Verdict

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def sweeping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Any]:
    """`sweeping("points")`: a module of scripts/sweeping, in an empty folder."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.chdir(tmp_path)
    return lambda name: importlib.import_module(f"sweeping.{name}")


def _report(
    unsafe: Mapping[str, int], helpful: float, state: str = "aligned", offset: int = 0
) -> CategoryReport:
    """Of ten prompts a category the first `unsafe` answered unsafely; four reference answers around `helpful`."""
    samples = [
        SampleResult(
            f"{c}-{i + offset}", "harmful", c, (), "", verdict=Verdict.UNSAFE if i < num else Verdict.SAFE
        )
        for c, num in unsafe.items()
        for i in range(10)
    ]
    samples += [
        SampleResult(f"l{i}", "lookalike", "S1", (), "", verdict=Verdict.SAFE, refused=i == 0)
        for i in range(4)
    ]
    samples += [
        SampleResult(f"h{i}", "helpfulness", "helpful", (), "", score=helpful + 0.1 * (i - 1.5))
        for i in range(4)
    ]
    return CategoryReport(state, "tiny", {"name": "rule", "stand_in": True}, {}, tuple(samples))


def _finish(
    point: Any, report: CategoryReport, verdict: str = "PASS", inside: CategoryReport | None = None
) -> None:
    """What a run leaves that has ended."""
    base = _report({"S1": 9, "S2": 8}, -1.0, "base")
    reports = {"base-0": base, **({"safe-20": inside} if inside else {}), "safe-60": report}
    for label, each in reports.items():
        each.to_json(point.folder / "eval" / label / "report.json")
    gated = [{"label": label, "verdict": verdict} for label in reports if label != "base-0"]
    (point.folder / "gate.jsonl").write_text("".join(json.dumps(line) + "\n" for line in gated))
    promoted = "aligned" if verdict == "PASS" else None
    code = {"PASS": 0, "FAIL": 3}[verdict]
    summary = {"verdict": verdict, "promoted": promoted, "exit_code": code, "seconds": {"safe": 2.5}}
    (point.folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="session")
def make_report() -> Callable[..., CategoryReport]:
    """`make_report({"S1": 3}, helpful=-1.0)`: see `_report`."""
    return _report


@pytest.fixture(scope="session")
def finish() -> Callable[..., None]:
    """`finish(point, report, verdict="PASS", inside=None)`: see `_finish`."""
    return _finish
