"""TRL's GRPOTrainer with rewards normalised one by one, category terms and exact per-category metrics.

Kept from TRL: sampling (generate or vLLM), the clipped loss in all its types, the KL term, buffering, checkpoints.
Ours: the advantages (`losses/group_rewards.py`: equal rewards give exactly 0, a cost counts by its category's lambda),
rewards that are not finite, empty answers, and the metrics (sums over the tokens and answers of all ranks).
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer import grpo_trainer

from equipoise.train.diagnostics.non_finite import stop_unsampled
from equipoise.train.losses.group_rewards import group_advantages
from equipoise.train.losses.kl import k3
from equipoise.train.losses.lagrange import Multipliers
from equipoise.train.recipe.rl import GRPOStageConfig
from equipoise.train.rewards.verifiable import Reward, completion_text, outcomes
from equipoise.train.sharding import is_sharded, own_reference
from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.trainers.completion_head import add_completion_head, base_causal_lm, lm_head
from equipoise.train.trainers.grpo_metrics import ANSWER_COLUMNS, COST, OUTCOMES, TOKEN_COLUMNS, metrics_of
from equipoise.train.trainers.optimizer_steps import OptimizerSteps
from equipoise.train.trainers.rollout import GumbelSampling, up_to_end, weights_are_finite
from equipoise.train.trainers.shared_prompts import grouped, pays, sample_shared, shared_log_probs
from equipoise.train.trainers.step_table import StepTable

RewardFunction = Callable[..., list[Reward]]


class VerifiableTrainer(OptimizerSteps, GRPOTrainer):
    """See the module. `dataset`, in order of drawing: prompt, answer, unanswerable, category, category_index."""

    loss_column = "entropy_sum"

    def __init__(
        self,
        *,
        model: nn.Module,
        ref_model: nn.Module | None,
        args: GRPOConfig,
        dataset: Dataset,
        category_names: Sequence[str],
        rewards: Mapping[str, RewardFunction],
        stage: GRPOStageConfig,
        terms: CategoryTerms,
        multipliers: Multipliers | None,
        share_rows: bool,
        log: Callable[[Mapping[str, float], int], None],
        **kwargs: Any,
    ) -> None:
        """rewards: by name, those of `stage.rewards` and `cost` where there is a cost model (with its multipliers).

        share_rows: the answers of a group stand behind their prompt in one row; only for models that take a 4-D mask.
        """
        assert (COST in rewards) == (multipliers is not None)
        self.stage, self.terms, self.multipliers = stage, terms, multipliers
        self.category_names = tuple(category_names)
        self.reward_names = tuple(rewards)
        self._log_metrics = log
        self._not_finite: dict[str, list[bool]] = {}
        self._rewards = torch.empty(0)
        self._answers: dict[str, Tensor] = {}
        self._token_log_probs: tuple[Tensor, Tensor] | None = None
        self._sampled_categories: list[str] = []
        """Of the answers that are being sampled."""
        self._batches: list[Mapping[str, Any]] = []
        """Of the step at work."""
        self._step = 0
        self._table = StepTable((*ANSWER_COLUMNS, *self.reward_names, *TOKEN_COLUMNS))
        with own_reference(grpo_trainer, ref_model):
            super().__init__(
                model=model,
                args=args,
                train_dataset=dataset,
                reward_funcs=[self._finite(name, function) for name, function in rewards.items()],
                **kwargs,
            )
        self.steps_between_checkpoints = self.num_iterations  # then the answers have been used up
        add_completion_head(self.model)
        if self.ref_model is not None:
            add_completion_head(self.accelerator.unwrap_model(self.ref_model))
        soft_cap = lm_head(base_causal_lm(self.accelerator.unwrap_model(self.model))).softcap
        # Behind a soft cap a temperature is no scale of the logits; TRL then takes rows of their own.
        self._can_share = share_rows and (self.temperature == 1.0 or soft_cap is None)

    # ---- sampling and rewards ---------------------------------------------------------------------------------

    def _finite(self, name: str, function: RewardFunction) -> RewardFunction:
        """The function with nan and infinity replaced by None, and noted: one such reward would void its group."""

        def finite(**columns: Any) -> list[Reward]:
            values = function(**columns)
            self._not_finite[name] = [
                value is not None and not torch.isfinite(torch.tensor(value)).item() for value in values
            ]
            return [None if bad else value for value, bad in zip(values, self._not_finite[name], strict=True)]

        finite.__name__ = name
        return finite

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any
    ) -> tuple[list[list[int]], list[Any] | None]:
        """An answer without a token (a server may leave its end out) becomes its end token: it can be scored."""
        if not self.use_vllm:
            return self._sampled(prompt_ids, self._sample(prompt_ids)), None
        if not weights_are_finite(self.model, self.accelerator):  # before a server gets them
            self._sampled(prompt_ids, [None] * len(prompt_ids))
        completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        end = [self.eos_token_ids[0]]
        if logprobs is not None:
            # None: not known; TRL then takes the ratio to the sampler as 1.
            logprobs = [
                values if ids else [None] for ids, values in zip(completion_ids, logprobs, strict=True)
            ]
        return [ids or end for ids in completion_ids], logprobs

    def _sampled(
        self, prompt_ids: Sequence[list[int]], answers: Sequence[list[int] | None]
    ) -> list[list[int]]:
        """The answers, where there is one to every prompt on every rank; raises TrainingError. Collective."""
        first = self.accelerator.process_index * len(prompt_ids)
        numbers = range(first, first + len(prompt_ids))
        sampled = zip(numbers, self._sampled_categories, prompt_ids, answers, strict=True)
        folder, step = Path(self.args.output_dir), self.state.global_step + 1
        stop_unsampled(self.accelerator, folder, step, self._tokenizer, sampled)
        return [answer for answer in answers if answer is not None]

    def _sample(self, prompt_ids: list[list[int]]) -> list[list[int] | None]:
        """Answers by `generate`, the prompt encoded once a group where the model permits; each up to its end token.

        None where the policy had no distribution to sample from.

        Every answer has a random stream of its own, a function of seed, step and its number among all ranks' answers:
        the same answers on any number of ranks, and after a resume.
        """
        step = self.state.global_step // self.num_iterations
        first = self.accelerator.process_index * len(prompt_ids)
        slots = [hash((step, first + i)) for i in range(len(prompt_ids))]
        drawn = GumbelSampling(self.args.seed, slots, self.accelerator.device)
        warpers = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1.0 else []
        warpers += [TopPLogitsWarper(self.top_p)] if self.top_p < 1.0 else []
        config = copy.deepcopy(self.generation_config)
        config.update(do_sample=False, temperature=None, top_p=None, top_k=None)  # the draw is the noise's
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            answers = sample_shared(
                model,
                prompt_ids,
                config,
                share=self._can_share,
                logits_processor=LogitsProcessorList([*warpers, drawn]),
                synced_gpus=is_sharded(model),
            ).tolist()
        ends = set(self.eos_token_ids)
        return [
            up_to_end(ids, ends) if finite else None
            for ids, finite in zip(answers, drawn.finite.tolist(), strict=True)
        ]

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids: Any
    ) -> Tensor:
        """(answers of all ranks, rewards), nan where there is none; keeps what is known of this rank's answers."""
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        columns = {name: [row[name] for row in inputs] for name in ("answer", "unanswerable")}
        found = outcomes(completions, **columns)
        ends = {*self.eos_token_ids, self._tokenizer.pad_token_id}
        bad = [any(flags) for flags in zip(*self._not_finite.values(), strict=True)]
        device = self.accelerator.device

        def column(values: Any) -> Tensor:
            return torch.tensor(list(values), device=device, dtype=torch.float32)

        self._rewards = rewards
        self._answers = {
            "category": column(row["category_index"] for row in inputs),
            "outcome": column(-1 if o is None else OUTCOMES.index(o) for o in found),
            "num_tokens": column(len(ids) for ids in completion_ids),
            "truncated": column(ids[-1] not in ends for ids in completion_ids),
            "empty": column(not completion_text(c).strip() for c in completions),
            "not_finite": column(bad),
        }
        return rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with our advantages, and with what the metrics need of each answer."""
        self._sampled_categories = [row["category"] for row in inputs]
        output = super()._generate_and_score_completions(inputs)
        category = self.accelerator.gather(self._answers["category"]).long()
        rewards, weights = self._rewards, self._reward_weights()
        cost = multiplier = None
        if self.multipliers is not None:
            at = self.reward_names.index(COST)
            cost, multiplier = rewards[:, at], self._multiplier(category)
            keep = [i for i in range(len(self.reward_names)) if i != at]
            rewards, weights = rewards[:, keep], weights[keep]
        found = group_advantages(rewards, weights, self.num_generations, cost, multiplier)
        _, _, category_weight = self.terms.per_pair(category, 1.0)
        advantages = found.advantages * category_weight
        # What group DRO compares categories by, and what is logged as the reward: the weighted sum, not normalised.
        total = (rewards.nan_to_num(0.0) * weights).sum(1)
        if cost is not None and multiplier is not None:
            total = total - multiplier * cost.nan_to_num(0.0)
        total[self._rewards.isnan().all(1)] = torch.nan
        start = self.accelerator.process_index * len(inputs)
        mine = slice(start, start + len(inputs))
        output["advantages"] = advantages[mine]
        output |= {f"answer_{name}": values for name, values in self._answers.items()}
        output["answer_slot"] = torch.arange(start, start + len(inputs), device=advantages.device)
        output["answer_flat"] = found.flat[mine].float()
        output["answer_total"] = total[mine]
        output["answer_rewards"] = self._rewards[mine]
        return output

    def _reward_weights(self) -> Tensor:
        weights = [self.stage.rewards.get(name, 0.0) for name in self.reward_names]
        return torch.tensor(weights, device=self.accelerator.device)

    def _multiplier(self, category: Tensor) -> Tensor:
        assert self.multipliers is not None
        place = self.multipliers.index(self.category_names).to(category.device)
        return self.multipliers.of(place[category])

    # ---- loss -------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Any, Any]:
        """TRL's, with the prompt encoded once a group where that pays; kept for the metrics of the step."""
        log_probs, entropies, aux = self._shared(
            *args, **kwargs
        ) or super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if entropies is not None:
            self._token_log_probs = log_probs.detach(), entropies.detach()
        return log_probs, entropies, aux

    def _shared(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None] | None:
        """The same from shared rows, `batch_size` answers at a time; None where that cannot be or does not pay."""
        if not self._can_share or kwargs.get("compute_aux_loss"):
            return None
        size = batch_size or len(input_ids)
        chunks = [
            (ids, *grouped(ids, mask, logits_to_keep))
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
        ]
        mine = all(pays(blocks, ids.numel()) for ids, blocks, _ in chunks)
        # Ranks have to call the model alike, or sharded parameters wait for one another for ever.
        if not bool(self.accelerator.gather(torch.tensor([mine], device=input_ids.device)).all()):
            return None
        base = self.accelerator.unwrap_model(model)
        found = []
        for ids, blocks, rows in chunks:
            with self.accelerator.autocast():
                found.append(
                    shared_log_probs(
                        model,
                        base,
                        blocks,
                        rows,
                        (len(ids), logits_to_keep),
                        self._tokenizer.pad_token_id,
                        entropy=compute_entropy,
                        temperature=self.temperature,
                    )
                )
        log_probs = torch.cat([values for values, _ in found])
        entropies = torch.cat([e for _, e in found if e is not None]) if compute_entropy else None
        return log_probs, entropies, None

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss of a microbatch; the answers' values are kept for the step's metrics."""
        loss = super()._compute_loss(model, inputs)
        assert self._token_log_probs is not None
        log_probs, entropies = self._token_log_probs
        mask = inputs["completion_mask"]
        if not len(self._table):
            self._batches.clear()
        self._batches.append(inputs)
        kl = clipped = torch.zeros_like(log_probs)
        if self.beta:
            kl = k3(log_probs, inputs["ref_per_token_logps"])
        if (old := inputs.get("old_per_token_logps")) is not None:
            ratio, advantage = torch.exp(log_probs - old), inputs["advantages"][:, None]
            low = (ratio < 1 - self.epsilon_low) & (advantage < 0)
            high = (ratio > 1 + self.epsilon_high) & (advantage > 0)
            clipped = (low | high).float()
        self._table.keep(
            *(inputs[f"answer_{name}"] for name in ANSWER_COLUMNS),
            *inputs["answer_rewards"].unbind(1),
            *((values * mask).sum(1) for values in (torch.ones_like(kl), kl, entropies, clipped)),
        )
        return loss

    def _described(self, slots: Sequence[int]) -> list[dict[str, Any]]:
        """Prompts and sampled answers: each rank has its own."""
        found = {slot: texts for mine in gather_object([self._texts()]) for slot, texts in mine.items()}
        return [{"id": f"answer {slot}", **found[slot]} for slot in slots]

    def _texts(self) -> dict[int, dict[str, str]]:
        decode = self._tokenizer.decode
        texts: dict[int, dict[str, str]] = {}
        for batch in self._batches:
            parts = [batch["answer_slot"].tolist()]
            for name in ("prompt", "completion"):
                ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"].bool()
                parts.append([decode(row[kept]) for row, kept in zip(ids, mask, strict=True)])
            texts |= {slot: {"prompt": p, "answer": a} for slot, p, a in zip(*parts, strict=True)}
        return texts

    # ---- metrics, state ---------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One microbatch; at the end of an optimizer step the category state moves and metrics are written."""
        if not self._step:  # resumed: answers are sampled where an uninterrupted run samples them
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
        return super().training_step(*args, **kwargs)

    def _finish_step(self) -> None:
        step = self.state.global_step + 1
        table = self._table.gather(self.accelerator)
        first_pass = self.state.global_step % self.num_iterations == 0
        metrics: dict[str, float] = {}
        if step % self.stage.log_every == 0:
            metrics = {
                "train/learning_rate": self._get_learning_rate(),
                **metrics_of(
                    table, self.category_names, self.reward_names, self.num_generations, kl=self.beta > 0
                ),
            }
        if first_pass:  # the same answers come back in the other iterations
            self._observe(table)
        if metrics:
            self._log_metrics({**metrics, **self._state_metrics()}, step)
        self._metrics["train"].clear()  # TRL's averages of batch means

    def _observe(self, table: dict[str, Tensor]) -> None:
        rewarded = table["total"].isfinite()
        seen = {name: values[rewarded] for name, values in table.items()}
        self.terms.observe({"category": seen["category"], "h": seen["total"], "loss": -seen["total"]})
        if self.multipliers is not None:
            priced = table[COST].isfinite()
            place = self.multipliers.index(self.category_names)[table["category"][priced].long()]
            windows = self.multipliers.observe(table[COST][priced], place)
            if self.state.global_step >= self.stage.cost.multiplier.delay:
                self.multipliers.update(windows, eta=self.stage.cost.multiplier.eta)

    def _state_metrics(self) -> dict[str, float]:
        found = self.multipliers.metrics() if self.multipliers is not None else {}
        return {**self.terms.metrics(), **{f"train/{name}": value for name, value in found.items()}}

    def state_dict(self) -> dict[str, Any]:
        """The category weights and the multipliers, for JSON beside a checkpoint."""
        multipliers = self.multipliers.state_dict() if self.multipliers is not None else None
        return {"terms": self.terms.state_dict(), "multipliers": multipliers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; raises ValueError when it was saved for other categories."""
        self.terms.load_state_dict(state["terms"])
        if self.multipliers is not None:
            self.multipliers.load_state_dict(state["multipliers"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Ours is `_finish_step`; TRL's averages of batch means are not wanted."""
        self._metrics["train"].clear()
