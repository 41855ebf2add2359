"""What a recipe asks of its data, checked once both are there: before a model is loaded or anything is written."""

from collections.abc import Collection, Mapping

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL
from equipoise.data.sources import SafetyData
from equipoise.train.recipe import Recipe
from equipoise.train.recipe_checks import Problems, near_misses
from equipoise.train.recipe_stages import KLConfig, PreferenceStageConfig
from equipoise.train.stages.preference import stage_pairs


def check_data(recipe: Recipe, data: SafetyData) -> None:
    """Raise RecipeError with every key of a stage that the data cannot serve."""
    problems = Problems(raw={})
    for name, stage in recipe.stages.items():
        path = f"stages.{name}"
        if isinstance(stage, PreferenceStageConfig):
            _check_pairs(path, stage, data, problems)
    problems.raise_if_any()


def _check_pairs(path: str, stage: PreferenceStageConfig, data: SafetyData, problems: Problems) -> None:
    check_mixture(path, stage.mixture, data, problems)
    try:
        pairs, _ = stage_pairs(stage, data)
    except DataError as error:
        problems.add(f"{path}.loss", str(error))
        return
    check_kl(f"{path}.kl", stage.kl, {pair.category for pair in pairs}, data, problems)


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
            hint = near_misses(category, present)
            reason = f"nothing that this stage trains on has this category; {hint}occurring: {occurring}"
            problems.add(f"{key}.{category}", reason)
