"""What ours add to TRL's and transformers' trainers: metrics and state that move once an optimizer step."""

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.training import save_state


class OptimizerSteps(Trainer):
    """A trainer that calls `_finish_step` at the end of each optimizer step and saves its own state with a checkpoint.

    Stands before the trainer that it extends: `class SupervisedTrainer(OptimizerSteps, SFTTrainer)`.
    """

    terms: CategoryTerms

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
        super()._save_checkpoint(model, trial)
        save_state(self, self.state_dict())
