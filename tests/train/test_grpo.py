import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from equipoise.data.errors import DataError
from equipoise.data.sources import SafetyData
from equipoise.train.losses.group_rewards import normalised
from equipoise.train.recipe import DataConfig, EvaluationConfig, LoraConfig, ModelConfig, Recipe
from equipoise.train.recipe_rl import ArithmeticConfig, GRPOStageConfig
from equipoise.train.recipe_stages import WeightConfig
from equipoise.train.rewards import verifiable
from equipoise.train.stages import grpo
from equipoise.train.stages.context import StageContext, StageResult
from equipoise.train.training import STATE_FILE, TrainingError

pytestmark = pytest.mark.filterwarnings("ignore:.*copy construct from a tensor:UserWarning")


def make_stage(**keys: Any) -> GRPOStageConfig:
    """Three steps of two prompts with four answers each, at a constant learning rate."""
    defaults: dict[str, Any] = {
        "arithmetic": ArithmeticConfig({"addition_1": 0.5, "unanswerable": 0.5}, 8, 4),
        "instruction": "",
        "num_steps": 3,
        "num_generations": 4,
        "per_device_batch_size": 8,
        "max_completion_length": 5,
        "learning_rate": 1e-3,
        "lr_scheduler": "constant",
        "warmup": 0.0,
        "evaluate": False,
    }
    return GRPOStageConfig(**(defaults | keys))


@dataclass
class Trained:
    result: StageResult
    metrics: list[dict[str, float]]
    said: list[str]
    folder: Path

    @property
    def weights(self) -> Mapping[str, Tensor]:
        return load_file(Path(self.result.model_folder) / "model.safetensors")

    @property
    def steps(self) -> list[dict[str, float]]:
        return [m for m in self.metrics if "train/reward" in m or "train/num_answers" in m]


TrainGRPO = Callable[..., Trained]


@pytest.fixture
def train_grpo(tmp_path: Path, tiny_model_folder: Path, make_data: Callable[..., SafetyData]) -> TrainGRPO:
    def run(
        stage: GRPOStageConfig,
        run: str = "run",
        lora: bool = True,
        interrupt_at: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> Trained:
        metrics: list[dict[str, float]] = []
        said: list[str] = []

        def log(values: Mapping[str, float], step: int, stage: str) -> None:
            if step == interrupt_at:
                raise KeyboardInterrupt
            metrics.append({"step": step, **values})

        model = ModelConfig(id=str(tiny_model_folder), dtype="float32", lora=LoraConfig(enabled=lora))
        context = StageContext(
            recipe=Recipe(
                name=run,
                stages={"rl": stage},
                seed=seed,
                model=model,
                data=DataConfig(max_length=256),
                evaluation=EvaluationConfig(batch_size=8),
            ),
            data=make_data(),
            run_dir=tmp_path / run,
            base_folder=str(tiny_model_folder),
            log=log,
            rewind=lambda stage, step: None,
            say=said.append,
            progress=lambda *call: None,
            **options,
        )
        result = grpo.run_grpo("rl", stage, str(tiny_model_folder), context)
        return Trained(result, metrics, said, context.stage_dir("rl"))

    return run


def test_three_steps_leave_a_model_facts_and_metrics_of_every_category(train_grpo: TrainGRPO) -> None:
    trained = train_grpo(make_stage())
    AutoModelForCausalLM.from_pretrained(trained.result.model_folder)
    assert [m["step"] for m in trained.steps] == [1, 2, 3]
    for step in trained.steps:
        assert step["train/num_answers"] == 8
        by_category = [v for k, v in step.items() if k.startswith("train/num_answers/")]
        assert sum(by_category) == 8
        rates = [step[f"train/{o}_rate"] for o in ("correct", "abstained", "wrong")]
        assert sum(rates) == pytest.approx(1)
        assert step["train/reward"] == pytest.approx(rates[0] - rates[2])
    facts = trained.result.facts
    assert facts["num_steps"] == 3
    assert facts["tasks_before"]["all"]["num_tasks"] == facts["num_held_out"] == 4  # type: ignore[index]
    assert "correct_rate" in facts["tasks_after"]["unanswerable"]  # type: ignore[index]
    before, after = (m for m in trained.metrics if "tasks/score" in m)
    assert (before["step"], after["step"]) == (0, 3)
    assert before["tasks/wrong_rate_low"] <= before["tasks/wrong_rate"] <= before["tasks/wrong_rate_high"]
