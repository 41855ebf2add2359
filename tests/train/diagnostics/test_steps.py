"""Speed, memory and profiles of a stage's steps."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model

from equipoise.data.schema import HELPFUL
from equipoise.train.diagnostics.speed import PassCounter, passed_parameters
from equipoise.train.diagnostics.steps import decoder_of
from equipoise.train.planning import machine, phase_memory
from equipoise.train.recipe import LoraConfig
from equipoise.train.recipe.measuring import DiagnosticsConfig, ProfileConfig
from equipoise.train.recipe.stages import SFTStageConfig
from equipoise.train.stages.sft import run_sft

BLOCKS = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32) + 32
"""The tiny Llama's weights without embeddings and head."""


def test_flops_by_hand(tiny_model: Any) -> None:
    """2 N a token forward, 6 N with a backward pass through trained weights, 4 N through frozen ones."""
    ids = torch.zeros(3, 5, dtype=torch.long)
    assert passed_parameters(decoder_of(tiny_model)) == (BLOCKS, 2)
    counter = PassCounter([decoder_of(tiny_model)])
    with torch.no_grad():
        tiny_model(input_ids=ids)
    assert counter.take() == (0, 2 * BLOCKS * 15)
    tiny_model(input_ids=ids)
    assert counter.take() == (15, 6 * BLOCKS * 15)
    counter.close()
    tiny_model(input_ids=ids)
    assert counter.take() == (0, 0)

    adapted: Any = get_peft_model(
        tiny_model, PeftLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    counter = PassCounter([decoder_of(adapted)])
    adapted(input_ids=ids)
    assert counter.take() == (15, 4 * BLOCKS * 15)


def test_two_weights_of_a_byte_are_two_weights(tiny_model_folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra equipoise[quantization] is not installed")
    from equipoise.train.model import load_trainable
    from equipoise.train.recipe import ModelConfig

    model, _ = load_trainable(
        ModelConfig(id=str(tiny_model_folder), dtype="float32", quantization="nf4"), None
    )
    assert passed_parameters(decoder_of(model.requires_grad_(False))) == (BLOCKS, 1)


@pytest.mark.parametrize("lora", [True, False])
def test_speeds_of_a_stage(
    lora: bool, train_stage: Any, make_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logged every second step, apart from the metrics, and consistent with one another."""
    monkeypatch.setattr("equipoise.train.diagnostics.steps.peak_flops", lambda dtype: 1e9)
    logged: list[tuple[int, dict[str, float]]] = []
    trained = train_stage(
        make_stage(log_every=2, per_device_batch_size=4, gradient_accumulation_steps=2),
        model={"lora": LoraConfig(enabled=lora)},
        log_speed=lambda speeds, step, stage: logged.append((step, speeds)),
    )
    assert [step for step, _ in logged] == [2, 4]
    assert not any(name.startswith("speed/") for line in trained.metrics for name in line)
    for _, speeds in logged:
        seconds = speeds["speed/seconds_per_step"]
        assert seconds > 0
        assert speeds["speed/pairs_per_second"] * seconds == pytest.approx(8)
        tokens = speeds["speed/tokens_per_second"] * seconds
        assert 8 * 60 < tokens < 8 * 160  # the pairs have 60 to 110 tokens each, and there is padding
        if phase_memory._can_reset():  # else the system does not tell
            assert 0.1 < speeds["speed/peak_memory_gib"] <= phase_memory.highest_resident_set() / 2**30
        passes = 2 if lora else 3
        assert speeds["speed/mfu"] * 1e9 * seconds == pytest.approx(passes * 2 * BLOCKS * tokens)


def test_a_profile_of_the_steps_that_were_asked_for(
    train_stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equipoise.train.recipe import Recipe

    monkeypatch.setattr(Recipe, "__init__", _with_profile(Recipe.__init__))
    stage = SFTStageConfig(mixture={"safety": 0.5, HELPFUL: 0.5}, num_steps=3, evaluate=False)
    trained = train_stage(stage, runner=run_sft)
    path = trained.folder / "trace-2-3.json.gz"
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name") for event in events}
    assert "aten::mm" in names or "aten::addmm" in names or "aten::linear" in names
    assert any(name and name.startswith("Optimizer.step") for name in names)
    # Two steps: the optimizer has stepped twice inside.
    assert sum(1 for event in events if str(event.get("name")).startswith("Optimizer.step")) == 2


def _with_profile(init: Any) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "profile": ProfileConfig([2, 3])})

    return wrapped


def test_the_machines_peak_is_measured_in_the_trainings_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    from equipoise.train.diagnostics import speed

    asked: list[torch.dtype] = []
    monkeypatch.setattr(speed, "measured_flops", lambda dtype: asked.append(dtype) or 1.0)
    speed.peak_flops("bfloat16")
    speed.peak_flops("float32")
    assert asked == [torch.bfloat16, torch.float32]
    assert machine.measured_flops is not None
    assert DiagnosticsConfig().speed
