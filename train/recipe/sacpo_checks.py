"""KTO and merge stages that cannot work, found before any model is loaded."""

import math
from collections.abc import Mapping
from pathlib import Path

from equipoise.train.recipe import Recipe
from equipoise.train.recipe.checks import Problems, positive
from equipoise.train.recipe.stages import KTOStageConfig, MergeStageConfig, StageConfig

LABELLED_SOURCES = ("samples", "labelled", "beavertails", "wildguardmix", "aegis2", "do_not_answer")
"""Of `data.source`: those whose answers are labelled one by one; the others are preference pairs."""


def check_kto_stage(path: str, stage: KTOStageConfig, recipe: Recipe, problems: Problems) -> None:
    """Note what is KTO's own; what it shares with preference stages is checked there."""
    source = recipe.data.source.partition("/")[0]
    labelled = recipe.data.unpaired_path is not None or source in LABELLED_SOURCES
    if source == "mixture":
        labelled |= any(part.partition("/")[0] in LABELLED_SOURCES for part in recipe.data.mixture)
    if not stage.split_pairs and not labelled:
        reason = (
            f"found false, but data.source={recipe.data.source} holds preference pairs, and KTO trains on single "
            f"answers: set {path}.split_pairs=true to split each pair in two, or give answers that come unpaired "
            "(data.unpaired_path=FILE)"
        )
        problems.add(f"{path}.split_pairs", reason)
    if stage.per_device_batch_size < 2:
        reason = (
            f"found {stage.per_device_batch_size}, expected at least 2: the reference point is estimated from the "
            "other answers of a forward pass"
        )
        problems.add(f"{path}.per_device_batch_size", reason)
    positive(f"{path}.desirable_weight", stage.desirable_weight, problems)
    if stage.undesirable_weight is not None:
        positive(f"{path}.undesirable_weight", stage.undesirable_weight, problems)
    if stage.category.margin.enabled:
        reason = (
            "found true, but KTO's loss flattens on both sides: a margin would weaken the pull of a category that is "
            "behind; use category.weight or category.multiplier"
        )
        problems.add(f"{path}.category.margin.enabled", reason)


def check_unpaired_is_read(recipe: Recipe, problems: Problems) -> None:
    """A file of unpaired answers that no stage reads is a mistake."""
    read = any(
        isinstance(stage, KTOStageConfig) and not stage.split_pairs for stage in recipe.stages.values()
    )
    file = recipe.data.unpaired_path
    if file is not None and not Path(file).expanduser().is_file():
        problems.add("data.unpaired_path", f"found {file!r}, which is no file")
    elif file is not None and not read:
        problems.add("data.unpaired_path", f"found {file!r}, but no kto stage without split_pairs reads it")


def check_merge_stage(
    path: str, stage: MergeStageConfig, earlier: Mapping[str, StageConfig], recipe: Recipe, problems: Problems
) -> None:
    """Note what cannot be merged; whether the models fit is seen once they are there (`merging.py`)."""
    if stage.start_from is not None:
        reason = f"found {stage.start_from!r}, but a merge starts from first and second; expected null"
        problems.add(f"{path}.start_from", reason)
    for key, source in (("first", stage.first), ("second", stage.second)):
        if not source:
            problems.add(f"{path}.{key}", f"has to be given: {path}.{key}=STAGE, base, or a model folder")
    if stage.first and stage.first == stage.second:
        problems.add(f"{path}.second", f"found {stage.second!r}, which is first too: nothing to merge")
    problems.one_of(f"{path}.of", stage.of, ("weights", "adapters"))
    if stage.of == "adapters":
        _check_adapters(path, stage, earlier, recipe, problems)
    weights = stage.second_weights
    if not weights or len({f"{weight:g}" for weight in weights}) < len(weights):  # they name folders
        problems.expect(False, f"{path}.second_weights", weights, "at least one number, and none twice")
    for weight in weights:
        in_range = 0 <= weight <= 1 and math.isfinite(weight)
        problems.expect(in_range, f"{path}.second_weights", weights, "numbers in [0, 1]")
    problems.expect(
        stage.pass_on in weights, f"{path}.pass_on", stage.pass_on, f"one of second_weights, {weights}"
    )


def _check_adapters(
    path: str, stage: MergeStageConfig, earlier: Mapping[str, StageConfig], recipe: Recipe, problems: Problems
) -> None:
    for key, source in (("first", stage.first), ("second", stage.second)):
        if source == "base":
            problems.add(f"{path}.{key}", "found 'base', which has no adapter; set of=weights")
        elif source in earlier and not recipe.model.lora.enabled:
            reason = f"found {source!r}, which trains without an adapter (model.lora.enabled=false); set of=weights"
            problems.add(f"{path}.{key}", reason)
