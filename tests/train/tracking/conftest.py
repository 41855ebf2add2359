"""Fixtures: no account of this machine's, made-up reports, and a dashboard that remembers."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.judges.base import Verdict
from equipoise.eval.report.content import ReportContent
from equipoise.eval.report.tables import Table
from equipoise.train import tracking
from equipoise.train.tracking.dashboard import Run


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No W&B key and no server of trackio's, whatever this machine has; what W&B is told by variables is undone."""
    for name in (
        "API_KEY",
        "IDENTITY_TOKEN_FILE",
        "MODE",
        "BASE_URL",
        "RUN_GROUP",
        "PROJECT",
        "ENTITY",
        "DIR",
    ):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    for name in ("DATA_DIR", "SILENT", "ERROR_REPORTING"):
        monkeypatch.setenv(f"WANDB_{name}", "")  # so that it is taken back
        monkeypatch.delenv(f"WANDB_{name}")
    for name in ("SPACE_ID", "SERVER_URL"):
        monkeypatch.delenv(f"TRACKIO_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def _report(unsafe: Mapping[str, int], state: str) -> CategoryReport:
    samples = [
        SampleResult(
            f"{c}-{i}",
            "harmful",
            c,
            ({"role": "user", "content": "a harmful prompt"},),
            "a harmful answer",
            verdict=Verdict.UNSAFE if i < num else Verdict.SAFE,
        )
        for c, num in unsafe.items()
        for i in range(10)
    ]
    return CategoryReport(state, "tiny", {"name": "rule", "stand_in": True}, {}, tuple(samples))


def make_contents() -> tuple[ReportContent, ReportContent]:
    """Evaluations of the starting model and of an aligned one: ten prompts of S1 and of S2."""
    base, aligned = _report({"S1": 9, "S2": 8}, "base"), _report({"S1": 1, "S2": 2}, "aligned")
    return ReportContent("base-0", {"base": base}), ReportContent(
        "safe-3", {"base": base, "aligned": aligned}
    )


@pytest.fixture(scope="session")
def contents() -> tuple[ReportContent, ReportContent]:
    """See `make_contents`."""
    return make_contents()


class Recorder:
    """A dashboard that remembers what it is told, and fails where it is told to."""

    def __init__(self, run: Run, fails_at: str = "") -> None:
        self.run, self.fails_at = run, fails_at
        self.logged: list[tuple[dict[str, Any], int, str]] = []
        self.evaluations: list[tuple[Table, str, int]] = []
        self.promoted: list[tuple[Path, tuple[str, ...], Mapping[str, Any]]] = []
        self.ended: tuple[int, Mapping[str, Any]] | None = None
        self._may_fail("start")

    def log(self, values: Mapping[str, float | int | str], step: int, axis: str) -> None:
        self._may_fail("log")
        self.logged.append((dict(values), step, axis))

    def log_evaluation(self, table: Table, plots: str, number: int) -> None:
        self.evaluations.append((table, plots, number))

    def log_promoted(self, folder: Path, aliases: Sequence[str], verdict: Mapping[str, Any]) -> None:
        self.promoted.append((folder, tuple(aliases), verdict))

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        self._may_fail("finish")
        self.ended = (exit_code, summary)

    def _may_fail(self, where: str) -> None:
        if where == self.fails_at:
            raise OSError("the server said no to key-0123456789")


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """Every dashboard that is started as `trackio` from here on; the one named `tensorboard` fails in `log`."""
    started: list[Recorder] = []

    def start(run: Run) -> Recorder:
        started.append(Recorder(run))
        return started[-1]

    monkeypatch.setitem(tracking.DASHBOARDS, "trackio", start)
    monkeypatch.setitem(tracking.DASHBOARDS, "tensorboard", lambda run: Recorder(run, "log"))
    monkeypatch.setitem(tracking.DASHBOARDS, "wandb", lambda run: Recorder(run, "start"))
    return started


@pytest.fixture(scope="session")
def read_metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """`read_metrics(run_dir)`: the lines of metrics.jsonl, which are JSON to the letter."""

    def read(run_dir: Path) -> list[dict[str, Any]]:
        text = (run_dir / "metrics.jsonl").read_text()
        return [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]

    return read
