"""Train a scorer on pairs: transformers' Trainer with our batches, losses and exact per-category metrics.

Both answers of a pair are scored in one row behind one prompt (`pairs.py`), each at its last token. A chosen answer is
the preferred one of a reward model, and the less harmful one of a cost model.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.training_args import TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from equipoise.eval.scorer import Scorer
from equipoise.train.losses.cost import cost_loss, reward_loss
from equipoise.train.pairs import PairCollator, model_inputs
from equipoise.train.recipe.stages import CostModelStageConfig, ScorerStageConfig
from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.trainers.optimizer_steps import OptimizerSteps
from equipoise.train.trainers.step_table import StepTable, mean_by_category
from equipoise.train.training import TrainingError

LABELS = ("chosen_sign", "rejected_sign", "ordered")
"""Columns of a cost model's rows: +1 for an unsafe answer, -1 for a safe one; 1 where one is the more harmful."""
COLUMNS = ("slot", "category", "loss", "h", "chosen_score", "rejected_score", *LABELS)
"""What is kept of every pair until the step is logged; h is the difference of scores in the right order."""


class ScorePairCollator(PairCollator):
    """`PairCollator`, with a cost model's labels (B,)."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate; see `PairCollator`."""
        batch = super().__call__(examples)
        for name in LABELS:
            batch[name] = torch.tensor([float(example[name]) for example in examples])
        return batch


class ScorerTrainer(OptimizerSteps):
    """See the module. `dataset` holds the pairs in training order, one row a draw; `held_out` those not trained on."""

    examples = "pairs"

    def __init__(
        self,
        *,
        model: Scorer,
        args: TrainingArguments,
        dataset: Dataset,
        held_out: Dataset | None,
        category_names: Sequence[str],
        pair_ids: Sequence[str],
        stage: ScorerStageConfig,
        terms: CategoryTerms,
        collator: ScorePairCollator,
        log: Callable[[Mapping[str, float], int], None],
        progress: Callable[[int, int, str], None],
        **kwargs: Any,
    ) -> None:
        """category_names: behind the column `category_index`; pair_ids: behind `pair`."""
        self.stage, self.terms, self.held_out = stage, terms, held_out
        self.category_names, self.pair_ids = tuple(category_names), tuple(pair_ids)
        self._log_metrics, self._progress = log, progress
        self._table = StepTable(COLUMNS)
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collator, **kwargs)

    # ---- loss -------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Tensor:
        """Scalar loss of a microbatch; the pairs' values are kept for the step's metrics."""
        assert not return_outputs
        chosen, rejected = self._scores(model, inputs)
        category = inputs["category_index"]
        loss, difference = self.pair_loss(chosen, rejected, inputs)
        labels = [inputs[name] for name in LABELS]
        self._table.keep(inputs["slot"], category, loss, difference, chosen, rejected, *labels)
        _, _, weight = self.terms.per_pair(category, 1.0)
        return (weight * loss).mean()

    def pair_loss(
        self, chosen: Tensor, rejected: Tensor, labels: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(loss (B,), the difference of scores that should be above 0 (B,)) of end scores (B,)."""
        mu = self.stage.regularization
        if isinstance(self.stage, CostModelStageConfig):
            signs = labels["rejected_sign"], labels["chosen_sign"]
            loss = cost_loss(rejected, chosen, *signs, ordered=labels["ordered"], regularization=mu)
            return loss, rejected - chosen
        return reward_loss(chosen, rejected, regularization=mu), chosen - rejected

    def _scores(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """End scores of the chosen and of the rejected answers, (B,) each, fp32."""
        layout = model_inputs(batch)
        inputs = {
            name: layout[name] for name in ("input_ids", "attention_mask", "position_ids") if name in layout
        }
        ends = model(**inputs, end_index=batch["end_index"]).end_scores
        return ends[0::2], ends[1::2]

    def _id_of(self, row: Mapping[str, Any]) -> str:
        return self.pair_ids[row["pair"]]

    # ---- metrics ----------------------------------------------------------------------------------------------

    def _finish_step(self) -> None:
        step = self.state.global_step + 1
        table = self._table.gather(self.accelerator)
        self.terms.observe(table)
        if step % self.stage.log_every == 0:
            metrics = self.metrics_of(table, "train")
            metrics["train/learning_rate"] = self._get_learning_rate()
            self._log_metrics(metrics | self.terms.metrics(), step)

    def evaluate_held_out(self, step: int) -> dict[str, Tensor]:
        """Score the held-out pairs and log `held_out/...`; returns their table by column.

        Collective: every rank has to call it.
        """
        assert self.held_out is not None
        table = self.score_pairs(self.held_out, "scores of held-out pairs")
        self._log_metrics(self.metrics_of(table, "held_out"), step)
        return table

    def metrics_of(self, table: Mapping[str, Tensor], prefix: str) -> dict[str, float]:
        """Means over the table's pairs, overall and a category, each rate with its count."""
        names, category = self.category_names, table["category"]
        columns = {
            "loss": table["loss"],
            "chosen_score": table["chosen_score"],
            "rejected_score": table["rejected_score"],
        }
        metrics: dict[str, float] = {f"{prefix}/num_pairs": len(category)}
        for i, name in enumerate(names):
            if num := int((category == i).sum()):
                metrics[f"{prefix}/num_pairs/{name}"] = num
        for key, values in columns.items():
            metrics[f"{prefix}/{key}"] = float(values.mean())
            metrics |= mean_by_category(f"{prefix}/{key}", values, category, names)
        for rate, (right, of) in self.outcomes(table).items():
            if len(right):
                metrics[f"{prefix}/{rate}"] = float(right.mean())
            metrics |= mean_by_category(f"{prefix}/{rate}", right, of, names)
        return metrics

    def outcomes(self, table: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Rate -> (1 where right else 0, category), one entry a decision; a score of 0 and a tie are wrong.

        accuracy: of each pair with an order, whether its answers' scores have it. sign_accuracy (cost models): of each
        answer, whether its cost is above 0 if it is unsafe and below if it is safe.
        """
        ordered = table["ordered"] > 0
        found = {"accuracy": ((table["h"][ordered] > 0).double(), table["category"][ordered])}
        if isinstance(self.stage, CostModelStageConfig):
            right = [
                table[f"{answer}_sign"] * table[f"{answer}_score"] > 0 for answer in ("chosen", "rejected")
            ]
            found["sign_accuracy"] = (torch.cat(right).double(), table["category"].repeat(2))
        return found

    @torch.no_grad()
    def score_pairs(self, dataset: Dataset, what: str) -> dict[str, Tensor]:
        """The table of every pair of a dataset, (n,) fp64 by column, on CPU; each rank scores its share.

        Collective: every rank has to call it.
        """
        accelerator, size = self.accelerator, self.args.per_device_train_batch_size
        rank, world = accelerator.process_index, accelerator.num_processes
        lengths = [len(r["prompt_ids"]) + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in dataset]
        order = sorted(range(len(dataset)), key=lengths.__getitem__)  # alike lengths: little padding
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        num_rounds = math.ceil(len(batches) / world)
        table = StepTable(COLUMNS)
        was_training = self.model.training
        self.model_wrapped.eval()
        # A rank without a batch of its own repeats the last one, so that all call forward equally often (ZeRO-3); the
        # table keeps each pair once.
        for i in range(num_rounds):
            rows = batches[min(i * world + rank, len(batches) - 1)]
            batch = self._prepare_inputs(self.data_collator([dataset[row] for row in rows]))
            with self.compute_loss_context_manager():
                chosen, rejected = self._scores(self.model_wrapped, batch)
            loss, difference = self.pair_loss(chosen, rejected, batch)
            slot = torch.tensor(rows, device=chosen.device)
            labels = [batch[name] for name in LABELS]
            table.keep(slot, batch["category_index"], loss, difference, chosen, rejected, *labels)
            self._progress(i + 1, num_rounds, what)
        self.model_wrapped.train(was_training)
        return table.gather(accelerator)

    # ---- checkpoints ------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A checkpoint holds what is trained (adapter and head, or all of it); the rest is where it was."""
        if not self.args.should_save:
            return
        state = self.model.state_dict() if state_dict is None else state_dict
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: state[name].contiguous() for name in trained}, folder / SAFE_WEIGHTS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        state = load_file(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME)
        unexpected = self.model.load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            raise TrainingError(
                f"{resume_from_checkpoint} was written by another model (it has {unexpected[0]}, which this one has "
                "not); remove the folder to start the stage anew"
            )
