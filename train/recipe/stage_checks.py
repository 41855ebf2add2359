"""Values and combinations of a recipe's stages that cannot work, found before any model is loaded."""

import math
from collections.abc import Mapping
from pathlib import Path

from equipoise.data.sampling import BALANCES
from equipoise.data.schema import HELPFUL
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.checks import (
    MARGIN_LOSSES,
    Problems,
    at_least,
    check_folder_name,
    check_loss,
    positive,
    share_of_one,
)
from equipoise.train.recipe.grpo_checks import check_grpo_stage, check_warm_up
from equipoise.train.recipe.rl import GRPOStageConfig, SafeRLHFStageConfig
from equipoise.train.recipe.sacpo_checks import check_kto_stage, check_merge_stage
from equipoise.train.recipe.safe_rlhf_checks import check_safe_rlhf_stage
from equipoise.train.recipe.stages import (
    CategoryConfig,
    CostModelStageConfig,
    KLConfig,
    KTOStageConfig,
    LogRatioStageConfig,
    MergeStageConfig,
    MixtureConfig,
    PreferenceStageConfig,
    ScorerStageConfig,
    SFTStageConfig,
    StageConfig,
    TokenBiasStageConfig,
    TrainingConfig,
    WeightConfig,
)
from equipoise.train.recipe.tsdi_checks import check_penalty, check_token_bias_stage

SUBSETS = ("safety", "helpful")
SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
BASE = "base"
"""What `start_from` calls the run's starting model; `stages.context.BASE` is the same, and takes seconds to import."""


def check_stages(recipe: Recipe, problems: Problems) -> None:
    """Note every value of `recipe.stages` that cannot work, and an order of stages that cannot."""
    earlier: dict[str, StageConfig] = {}
    for name, stage in recipe.stages.items():
        path = f"stages.{name}"
        check_folder_name(path, name, problems)
        if name == BASE:
            problems.add(path, f"found {name!r}, which means the starting model; name the stage otherwise")
        check_source(f"{path}.start_from", stage.start_from, earlier, recipe, problems)
        if isinstance(stage, TrainingConfig):
            _check_training(path, stage, problems)
        if isinstance(stage, MixtureConfig):
            _check_balance(path, stage, problems)
        if isinstance(stage, PreferenceStageConfig):
            _check_preference_stage(path, stage, problems)
        elif isinstance(stage, KTOStageConfig):
            _check_log_ratio_stage(path, stage, problems)
            check_kto_stage(path, stage, recipe, problems)
        elif isinstance(stage, MergeStageConfig):
            for key, source in (("first", stage.first), ("second", stage.second)):
                check_source(f"{path}.{key}", source, earlier, recipe, problems)
            check_merge_stage(path, stage, earlier, recipe, problems)
        elif isinstance(stage, SFTStageConfig):
            check_warm_up(path, stage, recipe, problems)
            _check_mixture(path, stage.mixture, problems)
            _check_weight(f"{path}.weight", stage.weight, problems)
            _check_kl(f"{path}.kl", stage.kl, stage.mixture, problems)
        elif isinstance(stage, ScorerStageConfig):
            _check_scorer_stage(path, stage, problems)
        elif isinstance(stage, GRPOStageConfig):
            check_grpo_stage(name, stage, earlier, recipe, problems)
        elif isinstance(stage, SafeRLHFStageConfig):
            _check_mixture(path, stage.mixture, problems)
            check_safe_rlhf_stage(name, stage, earlier, recipe, problems)
        elif isinstance(stage, TokenBiasStageConfig):
            check_source(f"{path}.reference", stage.reference, earlier, recipe, problems)
            check_token_bias_stage(name, stage, earlier, recipe, problems)
        earlier[name] = stage


def check_source(
    key: str, source: str | None, earlier: Mapping[str, StageConfig], recipe: Recipe, problems: Problems
) -> None:
    """A model is named as `base`, an earlier stage or a folder."""
    if source is None or source == BASE or source in earlier or Path(source).expanduser().is_dir():
        return
    if source in recipe.stages:
        problems.add(key, f"found {source!r}, a stage that comes later; possible: {_sources(earlier)}")
    else:
        problems.add(key, f"found {source!r}, expected {_sources(earlier)}")


def _sources(earlier: Mapping[str, StageConfig]) -> str:
    return ", ".join([BASE, *earlier, "or a model folder that exists"])


def _check_training(path: str, stage: TrainingConfig, problems: Problems) -> None:
    if stage.num_steps is not None:
        at_least(1, f"{path}.num_steps", stage.num_steps, problems)
    positive(f"{path}.num_epochs", stage.num_epochs, problems)
    positive(f"{path}.learning_rate", stage.learning_rate, problems)
    problems.one_of(f"{path}.lr_scheduler", stage.lr_scheduler, SCHEDULERS)
    at_least(0, f"{path}.warmup", stage.warmup, problems)
    problems.expect(
        stage.warmup < 1 or stage.warmup == int(stage.warmup),
        f"{path}.warmup",
        stage.warmup,
        "a share below 1 or a whole number of steps",
    )
    at_least(0, f"{path}.weight_decay", stage.weight_decay, problems)
    at_least(0, f"{path}.max_grad_norm", stage.max_grad_norm, problems)
    at_least(1, f"{path}.per_device_batch_size", stage.per_device_batch_size, problems)
    at_least(1, f"{path}.gradient_accumulation_steps", stage.gradient_accumulation_steps, problems)
    at_least(0, f"{path}.save_every", stage.save_every, problems)
    at_least(1, f"{path}.log_every", stage.log_every, problems)


def _check_mixture(path: str, mixture: Mapping[str, float], problems: Problems) -> None:
    for subset, share in mixture.items():
        if subset in SUBSETS:
            at_least(0, f"{path}.mixture.{subset}", share, problems)
        else:
            problems.unknown(f"{path}.mixture.{subset}", subset, SUBSETS)
    if not any(share > 0 for share in mixture.values()):
        problems.add(f"{path}.mixture", "every share is 0; at least one of safety, helpful must be above 0")


def _check_balance(path: str, stage: MixtureConfig, problems: Problems) -> None:
    problems.one_of(f"{path}.balance", stage.balance, BALANCES)
    share_of_one(f"{path}.balance_temperature", stage.balance_temperature, problems)
    if stage.balance != "temperature" and stage.balance_temperature != MixtureConfig.balance_temperature:
        reason = f"found {stage.balance_temperature}, but {path}.balance={stage.balance} does not read it"
        problems.add(f"{path}.balance_temperature", reason)
    if stage.balance != "none" and isinstance(stage, SFTStageConfig) and stage.tasks_of is not None:
        problems.add(f"{path}.balance", "found a balance, but the stage answers tasks; expected none")


def _check_preference_stage(path: str, stage: PreferenceStageConfig, problems: Problems) -> None:
    check_loss(f"{path}.loss", stage.loss, problems)
    _check_log_ratio_stage(path, stage, problems)
    margin = stage.category.margin
    if margin.enabled and not any(stage.loss.weights.get(name) for name in MARGIN_LOSSES):
        reason = f"the loss {stage.loss.name!r} has no margin; possible: {', '.join(MARGIN_LOSSES)}"
        problems.add(f"{path}.category.margin.enabled", reason)


def _check_log_ratio_stage(path: str, stage: LogRatioStageConfig, problems: Problems) -> None:
    _check_mixture(path, stage.mixture, problems)
    positive(f"{path}.beta", stage.beta, problems)
    positive(f"{path}.lam", stage.lam, problems)
    _check_category(f"{path}.category", stage.category, problems)
    _check_kl(f"{path}.kl", stage.kl, stage.mixture, problems)
    check_penalty(f"{path}.token_bias", stage.token_bias, problems)


def _check_category(path: str, category: CategoryConfig, problems: Problems) -> None:
    margin, weight, multiplier = category.margin, category.weight, category.multiplier
    positive(f"{path}.margin.eta", margin.eta, problems)
    at_least(0, f"{path}.multiplier.eta", multiplier.eta, problems)
    categories = problems.categories
    for key, term in ((f"{path}.margin", margin), (f"{path}.multiplier", multiplier)):
        share_of_one(f"{key}.target", term.target, problems)
        for name, target in term.targets.items():
            share_of_one(f"{key}.targets.{name}", target, problems)
    positive(f"{path}.margin.max", margin.max, problems)
    positive(f"{path}.multiplier.max_log", multiplier.max_log, problems)
    limit = math.exp(multiplier.max_log)
    for name, value in multiplier.initial.items():
        problems.expect(
            1 / limit <= value <= limit,
            f"{path}.multiplier.initial.{name}",
            value,
            f"a number in [{1 / limit:.3g}, {limit:.3g}] (max_log={multiplier.max_log})",
        )
    per_category = {
        "margin.targets": margin.targets,
        "multiplier.targets": multiplier.targets,
        "multiplier.initial": multiplier.initial,
    }
    for key, values in per_category.items():
        for name in values:
            if name not in categories:
                problems.unknown(f"{path}.{key}.{name}", name, categories)
    _check_weight(f"{path}.weight", weight, problems)
    at_least(1, f"{path}.update_every", category.update_every, problems)
    problems.expect(0 <= category.ema < 1, f"{path}.ema", category.ema, "a decay in [0, 1)")
    at_least(0, f"{path}.shrinkage", category.shrinkage, problems)


def _check_weight(path: str, weight: WeightConfig, problems: Problems) -> None:
    problems.one_of(f"{path}.mode", weight.mode, ("none", "group_dro", "inverse_frequency"))
    positive(f"{path}.eta", weight.eta, problems)
    at_least(0, f"{path}.temperature", weight.temperature, problems)


def _check_scorer_stage(path: str, stage: ScorerStageConfig, problems: Problems) -> None:
    _check_mixture(path, stage.mixture, problems)
    if isinstance(stage, CostModelStageConfig) and not stage.mixture.get("safety"):
        problems.add(f"{path}.mixture", "a cost model needs safety pairs: give safety a share above 0")
    if stage.evaluate:
        reason = "found True, but the stage leaves the policy as it was: there is nothing new to judge"
        problems.add(f"{path}.evaluate", reason)
    at_least(0, f"{path}.regularization", stage.regularization, problems)
    _check_weight(f"{path}.weight", stage.weight, problems)
    fraction = stage.held_out_fraction
    problems.expect(0 <= fraction < 1, f"{path}.held_out_fraction", fraction, "a share in [0, 1)")
    at_least(0, f"{path}.eval_every", stage.eval_every, problems)
    if stage.eval_every and not fraction:
        reason = f"found {stage.eval_every}, but held_out_fraction=0 leaves no pairs for it"
        problems.add(f"{path}.eval_every", reason)


def _check_kl(path: str, kl: KLConfig, mixture: Mapping[str, float], problems: Problems) -> None:
    at_least(0, f"{path}.coef", kl.coef, problems)
    problems.one_of(f"{path}.estimator", kl.estimator, ("forward", "reverse", "k3"))
    problems.one_of(f"{path}.on", kl.on, ("chosen", "helpful", "benign"))
    at_least(1, f"{path}.num_benign", kl.num_benign, problems)
    categories = (*problems.categories, HELPFUL)
    for category, coef in kl.per_category.items():
        if category in categories:
            at_least(0, f"{path}.per_category.{category}", coef, problems)
        else:
            problems.unknown(f"{path}.per_category.{category}", category, categories)
        if kl.on == "benign" or (kl.on == "helpful" and category != HELPFUL):
            reason = f"{path}.on={kl.on} penalises answers to harmless prompts alone; set {path}.coef instead"
            problems.add(f"{path}.per_category.{category}", reason)
    if kl.active and kl.on == "helpful" and not mixture.get("helpful"):
        problems.add(f"{path}.on", "found 'helpful', but the stage's mixture has no helpful pairs")
