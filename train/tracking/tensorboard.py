"""TensorBoard: `tensorboard --logdir outputs` shows every run below `outputs`. The package is an extra."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from equipoise.eval.report.markdown import escaped
from equipoise.eval.report.tables import Cell, Table
from equipoise.train.tracking.dashboard import Run


class TensorBoard:
    """Event files in the run's `tensorboard/`; nothing leaves the machine."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an extra

        self._writer = SummaryWriter(str(run.folder / "tensorboard"))
        self._text("recipe", yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True), 0)

    def log(self, values: Mapping[str, float | int | str], step: int, axis: str) -> None:
        """See `Dashboard`."""
        for name, value in values.items():
            if isinstance(value, str):
                self._text(name, value, step)
            else:
                self._writer.add_scalar(name, value, step)

    def log_evaluation(self, table: Table, plots: str, number: int) -> None:
        """See `Dashboard`. TensorBoard has no place for a page; `eval/<label>/report.html` has the plots."""
        lines = [table.columns, ("---",) * len(table.columns), *table.rows]
        text = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
        self._writer.add_text("eval_categories/table", text, number)
        self._writer.flush()

    def log_promoted(self, folder: Path, aliases: Sequence[str], verdict: Mapping[str, Any]) -> None:
        """See `Dashboard`. TensorBoard keeps no files: it says which folder was promoted, and why."""
        self._text(
            "promoted", json.dumps({"folder": str(folder), "aliases": list(aliases), **verdict}, indent=1), 0
        )

    def finish(self, exit_code: int, summary: Mapping[str, Any]) -> None:
        """See `Dashboard`."""
        self._text("summary", json.dumps({"exit_code": exit_code, **summary}, indent=1), 0)
        self._writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        """Shown as it is: TensorBoard reads markdown, in which what is indented is code."""
        self._writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)


def _cell(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else escaped(str(cell))
