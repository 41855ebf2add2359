"""Where metrics go: always `metrics.jsonl` in the run's folder, and Weights & Biases where the recipe says so."""

import math
import netrc
import numbers
import os
import re
import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from equipoise.data.errors import DiskFullError
from equipoise.eval.report.tables import Table
from equipoise.eval.terminal import say
from equipoise.train.metrics_file import END, MetricsFile
from equipoise.train.recipe import TrackingConfig

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


class Tracker:
    """The first rank's record of a run.

    `metrics.jsonl` is the truth: a line a call, written through at once, appended to when a run is resumed. W&B gets
    the same values; when it fails, a warning says so and the run goes on without it.
    """

    def __init__(self, run_dir: Path, config: TrackingConfig, recipe_dict: Mapping[str, Any]) -> None:
        """`recipe_dict` is the resolved recipe; W&B shows it as the run's configuration."""
        self._metrics = MetricsFile(run_dir / "metrics.jsonl")
        self._wandb: Any = None
        self._stages: set[str] = set()
        if config.name == "wandb":
            self._start_wandb(run_dir, config, _without_secrets(recipe_dict))

    def log(self, metrics: Mapping[str, float | int | str], step: int, stage: str) -> None:
        """Record `metrics` at optimizer step `step` of `stage`; values that are not finite become texts, "NaN".

        What an interrupted run has recorded already is not recorded again.
        """
        values = {name: _plain(value) for name, value in metrics.items()}
        new = self._metrics.append(_finite({"stage": stage, "step": step, **values}))
        if new and self._wandb is not None:
            self._try(lambda: self._log_wandb(values, step, stage))

    def log_table(self, name: str, table: Table, stage: str) -> None:
        """Show a table in W&B, where the run is tracked there; `report.json` has what is in it."""
        if self._wandb is not None:
            self._try(lambda: self._log_wandb_table(name, table, stage))

    def rewind(self, stage: str, step: int) -> None:
        """Forget what an interrupted run logged of `stage` behind `step`: it is about to be done again."""
        self._metrics.rewind(stage, step)

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """Record how the run ended and close; `summary` may be nested, W&B shows it beside the curves."""
        try:
            self._metrics.append({"stage": END, "exit_code": exit_code})
        except (
            DiskFullError
        ) as error:  # very likely what ended the run: its own error must not be lost behind this one
            say(str(error))
        self._metrics.close()
        if self._wandb is not None:
            self._try(lambda: self._wandb.summary.update(_finite(_without_secrets(summary))))
        if self._wandb is not None:
            self._try(lambda: self._wandb.finish(exit_code=exit_code))

    def _start_wandb(self, run_dir: Path, config: TrackingConfig, recipe: Mapping[str, Any]) -> None:
        import wandb  # here: it takes a second, and most runs don't use it

        mode: Any = config.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")

        def start() -> None:
            self._wandb = wandb.init(
                project=config.project,
                name=f"{run_dir.parent.name}/{run_dir.name}",
                id=_run_id(run_dir),
                resume="allow",
                mode=mode,
                dir=run_dir,
                tags=config.tags,
                config=dict(recipe),
                settings=wandb.Settings(silent=True, console="off", disable_code=True),
            )
            where = self._wandb.url if mode == "online" else f"{mode}, in {run_dir / 'wandb'}"
            say(f"Weights & Biases: {where}")

        self._try(start)

    def _log_wandb(self, values: Mapping[str, Any], step: int, stage: str) -> None:
        if stage not in self._stages:  # every stage counts its own steps
            self._wandb.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._wandb.log(
            {f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in values.items()}}
        )

    def _log_wandb_table(self, name: str, table: Table, stage: str) -> None:
        import wandb

        rows = [list(row) for row in table.rows]
        self._wandb.log({f"{stage}/{name}": wandb.Table(columns=list(table.columns), data=rows)})

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # whatever a tracker raises, hours of training are worth more
            self._wandb = None
            warnings.warn(
                f"Weights & Biases failed and is off from here on; {self._metrics.path} has everything. "
                f"({type(error).__name__}: {_redact(str(error))})",
                stacklevel=3,
            )


def _run_id(run_dir: Path) -> str:
    """The run's W&B id: drawn once, kept in its folder, so that a resumed run continues its curves."""
    path = run_dir / "wandb_id.txt"
    if not path.exists():
        path.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _has_wandb_key() -> bool:
    """Whether W&B would find a key: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        file = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return host in file.hosts


def _plain(value: object) -> object:
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


def _without_secrets(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_secrets(item) for item in value]
    return _redact(value) if isinstance(value, str) else value


def _redact(text: str) -> str:
    """`text` without the values of environment variables that are named like secrets."""
    for name, secret in os.environ.items():
        if _SECRET_NAME.search(name) and len(secret) >= 8:
            text = text.replace(secret, "***")
    return text
