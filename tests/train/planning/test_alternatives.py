"""What is proposed where a plan does not fit: worked out by the same formulas, the cheapest first, and it does fit."""

from dataclasses import replace
from typing import Any

import pytest

from equipoise.train.planning.alternatives import Alternative, alternatives
from equipoise.train.planning.engine import Engine
from equipoise.train.planning.memory import ModelSize, Training
from equipoise.train.planning.stage_plans import StagePlan
from equipoise.train.recipe.stages import MergeStageConfig, PreferenceStageConfig

LLAMA_7B = ModelSize(6_738_415_616, 32, 4096, 4096, 4096, 11008, 32000)
LORA = Training(LLAMA_7B, width=2, rank=16, checkpointing=False, frozen_copy=False)
FULL = replace(LORA, rank=None)
STAGE = PreferenceStageConfig(per_device_batch_size=8, gradient_accumulation_steps=2)
ROW = StagePlan(lambda training, batch_size: training.policy(batch_size * 1024, reference=False))
GIB = 2**30


def ways(training: Training, gib: float, **others: Any) -> list[Alternative]:
    rows = {"safe": ROW}
    return alternatives({"safe": STAGE, **others}, rows, training, gib * GIB)


def peak(training: Training, batch_size: int = 8) -> float:
    return ROW.needs(training, batch_size).total / GIB


def test_smaller_passes_before_recomputing_before_other_trainings() -> None:
    """64 GiB asked for, 40 at hand: half the pairs a pass and twice the passes, or checkpointing; on one GPU."""
    assert peak(LORA) == pytest.approx(64.4, abs=0.1)
    found = ways(LORA, 40)
    assert found[0].changes == (
        "stages.safe.per_device_batch_size=4",
        "stages.safe.gradient_accumulation_steps=4",
    )
    assert found[0].memory.total / GIB == pytest.approx(peak(LORA, 4))
    assert found[1].changes == ("model.gradient_checkpointing=true",)
    assert found[1].memory.total / GIB == pytest.approx(peak(replace(LORA, checkpointing=True)))
    assert (found[0].passes, found[1].passes) == (1, 1.5)
    assert "1.5 times the computing" in str(found[1])
    assert found[2].changes[0] == "model.quantization=nf4"


def test_both_where_neither_is_enough() -> None:
    checkpointed = replace(LORA, checkpointing=True)
    room = peak(checkpointed, 1) + 0.01
    assert peak(LORA, 1) > room < peak(checkpointed, 2)
    first = ways(LORA, room)[0]
    assert first.changes == (
        "model.gradient_checkpointing=true",
        "stages.safe.per_device_batch_size=1",
        "stages.safe.gradient_accumulation_steps=16",
    )


def test_fewer_devices_before_more() -> None:
    """Full fine-tuning in 24 GiB: adapters on one GPU, offloading on one, sharding over as few as do."""
    found = ways(FULL, 24)
    devices = [way.cost[0] for way in found]
    assert devices == sorted(devices)
    assert found[0].changes[0] == "model.lora.enabled=true"
    offloading = next(way for way in found if "zero3_offload" in way.launch)
    assert offloading.memory.host / GIB == pytest.approx(16 * LLAMA_7B.num_parameters / GIB)
    (sharded,) = (way for way in found if "fsdp2" in way.launch)
    assert "model.lora" not in str(sharded)  # adapters on more devices are needless where they fit on one
    assert peak(replace(FULL, engine=Engine("fsdp2", sharded.cost[0])), 1) <= 24
    assert peak(replace(FULL, engine=Engine("fsdp2", sharded.cost[0] // 2)), 1) > 24


@pytest.mark.parametrize(
    "training", [LORA, FULL, replace(LORA, engine=Engine("ddp", 8))], ids=["lora", "full", "ddp"]
)
@pytest.mark.parametrize("gib", [10, 20, 40])
def test_everything_that_is_proposed_fits(training: Training, gib: float) -> None:
    found = ways(training, gib)
    assert len(found) <= 6
    for way in found:
        assert way.memory.total <= gib * GIB
        assert way.changes or way.launch
    assert len({(way.changes, way.launch) for way in found}) == len(found)


def test_four_bits_and_sharded_weights_are_not_combined() -> None:
    for way in ways(LORA, 8):
        assert not ("nf4" in str(way) and any(name in way.launch for name in ("zero3", "fsdp2")))


def test_nothing_fits_where_one_stage_never_does() -> None:
    """A merge holds a file of weights whatever the launch: no proposal hides it."""
    rows = {
        "safe": ROW,
        "merged": StagePlan(lambda training, _: replace(training.policy(0, False), states=4e12)),
    }
    stages = {"safe": STAGE, "merged": MergeStageConfig()}
    assert alternatives(stages, rows, LORA, 80 * GIB) == []
