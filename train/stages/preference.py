"""Preference training: policy folder in, better policy folder out."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from equipoise.data.schema import HELPFUL, PreferencePair
from equipoise.train import reference_cache
from equipoise.train.category_terms import CategoryTerms
from equipoise.train.model import load_policy, merged, peft_config, save_policy, uses_frozen_copy
from equipoise.train.pairs import EncodedPairs, encode_pairs
from equipoise.train.preference_trainer import PreferenceTrainer
from equipoise.train.random_contexts import RandomContexts
from equipoise.train.recipe import Recipe
from equipoise.train.recipe_stages import PreferenceStageConfig
from equipoise.train.sampling import order_pairs
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.training import STATE_FILE, examples_per_step, train, training_arguments


def select_pairs(
    context_data: Mapping[str, list[PreferencePair]], mixture: Mapping[str, float]
) -> list[PreferencePair]:
    """The pairs of every subset with a share, one list."""
    return [pair for name, share in mixture.items() if share > 0 for pair in context_data[name]]


def draw(
    encoded: EncodedPairs, stage: PreferenceStageConfig, batch_pairs: int, seed: int
) -> tuple[Dataset, list[str], int]:
    """The training rows in order, the category names behind `category_index`, and the optimizer steps.

    batch_pairs: pairs of one optimizer step over all ranks and accumulation. The last batch is full: draws are
    rounded up to whole steps.
    """
    categories = list(encoded.dataset["category"])
    subsets = {
        "safety": [i for i, c in enumerate(categories) if c != HELPFUL],
        "helpful": [i for i, c in enumerate(categories) if c == HELPFUL],
    }
    if stage.num_steps is not None:
        num_draws = stage.num_steps * batch_pairs
    else:
        once = len(order_pairs(subsets, stage.mixture, None, seed))
        num_draws = math.ceil(once * stage.num_epochs / batch_pairs) * batch_pairs
    order = order_pairs(subsets, stage.mixture, num_draws, seed)
    names = sorted(set(categories), key=_category_order)
    index = {name: i for i, name in enumerate(names)}
    rows = encoded.dataset.select(order)
    rows = rows.add_column("category_index", [index[c] for c in rows["category"]])
    rows = rows.add_column("slot", list(range(len(order))))
    return rows, names, num_draws // batch_pairs


def run_preference(
    name: str, stage: PreferenceStageConfig, policy: str, context: StageContext
) -> StageResult:
    """Train one stage from the model folder `policy`; resumes from its last complete checkpoint."""
    started = time.perf_counter()
    recipe, folder = context.recipe, context.stage_dir(name)
    set_seed(recipe.seed)  # a stage starts alike whether or not the one before ran in this process
    model, tokenizer = load_policy(recipe.model, policy, context.say)
    pairs = select_pairs(
        {"safety": context.data.safety_pairs, "helpful": context.data.helpful_pairs}, stage.mixture
    )
    encoded = encode_pairs(pairs, tokenizer, recipe.data.max_length)
    if encoded.too_long:
        context.say(
            f"{name}: {len(encoded.too_long)} of {len(pairs)} pairs are longer than "
            f"data.max_length={recipe.data.max_length} tokens and left out (first: {', '.join(encoded.too_long[:3])})"
        )
    rows, names, num_steps = draw(encoded, stage, examples_per_step(stage), recipe.seed)
    terms = CategoryTerms(stage.category, names, list(rows["category"]))
    if context.unsafe_counts is not None:
        terms.update_from_evaluation(context.unsafe_counts)
    frozen_copy = uses_frozen_copy(recipe.model)
    reference = None
    if frozen_copy and (stage.kl.coef or any(stage.kl.per_category.values()) or stage.token_bias.coef):
        reference = _frozen(policy, recipe)
    trainer = PreferenceTrainer(
        model=model,
        ref_model=reference,
        args=_arguments(stage, recipe, folder / "checkpoints", num_steps),
        dataset=rows,
        category_names=names,
        pair_ids=encoded.ids,
        stage=stage,
        terms=terms,
        contexts=_contexts(stage, tokenizer, recipe, context),
        log=lambda metrics, step: context.log(metrics, step, name),
        warn=context.say,
        progress=lambda done, total, what: context.progress(done, total, f"{name}: {what}"),
        processing_class=tokenizer,
        peft_config=peft_config(recipe.model),
    )
    watched = trainer.ref_model if trainer.ref_model is not None else trainer.model
    before = reference_cache.weights_fingerprint(watched) if _is_frozen(trainer, recipe) else None
    train(trainer, name, stage, context, trainer.terms.load_state_dict)
    if before is not None:
        after = reference_cache.weights_fingerprint(watched)
        assert after == before, "the reference's weights changed during training"
    final = merged(trainer.accelerator.unwrap_model(trainer.model))
    model_folder = folder / "model"
    if trainer.accelerator.is_main_process:
        save_policy(final, tokenizer, model_folder)
        (folder / STATE_FILE).write_text(json.dumps(terms.state_dict()) + "\n")
    trainer.accelerator.wait_for_everyone()
    seconds = time.perf_counter() - started
    facts: dict[str, object] = {
        "num_steps": num_steps,
        "num_pairs": len(encoded.ids),
        "num_draws": len(rows),
        "num_too_long": len(encoded.too_long),
        "one_row_a_pair": not trainer.data_collator.two_rows,
        "reference_cache_hit": trainer.reference_cache_hit,
        "beta_over_lam": stage.beta / stage.lam,
    }
    return StageResult(str(model_folder), seconds, facts)


def _category_order(name: str) -> tuple[bool, int, str]:
    """S2 before S10, and what is no hazard last."""
    number = name.removeprefix("S")
    return (name == HELPFUL, int(number) if number.isdigit() else 10**6, name)


def _is_frozen(trainer: PreferenceTrainer, recipe: Recipe) -> bool:
    """Whether there is a reference in memory that could change: the base under an adapter, or the frozen copy."""
    return recipe.model.lora.enabled or trainer.ref_model is not None


def _frozen(policy: str, recipe: Recipe) -> torch.nn.Module:
    model, _ = load_policy(recipe.model, policy)
    return model.requires_grad_(False)


def _contexts(
    stage: PreferenceStageConfig, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, context: StageContext
) -> RandomContexts | None:
    if not stage.token_bias.coef:
        return None
    words = [turn["content"] for pair in context.data.safety_pairs for turn in pair.prompt]
    return RandomContexts(tokenizer, stage.token_bias, words=words, seed=recipe.seed)


def _arguments(stage: PreferenceStageConfig, recipe: Recipe, folder: Path, num_steps: int) -> DPOConfig:
    return DPOConfig(
        **training_arguments(stage, recipe, folder, num_steps),
        beta=stage.beta / stage.lam,
        activation_checkpointing=recipe.model.gradient_checkpointing,
        precompute_ref_log_probs=True,
        max_length=None,
    )
