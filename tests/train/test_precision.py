"""A launch's precision and the recipe's."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers.training_args import TrainingArguments

from equipoise.train.precision import MIXED_PRECISION, agree_on_precision
from equipoise.train.recipe import ModelConfig, RecipeError


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests set is taken back, whoever sets it."""
    monkeypatch.setenv(MIXED_PRECISION, "no")


@pytest.mark.parametrize("launched", ["no", "bf16"])
@pytest.mark.parametrize(("dtype", "trained"), [("float32", "no"), ("bfloat16", "bf16")])
def test_the_recipe_decides(launched: str, dtype: str, trained: str, tmp_path: Path) -> None:
    """A file for `accelerate launch` says bf16: transformers would train float32 weights in bf16 autocast."""
    os.environ[MIXED_PRECISION] = launched
    said: list[str] = []
    agree_on_precision(ModelConfig(dtype=dtype), said.append)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), bf16=dtype == "bfloat16", use_cpu=True, report_to=[]
    )
    assert arguments.mixed_precision == trained
    assert len(said) == ((launched, trained) == ("bf16", "no"))


def test_formats_that_no_recipe_has_are_refused() -> None:
    os.environ[MIXED_PRECISION] = "fp16"
    with pytest.raises(RecipeError, match=r"asks for mixed_precision=fp16.*set model\.dtype"):
        agree_on_precision(ModelConfig(), print)


def deepspeed(monkeypatch: pytest.MonkeyPatch, stage: str = "2", **environment: str) -> None:
    names = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": stage, **environment}
    for name, value in names.items():
        monkeypatch.setenv(name, value)


def test_a_deepspeed_file_that_insists_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "ds.json"
    content: dict[str, Any] = {
        "zero_optimization": {"stage": 2},
        "train_batch_size": "auto",
        "bf16": {"enabled": True},
    }
    file.write_text(json.dumps(content))
    deepspeed(monkeypatch, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file))
    with pytest.raises(RecipeError, match=r"sets bf16\.enabled, and model\.dtype=float32"):
        agree_on_precision(ModelConfig(dtype="float32"), print)
    agree_on_precision(ModelConfig(dtype="bfloat16"), print)


def test_four_bits_are_not_sharded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(dtype="float32", quantization="nf4")
    agree_on_precision(config, print)
    deepspeed(monkeypatch)
    agree_on_precision(config, print)
    deepspeed(monkeypatch, stage="3")
    with pytest.raises(RecipeError, match=r"zero3.*ddp\.yaml or zero2\.yaml"):
        agree_on_precision(config, print)


def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"FSDP 1.*fsdp_version: 2"):
        agree_on_precision(ModelConfig(dtype="float32"), print)
    monkeypatch.setenv("FSDP_VERSION", "2")
    agree_on_precision(ModelConfig(dtype="float32"), print)
