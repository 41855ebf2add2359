"""What a run tells: always `metrics.jsonl` in its folder, and the dashboards that the recipe names.

Only the first rank has a `Tracker`. A dashboard that fails is left out from there on; the run goes on, and
`metrics.jsonl` has everything.
"""

import json
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from equipoise.data.errors import DiskFullError
from equipoise.data.files import full_disk_named
from equipoise.eval.report.content import ReportContent
from equipoise.eval.report.tables import category_table
from equipoise.eval.terminal import say
from equipoise.train.metrics_file import END, MetricsFile
from equipoise.train.recipe import TrackingConfig
from equipoise.train.redaction import key_variables, secret_values, without_secrets
from equipoise.train.tracking.dashboard import EVALUATIONS, Dashboard, Run, panel, run_id
from equipoise.train.tracking.plots_page import plots_page
from equipoise.train.tracking.tensorboard import TensorBoard
from equipoise.train.tracking.trackio import Trackio
from equipoise.train.tracking.weights_and_biases import WeightsAndBiases

DASHBOARDS: dict[str, Callable[[Run], Dashboard]] = {
    "wandb": WeightsAndBiases,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}
"""What `tracking.trackers` may name. Their packages are imported when one is started."""


class Tracker:
    """The first rank's record of a run."""

    def __init__(self, run_dir: Path, config: TrackingConfig, recipe: Mapping[str, Any]) -> None:
        """`recipe` is the resolved recipe; dashboards show it as the run's configuration."""
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._speed = run_dir / "speed.jsonl"
        self._secrets = secret_values(key_variables(recipe))
        self._evaluations = _evaluations(self._metrics.path)
        self._dashboards: dict[str, Dashboard] = {}
        if config.trackers:
            run = Run(run_dir, run_id(run_dir), config, self._clean(recipe))
            for name in dict.fromkeys(config.trackers):
                self._guarded(name, partial(self._start, name, run))

    def log(self, metrics: Mapping[str, float | int | str], step: int, stage: str) -> None:
        """Record `metrics` at optimizer step `step` of `stage`; values that are not finite become texts, "NaN".

        What an interrupted run has recorded already is not recorded again.
        """
        values = self._clean({name: _plain(value) for name, value in metrics.items()})
        if not self._metrics.append(_finite({"stage": stage, "step": step, **values})):
            return
        axis = stage
        if any(name.startswith("eval/") for name in values) and stage not in self._evaluations:
            self._evaluations.append(stage)
        if stage in self._evaluations:  # one curve over the states of a run, whatever their stage
            axis, step = EVALUATIONS, self._evaluations.index(stage)
        named = {panel(name, axis): value for name, value in values.items()}
        self._each(lambda dashboard: dashboard.log(named, step, axis))

    def log_evaluation(self, content: ReportContent, label: str) -> None:
        """Show the last state of `content`: its table by category, and its plots against the others.

        Dashboards only; no prompt or answer is among it. `metrics.jsonl` has the rates, `report.json` everything.
        """
        if not self._dashboards or label not in self._evaluations:
            return
        state, report = list(content.reports.items())[-1]
        baseline = None if state == content.baseline_state else content.baseline
        table = category_table(report, baseline, content.category_names)
        plots = plots_page(content)
        number = self._evaluations.index(label)
        self._each(lambda dashboard: dashboard.log_evaluation(table, plots, number))

    def log_promoted(self, folder: Path, aliases: Sequence[str], verdict: Mapping[str, Any]) -> None:
        """Record a model folder that passed the gate, with the verdict's numbers; how, `tracking.log_model` says."""
        facts = _finite(self._clean(verdict))
        self._each(lambda dashboard: dashboard.log_promoted(folder, aliases, facts))

    def log_speed(self, speeds: Mapping[str, float], step: int, stage: str) -> None:
        """Record how fast it goes in `speed.jsonl`: unlike `metrics.jsonl` it is no function of recipe and seed."""
        line = json.dumps(_finite({"stage": stage, "step": step, **speeds}))
        with full_disk_named(self._speed), self._speed.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        named = {panel(name, stage): value for name, value in speeds.items()}
        self._each(lambda dashboard: dashboard.log(named, step, stage))

    def rewind(self, stage: str, step: int) -> None:
        """Forget what an interrupted run logged of `stage` behind `step`: it is about to be done again."""
        self._metrics.rewind(stage, step)
        self._evaluations = _evaluations(self._metrics.path)

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Record how the run ended and close; `summary` may be nested, dashboards show it beside the curves."""
        try:
            self._metrics.append({"stage": END, "exit_code": exit_code})
        except DiskFullError as error:
            say(str(error))  # very likely what ended the run: its own error must not be lost behind this one
        self._metrics.close()
        facts = _finite(self._clean(summary))
        self._each(lambda dashboard: dashboard.finish(exit_code, facts))

    def _start(self, name: str, run: Run) -> None:
        self._dashboards[name] = DASHBOARDS[name](run)

    def _each(self, action: Callable[[Dashboard], None]) -> None:
        for name, dashboard in list(self._dashboards.items()):
            self._guarded(name, partial(action, dashboard))

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a dashboard raises, hours of training are worth more
            self._dashboards.pop(name, None)
            warnings.warn(
                f"tracking to {name} failed and is off from here on; {self._metrics.path} has everything. "
                f"({type(error).__name__}: {self._clean(str(error))})",
                stacklevel=3,
            )

    def _clean(self, value: Any) -> Any:
        return without_secrets(value, self._secrets)


def _evaluations(path: Path) -> list[str]:
    """The labels of the evaluations in `metrics.jsonl`, in order: dashboards number them."""
    with path.open(encoding="utf-8", newline="\n") as file:
        lines = [json.loads(line) for line in file]
    labels = [line["stage"] for line in lines if any(name.startswith("eval/") for name in line)]
    return list(dict.fromkeys(labels))


def _plain(value: object) -> float | int | str:
    """A NumPy or 0-d scalar as Python's own number."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(f"a metric is a number or a text, found {type(value).__name__}")


def _finite(value: Any) -> Any:
    """`value` with floats that JSON has no word for as texts: "NaN", "Infinity", "-Infinity"."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
