"""What preference and KTO stages share: from drawn examples to a saved policy."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from accelerate.utils import set_seed
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig

from equipoise.data.errors import EquipoiseError
from equipoise.data.schema import HELPFUL
from equipoise.data.templates import EncodingLimits
from equipoise.train import reference_cache
from equipoise.train.answers import BenignAnswers, encode_chosen
from equipoise.train.model import (
    load_frozen,
    load_trainable,
    peft_config,
    uses_frozen_copy,
)
from equipoise.train.ranks import from_first
from equipoise.train.recipe import ModelConfig, Recipe
from equipoise.train.recipe.stages import KLConfig, LogRatioStageConfig, MixtureConfig
from equipoise.train.sampling import order_pairs
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.trainers.category_terms import CategoryTerms
from equipoise.train.trainers.preference import PreferenceTrainer
from equipoise.train.trainers.random_contexts import RandomContexts
from equipoise.train.training import save_trained, shares_prompts, train, training_arguments


@dataclass(frozen=True)
class Drawn:
    """What a stage trains on, in order."""

    rows: Dataset
    """One row a draw: prompt_ids, chosen_ids, rejected_ids, category, category_index, pair, slot."""
    category_names: list[str]
    """Behind `category_index`."""
    ids: list[str]
    """Behind `pair`."""
    num_steps: int
    """Optimizer steps."""
    facts: dict[str, object] = field(default_factory=dict)
    """What the preparation has to say, for summary.json."""


def draw(
    dataset: Dataset, stage: MixtureConfig, num_examples: int, seed: int
) -> tuple[Dataset, list[str], int]:
    """The training rows in order, the category names behind `category_index`, and the optimizer steps.

    num_examples: of one optimizer step over all ranks and accumulation. The last batch is full: draws are rounded up
    to whole steps.
    """
    categories = list(dataset["category"])
    subsets = {
        "safety": [i for i, c in enumerate(categories) if c != HELPFUL],
        "helpful": [i for i, c in enumerate(categories) if c == HELPFUL],
    }
    if stage.num_steps is not None:
        num_draws = stage.num_steps * num_examples
    else:
        once = len(order_pairs(subsets, stage.mixture, None, seed))
        num_draws = math.ceil(once * stage.num_epochs / num_examples) * num_examples
    if stage.balance == "none":
        order = order_pairs(subsets, stage.mixture, num_draws, seed)
    else:
        temperature = stage.balance_temperature if stage.balance == "temperature" else 1.0
        order = order_pairs(subsets, stage.mixture, num_draws, seed, categories, temperature)
    names = sorted(set(categories), key=_category_order)
    index = {name: i for i, name in enumerate(names)}
    rows = dataset.select(order)
    rows = rows.add_column("category_index", [index[c] for c in rows["category"]])
    rows = rows.add_column("slot", list(range(len(order))))
    return rows, names, num_draws // num_examples


def train_on_log_ratios(
    name: str,
    stage: LogRatioStageConfig,
    policy: str,
    context: StageContext,
    prepare: Callable[[PreTrainedTokenizerBase], Drawn],
    trainer_class: type[PreferenceTrainer],
) -> StageResult:
    """Train one stage from the model folder `policy`; resumes from its last complete checkpoint."""
    started = time.perf_counter()
    recipe, folder = context.recipe, context.stage_dir(name)
    set_seed(recipe.seed)  # a stage starts alike whether or not the one before ran in this process
    model, tokenizer = load_trainable(recipe.model, policy, context.say)
    drawn = prepare(tokenizer)
    terms = CategoryTerms(stage.category, drawn.category_names, list(drawn.rows["category"]))
    if context.unsafe_counts is not None:
        terms.update_from_evaluation(context.unsafe_counts)
    frozen_copy = uses_frozen_copy(recipe.model)
    reference = None
    if frozen_copy and (stage.kl.active or stage.token_bias.coef):
        reference = load_frozen(recipe.model, policy)
    trainer = trainer_class(
        model=model,
        ref_model=reference,
        args=_arguments(stage, recipe, folder / "checkpoints", drawn.num_steps),
        dataset=drawn.rows,
        category_names=drawn.category_names,
        pair_ids=drawn.ids,
        stage=stage,
        terms=terms,
        contexts=_contexts(stage, tokenizer, recipe, context),
        benign=benign_answers(stage.kl, tokenizer, context),
        reference_key=_reference_key(policy, recipe.model, context.say),
        log=lambda metrics, step: context.log(metrics, step, name),
        share_rows=shares_prompts(name, model, tokenizer, policy, context),
        progress=lambda done, total, what: context.progress(done, total, f"{name}: {what}"),
        processing_class=tokenizer,
        peft_config=peft_config(recipe.model),
    )
    train(trainer, name, stage, context, trainer.terms.load_state_dict)
    trainer.check_reference()
    model_folder = save_trained(trainer, policy, recipe.model, folder)
    seconds = time.perf_counter() - started
    facts: dict[str, object] = {
        "num_steps": drawn.num_steps,
        **drawn.facts,
        "num_draws": len(drawn.rows),
        "one_row_a_pair": not trainer.data_collator.two_rows,
        "reference_cache_hit": trainer.reference_cache_hit,
        "beta_over_lam": stage.beta / stage.lam,
    }
    return StageResult(model_folder, seconds, facts)


def _category_order(name: str) -> tuple[bool, int, str]:
    """S2 before S10, and what is no hazard last."""
    number = name.removeprefix("S")
    return (name == HELPFUL, int(number) if number.isdigit() else 10**6, name)


def _reference_key(policy: str, model: ModelConfig, say: Callable[[str], None]) -> str | None:
    """The cache's name for the reference, None where it has none (and said); the same on all ranks, collective."""

    def key() -> str | None:
        try:
            return reference_cache.reference_key(policy, model)
        except EquipoiseError as error:
            say(f"the reference's log-probabilities are not kept for other runs: {error}")
            return None

    return from_first(key)


def benign_answers(
    kl: KLConfig, tokenizer: PreTrainedTokenizerBase, context: StageContext
) -> BenignAnswers | None:
    """The answers of a penalty `on: benign`; those longer than data.max_length are left out, and said."""
    if not kl.active or kl.on != "benign":
        return None
    max_length, pairs = context.recipe.data.max_length, context.data.helpful_pairs
    encoded = encode_chosen(pairs, tokenizer, max_length, EncodingLimits.of(context.recipe.data))
    for line in encoded.left_out:
        context.say(f"kl, benign answers: {line}")
    return BenignAnswers(encoded.dataset, tokenizer.pad_token_id, kl.num_benign, context.recipe.seed)


def _contexts(
    stage: LogRatioStageConfig, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, context: StageContext
) -> RandomContexts | None:
    if not stage.token_bias.coef:
        return None
    words = [turn["content"] for pair in context.data.safety_pairs for turn in pair.prompt]
    return RandomContexts(tokenizer, stage.token_bias, words=words, seed=recipe.seed)


def _arguments(stage: LogRatioStageConfig, recipe: Recipe, folder: Path, num_steps: int) -> DPOConfig:
    return DPOConfig(
        **training_arguments(stage, recipe, folder, num_steps),
        beta=stage.beta / stage.lam,
        activation_checkpointing=recipe.model.gradient_checkpointing,
        precompute_ref_log_probs=True,
        max_length=None,
    )
