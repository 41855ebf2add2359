"""Reward and cost models: trained from the policy, which they leave as it was."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from equipoise.data.templates import EncodingLimits
from equipoise.eval.generation.engine import end_tokens
from equipoise.eval.scorer import Scorer
from equipoise.eval.scorer_card import ScorerCard
from equipoise.eval.statistics import wilson_interval
from equipoise.train.model import load_trainable, peft_config
from equipoise.train.pairs import encode_pairs
from equipoise.train.ranks import from_first
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.stages import (
    CategoryConfig,
    CostModelStageConfig,
    RewardModelStageConfig,
    ScorerStageConfig,
)
from equipoise.train.scorer import save_scorer
from equipoise.train.scorer_pairs import scorer_pairs, scorer_rows, split_by_prompt
from equipoise.train.sharding import whole_tensors
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.stages.log_ratios import draw
from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.trainers.scorer import ScorePairCollator, ScorerTrainer
from equipoise.train.training import examples_per_step, shares_prompts, train, training_arguments


def run_reward_model(
    name: str, stage: RewardModelStageConfig, policy: str, context: StageContext
) -> StageResult:
    """Train a reward model on the decoder of the model folder `policy`; resumes from its last complete checkpoint."""
    return _train_scorer(name, "reward", stage, policy, context)


def run_cost_model(name: str, stage: CostModelStageConfig, policy: str, context: StageContext) -> StageResult:
    """Train a cost model on the decoder of the model folder `policy`; resumes from its last complete checkpoint."""
    return _train_scorer(name, "cost", stage, policy, context)


def _train_scorer(
    name: str, kind: str, stage: ScorerStageConfig, policy: str, context: StageContext
) -> StageResult:
    started = time.perf_counter()
    recipe, folder = context.recipe, context.stage_dir(name)
    set_seed(recipe.seed)  # a stage starts alike whether or not the one before ran in this process
    model, tokenizer = load_trainable(recipe.model, policy, context.say)
    ends = end_tokens(model, tokenizer)
    pairs, facts = scorer_pairs(stage, context.data)
    training, held_out = split_by_prompt(pairs, stage.held_out_fraction, recipe.seed)
    limits = EncodingLimits.of(recipe.data)
    encoded = encode_pairs(training, tokenizer, recipe.data.max_length, limits)
    unique = scorer_rows(stage, encoded.dataset, ends)
    rows, names, num_steps = draw(unique, stage, examples_per_step(stage), recipe.seed)
    too_long, held_out_rows, left_out = list(encoded.too_long), None, list(encoded.left_out)
    if held_out:
        encoded_held_out = encode_pairs(held_out, tokenizer, recipe.data.max_length, limits)
        held_out_rows = scorer_rows(stage, encoded_held_out.dataset, ends)
        # A category whose only prompt is held out because another category shares it.
        names = [*names, *sorted(set(held_out_rows["category"]) - set(names))]
        held_out_rows = _indexed(held_out_rows, names)
        too_long += encoded_held_out.too_long
        left_out += [f"held out: {line}" for line in encoded_held_out.left_out]
    for line in left_out:
        context.say(f"{name}: {line}")
    terms = CategoryTerms(CategoryConfig(weight=stage.weight), names, list(rows["category"]))
    collator = ScorePairCollator(
        tokenizer.pad_token_id, not shares_prompts(name, model, tokenizer, policy, context)
    )
    trainer = ScorerTrainer(
        model=_scorer(model, recipe),
        args=TrainingArguments(**training_arguments(stage, recipe, folder / "checkpoints", num_steps)),
        dataset=rows,
        held_out=held_out_rows,
        category_names=names,
        pair_ids=encoded.ids,
        stage=stage,
        terms=terms,
        collator=collator,
        log=lambda metrics, step: context.log(metrics, step, name),
        progress=lambda done, total, what: context.progress(done, total, f"{name}: {what}"),
        processing_class=tokenizer,
    )
    if stage.eval_every and held_out_rows is not None:
        trainer.add_callback(_HeldOutCallback(trainer, stage.eval_every))
    train(trainer, name, stage, context, terms.load_state_dict)
    facts = {
        "num_steps": num_steps,
        "num_pairs": len(encoded.ids),
        "num_held_out": len(held_out_rows) if held_out_rows is not None else 0,
        "num_too_long": len(too_long),
        **facts,
        "num_draws": len(rows),
        "one_row_a_pair": not collator.two_rows,
    }
    if held_out_rows is not None:
        facts["held_out"] = _rates(trainer, trainer.evaluate_held_out(num_steps))
        context.say(f"{name}: held-out pairs: {_said(facts['held_out'])}")
    card = ScorerCard(kind, backbone=_in_full(policy) if recipe.model.lora.enabled else None)
    if stage.normalise:
        card = _normalised(card, trainer.score_pairs(_indexed(unique, names), "scores of training pairs"))
        facts |= {"score_mean": card.mean, "score_std": card.std}
    scorer: Scorer = trainer.accelerator.unwrap_model(trainer.model)
    state = whole_tensors(_saved_tensors(scorer))
    scorer_folder = folder / "scorer"
    from_first(lambda: save_scorer(scorer, tokenizer, scorer_folder, card, state))
    return StageResult(policy, time.perf_counter() - started, facts, scorer_folder=str(scorer_folder))


def _saved_tensors(scorer: Scorer) -> Iterator[tuple[str, Tensor]]:
    """What a scorer folder holds: adapter and head, or all of the decoder and head."""
    adapter_only = isinstance(scorer.backbone, PeftModel)
    kept = set(scorer.state_dict())  # without the buffers that are not saved
    for name, tensor in (*scorer.named_parameters(), *scorer.named_buffers()):
        if name in kept and (tensor.requires_grad or not adapter_only):
            yield name, tensor


def _scorer(model: PreTrainedModel, recipe: Recipe) -> Scorer:
    """A new scorer: an adapter on the policy, or its bare decoder where all of it is trained."""
    config = peft_config(recipe.model)
    backbone = get_peft_model(model, config) if config is not None else model.base_model
    if recipe.model.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return Scorer(backbone)


def _indexed(dataset: Dataset, names: list[str]) -> Dataset:
    """With the column `category_index`."""
    return dataset.add_column("category_index", [names.index(category) for category in dataset["category"]])


def _in_full(policy: str) -> str:
    """A folder's whole path, so that the scorer finds it from anywhere; a hub id as it is."""
    return str(Path(policy).resolve()) if Path(policy).is_dir() else policy


def _normalised(card: ScorerCard, table: Mapping[str, Tensor]) -> ScorerCard:
    scores = torch.cat([table["chosen_score"], table["rejected_score"]])
    mean, std = float(scores.mean()), float(scores.std(correction=0))
    # Equal scores (nothing was learned) have no spread to divide by.
    return replace(card, mean=mean if card.kind == "reward" else 0.0, std=std if std > 0 else 1.0)


def _rates(trainer: ScorerTrainer, table: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Category (and `all`) -> rate -> its value, n and 95 % interval (Wilson)."""
    found: dict[str, dict[str, Any]] = {}
    for rate, (right, category) in trainer.outcomes(table).items():
        of = {"all": torch.ones_like(category, dtype=torch.bool)}
        of |= {name: category == i for i, name in enumerate(trainer.category_names)}
        for name, mask in of.items():
            num, count = int(mask.sum()), int(right[mask].sum())
            if num:
                low, high = wilson_interval(count, num)
                found.setdefault(name, {})[rate] = {"rate": count / num, "num": num, "low": low, "high": high}
    return found


def _said(rates: object) -> str:
    assert isinstance(rates, dict)
    return ", ".join(
        f"{rate.replace('_', ' ')} {value['rate']:.2f} [{value['low']:.2f}, {value['high']:.2f}] (n = {value['num']})"
        for rate, value in rates.get("all", {}).items()
    )


class _HeldOutCallback(TrainerCallback):
    """Scores the held-out pairs every few optimizer steps; the last step is scored behind the training."""

    def __init__(self, trainer: ScorerTrainer, every: int) -> None:
        self._trainer, self._every = trainer, every

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step % self._every == 0 and state.global_step < state.max_steps:
            self._trainer.evaluate_held_out(state.global_step)
