"""A loss or a gradient that is not finite: every trainer stops, and says what, where, and with which examples."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.train.recipe.stages import CostModelStageConfig, SFTStageConfig
from equipoise.train.stages.scorer import run_cost_model
from equipoise.train.stages.sft import run_sft
from equipoise.train.trainers import preference as preference_trainer
from equipoise.train.training import TrainingError

CATEGORIES = {"S1", "S2", "S10", "helpful"}


def written(error: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The examples and the ids that the message names."""
    path = Path(re.search(r"examples are in (\S+\.jsonl)", error)[1])  # type: ignore[index]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return rows, path.with_suffix(".ids").read_text().split()


def test_a_rate_that_is_far_too_high(train_stage: Any, make_stage: Any, tmp_path: Path) -> None:
    """lr = 1e6: the second step's weights are no weights any more."""
    stage = make_stage(learning_rate=1e6, num_steps=12, save_every=1)
    with pytest.raises(TrainingError) as stopped:
        train_stage(stage, run="broken")
    message = str(stopped.value)
    step = int(re.match(r"stage safe, step (\d+): the (loss|gradient) is not finite", message)[1])  # type: ignore[index]
    assert step > 1
    checkpoint = tmp_path / "broken" / "stages" / "safe" / "checkpoints" / f"checkpoint-{step - 1}"
    assert f"The last checkpoint is {checkpoint}: the same command goes on from it." in message
    assert checkpoint.is_dir()
    rows, ids = written(message)
    assert len(rows) == 8
    assert {row["category"] for row in rows} <= CATEGORIES
    assert set(ids) <= {row["id"] for row in rows}
    assert ids[0] in message
    assert {"id", "category", "finite", "prompt", "chosen", "rejected", "loss", "h"} <= rows[0].keys()
    assert all("Question" in row["prompt"] for row in rows)
    assert {row["loss"] for row in rows if not row["finite"]} <= {"nan", "inf"}


STAGES = {
    "sft": (SFTStageConfig(), run_sft, "nll", "answer"),
    "cost_model": (CostModelStageConfig(held_out_fraction=0.0), run_cost_model, "loss", "chosen"),
}


@pytest.mark.parametrize("name", STAGES)
def test_every_trainer_stops(name: str, train_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, runner, column, text = STAGES[name]
    stage.num_steps, stage.learning_rate, stage.evaluate, stage.warmup = 8, 1e30, False, 0.0
    with pytest.raises(TrainingError, match="There is no checkpoint") as stopped:
        train_stage(stage, runner=runner)
    rows, ids = written(str(stopped.value))
    assert len(rows) == 8
    assert {column, text, "prompt"} <= rows[0].keys()
    assert ids


def test_one_example_is_named(train_stage: Any, make_stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two microbatches of four pairs one pair's loss is not a number: it alone is named, the step is not taken."""
    loss = preference_trainer.mixed_loss
    seen: list[int] = []

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        values = loss(*args, **kwargs)
        seen.append(len(values))
        return values * torch.tensor([1.0, 1.0, torch.nan, 1.0]) if len(seen) == 3 else values

    monkeypatch.setattr(preference_trainer, "mixed_loss", broken)
    stage = make_stage(per_device_batch_size=4, gradient_accumulation_steps=2)
    with pytest.raises(TrainingError, match="step 2: the loss is not finite, of 1 of 8 examples") as stopped:
        train_stage(stage)
    rows, ids = written(str(stopped.value))
    assert [row["id"] for row in rows if not row["finite"]] == ids == [rows[2]["id"]]
    assert len(seen) == 4  # found behind the whole step: once, and on all ranks alike


def test_a_gradient_that_is_not_finite_under_a_loss_that_is(
    train_stage: Any, make_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The square root of 0 is 0 and has no gradient: the optimizer would leave weights that are not numbers."""
    loss = preference_trainer.mixed_loss

    def broken(weights: Any, logps: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return loss(weights, logps, *args, **kwargs) + (logps.chosen * 0).sqrt()

    monkeypatch.setattr(preference_trainer, "mixed_loss", broken)
    with pytest.raises(TrainingError, match="step 1: the gradient is not finite, of 8 of 8 examples"):
        train_stage(make_stage(max_grad_norm=0.0))
