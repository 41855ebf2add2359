"""TRL's SFTTrainer with our batches, category weights, a KL penalty and exact per-category metrics.

Kept from TRL: adapters, checkpoints, accelerate and DeepSpeed, and the loss of a step: the sum over the answers' tokens
of all microbatches and ranks, divided by their number. Written anew: data preparation (short answers share a row), the
forward (only answer tokens meet the LM head), the metrics (sums and counts a category, over all ranks).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from equipoise.train.answers import AnswerCollator, BenignAnswers
from equipoise.train.pairs import answer_sums, model_inputs
from equipoise.train.recipe.stages import SFTStageConfig
from equipoise.train.sharding import prepared_reference
from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.trainers.completion_head import add_completion_head
from equipoise.train.trainers.kl_penalty import KLPenalty, Reference
from equipoise.train.trainers.optimizer_steps import OptimizerSteps
from equipoise.train.trainers.step_table import StepTable

COLUMNS = ("slot", "category", "nll", "num_tokens", "kl")
"""What is kept of every answer until the step is logged; nll is summed over its tokens."""


class SupervisedTrainer(OptimizerSteps, SFTTrainer):
    """See the module. `dataset` holds the answers in training order, one row a draw (see `answers.encode_chosen`)."""

    loss_column = "nll"
    loss_is_scaled_for_ga = True
    """Said to transformers: `compute_loss` divides by the step's tokens, not by the microbatch's."""

    def __init__(
        self,
        *,
        model: nn.Module,
        ref_model: nn.Module | None,
        args: SFTConfig,
        dataset: Dataset,
        category_names: Sequence[str],
        ids: Sequence[str],
        stage: SFTStageConfig,
        terms: CategoryTerms,
        benign: BenignAnswers | None,
        share_rows: bool = True,
        log: Callable[[Mapping[str, float], int], None],
        **kwargs: Any,
    ) -> None:
        """share_rows: short answers stand behind one another in a row; only for models that take a 4-D mask."""
        self.stage, self.terms, self._log_metrics = stage, terms, log
        self.category_names, self.ids = tuple(category_names), tuple(ids)
        self._table = StepTable(COLUMNS)
        self._benign_kl: Tensor | None = None
        """The step's KL on benign answers on this rank; None on a step without one."""
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=AnswerCollator(kwargs["processing_class"].pad_token_id, share_rows),
            **kwargs,
        )
        self.ref_model = prepared_reference(self, ref_model)
        self._kl_penalty = KLPenalty(stage.kl, category_names, Reference(self), benign)
        for module in (self.model, self.ref_model):
            if module is not None:
                add_completion_head(self.accelerator.unwrap_model(module))

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Answers come tokenised (`answers.encode_chosen`)."""
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Answer tokens of the optimizer step: all microbatches, all ranks."""
        num = torch.stack([batch["lengths"].sum() for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(num).sum()

    # ---- loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Scalar: sum over the microbatch of w_c * nll, divided by the step's tokens; plus its share of the KL penalty.

        Without weights and penalty it is TRL's loss of the same step. num_items_in_batch None: the microbatch is the
        step.
        """
        if return_outputs:
            raise NotImplementedError("the completion forward has no full logits to return")
        outputs = model(**model_inputs(inputs))
        nll = -answer_sums(outputs.log_probs, inputs)
        num_tokens = inputs["lengths"].sum() if num_items_in_batch is None else num_items_in_batch
        category = inputs["category_index"]
        _, _, weight = self.terms.per_pair(category, 1.0)
        # DDP averages gradients over the ranks; the tokens are those of all of them.
        loss = (weight * nll).sum() / num_tokens * self.accelerator.num_processes
        steps = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        kl = torch.zeros_like(nll)
        kappa = self._kl_penalty.kappa(category)
        if kappa is not None:
            kl = self._kl_penalty.of_answers(model, inputs, outputs)
            loss = loss + (kappa * kl).mean() / steps
        if self._kl_penalty.on_benign and not len(self._table):  # in the step's first microbatch
            benign_kl = self._kl_penalty.of_benign(model, self, share_rows=self.data_collator.share_rows)
            self._benign_kl = benign_kl.detach()
            loss = loss + self.stage.kl.coef * benign_kl
        self._table.keep(inputs["slot"], category, nll, inputs["lengths"], kl)
        return loss

    def _id_of(self, row: Mapping[str, Any]) -> str:
        return self.ids[row["example"]]

    # ---- metrics and category state -----------------------------------------------------------------------------

    def _finish_step(self) -> None:
        step = self.state.global_step + 1
        table = self._table.gather(self.accelerator)
        self.terms.observe_losses(table["category"], table["nll"], table["num_tokens"])
        if step % self.stage.log_every == 0:
            self._log_metrics(self._metrics_of(table), step)
        self._benign_kl = None

    def _metrics_of(self, table: dict[str, Tensor]) -> dict[str, float]:
        """Losses are nats a token: sums over tokens divided by their number, whatever the answers' lengths."""
        metrics: dict[str, float] = {
            "train/loss": float(table["nll"].sum() / table["num_tokens"].sum()),
            "train/num_answers": len(table["nll"]),
            "train/num_tokens": float(table["num_tokens"].sum()),
            "train/learning_rate": self._get_learning_rate(),
        }
        if self._benign_kl is not None:  # on all ranks or on none; each has answers of its own
            metrics["train/kl"] = float(self.accelerator.reduce(self._benign_kl, reduction="mean"))
        elif self.stage.kl.active:
            metrics["train/kl"] = float(table["kl"].mean())
        for i, name in enumerate(self.category_names):
            of = table["category"] == i
            if not bool(of.any()):
                continue
            loss_sum, num_tokens = float(table["nll"][of].sum()), float(table["num_tokens"][of].sum())
            metrics[f"train/num_answers/{name}"] = int(of.sum())
            metrics[f"train/num_tokens/{name}"] = num_tokens
            metrics[f"train/loss_sum/{name}"] = loss_sum
            metrics[f"train/loss/{name}"] = loss_sum / num_tokens
            if self.stage.kl.active and self._benign_kl is None:
                metrics[f"train/kl/{name}"] = float(table["kl"][of].mean())
        return metrics | self.terms.metrics()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Ours is `_finish_step`; TRL's averages of batch means are not wanted."""
        self._metrics["train"].clear()
