"""What ours add to TRL's and transformers' trainers: metrics and state that move once an optimizer step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from equipoise.data.files import write_aside
from equipoise.train.checkpoints import STATE_FILE, save_checkpoint
from equipoise.train.trainers.category_terms import CategoryTerms


class OptimizerSteps(Trainer):
    """A trainer that calls `_finish_step` at the end of each optimizer step and saves its own state with a checkpoint.

    Stands before the trainer that it extends: `class SupervisedTrainer(OptimizerSteps, SFTTrainer)`.
    """

    terms: CategoryTerms
    belongs_to: Mapping[str, object]
    """For the manifests of checkpoints."""
    _saving_in: Path | None = None
    """Where a checkpoint's folder is put while it is written."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One microbatch; at the end of an optimizer step the category state moves and metrics are written."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._finish_step()
        return loss

    def _finish_step(self) -> None:
        """Gather what the step's microbatches kept, move the category state, write metrics; collective."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights and optimizer, for JSON."""
        return self.terms.state_dict()

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
