"""trackio: `trackio show` draws what is in its local database. The package is an extra.

Written against trackio 0.43. Runs go to a SQLite file in `TRACKIO_DIR` (the Hugging Face cache folder by default), with
no network; where `TRACKIO_SPACE_ID` or `TRACKIO_SERVER_URL` is set, trackio sends them there.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise.eval.report.tables import Table
from equipoise.eval.terminal import say
from equipoise.train.tracking.dashboard import Run


class Trackio:
    """One trackio run, found again by its name, which therefore ends with its id."""

    def __init__(self, run: Run) -> None:
        import trackio  # an extra

        self._module, self._config = trackio, run.config
        self._model_name = f"model-{run.id}"
        with contextlib.redirect_stdout(io.StringIO()):  # instructions, each time
            self._run = trackio.init(
                project=run.config.project,
                name=f"{run.name} {run.id}",
                group=run.config.group,
                config=dict(run.recipe),
                resume="allow",
                embed=False,
            )
        say(f"trackio: project {run.config.project}, run {run.name} {run.id}")

    def log(self, values: Mapping[str, float | int | str], step: int, axis: str) -> None:
        """See `Dashboard`."""
        self._run.log(dict(values), step=step)

    def log_evaluation(self, table: Table, plots: str, number: int) -> None:
        """See `Dashboard`."""
        rows = [list(row) for row in table.rows]
        self._run.log(
            {
                "eval_categories/table": self._module.Table(columns=list(table.columns), data=rows),
                "eval_categories/plots": self._module.Html(plots),
            },
            step=number,
        )

    def log_promoted(self, folder: Path, aliases: Sequence[str], verdict: Mapping[str, Any]) -> None:
        """See `Dashboard`. A reference has the files' paths, sizes and SHA-256 sums, and copies no file."""
        if self._config.log_model == "none":
            return
        artifact = self._module.Artifact(
            self._model_name, type="model", metadata=dict(verdict, folder=str(folder))
        )
        if self._config.log_model == "reference":
            artifact.add_reference(folder.absolute().as_uri() + "/")
        else:
            artifact.add_dir(folder)
        self._run.log_artifact(artifact, aliases=list(aliases))

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """See `Dashboard`."""
        self._run.log({"exit_code": exit_code})
        with contextlib.redirect_stdout(io.StringIO()):
            self._module.finish()  # not the run's own: that one is done again at exit, and says so
