"""How models are read where an engine shards them; that it works in real processes is the matrix' part."""

import os
from types import ModuleType

import pytest
import torch
from accelerate import PartialState
from transformers.integrations import is_deepspeed_zero3_enabled

from equipoise.train.sharding import EFFICIENT, own_reference, read_in_shards, unsharded


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("efficient", [None, "true", "false"])
def test_under_fsdp_one_rank_of_a_machine_reads(
    efficient: str | None, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    monkeypatch.delenv(EFFICIENT, raising=False)
    if efficient is not None:
        monkeypatch.setenv(EFFICIENT, efficient)
    monkeypatch.setattr(PartialState(), "local_process_index", rank)
    before = dict(os.environ)
    with read_in_shards("float32", "fsdp2") as device_map:
        assert device_map == ({"": "meta"} if rank and efficient != "false" else None)
        assert os.environ.get("ACCELERATE_USE_FSDP") == (None if efficient == "false" else "true")
        with unsharded():
            assert "ACCELERATE_USE_FSDP" not in os.environ
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
