"""How models are read where an engine shards them; that it works in real processes is the matrix' part."""

import os
from types import ModuleType

import pytest
import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from equipoise.train.sharding import own_reference, read_in_shards, unsharded


@pytest.mark.parametrize("efficient", [None, "false"])
def test_fsdp_is_told_to_transformers_and_the_environment_is_put_back(
    efficient: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.delenv("FSDP_CPU_RAM_EFFICIENT_LOADING", raising=False)
    if efficient is not None:
        monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", efficient)
    before = dict(os.environ)
    with read_in_shards("float32", "fsdp2"):
        assert os.environ["ACCELERATE_USE_FSDP"] == "true"
        assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == (efficient or "true")
        with unsharded():
            assert "ACCELERATE_USE_FSDP" not in os.environ
        assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    assert dict(os.environ) == before


def test_zero_3_is_told_to_transformers_and_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    with read_in_shards("bfloat16", "zero3"):
        assert is_deepspeed_zero3_enabled()
        with read_in_shards("bfloat16", "ddp"):
            assert not is_deepspeed_zero3_enabled()
        assert is_deepspeed_zero3_enabled()
    assert not is_deepspeed_zero3_enabled()


def test_trl_takes_our_reference_and_is_put_back() -> None:
    module, ours = ModuleType("trainer"), torch.nn.Linear(1, 1)
    theirs = {"create_model_from_path": object(), "hash_module": object()}
    vars(module).update(theirs)
    with own_reference(module, ours):
        assert module.create_model_from_path("a model", dtype="float32") is ours
        assert module.hash_module(ours) is None
        assert not hasattr(module, "prepare_fsdp")  # not every trainer shards one
    assert {name: getattr(module, name) for name in theirs} == theirs
