"""What engines hold and send, against values worked out by hand (P 420, A 272; see tests/test_scale_plan.py too)."""

from dataclasses import replace
from typing import Any

import pytest

from equipoise.train.planning.engine import Engine
from equipoise.train.planning.memory import NF4_BYTES, ModelSize, Training

SMALL = ModelSize(420, 2, 4, 4, 4, 8, 10)
assert SMALL.adapter_parameters(2) == 272


def setup(rank: int | None = None, width: int = 2, **keys: Any) -> Training:
    return Training(SMALL, width, rank, False, False, **keys)


@pytest.mark.parametrize(
    ("engine", "full", "lora"),
    [
        (Engine("single"), 6 * 420, 18 * 272),
        (Engine("ddp", 4), 8 * 420, 22 * 272),
        (Engine("zero1", 4), 2 * 420 + 12 * 420 / 4, (8 + 2 + 8 / 4) * 272),
        (Engine("zero2", 4), 14 * 420 / 4, (4 + 2 + 12 / 4) * 272),
        (Engine("zero3", 4), 14 * 420 / 4, 18 * 272 / 4),
        (Engine("fsdp2", 4), 14 * 420 / 4, 18 * 272 / 4),
    ],
    ids=str,
)
def test_states_by_hand(engine: Engine, full: float, lora: float) -> None:
    assert engine.states(setup()) == pytest.approx(full)
    assert engine.states(setup(rank=2)) == pytest.approx(lora)


def test_one_process_holds_what_the_engine_would_share() -> None:
    """Over one process nothing is shared: ZeRO's fp32 copies and moments are what is left of the difference."""
    assert Engine("fsdp2", 1).states(setup(width=4)) == Engine("single").states(setup(width=4))
    assert Engine("zero3", 1).states(setup(rank=2)) == Engine("single").states(setup(rank=2))
    assert [Engine(name, 4).weights(100.0) for name in ("ddp", "zero2", "zero3", "fsdp2")] == [
        100,
        100,
        25,
        25,
    ]


def test_what_is_offloaded_waits_in_the_machines_memory() -> None:
    training = setup(engine=Engine("zero3", 4, "all"))
    memory = training.policy(1, reference=False)
    assert memory.weights == 0
    assert memory.host == pytest.approx((14 + 2) * 420 / 4)  # 16 bytes a parameter over all devices
    assert memory.states == 2 * 420  # the bucket that gradients pass through: a small model's are all in it
    assert memory.gathered == 2 * 420
    optimizer = replace(training, engine=Engine("zero2", 4, "optimizer")).policy(1, reference=False)
    assert (optimizer.weights, optimizer.host) == (840, pytest.approx(14 * 420 / 4))


def test_four_bits_by_hand() -> None:
    """4 bits, 8 a block of 64, 32 a 256 blocks: 4.127 bits a weight (QLoRA, section 3), the embeddings in bf16."""
    assert pytest.approx(4.127, abs=5e-4) == NF4_BYTES * 8
    training = setup(rank=2, quantised=True)
    embeddings = 2 * 10 * 4
    assert SMALL.block_parameters == 420 - embeddings
    assert training.weights == pytest.approx(NF4_BYTES * (420 - embeddings) + 2 * embeddings)
    assert training.policy(1, reference=False).gathered == 2 * 4 * 8  # the largest matrix, in bf16
    assert training.whole == 840  # as it is judged


def test_the_launch_is_read_from_accelerates_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Engine.launched() == Engine("single", 1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    assert Engine.launched() == Engine("fsdp2", 1, "all")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert Engine.launched() == Engine("zero3", 1)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    assert Engine.launched() == Engine("zero3", 1, "optimizer")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "cpu")
    assert Engine.launched() == Engine("zero3", 1, "all")
