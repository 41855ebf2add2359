"""What cannot work in a recipe's token-bias stages and penalties, found before any model is loaded."""

import math
from collections.abc import Mapping
from pathlib import Path

from equipoise.train.recipe import Recipe
from equipoise.train.recipe.checks import Problems, at_least, check_path
from equipoise.train.recipe.stages import (
    LogRatioStageConfig,
    ScorerStageConfig,
    StageConfig,
    TokenBiasPenaltyConfig,
    TokenBiasStageConfig,
)

BASE = "base"
POOLS = ("vocabulary", "words", "file")


def check_token_bias_stage(
    name: str,
    stage: TokenBiasStageConfig,
    earlier: Mapping[str, StageConfig],
    recipe: Recipe,
    problems: Problems,
) -> None:
    """Note what cannot work in a token_bias stage; `earlier` are the stages before it."""
    path = f"stages.{name}"
    for key in ("num_prompts", "num_positions", "prompt_tokens", "batch_size"):
        at_least(1, f"{path}.{key}", getattr(stage, key), problems)
    for key in ("seed", "num_diagnosed"):
        at_least(0, f"{path}.{key}", getattr(stage, key), problems)
    _check_alpha(f"{path}.alpha", stage.alpha, stage.num_positions, problems)
    problems.one_of(f"{path}.space", stage.space, ("log_prob", "logit"))
    problems.one_of(f"{path}.continuation", stage.continuation, ("random", "aligned"))
    problems.expect(
        0 <= stage.plausibility < 1, f"{path}.plausibility", stage.plausibility, "a share in [0, 1)"
    )
    problems.one_of(f"{path}.pool", stage.pool, POOLS)
    check_path(path, "pool", "file", stage.pool, stage.path, problems)
    if not earlier and stage.start_from is None:
        problems.add(path, "a token_bias stage measures the stage before it, so it can't come first")
    elif stage.one_backbone:
        _check_one_backbone(f"{path}.one_backbone", stage, earlier, recipe, problems)


def _check_alpha(key: str, alpha: object, num_positions: int, problems: Problems) -> None:
    values = alpha if isinstance(alpha, list) else [alpha]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    fits = len(values) == num_positions or not isinstance(alpha, list)
    possible = all(math.isfinite(v) and v >= 0 for v in numbers) and len(numbers) == len(values)
    expected = f"a number of 0 or more, or a list of num_positions={num_positions} of them"
    problems.expect(fits and possible, key, alpha, expected)


def _check_one_backbone(
    key: str,
    stage: TokenBiasStageConfig,
    earlier: Mapping[str, StageConfig],
    recipe: Recipe,
    problems: Problems,
) -> None:
    """The policy has to be an adapter, and what that was trained on the reference."""
    if not recipe.model.lora.enabled:
        problems.add(key, "found True, but model.lora.enabled=false leaves no adapter to switch off")
        return
    trained = _policy_of(stage.start_from, earlier)
    if not isinstance(earlier.get(trained), LogRatioStageConfig):
        reason = (
            f"found True, but the policy is {trained!r}, which is no preference or kto stage with an adapter"
        )
        problems.add(key, reason)
        return
    names = list(earlier)
    before = {name: earlier[name] for name in names[: names.index(trained)]}
    start = _policy_of(earlier[trained].start_from, before)
    if start != stage.reference:
        reason = (
            f"found True, but the adapter of {trained!r} was trained on {start!r}: reference has to be that"
        )
        problems.add(key, reason)


def _policy_of(source: str | None, earlier: Mapping[str, StageConfig]) -> str:
    """Which stage made the policy that `start_from: source` means: its name, `base` or a folder."""
    if source is not None and source not in earlier:
        return source if source == BASE else str(Path(source))
    names = list(earlier)
    name = source if source is not None else (names[-1] if names else BASE)
    stage = earlier.get(name)
    if isinstance(stage, TokenBiasStageConfig | ScorerStageConfig):  # it passes the policy on
        return _policy_of(stage.start_from, {k: earlier[k] for k in names[: names.index(name)]})
    return name


def check_penalty(path: str, penalty: TokenBiasPenaltyConfig, problems: Problems) -> None:
    """Note what cannot work in a token-bias penalty."""
    at_least(0, f"{path}.coef", penalty.coef, problems)
    for key in ("every", "num_contexts", "num_positions", "prompt_tokens"):
        at_least(1, f"{path}.{key}", getattr(penalty, key), problems)
    problems.one_of(f"{path}.pool", penalty.pool, POOLS)
    check_path(path, "pool", "file", penalty.pool, penalty.path, problems)
