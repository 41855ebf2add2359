"""What is not finite (a loss, a gradient, logits to sample from) ends the training; the step's examples are written."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

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


def stop_unsampled(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    tokenizer: PreTrainedTokenizerBase,
    sampled: Iterable[tuple[int, str, list[int], list[int] | None]],
) -> None:
    """Stop where a policy had no distribution to sample an answer from, on any rank; collective.

    sampled: (number, category, prompt ids, answer ids or None) of this rank's answers. Before they are rewarded: what
    is drawn of nan is a token like any other, and a loss that leaves out cut-off answers would not notice. The rest as
    `stop_non_finite`.
    """
    sampled = list(sampled)
    bad = torch.tensor([any(answer is None for *_, answer in sampled)], device=accelerator.device)
    if not bool(accelerator.gather(bad).any()):
        return
    rows = [
        {
            "id": f"answer {number}",
            "category": category,
            "finite": answer is not None,
            "prompt": tokenizer.decode(prompt),
            "answer": None if answer is None else tokenizer.decode(answer),
        }
        for number, category, prompt, answer in sampled
    ]
    stop_non_finite("the distribution to sample from", folder, step, gather_object(rows))
