"""Preference training: policy folder in, better policy folder out."""

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from equipoise.data.schema import PreferencePair
from equipoise.data.sources import SafetyData
from equipoise.data.templates import EncodingLimits
from equipoise.train.pairs import encode_pairs
from equipoise.train.recipe.stages import PreferenceStageConfig
from equipoise.train.safety_order import SafetyOrder, order_by_safety
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.stages.log_ratios import Drawn, draw, train_on_log_ratios
from equipoise.train.trainers.preference import PreferenceTrainer
from equipoise.train.training import examples_per_step


def select_pairs(
    context_data: Mapping[str, list[PreferencePair]], mixture: Mapping[str, float]
) -> list[PreferencePair]:
    """The pairs of every subset with a share, one list."""
    return [pair for name, share in mixture.items() if share > 0 for pair in context_data[name]]


def stage_pairs(
    stage: PreferenceStageConfig, data: SafetyData
) -> tuple[list[PreferencePair], SafetyOrder | None]:
    """The stage's pairs; with `safedpo` among its losses in SafeDPO's order, which raises DataError where it cannot."""
    pairs = select_pairs({"safety": data.safety_pairs, "helpful": data.helpful_pairs}, stage.mixture)
    if not stage.loss.weights.get("safedpo"):
        return pairs, None
    order = order_by_safety(pairs, stage.loss.unlabelled)
    return order.pairs, order


def run_preference(
    name: str, stage: PreferenceStageConfig, policy: str, context: StageContext
) -> StageResult:
    """Train one stage from the model folder `policy`; resumes from its last complete checkpoint."""
    recipe = context.recipe

    def prepare(tokenizer: PreTrainedTokenizerBase) -> Drawn:
        pairs, order = stage_pairs(stage, context.data)
        if order is not None:
            context.say(f"{name}: {order.summary()}")
        encoded = encode_pairs(pairs, tokenizer, recipe.data.max_length, EncodingLimits.of(recipe.data))
        for line in encoded.left_out:
            context.say(f"{name}: {line}")
        rows, names, num_steps = draw(encoded.dataset, stage, examples_per_step(stage), recipe.seed)
        facts: dict[str, object] = {"num_pairs": len(encoded.ids), "num_too_long": len(encoded.too_long)}
        if order is not None:
            facts |= order.counts()
        return Drawn(rows, names, encoded.ids, num_steps, facts)

    return train_on_log_ratios(name, stage, policy, context, prepare, PreferenceTrainer)
