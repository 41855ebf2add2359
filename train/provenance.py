"""What a reader of a report needs to do the run again."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version

from equipoise.data.sources import SafetyData
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.stages import PreferenceStageConfig
from equipoise.train.stages.preference import stage_pairs


def provenance(recipe: Recipe, data: SafetyData) -> dict[str, str]:
    """Versions, model and data."""
    packages = ("equipoise", "torch", "transformers", "trl", "peft", "accelerate")
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    found["model"] = recipe.model.id
    found["model revision"] = recipe.model.revision or "default"
    found["data"] = data.summary()
    for name, stage in recipe.stages.items():
        order = stage_pairs(stage, data)[1] if isinstance(stage, PreferenceStageConfig) else None
        if order is not None:
            found[f"data of {name}"] = order.summary()
    found["training pairs (hash)"] = _data_hash(data)
    return found


def _data_hash(data: SafetyData) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for pair in [*data.safety_pairs, *data.helpful_pairs]:
        digest.update(repr((pair.prompt, pair.chosen, pair.rejected, pair.category)).encode())
    return digest.hexdigest()
