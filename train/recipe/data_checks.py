"""What a recipe asks of its data, checked once both are there: before a model is loaded or anything is written."""

from collections.abc import Collection, Mapping

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL
from equipoise.data.sources import SafetyData
from equipoise.train.recipe import DataConfig, Recipe
from equipoise.train.recipe.checks import Problems
from equipoise.train.recipe.rl import GRPOStageConfig, SafeRLHFStageConfig
from equipoise.train.recipe.safe_rlhf_checks import constrained
from equipoise.train.recipe.stages import (
    KLConfig,
    KTOStageConfig,
    LogRatioStageConfig,
    PreferenceStageConfig,
    ScorerStageConfig,
    SFTStageConfig,
)
from equipoise.train.scorer_pairs import scorer_pairs
from equipoise.train.stage_tasks import stage_tasks
from equipoise.train.stages.kto import stage_examples, subset_of
from equipoise.train.stages.preference import stage_pairs
from equipoise.train.stages.safe_rlhf import stage_prompts
from equipoise.train.stages.sft import safe_choices


def check_data(recipe: Recipe, data: SafetyData) -> None:
    """Raise RecipeError with every key of a stage that the data cannot serve."""
    problems = Problems(raw={})
    for name, stage in recipe.stages.items():
        path = f"stages.{name}"
        if isinstance(stage, PreferenceStageConfig):
            _check_pairs(path, stage, data, problems)
        elif isinstance(stage, KTOStageConfig):
            _check_examples(path, stage, recipe.data, data, problems)
        elif isinstance(stage, SafeRLHFStageConfig):
            check_mixture(path, stage.mixture, data, problems)
            _check_constraint(path, stage, data, problems)
        elif isinstance(stage, GRPOStageConfig):
            _check_tasks(path, stage, data, recipe.seed, problems)
        elif isinstance(stage, SFTStageConfig) and stage.tasks_of is None:
            check_mixture(path, stage.mixture, data, problems)
            answers, num_unsafe = safe_choices(stage, data)
            if num_unsafe and not answers:
                problems.add(f"{path}.mixture", f"all {num_unsafe} chosen answers are labelled unsafe")
            check_kl(f"{path}.kl", stage.kl, {pair.category for pair in answers}, data, problems)
        elif isinstance(stage, ScorerStageConfig):
            check_mixture(path, stage.mixture, data, problems)
            _check_labels(path, stage, data, problems)
    problems.raise_if_any()


def _check_pairs(path: str, stage: PreferenceStageConfig, data: SafetyData, problems: Problems) -> None:
    check_mixture(path, stage.mixture, data, problems)
    try:
        pairs, _ = stage_pairs(stage, data)
    except DataError as error:
        problems.add(f"{path}.loss", str(error))
        return
    _check_per_category(path, stage, {pair.category for pair in pairs}, data, problems)


def _check_examples(
    path: str, stage: KTOStageConfig, config: DataConfig, data: SafetyData, problems: Problems
) -> None:
    try:
        examples = stage_examples(stage, config, data).exchanges
    except DataError as error:
        problems.add("data.unpaired_path", str(error))
        return
    for subset, share in stage.mixture.items():
        if share > 0 and not any(subset_of(example) == subset for example in examples):
            reason = f"found {share}, but there are no {subset} answers to train on; set it to 0 or add such answers"
            problems.add(f"{path}.mixture.{subset}", reason)
    _check_per_category(path, stage, {example.category for example in examples}, data, problems)


def _check_per_category(
    path: str, stage: LogRatioStageConfig, present: Collection[str], data: SafetyData, problems: Problems
) -> None:
    category = stage.category
    for key, values in (
        ("margin.targets", category.margin.targets),
        ("multiplier.targets", category.multiplier.targets),
        ("multiplier.initial", category.multiplier.initial),
    ):
        check_categories(f"{path}.category.{key}", values, present, problems)
    check_kl(f"{path}.kl", stage.kl, present, data, problems)


def _check_labels(path: str, stage: ScorerStageConfig, data: SafetyData, problems: Problems) -> None:
    try:
        scorer_pairs(stage, data)
    except DataError as error:
        problems.add(f"{path}.kind", str(error))


def _check_tasks(path: str, stage: GRPOStageConfig, data: SafetyData, seed: int, problems: Problems) -> None:
    try:
        stage_tasks(stage, data, seed)
    except DataError as error:
        problems.add(path, str(error))


def _check_constraint(path: str, stage: SafeRLHFStageConfig, data: SafetyData, problems: Problems) -> None:
    present = {pair.category for pair in stage_prompts(stage, data)}
    check_categories(f"{path}.multiplier.thresholds", stage.multiplier.thresholds, present, problems)
    if stage.multiplier.per_category and present and not constrained(stage.multiplier, sorted(present)):
        problems.add(
            f"{path}.multiplier.per_category",
            "found true, but no prompt that this stage trains on has a harm category to constrain",
        )
    if stage.ptx_coef and not data.helpful_pairs:
        problems.add(
            f"{path}.ptx_coef",
            f"found {stage.ptx_coef}, but the data has no helpful pairs, whose chosen answers it is about; set it to 0",
        )


def check_mixture(path: str, mixture: Mapping[str, float], data: SafetyData, problems: Problems) -> None:
    """Note a share of pairs that the data does not have."""
    for subset, pairs in (("safety", data.safety_pairs), ("helpful", data.helpful_pairs)):
        if mixture.get(subset, 0) > 0 and not pairs:
            reason = (
                f"found {mixture[subset]}, but the data has no {subset} pairs; set it to 0 or add such pairs"
            )
            problems.add(f"{path}.mixture.{subset}", reason)


def check_kl(path: str, kl: KLConfig, present: Collection[str], data: SafetyData, problems: Problems) -> None:
    """Note a coefficient of a category that the stage does not train on, and benign answers that are not there."""
    check_categories(f"{path}.per_category", kl.per_category, present, problems)
    if kl.coef and kl.on == "benign" and not data.helpful_pairs:
        problems.add(
            f"{path}.on", "found 'benign', but the data has no helpful pairs to take benign answers from"
        )


def check_categories(
    key: str, per_category: Collection[str], present: Collection[str], problems: Problems
) -> None:
    """Note every key of `per_category` whose category is not `present` in the stage's training data."""
    for category in per_category:
        if category not in present:
            occurring = ", ".join(sorted(present, key=lambda c: (c == HELPFUL, len(c), c)))
            reason = f"nothing that this stage trains on has this category; occurring: {occurring}"
            problems.add(f"{key}.{category}", reason)
