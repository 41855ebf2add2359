"""What every dashboard is given and has to do, and how metrics are named on it."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from equipoise.data.files import write_aside
from equipoise.eval.report.tables import Table
from equipoise.train.recipe import TrackingConfig

EVALUATIONS = "evaluations"
"""The axis that counts a run's evaluations, the starting model's first; every other axis is a stage's steps."""


@dataclass(frozen=True)
class Run:
    """A run as its dashboards know it."""

    folder: Path
    id: str
    """The same when it is resumed, another for every other folder."""
    config: TrackingConfig
    recipe: Mapping[str, Any]
    """Resolved, without secrets."""

    @property
    def name(self) -> str:
        """`<name>/seed<seed>`, as its folder."""
        return f"{self.folder.parent.name}/{self.folder.name}"


class Dashboard(Protocol):
    """Started with a `Run`. Whatever a method raises ends this dashboard and not the run."""

    def log(self, values: Mapping[str, float | int | str], step: int, axis: str) -> None:
        """Draw `values`, by `panel` name, at `step` of the axis."""

    def log_evaluation(self, table: Table, plots: str, number: int) -> None:
        """Show the rates of one state by category, and an HTML page of plots, at the `number`-th evaluation."""

    def log_promoted(self, folder: Path, aliases: Sequence[str], verdict: Mapping[str, Any]) -> None:
        """Record the model in `folder`, which later promotions replace, under `aliases` and with its verdict."""

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Show `summary` and end; everything is written, or sent as far as a server takes it in a bounded time."""


def panel(name: str, axis: str) -> str:
    """A metric's name on a dashboard: its group, a slash, and its own name.

    W&B, TensorBoard and trackio put into one group what is the same in front of the first slash. So the categories of
    `train/loss/<category>` of the stage `safe` are the group `safe_train_loss`; evaluations are the groups `eval`,
    `eval_unsafe_rate` and `gate`, with all states on one curve. (Letters, digits and underscores are what W&B's filters
    take.)
    """
    *group, own = name.split("/")
    if axis != EVALUATIONS:
        group.insert(0, axis)
    return f"{'_'.join(group) or axis}/{own}"


def axis_name(axis: str) -> str:
    """How the steps of an axis are logged: `safe/step`, `eval/number`."""
    return "eval/number" if axis == EVALUATIONS else f"{axis}/step"


def run_id(run_dir: Path) -> str:
    """The run's id, drawn once and kept in its folder, so that a resumed run continues its curves."""
    path = run_dir / "run_id.txt"
    if not path.exists():
        write_aside(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()
