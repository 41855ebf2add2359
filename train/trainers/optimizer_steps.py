"""What ours add to TRL's and transformers' trainers: metrics and state that move once an optimizer step."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from equipoise.data.files import write_aside
from equipoise.train.checkpoints import STATE_FILE, save_checkpoint
from equipoise.train.diagnostics.non_finite import stop_non_finite
from equipoise.train.sharding import keep_fp32_outputs
from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.trainers.step_table import StepTable


class AtBeginning(TrainerCallback):
    """Calls a function when the engine has the model and before the first step; a resumed run's weights are loaded."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the trainer."""
        self._function()


class OptimizerSteps(Trainer):
    """A trainer that calls `_finish_step` at the end of each optimizer step and saves its own state with a checkpoint.

    A loss or a gradient that is not finite on any rank ends the training of all of them with the same TrainingError,
    before the optimizer steps (DeepSpeed's has stepped by then; nothing is saved). Stands before the trainer that it
    extends: `class SupervisedTrainer(OptimizerSteps, SFTTrainer)`.
    """

    terms: CategoryTerms
    category_names: Sequence[str]
    """Behind the column `category` of the table."""
    examples: str = "answers"
    """What metrics call what a batch consists of."""
    loss_column: str = "loss"
    """Of the table: not finite where an example's own loss is not."""
    _table: StepTable
    _loss_is_finite: Tensor | None = None
    """Over the step's microbatches on this rank."""
    steps_between_checkpoints: int = 1
    """Behind every so many steps nothing is pending that a checkpoint does not hold."""
    belongs_to: Mapping[str, object]
    """For the manifests of checkpoints."""
    _saving_in: Path | None = None
    """Where a checkpoint's folder is put while it is written."""

    def create_accelerator_and_postprocess(self) -> None:
        """Transformers', with the precision that losses are computed in."""
        super().create_accelerator_and_postprocess()
        keep_fp32_outputs(self.accelerator)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One microbatch; at the end of an optimizer step the category state moves and metrics are written."""
        loss = super().training_step(*args, **kwargs)
        finite = loss.isfinite()
        self._loss_is_finite = finite if self._loss_is_finite is None else self._loss_is_finite & finite
        if self.accelerator.sync_gradients:
            bad = (~self._loss_is_finite).float()
            self._loss_is_finite = None
            if bool(
                self.accelerator.reduce(bad, reduction="sum") > 0
            ):  # looked at once a step: a GPU has to wait
                self._stop_non_finite("the loss", self._table.gather(self.accelerator))
            self._finish_step()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The step's norm, the same on all ranks; one that is not finite would leave weights that are not either."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if norm is not None and not math.isfinite(float(norm)):
            self._stop_non_finite("the gradient", self._table.last)
        return norm

    def _stop_non_finite(self, what: str, table: Mapping[str, Tensor]) -> NoReturn:
        """Raise TrainingError with the examples of `table` written; collective."""
        rows = self._described(table["slot"].long().tolist())
        for i, row in enumerate(rows):
            row["category"] = self.category_names[int(table["category"][i])]
            row["finite"] = bool(table[self.loss_column][i].isfinite())
            row |= {name: repr(float(column[i])) for name, column in table.items() if name not in row}
        stop_non_finite(what, Path(self.args.output_dir), self.state.global_step + 1, rows)

    def _described(self, slots: Sequence[int]) -> list[dict[str, Any]]:
        """`id` and texts of the examples in these slots, the same on all ranks; collective."""
        rows = [self.train_dataset[slot] for slot in slots]
        return [
            {
                "id": self._id_of(row),
                **{
                    name.removesuffix("_ids"): self.processing_class.decode(ids)
                    for name, ids in row.items()
                    if name.endswith("_ids")
                },
            }
            for row in rows
        ]

    def _id_of(self, row: Mapping[str, Any]) -> str:
        """The id in the user's data of a row of the training set."""
        raise NotImplementedError

    def _finish_step(self) -> None:
        """Gather what the step's microbatches kept, move the category state, write metrics; collective."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights and optimizer, for JSON."""
        return self.terms.state_dict()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: with every checkpoint TRL writes one, about a model called `checkpoints`, its tags in any order."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """A checkpoint with our state in it, whole or not at all."""
        save = super()._save_checkpoint

        def write(folder: Path) -> None:
            self._saving_in = folder.parent
            try:
                save(model, trial)
            finally:
                self._saving_in = None
            if self.accelerator.is_main_process:
                write_aside(folder / STATE_FILE, json.dumps(self.state_dict()) + "\n")

        save_checkpoint(Path(self.args.output_dir), self.state.global_step, self.belongs_to, write)

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers puts `checkpoint-<step>`."""
        return super()._get_output_dir(trial) if self._saving_in is None else str(self._saving_in)
