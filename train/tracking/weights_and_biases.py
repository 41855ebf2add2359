"""Weights & Biases: https://docs.wandb.ai. Offline without a key; a server that is not there delays a run, no more.

Written against wandb 0.31. W&B keeps a log of all that it is told on disk and sends from there, so what an outage held
back goes up later with `wandb sync FOLDER`.
"""

import netrc
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from equipoise.eval.report.tables import Table
from equipoise.eval.terminal import say
from equipoise.train.preemption import REQUEUE
from equipoise.train.redaction import secret_values, without_secrets
from equipoise.train.tracking.dashboard import EVALUATIONS, Run, axis_name

EVIDENCE = ("recipe.yaml", "gate.jsonl", "summary.json")
"""Files of the run's folder that are kept as an artifact when it ends: figures and verdicts, no prompt or answer."""

Mode = Literal["online", "offline", "disabled", "shared"]


class WeightsAndBiases:
    """One W&B run; its groups of panels are those of `dashboard.panel`."""

    def __init__(self, run: Run) -> None:
        # Files of artifacts wait here until they are sent. W&B's own place is the home folder, and not removed with it.
        os.environ.setdefault("WANDB_DATA_DIR", str(run.folder.absolute() / "wandb" / "data"))
        os.environ.setdefault("WANDB_SILENT", "true")  # `Settings.silent` is too late for some messages
        # Its crash reports hold code and paths, and wait for a server at exit.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # here: it takes a second, and most runs don't use it

        self._module, self._run_info = wandb, run
        self._groups: set[str] = set()
        self._run = self._started(_mode(run.config.mode))

    def log(self, values: Mapping[str, float | int | str], step: int, axis: str) -> None:
        """See `Dashboard`."""
        x = axis_name(axis)
        for group in {name.partition("/")[0] for name in values} - self._groups:
            self._run.define_metric(f"{group}/*", step_metric=x)
            self._groups.add(group)
        self._run.log({x: step, **values})

    def log_evaluation(self, table: Table, plots: str, number: int) -> None:
        """See `Dashboard`."""
        rows = [list(row) for row in table.rows]
        self._run.log(
            {
                axis_name(EVALUATIONS): number,
                "eval_categories/table": self._module.Table(columns=list(table.columns), data=rows),
                "eval_categories/plots": self._module.Html(plots, inject=False),
            }
        )

    def log_promoted(self, folder: Path, aliases: Sequence[str], verdict: Mapping[str, Any]) -> None:
        """See `Dashboard`. A reference has the files' paths, sizes and MD5 sums, and sends no file."""
        how = self._run_info.config.log_model
        if how == "none":
            return
        artifact = self._module.Artifact(
            f"model-{self._run_info.id}", type="model", metadata=dict(verdict, folder=str(folder))
        )
        if how == "reference":
            artifact.add_reference(folder.absolute().as_uri())
        else:
            artifact.add_dir(str(folder))  # copied: the next promotion replaces the folder
        self._run.log_artifact(artifact, aliases=list(aliases))

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """See `Dashboard`."""
        if exit_code == REQUEUE:
            self._run.mark_preempting()  # or it is shown as failed until it goes on
        self._run.summary.update(summary)
        evidence = [path for name in EVIDENCE if (path := self._run_info.folder / name).exists()]
        if summary and evidence:
            artifact = self._module.Artifact(f"evaluation-{self._run_info.id}", type="evaluation")
            for path in evidence:
                artifact.add_file(str(path))
            verdict = summary.get("verdict")
            self._run.log_artifact(artifact, aliases=[str(verdict).lower()] if verdict else None)
        try:
            self._run.finish(exit_code=exit_code)
        except TimeoutError as error:
            sync = f"`wandb sync {Path(self._run.dir).parent}` sends the rest"
            raise TimeoutError(
                f"{self._run_info.config.finish_timeout:g} s were not enough to send all; {sync}"
            ) from error

    def _started(self, mode: Mode) -> Any:
        """The run; offline where a server that was asked for does not answer."""
        run, config = self._run_info, self._run_info.config
        settings = self._module.Settings(
            silent=True,
            console="off",  # what is printed stays here
            disable_code=True,
            init_timeout=config.init_timeout,
            finish_timeout=config.finish_timeout,
            finish_timeout_raises=True,
        )
        before = set(run.folder.glob("wandb/run-*"))
        try:
            started = self._module.init(
                project=config.project,
                group=config.group,
                name=run.name,
                id=run.id,
                resume="allow",
                mode=mode,
                dir=run.folder,
                tags=config.tags,
                config=dict(run.recipe),
                settings=settings,
            )
        except Exception as error:  # no key, a wrong one, no network, a server that fails or hangs
            if mode != "online":
                raise
            warnings.warn(
                f"Weights & Biases cannot be reached, so this run is recorded offline: `wandb sync "
                f"{run.folder / 'wandb' / 'offline-run-*'}` sends it later. ({type(error).__name__}: "
                f"{without_secrets(str(error), secret_values())})",
                stacklevel=2,
            )
            self._module.teardown()  # its process still holds the run's id
            for attempt in set(run.folder.glob("wandb/run-*")) - before:
                shutil.rmtree(attempt)  # it has no values, and a log of what the server said
            return self._started("offline")
        say(f"Weights & Biases: {started.url if mode == 'online' else f'{mode}, in {started.dir}'}")
        return started


def _mode(asked: str) -> Mode:
    if asked == "auto":
        asked = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    return asked  # type: ignore[return-value]  # W&B says what it does not know


def _has_key() -> bool:
    """Whether W&B would find a key: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        file = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser())
    except (OSError, netrc.NetrcParseError):
        return False
    return host in file.hosts
