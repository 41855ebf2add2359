"""How models are read where an engine shards them; that it works in real processes is the matrix' part."""

import os
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from transformers.integrations import is_deepspeed_zero3_enabled

from equipoise.train.sharding import (
    EFFICIENT,
    allocate,
    keep_fp32_outputs,
    own_reference,
    read_in_shards,
    unsharded,
)


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


def test_log_probabilities_are_not_rounded_by_fsdp() -> None:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy="bf16")
    assert plugin.mixed_precision_policy.output_dtype == torch.bfloat16  # accelerate's, which would
    keep_fp32_outputs(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))  # type: ignore[arg-type]
    assert plugin.mixed_precision_policy.output_dtype is None
    assert plugin.mixed_precision_policy.param_dtype == torch.bfloat16
    keep_fp32_outputs(SimpleNamespace(state=SimpleNamespace()))  # type: ignore[arg-type]


def test_tied_tensors_without_memory_stay_tied() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("real", torch.ones(2))
    model.register_buffer("unread", torch.empty(2, device="meta"))
    allocate(model, "cpu", torch.bfloat16)
    assert model[0].weight is model[1].weight
    assert (model[0].weight.device.type, model[0].weight.dtype) == ("cpu", torch.bfloat16)
    assert model.real.tolist() == [1, 1]
    assert (model.unread.device.type, model.unread.dtype) == ("cpu", torch.float32)
