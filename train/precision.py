"""What a launch and a recipe both say of numbers' formats: the recipe decides, and what cannot be is refused."""

import os
from collections.abc import Callable

from accelerate.utils import DeepSpeedPlugin

from equipoise.train.planning.engine import SHARDED, Engine
from equipoise.train.recipe import ModelConfig, RecipeError

MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
"""Environment variable of `accelerate launch`; transformers trains in bf16 where it says so."""


def agree_on_precision(config: ModelConfig, say: Callable[[str], None]) -> None:
    """Make the launch's mixed precision that of `model.dtype`, and say where it was another; `native` is resolved.

    Raises RecipeError for a format that no recipe has, for a DeepSpeed file that insists on another, for 4-bit weights
    under an engine that shards them, and for the first version of FSDP.
    """
    wanted = "bf16" if config.dtype == "bfloat16" else "no"
    found = os.environ.get(MIXED_PRECISION, "no")
    if found not in ("no", "bf16"):
        raise RecipeError(
            f"the launch asks for mixed_precision={found}, and recipes train in bfloat16 or float32: launch with "
            "mixed_precision 'no' and set model.dtype"
        )
    if (found, wanted) == ("bf16", "no"):
        say(f"the launch's mixed_precision=bf16 is not followed: model.dtype={config.dtype}")
    os.environ[MIXED_PRECISION] = wanted
    engine = Engine.launched()
    if engine.name == "fsdp2" and os.environ.get("FSDP_VERSION", "1") != "2":
        raise RecipeError(
            "the launch asks for FSDP 1, and models are sharded by FSDP 2: set fsdp_version: 2 in its file, as in "
            "recipes/accelerate/fsdp2.yaml"
        )
    if engine.name.startswith("zero"):
        _check_deepspeed(config, wanted)
    if config.quantization != "none" and engine.name in SHARDED:
        raise RecipeError(
            f"model.quantization={config.quantization} and {engine.name}, which would shard packed weights, were never "
            "tried together here: take recipes/accelerate/ddp.yaml or zero2.yaml (four bits are a quarter of bf16), or "
            "model.quantization=none"
        )


def _check_deepspeed(config: ModelConfig, wanted: str) -> None:
    file = DeepSpeedPlugin().deepspeed_config
    for key in ("bf16", "fp16"):
        enabled = file.get(key, {}).get("enabled", "auto")
        if enabled is not True and enabled != "true":
            continue
        if key != wanted:
            raise RecipeError(
                f"the DeepSpeed file sets {key}.enabled, and model.dtype={config.dtype}: set it to auto, or "
                f"{'model.dtype=bfloat16' if key == 'bf16' else 'bf16.enabled with model.dtype=bfloat16'}"
            )
