"""A loss or a gradient that is not finite ends the training, with the step's examples written for whoever looks."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from accelerate import PartialState

from equipoise.data.files import write_aside
from equipoise.train.checkpoints import checkpoints
from equipoise.train.training import TrainingError

NAMED = 8
"""Examples that the message names; the file has all of them."""


def stop_non_finite(what: str, folder: Path, step: int, rows: Sequence[Mapping[str, object]]) -> NoReturn:
    """Write the step's examples beside the checkpoints, raise TrainingError, which names what there is to know.

    what: is not finite, as "the loss". folder: the stage's checkpoints. step: the optimizer step at work, from 1. rows:
    each with `id`, `category`, `finite` (whether its own values are) and whatever else is known, as texts; the same on
    all ranks, of which the first writes.
    """
    stage = folder.parent
    bad = [row for row in rows if not row["finite"]] or list(rows)
    path = stage / f"non_finite_step{step}.jsonl"
    if PartialState().is_main_process:
        stage.mkdir(parents=True, exist_ok=True)
        write_aside(path, "".join(json.dumps(row) + "\n" for row in rows))
        write_aside(path.with_suffix(".ids"), "".join(f"{row['id']}\n" for row in bad))
    ids = ", ".join(str(row["id"]) for row in bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
    categories = ", ".join(sorted({str(row["category"]) for row in bad}))
    saved = checkpoints(folder)
    last = (
        f"The last checkpoint is {saved[0]}: the same command goes on from it."
        if saved
        else "There is no checkpoint (stages.<stage>.save_every): the same command starts the stage anew."
    )
    raise TrainingError(
        f"stage {stage.name}, step {step}: {what} is not finite, of {len(bad)} of {len(rows)} examples (categories "
        f"{categories}): {ids}. The step's examples are in {path}, these ids in {path.with_suffix('.ids').name}. "
        f"{last} It will meet the same step: look at the examples, or give the run another name with a lower "
        "learning_rate or max_grad_norm, or with model.dtype=float32."
    )
