"""What cannot work in a stage that samples its own answers, found before any model is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from equipoise.data.schema import HELPFUL
from equipoise.eval.scorer_card import ScorerError, check_kind, read_card
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.checks import Problems, at_least, positive, share_of_one
from equipoise.train.recipe.grpo_checks import check_vllm
from equipoise.train.recipe.rl import MultiplierUpdateConfig, RolloutConfig, SafeRLHFStageConfig
from equipoise.train.recipe.stages import (
    CostModelStageConfig,
    RewardModelStageConfig,
    ScorerStageConfig,
    StageConfig,
    TokenBiasStageConfig,
)

SCORER_STAGES: dict[str, type[ScorerStageConfig]] = {
    "reward": RewardModelStageConfig,
    "cost": CostModelStageConfig,
}
"""What trains a scorer of each kind."""


def check_safe_rlhf_stage(
    name: str,
    stage: SafeRLHFStageConfig,
    earlier: Mapping[str, StageConfig],
    recipe: Recipe,
    problems: Problems,
) -> None:
    """Note every value of a Safe RLHF stage that cannot work, and scorers that are missing or do not fit."""
    path = f"stages.{name}"
    problems.one_of(f"{path}.layout", stage.layout, ("shared", "separate"))
    problems.one_of(f"{path}.advantage", stage.advantage, ("gae", "rloo", "grpo"))
    _check_generations(path, stage, problems)
    at_least(1, f"{path}.update_epochs", stage.update_epochs, problems)
    positive(f"{path}.critic_learning_rate", stage.critic_learning_rate, problems)
    at_least(0, f"{path}.kl", stage.kl, problems)
    share_of_one(f"{path}.gamma", stage.gamma, problems)
    share_of_one(f"{path}.gae_lambda", stage.gae_lambda, problems)
    for key in ("clip_ratio", "clip_value", "clip_score"):
        positive(f"{path}.{key}", getattr(stage, key), problems)
    at_least(0, f"{path}.missing_end_penalty", stage.missing_end_penalty, problems)
    at_least(0, f"{path}.ptx_coef", stage.ptx_coef, problems)
    check_multiplier(f"{path}.multiplier", stage.multiplier, problems)
    _check_rollout(f"{path}.rollout", stage.rollout, recipe, problems)
    if stage.layout == "shared" and not recipe.model.lora.enabled:
        reason = "found 'shared', but model.lora.enabled=false leaves no adapters to share a backbone; take separate"
        problems.add(f"{path}.layout", reason)
    if stage.layout == "separate" and recipe.model.quantization != "none":
        reason = "found 'separate', whose models are not quantised; take shared, or model.quantization=none"
        problems.add(f"{path}.layout", reason)
    if stage.layout == "shared" and recipe.model.reference == "frozen_copy":
        reason = "found 'frozen_copy', but with layout=shared the reference is the bare backbone; take auto"
        problems.add("model.reference", reason)
    for kind in SCORER_STAGES:
        _check_scorer(kind, name, stage, earlier, recipe, problems)


def check_multiplier(path: str, multiplier: MultiplierUpdateConfig, problems: Problems) -> None:
    """Note what cannot work in the update of the multipliers."""
    positive(f"{path}.max", multiplier.max, problems)
    problems.expect(
        0 <= multiplier.initial <= multiplier.max,
        f"{path}.initial",
        multiplier.initial,
        f"a number from 0 to {path}.max={multiplier.max}",
    )
    at_least(0, f"{path}.eta", multiplier.eta, problems)
    at_least(1, f"{path}.window", multiplier.window, problems)
    at_least(0, f"{path}.delay", multiplier.delay, problems)
    categories = (*problems.categories, HELPFUL)
    for category in multiplier.thresholds:
        if category not in categories:
            problems.unknown(f"{path}.thresholds.{category}", category, categories)
    if multiplier.thresholds and not multiplier.per_category:
        reason = (
            f"found thresholds of single categories, but {path}.per_category=false has one multiplier for all"
        )
        problems.add(f"{path}.thresholds", reason)


def constrained(multiplier: MultiplierUpdateConfig, categories: Sequence[str]) -> dict[str, float]:
    """Category -> threshold of those that get a multiplier of their own, in the order given."""
    return {
        category: multiplier.thresholds.get(category, multiplier.threshold)
        for category in categories
        if category != HELPFUL or category in multiplier.thresholds
    }


def scorer_source(kind: str, name: str, stage: SafeRLHFStageConfig, recipe: Recipe) -> str | None:
    """Where the stage `name` takes its reward or cost model from: a stage's name or a folder; None: there is none."""
    given = stage.reward_model if kind == "reward" else stage.cost_model
    if given is not None:
        return given
    before = list(recipe.stages)[: list(recipe.stages).index(name)]
    return next((n for n in reversed(before) if isinstance(recipe.stages[n], SCORER_STAGES[kind])), None)


def policy_origin(recipe: Recipe, name: str) -> str:
    """What the stage `name` starts from: `base`, the stage whose policy it is, or a folder."""
    leaves = start = "base"
    for other, stage in recipe.stages.items():
        start = leaves if stage.start_from is None else stage.start_from
        # A stage that trains no policy passes on the one it got.
        if start in recipe.stages and isinstance(
            recipe.stages[start], ScorerStageConfig | TokenBiasStageConfig
        ):
            start = policy_origin(recipe, start)
        if other == name:
            break
        leaves = start if isinstance(stage, ScorerStageConfig | TokenBiasStageConfig) else other
    return start


def _check_generations(path: str, stage: SafeRLHFStageConfig, problems: Problems) -> None:
    num = stage.num_generations
    at_least(1, f"{path}.num_generations", num, problems)
    if stage.advantage in ("rloo", "grpo") and num == 1:
        reason = f"found 1, but advantage={stage.advantage} compares several answers to a prompt; expected 2 or more"
        problems.add(f"{path}.num_generations", reason)
    answers = stage.per_device_batch_size * stage.gradient_accumulation_steps
    if num > 1 and answers % num:
        reason = (
            f"found {num}, which does not divide the {answers} answers of a step on each rank (per_device_batch_size "
            f"* gradient_accumulation_steps)"
        )
        problems.add(f"{path}.num_generations", reason)


def _check_rollout(path: str, rollout: RolloutConfig, recipe: Recipe, problems: Problems) -> None:
    at_least(1, f"{path}.max_new_tokens", rollout.max_new_tokens, problems)
    if rollout.max_new_tokens >= recipe.data.max_length:
        reason = (
            f"found {rollout.max_new_tokens}, which leaves no room for a prompt in data.max_length="
            f"{recipe.data.max_length}"
        )
        problems.add(f"{path}.max_new_tokens", reason)
    at_least(1, f"{path}.batch_size", rollout.batch_size, problems)
    check_vllm(f"{path}.vllm", rollout.vllm, problems)


def _check_scorer(
    kind: str,
    name: str,
    stage: SafeRLHFStageConfig,
    earlier: Mapping[str, StageConfig],
    recipe: Recipe,
    problems: Problems,
) -> None:
    key, trainer = f"stages.{name}.{kind}_model", SCORER_STAGES[kind]
    source = scorer_source(kind, name, stage, recipe)
    possible = [n for n, other in earlier.items() if isinstance(other, trainer)]
    expected = ", ".join([*possible, f"a folder with a {kind} model"])
    if source is None:
        reason = f"a safe_rlhf stage needs a {kind} model: put a stage of kind {kind}_model before it, or name a folder"
        problems.add(key, reason)
    elif source in earlier:
        other = earlier[source]
        if not isinstance(other, trainer):
            problems.add(key, f"found {source!r}, a {other.kind} stage; possible: {expected}")
        elif stage.layout == "shared":
            ours, theirs = policy_origin(recipe, name), policy_origin(recipe, source)
            if ours != theirs:
                reason = (
                    f"{source!r} is trained on the policy of {theirs!r}, and the stage starts from that of {ours!r}: "
                    f"layout=shared has one backbone for all. Set {source}.start_from={ours} or "
                    f"stages.{name}.layout=separate"
                )
                problems.add(key, reason)
    elif source in recipe.stages:
        problems.add(key, f"found {source!r}, a stage that comes later; possible: {expected}")
    elif not Path(source).expanduser().is_dir():
        problems.add(key, f"found {source!r}, expected {expected}")
    else:
        try:
            check_kind(read_card(source), kind, source)
        except ScorerError as error:
            problems.add(key, str(error))
