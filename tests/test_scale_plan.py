"""The plan's formulas against values worked out by hand."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from equipoise.train.planning.engine import LIVE_PARAMETERS, Engine
from equipoise.train.planning.machine import GPU, GPUS

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("scaling.model")


def test_parameters_are_those_published(model: Any) -> None:
    """As the models' own weight files count them."""
    counted = {name: size.num_parameters for name, size in model.MODELS.items()}
    assert counted == {"7B": 6_738_415_616, "70B": 68_976_648_192, "405B": 405_853_388_800}


def small(model: Any, rank: int | None = None) -> Any:
    """P = 2 (2 * 16 + 2 * 16 + 3 * 32 + 8) + 2 * 10 * 4 + 4 = 420: hidden 4, one head, inner 8, vocabulary 10."""
    size = model.llama(num_layers=2, hidden=4, heads=1, key_heads=1, inner=8, vocab=10)
    assert size.num_parameters == 420
    return model.training_of(size, rank)


def spread(training: Any, engine: str, num_gpus: int) -> Any:
    return replace(training, engine=Engine(engine, num_gpus))


def without_activations(training: Any, engine: str, num_gpus: int) -> float:
    memory = spread(training, engine, num_gpus).policy(1, reference=False)
    return memory.total - memory.activations - memory.logits


def traffic(training: Any, engine: str, num_gpus: int) -> float:
    return spread(training, engine, num_gpus).engine.traffic(spread(training, engine, num_gpus))


@pytest.mark.parametrize(
    ("engine", "bytes_of_states"),
    [
        ("zero2", 840 + 14 * 420 / 4),
        ("zero3", 16 * 420 / 4 + 840),  # a small model is gathered whole
        ("fsdp2", 16 * 420 / 4 + 2 * 420),  # and so is one of two layers
    ],
)
def test_memory_by_hand(model: Any, engine: str, bytes_of_states: float) -> None:
    assert without_activations(small(model), engine, 4) == pytest.approx(bytes_of_states)


def test_zero_as_published(model: Any) -> None:
    """ZeRO (1910.02054), figure 1: 7.5B parameters on 64 GPUs, 16.6 GB at stage 2 and 1.9 GB at stage 3."""
    size = model.llama(num_layers=1, hidden=1, heads=1, key_heads=1, inner=1, vocab=1)
    object.__setattr__(size, "num_parameters", int(7.5e9))
    training = model.training_of(size, None)
    gathered = 2 * LIVE_PARAMETERS
    assert without_activations(training, "zero2", 64) / 1e9 == pytest.approx(16.6, abs=0.05)
    assert (without_activations(training, "zero3", 64) - gathered) / 1e9 == pytest.approx(1.9, abs=0.05)


def test_lora_states_by_hand(model: Any) -> None:
    """A = 2 layers * r 2 * (2 * 8 + 2 * 8 + 3 * 12) = 272; 18 A in all, of which ZeRO-2 keeps 6 A on every GPU."""
    training = small(model, rank=2)
    assert training.size.adapter_parameters(2) == 272
    assert without_activations(training, "zero2", 4) == pytest.approx(840 + 6 * 272 + 12 * 272 / 4)
    assert without_activations(training, "fsdp2", 4) == pytest.approx(840 / 4 + 18 * 272 / 4 + 840)


def test_traffic_by_hand(model: Any) -> None:
    full, lora = small(model), small(model, rank=2)
    assert traffic(full, "zero2", 4) == pytest.approx(2 * 2 * 420 * 3 / 4)
    assert traffic(full, "zero3", 4) == pytest.approx(3 * 2 * 420 * 3 / 4)
    assert traffic(lora, "zero2", 4) == pytest.approx(2 * 2 * 272 * 3 / 4)
    assert traffic(lora, "fsdp2", 4) == pytest.approx(2 * (2 * 420 + 272) * 3 / 4)
    assert traffic(full, "fsdp2", 1) == 0


def test_flops_by_hand(model: Any) -> None:
    """A token's forward pass: 2 * 420 + 2 * 2 * 4 * T of attention."""
    forward = (840 + 16 * 10) * 5
    full, lora = small(model), small(model, rank=2)
    assert model.flops(full, 5, 10, recomputed=True) == 4 * forward
    assert model.flops(full, 5, 10, recomputed=False) == 3 * forward
    assert model.flops(lora, 5, 10, recomputed=True) == 3 * forward


def test_efficiency_of_a_step(model: Any) -> None:
    """Without traffic 3 of 4 computed passes are useful: MFU is 3/4 of the kernels' efficiency."""
    alone = model.step(small(model), "fsdp2", 1, 5, 10, GPUS["h100"], kernel_efficiency=0.4)
    assert alone.efficiency == (pytest.approx(0.3), pytest.approx(0.3))
    gpu = GPU(memory=1e6, flops=1e6, within_node=1e4, between_nodes=1e3)
    slow = model.step(small(model), "zero2", 16, 5, 10, gpu, kernel_efficiency=0.5)
    assert slow.compute_seconds == pytest.approx(4 * 5000 / 0.5e6)
    assert slow.traffic_seconds == pytest.approx(4 * 420 * 15 / 16 / 1e3)  # more than a node: the network
    low, high = slow.efficiency
    assert low == pytest.approx(15000 / 1e6 / (slow.compute_seconds + slow.traffic_seconds))
    assert high == pytest.approx(15000 / 1e6 / slow.traffic_seconds)


def test_what_fits(model: Any) -> None:
    """The table's landmarks: 70B in full needs more than one node, 405B more than 64 GPUs, LoRA 70B fits 8."""
    h100 = GPUS["h100"]

    def fits(name: str, engine: str, num_gpus: int, rank: int | None = None) -> bool:
        training = model.training_of(model.MODELS[name], rank)
        return model.step(training, engine, num_gpus, 8192, 1024, h100, 0.5).fits

    assert fits("7B", "zero3", 8)
    assert not fits("70B", "zero3", 8)
    assert fits("70B", "zero3", 64)
    assert not fits("70B", "zero2", 1024)
    assert fits("70B", "fsdp2", 8, rank=16)
    assert not fits("405B", "zero3", 64)
    assert fits("405B", "zero3", 1024)
