"""TRL's DPOTrainer with our batches, our losses and exact per-category metrics.

Kept from TRL: adapters, reference handling, checkpoints, accelerate and DeepSpeed. Written anew: data preparation
(one row a pair), the loss (category terms, KL, token bias), the cached reference log-probabilities, the metrics
(sums and counts a category, over all ranks, padding duplicates dropped).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer
from trl.trainer import dpo_trainer

from equipoise.train import reference_cache
from equipoise.train.answers import BenignAnswers
from equipoise.train.locks import made_once
from equipoise.train.losses.preference import PairLogps, mixed_loss, sft_loss
from equipoise.train.pairs import (
    PairCollator,
    dataset_key,
    model_inputs,
    sum_by_sequence,
)
from equipoise.train.recipe.stages import LogRatioStageConfig, PreferenceStageConfig
from equipoise.train.sharding import own_reference
from equipoise.train.trainers.category_terms import TIE, CategoryTerms
from equipoise.train.trainers.completion_head import add_completion_head
from equipoise.train.trainers.kl_penalty import KLPenalty, Reference
from equipoise.train.trainers.optimizer_steps import AtBeginning, OptimizerSteps
from equipoise.train.trainers.random_contexts import RandomContexts
from equipoise.train.trainers.step_table import StepTable
from equipoise.train.training import TrainingError


class PreferenceTrainer(OptimizerSteps, DPOTrainer):
    """See the module. `dataset` holds the pairs in training order, one row a draw (see `sampling.order_pairs`)."""

    examples = "pairs"
    """What metrics call the examples."""
    columns: tuple[str, ...] = (
        "slot",
        "category",
        "loss",
        "h",
        "chosen_log_ratio",
        "rejected_log_ratio",
        "kl",
    )
    """What is kept of every example until the step is logged."""
    log_ratios: tuple[str, ...] = ("chosen_log_ratio",)
    """Columns whose mean in each category is logged; nan: not of this example."""

    def __init__(
        self,
        *,
        model: nn.Module,
        ref_model: nn.Module | None,
        args: DPOConfig,
        dataset: Dataset,
        category_names: Sequence[str],
        pair_ids: Sequence[str],
        stage: LogRatioStageConfig,
        terms: CategoryTerms,
        contexts: RandomContexts | None,
        benign: BenignAnswers | None = None,
        reference_key: str | None = None,
        share_rows: bool = True,
        log: Callable[[Mapping[str, float], int], None],
        progress: Callable[[int, int, str], None] | None = None,
        **kwargs: Any,
    ) -> None:
        """reference_key: names the reference's weights in the cache of its log-probabilities; None: not cached.

        share_rows: pairs of one row, short ones several in a row; only for models that take a 4-D mask.
        """
        self.stage, self.terms, self.contexts = stage, terms, contexts
        self.category_names, self.pair_ids = tuple(category_names), tuple(pair_ids)
        self._log_metrics, self._reference_progress = log, progress
        self._table = StepTable(self.columns)
        self._num_chosen_tokens: Tensor | None = None
        """Of the step, over all ranks; None where nothing is divided by it."""
        self._shift: Tensor | None = None
        """The step's token-bias penalty on this rank; None on a step without one."""
        self.reference_cache_hit = False
        self._reference_key = reference_key
        self._reference_sums: tuple[Tensor, Tensor] | None = None
        """The reference's log-probabilities of chosen and rejected answers, by pair."""
        self._frozen: str | None = None
        """Fingerprint of the weights in memory that are the reference's, where there are such."""
        self._reference = Reference(self)
        self._kl_penalty = KLPenalty(stage.kl, category_names, self._reference, benign)
        self._benign_kl: Tensor | None = None
        """The step's KL on benign answers on this rank; None on a step without one."""
        with own_reference(dpo_trainer, ref_model):
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                train_dataset=dataset,
                data_collator=PairCollator(kwargs["processing_class"].pad_token_id, two_rows=not share_rows),
                **kwargs,
            )
        for module in (self.model, self.ref_model):
            if module is not None:
                add_completion_head(self.accelerator.unwrap_model(module))
        self.add_callback(AtBeginning(self.load_reference))

    # ---- data -------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Pairs come tokenised (`pairs.encode_pairs`)."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Called before an engine has placed and sharded the model: too early, see `load_reference`."""
        return dataset

    def load_reference(self) -> None:
        """The reference's log-probabilities, from the cache or from the model as the engine has it. Collective.

        Raises TrainingError where the reference is no more: trained over, and not in the cache.
        """
        if self._reference_in_memory is not None:
            self._frozen = reference_cache.frozen_fingerprint(self._reference_in_memory)
        dataset = self.train_dataset
        unique = dataset.select(_first_rows(dataset["pair"]))
        path = None
        if self._reference_key is not None:
            model = self.accelerator.unwrap_model(self.model if self.ref_model is None else self.ref_model)
            dtype = f"{model.dtype}".removeprefix("torch.") + ("-autocast" if self.args.bf16 else "")
            path = reference_cache.cache_file(self._reference_key, dataset_key(unique), dtype)
        with made_once(path, "compute the reference's log-probabilities"):
            sums = self._found_or_computed(unique, path)
        pairs = torch.tensor(unique["pair"])
        by_pair = torch.full((2, int(pairs.max()) + 1), torch.nan)
        by_pair[:, pairs] = torch.stack(sums)
        chosen, rejected = by_pair.to(self.accelerator.device)
        self._reference_sums = chosen, rejected

    def _found_or_computed(self, dataset: Dataset, path: Path | None) -> tuple[Tensor, Tensor]:
        """(chosen (n,), rejected (n,)): from `path` where every rank finds them, else computed and saved there."""
        cached = None if path is None else reference_cache.load(path, len(dataset))
        # Ranks have to agree: the file may be on one machine only.
        found = torch.tensor([cached is not None], device=self.accelerator.device)
        self.reference_cache_hit = bool(self.accelerator.gather(found).all())
        if cached is not None and self.reference_cache_hit:
            return cached
        if self.state.global_step and self._reference_in_memory is None:
            raise TrainingError(
                f"the reference's log-probabilities are not in the cache any more ({path}), and its weights have been "
                f"trained; remove {self.args.output_dir} to start the stage anew"
            )
        computed = self._reference_logps(dataset, self.args.per_device_train_batch_size)
        if path is not None and self.accelerator.is_main_process:
            reference_cache.save(path, *computed)
        return computed

    def check_reference(self) -> None:
        """The reference's weights are those that training began with."""
        if self._reference_in_memory is not None:
            now = reference_cache.frozen_fingerprint(self._reference_in_memory)
            assert now == self._frozen, "the reference's weights changed during training"

    @property
    def _reference_in_memory(self) -> nn.Module | None:
        """The frozen copy, or the policy with an adapter; None: the policy is trained whole, without a copy."""
        if self.ref_model is not None:
            return self.accelerator.unwrap_model(self.ref_model)
        policy = self.accelerator.unwrap_model(self.model)
        return policy if isinstance(policy, PeftModel) else None

    def _reference_logps(self, dataset: Dataset, batch_size: int) -> tuple[Tensor, Tensor]:
        """(chosen (n,), rejected (n,)) on CPU, each rank its share, all ranks all of it."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        lengths = [
            len(p) + len(c) + len(r)
            for p, c, r in zip(
                dataset["prompt_ids"], dataset["chosen_ids"], dataset["rejected_ids"], strict=True
            )
        ]
        order = sorted(range(len(dataset)), key=lengths.__getitem__)  # alike lengths: little padding
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        chosen, rejected = torch.zeros(len(dataset)), torch.zeros(len(dataset))
        reference = self.ref_model if self.ref_model is not None else self.model_wrapped
        was_training = reference.training
        reference.eval()
        # A rank without a batch of its own repeats one, so that all ranks call forward equally often (ZeRO-3).
        for i in range(math.ceil(len(batches) / world)):
            number = i * world + rank
            rows = batches[min(number, len(batches) - 1)]
            batch = self._to_device(self.data_collator([dataset[r] for r in rows]))
            with self.compute_loss_context_manager():
                log_probs = self._reference.outputs(self.model_wrapped, model_inputs(batch)).log_probs
            if number < len(batches):
                sums = sum_by_sequence(log_probs, batch)
                chosen[rows], rejected[rows] = sums[0].cpu(), sums[1].cpu()
            if self._reference_progress:
                self._reference_progress(
                    i + 1, math.ceil(len(batches) / world), "reference log-probabilities"
                )
        reference.train(was_training)
        if world > 1:
            both = torch.stack([chosen, rejected]).to(self.accelerator.device)
            chosen, rejected = self.accelerator.reduce(both, reduction="sum").cpu()
        return chosen, rejected

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.accelerator.device) for k, v in batch.items()}

    # ---- loss -------------------------------------------------------------------------------------------------

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """Scalar loss of a microbatch; the pairs' values are kept for the step's metrics."""
        if return_outputs:
            raise NotImplementedError("the completion forward has no full logits to return")
        outputs = model(**model_inputs(inputs))
        chosen, rejected = sum_by_sequence(outputs.log_probs, inputs)
        assert self._reference_sums is not None
        ref_chosen, ref_rejected = (sums[inputs["pair"]] for sums in self._reference_sums)
        logps = PairLogps(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            inputs["chosen_lengths"],
            inputs["rejected_lengths"],
        )
        per_pair, loss = self._log_ratio_loss(inputs, logps)
        kl = torch.zeros_like(per_pair)
        kappa = self._kappa(inputs)
        if kappa is not None:
            kl = self._kl_penalty.of_answers(model, inputs, outputs, every=2)  # of the chosen ones
            loss = loss + (kappa * kl).mean()
        if self._kl_penalty.on_benign and not len(self._table):  # the first microbatch of the step
            benign_kl = self._kl_penalty.of_benign(model, self, share_rows=not self.data_collator.two_rows)
            self._benign_kl = benign_kl.detach()
            # Taken in one of n microbatches, it counts n times.
            loss = loss + self.stage.kl.coef * self.current_gradient_accumulation_steps * benign_kl
        penalised = self.contexts is not None and self.state.global_step % self.stage.token_bias.every == 0
        if penalised and not len(self._table):  # the first microbatch of the step
            shift = self._token_bias(model)
            self._shift = shift.detach()
            # Taken every k steps and in one of n microbatches, it counts k * n times: `coef` means the same for any.
            times = self.stage.token_bias.every * self.current_gradient_accumulation_steps
            loss = loss + self.stage.token_bias.coef * times * shift
        self._table.keep(*self._values(inputs, per_pair, logps, kl))
        return loss

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Transformers'; keeps the chosen tokens of the step, all microbatches and ranks, for the SFT term."""
        if isinstance(self.stage, PreferenceStageConfig) and self.stage.loss.sft_coef:
            num = torch.stack([batch["chosen_lengths"].sum() for batch in batch_samples]).sum().to(device)
            self._num_chosen_tokens = self.accelerator.gather(num).sum()
        return super()._get_num_items_in_batch(batch_samples, device)

    def _log_ratio_loss(self, inputs: dict[str, Any], logps: PairLogps) -> tuple[Tensor, Tensor]:
        """(each pair's loss (B,), their term of the microbatch's loss, scalar)."""
        assert isinstance(self.stage, PreferenceStageConfig)
        config = self.stage.loss
        if config.weights.get("safedpo"):
            logps = replace(logps, safety_offset=config.delta * inputs["unsafe_gap"])
        beta, margin, weight = self.terms.per_pair(inputs["category_index"], self.stage.beta / self.stage.lam)
        per_pair = mixed_loss(
            config.weights,
            logps,
            beta,
            margin=margin,
            label_smoothing=config.label_smoothing,
            length_normalised=config.length_normalised,
        )
        loss = (weight * per_pair).mean()
        if config.sft_coef:
            sft = sft_loss(logps, self._num_chosen_tokens)
            if (
                self._num_chosen_tokens is not None
            ):  # the sum over microbatches and ranks, which are then averaged over
                sft = sft * self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss + config.sft_coef * sft
        return per_pair, loss

    def _kappa(self, inputs: dict[str, Any]) -> Tensor | None:
        """Each example's coefficient of the KL penalty (B,), or None where no example of the stage is penalised."""
        return self._kl_penalty.kappa(inputs["category_index"])

    def _token_bias(self, model: nn.Module) -> Tensor:
        """Mean over random contexts and answer positions of KL(pi_ref || pi): what is preferred unread, scalar."""
        assert self.contexts is not None
        inputs = self._to_device(self.contexts.draw(self.state.global_step, self.accelerator.process_index))
        ref_hidden = self._reference.outputs(model, inputs).hidden
        return self._reference.exact_kl(model(**inputs).hidden, ref_hidden, "reverse").mean()

    def _id_of(self, row: Mapping[str, Any]) -> str:
        return self.pair_ids[row["pair"]]

    # ---- metrics and category state -----------------------------------------------------------------------------

    def _values(
        self, inputs: dict[str, Any], loss: Tensor, logps: PairLogps, kl: Tensor
    ) -> tuple[Tensor, ...]:
        """A (B,) tensor for each of `columns`."""
        category = inputs["category_index"]
        return (
            inputs["slot"],
            category,
            loss,
            logps.h,
            logps.chosen_log_ratio,
            logps.rejected_log_ratio,
            kl,
        )

    def _finish_step(self) -> None:
        step = self.state.global_step + 1
        table = self._table.gather(self.accelerator)
        self.terms.observe(table)
        if step % self.stage.category.update_every == 0:
            self.terms.update_from_errors()
        if step % self.stage.log_every == 0:
            self._log_metrics(self._metrics_of(table), step)
        self._shift = self._benign_kl = None

    def _metrics_of(self, table: dict[str, Tensor]) -> dict[str, float]:
        metrics: dict[str, float] = {
            "train/loss": float(table["loss"].mean()),
            "train/accuracy": float((table["h"] > TIE).double().mean()),
            f"train/num_{self.examples}": len(table["loss"]),
            "train/learning_rate": self._get_learning_rate(),
        }
        columns = self.log_ratios
        if self._benign_kl is not None:  # on all ranks or on none; each has answers of its own
            metrics["train/kl"] = float(self.accelerator.reduce(self._benign_kl, reduction="mean"))
        elif self.stage.kl.active:
            columns = (*columns, "kl")
            if not bool(table["kl"].isnan().all()):
                metrics["train/kl"] = float(table["kl"].nanmean())
        if self._shift is not None:  # on all ranks or on none; each has contexts of its own
            metrics["train/token_bias"] = float(self.accelerator.reduce(self._shift, reduction="mean"))
        for i, name in enumerate(self.category_names):
            of = table["category"] == i
            num = int(of.sum())
            if not num:
                continue
            metrics[f"train/num_{self.examples}/{name}"] = num
            metrics[f"train/loss_sum/{name}"] = float(table["loss"][of].sum())
            metrics[f"train/loss/{name}"] = float(table["loss"][of].mean())
            metrics[f"train/h/{name}"] = float(table["h"][of].mean())
            metrics[f"train/accuracy/{name}"] = float((table["h"][of] > TIE).double().mean())
            for column in columns:
                if not bool(table[column][of].isnan().all()):
                    metrics[f"train/{column}/{name}"] = float(table[column][of].nanmean())
        metrics.update(self.terms.metrics())
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Ours is `_finish_step`; TRL's averages of batch means are not wanted."""
        self._metrics["train"].clear()


def _first_rows(pairs: Sequence[int]) -> list[int]:
    """Row of the first draw of every pair, by pair."""
    first: dict[int, int] = {}
    for row, pair in enumerate(pairs):
        first.setdefault(pair, row)
    return [first[pair] for pair in sorted(first)]
