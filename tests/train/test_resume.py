import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.train.recipe import LoraConfig
from equipoise.train.recipe.stages import (
    CategoryConfig,
    KLConfig,
    MarginConfig,
    MultiplierConfig,
    PreferenceStageConfig,
    TokenBiasPenaltyConfig,
    WeightConfig,
)
from equipoise.train.training import STATE_FILE, TrainingError


@pytest.fixture
def stage(make_stage: Callable[..., PreferenceStageConfig]) -> PreferenceStageConfig:
    """Six steps with everything on that has a state: windows of four steps end between checkpoints, which are two."""
    return make_stage(
        num_steps=6,
        balance="category",
        save_every=2,
        lr_scheduler="cosine",
        per_device_batch_size=4,
        gradient_accumulation_steps=2,
        category=CategoryConfig(
            MarginConfig(enabled=True),
            WeightConfig(mode="group_dro"),
            MultiplierConfig(enabled=True),
            update_every=4,
        ),
        kl=KLConfig(coef=0.1),
        token_bias=TokenBiasPenaltyConfig(
            coef=1.0, every=3, num_contexts=2, num_positions=2, prompt_tokens=4
        ),
    )


def interrupt(train_stage: Any, stage: PreferenceStageConfig, step: int, **options: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        train_stage(stage, run="interrupted", interrupt_at=step, **options)


def checkpoints(tmp_path: Path) -> dict[str, Path]:
    folder = tmp_path / "interrupted" / "stages" / "safe" / "checkpoints"
    return {path.name: path for path in folder.glob("checkpoint-*")}


@pytest.mark.parametrize(
    "model",
    [{}, {"lora": LoraConfig(enabled=False)}, {"lora": LoraConfig(dropout=0.2)}],
    ids=["lora", "full", "dropout"],
)
def test_an_interrupted_stage_ends_where_an_uninterrupted_one_does(
    model: dict[str, Any], train_stage: Any, stage: PreferenceStageConfig, tmp_path: Path
) -> None:
    whole = train_stage(stage, run="whole", model=model)
    interrupt(train_stage, stage, step=6, model=model)
    assert set(checkpoints(tmp_path)) == {"checkpoint-2", "checkpoint-4"}
    resumed = train_stage(stage, run="interrupted", model=model)
    assert resumed.started_at == 4
    assert resumed.said == [f"resuming from {checkpoints(tmp_path)['checkpoint-4']}"]
    assert resumed.metrics == whole.metrics[4:]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
    assert (resumed.folder / STATE_FILE).read_text() == (whole.folder / STATE_FILE).read_text()
    state = json.loads((resumed.folder / STATE_FILE).read_text())
    assert any(value != 1 for value in state["weight"])
    assert any(state["margin"])
    assert sum(state["window_counts"]) == 12  # of two steps since the last update


def test_a_checkpoint_that_is_not_complete_is_passed_over(
    train_stage: Any, stage: PreferenceStageConfig, tmp_path: Path
) -> None:
    whole = train_stage(stage, run="whole")
    interrupt(train_stage, stage, step=6)
    found = checkpoints(tmp_path)
    (found["checkpoint-4"] / STATE_FILE).unlink()
    resumed = train_stage(stage, run="interrupted")
    assert resumed.said == [
        f"{found['checkpoint-4']} is not complete (interrupted while saving) and passed over",
        f"resuming from {found['checkpoint-2']}",
    ]
    assert resumed.started_at == 2
    assert resumed.metrics == whole.metrics[2:]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())


def test_the_state_file_is_a_checkpoints_last(
    train_stage: Any, stage: PreferenceStageConfig, tmp_path: Path
) -> None:
    interrupt(train_stage, stage, step=3)
    checkpoint = checkpoints(tmp_path)["checkpoint-2"]
    written = {path.name: path.stat().st_mtime_ns for path in checkpoint.iterdir()}
    assert written[STATE_FILE] == max(written.values())
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "adapter_model.safetensors"} <= set(written)
    (checkpoint / STATE_FILE).write_text('{"margin": [0.1')  # torn
    again = train_stage(stage, run="interrupted")
    assert again.started_at == 0
    assert "is not complete" in again.said[0]


def test_without_checkpoints_a_stage_begins_anew(
    train_stage: Any, make_stage: Callable[..., PreferenceStageConfig], tmp_path: Path
) -> None:
    whole = train_stage(make_stage(), run="whole")
    interrupt(train_stage, make_stage(), step=3)
    assert checkpoints(tmp_path) == {}
    again = train_stage(make_stage(), run="interrupted")
    assert again.started_at == 0
    assert again.metrics == whole.metrics
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())


def test_what_came_before_in_the_process_does_not_matter(
    train_stage: Any, make_stage: Callable[..., PreferenceStageConfig]
) -> None:
    dropout = {"lora": LoraConfig(dropout=0.2)}
    first = train_stage(make_stage(num_steps=2), run="first", model=dropout)
    torch.rand(17)
    second = train_stage(make_stage(num_steps=2), run="second", model=dropout)
    assert all(torch.equal(second.weights[name], weight) for name, weight in first.weights.items())


def test_a_checkpoint_of_other_categories_is_refused(
    train_stage: Any, stage: PreferenceStageConfig, make_data: Any
) -> None:
    interrupt(train_stage, stage, step=3)
    data = make_data()
    data.safety_pairs[:] = [pair for pair in data.safety_pairs if pair.category != "S2"]
    with pytest.raises(TrainingError, match=r"this run has .* remove the folder to start the stage anew"):
        train_stage(stage, run="interrupted", data=data)
