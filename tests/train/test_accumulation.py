"""Gradient accumulation and activation checkpointing change how a step is computed, and not what it is.

The answers have unequal lengths, so a mean of microbatch means would be another number. Preference stages, SFT, reward
models and Safe RLHF have such a test beside their others.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import modeling_utils

from equipoise.data.sources import SafetyData
from equipoise.train.recipe import DataConfig, LoraConfig, LossConfig, ModelConfig, Recipe
from equipoise.train.recipe.rl import ArithmeticConfig, GRPOStageConfig
from equipoise.train.recipe.stages import (
    CategoryConfig,
    KLConfig,
    KTOStageConfig,
    MultiplierConfig,
    SFTStageConfig,
    WeightConfig,
)
from equipoise.train.stages.context import StageContext
from equipoise.train.stages.grpo import run_grpo
from equipoise.train.stages.kto import run_kto
from equipoise.train.stages.sft import run_sft
from equipoise.train.trainers.kto import KTOTrainer
from equipoise.train.trainers.optimizer_steps import OptimizerSteps

Gradients = list[dict[str, torch.Tensor]]
SHORT: dict[str, Any] = {"num_steps": 1, "lr_scheduler": "constant", "warmup": 0.0, "evaluate": False}
WHOLE = {"per_device_batch_size": 8, "gradient_accumulation_steps": 1}
SPLIT = {"per_device_batch_size": 1, "gradient_accumulation_steps": 8}


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> Gradients:
    """The gradients in front of every optimizer step, by parameter; unclipped where max_grad_norm is 0."""
    kept: Gradients = []
    get = OptimizerSteps._get_grad_norm

    def keeping(self: Any, model: Any, grad_norm: Any = None) -> Any:
        named = model.named_parameters()
        kept.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        return get(self, model, grad_norm=grad_norm)

    monkeypatch.setattr(OptimizerSteps, "_get_grad_norm", keeping)
    return kept


def assert_same(gradients: Gradients) -> None:
    """Of two runs of one step."""
    first, other = gradients
    assert first.keys() == other.keys()
    assert max(float(gradient.abs().max()) for gradient in first.values()) > 1e-3
    for name, gradient in first.items():
        torch.testing.assert_close(
            gradient, other[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- accumulation ---------------------------------------------------------------------------------------------------


def test_losses_of_pairs(train_stage: Any, make_stage: Any, gradients: Gradients) -> None:
    """With weights and multipliers a category, a KL penalty whose coefficient is a category's own, and an SFT term."""
    keys = {
        **SHORT,
        "max_grad_norm": 0.0,
        "loss": LossConfig(mix={"apo_zero": 0.5}, sft_coef=1.0, length_normalised=True),
        "category": CategoryConfig(
            weight=WeightConfig(mode="inverse_frequency"),
            multiplier=MultiplierConfig(enabled=True, initial={"S1": 2.0}),
        ),
        "kl": KLConfig(coef=0.1, per_category={"S2": 0.5}),
    }
    for how in (WHOLE, SPLIT):
        train_stage(make_stage(**(keys | how)), run=f"{how}")
    assert_same(gradients)


def test_sft_with_a_kl_penalty_of_each_category(train_stage: Any, gradients: Gradients) -> None:
    keys = {**SHORT, "max_grad_norm": 0.0, "kl": KLConfig(coef=0.1, per_category={"S10": 1.0})}
    for how in (WHOLE, SPLIT):
        train_stage(SFTStageConfig(**keys, **how), run=f"{how}", runner=run_sft)
    assert_same(gradients)


def test_kto_but_for_its_reference_point(
    train_stage: Any, gradients: Gradients, monkeypatch: pytest.MonkeyPatch
) -> None:
    """z_ref is one of the forward pass (published so); with it given the rest is exact."""
    monkeypatch.setattr(KTOTrainer, "_reference_point", lambda self, mismatched: mismatched.new_tensor(0.3))
    keys = {**SHORT, "max_grad_norm": 0.0, "split_pairs": True, "kl": KLConfig(coef=0.1)}
    for how in (WHOLE, SPLIT):
        train_stage(KTOStageConfig(**keys, **how), run=f"{how}", runner=run_kto)
    assert_same(gradients)


@pytest.fixture
def train_grpo(
    tmp_path: Any, tiny_model_folder: Any, make_data: Callable[..., SafetyData]
) -> Callable[..., Any]:
    """`train_grpo(run, checkpointing=False, **keys)`: a step of two prompts with four answers."""

    def train(run: str, checkpointing: bool = False, **keys: Any) -> list[dict[str, float]]:
        stage = GRPOStageConfig(
            arithmetic=ArithmeticConfig({"addition_1": 0.5, "unanswerable": 0.5}, 8, 0),
            rewards={"response_length": 1.0},
            length_limit=2,
            num_generations=4,
            max_completion_length=6,
            beta=0.1,
            max_grad_norm=0.0,
            **SHORT,
            **keys,
        )
        model = ModelConfig(
            id=str(tiny_model_folder),
            dtype="float32",
            lora=LoraConfig(),
            gradient_checkpointing=checkpointing,
        )
        metrics: list[dict[str, float]] = []
        context = StageContext(
            recipe=Recipe(name=run, stages={"rl": stage}, model=model, data=DataConfig(max_length=256)),
            data=make_data(),
            run_dir=tmp_path / run,
            base_folder=str(tiny_model_folder),
            log=lambda values, step, stage: metrics.append(dict(values)),
            rewind=lambda stage, step: None,
            say=lambda text: None,
            progress=lambda *call: None,
        )
        run_grpo("rl", stage, str(tiny_model_folder), context)
        return metrics

    return train


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_grpo(loss_type: str, train_grpo: Any, gradients: Gradients) -> None:
    """The answers are sampled for the whole step, so they are the same; `bnpo` alone is normalised by microbatch."""
    whole = train_grpo("whole", loss_type=loss_type, per_device_batch_size=8)
    split = train_grpo("split", loss_type=loss_type, per_device_batch_size=2, gradient_accumulation_steps=4)
    assert whole[0]["train/num_tokens"] == split[0]["train/num_tokens"]
    assert_same(gradients)


# ---- checkpointing --------------------------------------------------------------------------------------------------


@pytest.fixture
def recomputed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Every layer that was checkpointed: whether by the non-reentrant way."""
    calls: list[bool] = []
    checkpoint = modeling_utils.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # a reference's pass keeps nothing anyway
            calls.append(kwargs["use_reentrant"])
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(modeling_utils, "checkpoint", counted)
    return calls


@pytest.mark.parametrize(("name", "lora"), [("preference", True), ("sft", False), ("kto", True)])
def test_checkpointing(
    name: str, lora: bool, train_stage: Any, make_stage: Any, gradients: Gradients, recomputed: list[bool]
) -> None:
    """Same loss and gradients; two layers recomputed, and the KL penalty's reference not."""
    keys = {**SHORT, "max_grad_norm": 0.0, "kl": KLConfig(coef=0.1)}
    stage, runner = {
        "preference": (make_stage(**keys), None),
        "sft": (SFTStageConfig(**keys), run_sft),
        "kto": (KTOStageConfig(**keys, split_pairs=True), run_kto),
    }[name]
    options = {} if runner is None else {"runner": runner}
    losses = []
    for checkpointing in (False, True):
        model = {"gradient_checkpointing": checkpointing, "lora": LoraConfig(enabled=lora)}
        losses.append(train_stage(stage, run=f"{checkpointing}", model=model, **options).series("train/loss"))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert_same(gradients)
    assert recomputed == [False] * 2


def test_checkpointing_in_grpo(train_grpo: Any, gradients: Gradients, recomputed: list[bool]) -> None:
    plain = train_grpo("plain", per_device_batch_size=8)
    saving = train_grpo("saving", checkpointing=True, per_device_batch_size=8)
    assert plain[0]["train/kl"] == pytest.approx(saving[0]["train/kl"], abs=1e-6)
    assert_same(gradients)
    assert recomputed == [False] * 2
