import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from accelerate.utils import set_seed

from equipoise.train.checkpoints import MANIFEST, STATE_FILE, read_manifest
from equipoise.train.claim import LAUNCH_FILE
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
from equipoise.train.training import TrainingError, random_state_kept


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
    (found["checkpoint-4"] / MANIFEST).unlink()
    resumed = train_stage(stage, run="interrupted")
    assert resumed.said == [
        f"{found['checkpoint-4']}: it has no manifest.json (interrupted while it was written or removed); passed over",
        f"resuming from {found['checkpoint-2']}",
    ]
    assert resumed.started_at == 2
    assert resumed.metrics == whole.metrics[2:]
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())


def let_in(tmp_path: Path) -> None:
    """As `resume.force` does: the folder has had this checkpoint's recipe, too."""
    (checkpoint,) = list(checkpoints(tmp_path).values())[:1]
    text = json.dumps({"recipes": [read_manifest(checkpoint)["recipe"]]})
    (tmp_path / "interrupted" / LAUNCH_FILE).write_text(text)


def test_a_damaged_checkpoint_is_named_and_passed_over(
    train_stage: Any, stage: PreferenceStageConfig, tmp_path: Path
) -> None:
    interrupt(train_stage, stage, step=6)
    damaged = checkpoints(tmp_path)["checkpoint-4"] / "optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    resumed = train_stage(stage, run="interrupted")
    said = f"{damaged.parent}: optimizer.pt is not what was written (its hash differs); passed over"
    assert resumed.said[0] == said
    assert resumed.started_at == 2


def test_where_no_checkpoint_is_whole_the_stage_starts_anew_and_says_so(
    train_stage: Any, stage: PreferenceStageConfig, tmp_path: Path
) -> None:
    interrupt(train_stage, stage, step=3)
    (checkpoint,) = checkpoints(tmp_path).values()
    (checkpoint / STATE_FILE).write_text('{"margin": [0.1')
    again = train_stage(stage, run="interrupted")
    assert again.started_at == 0
    assert again.said[0].startswith(f"{checkpoint}: {STATE_FILE} has 15 bytes, ")
    assert again.said[1].endswith("is whole (1 are damaged): THE STAGE STARTS ANEW")


def test_a_manifest_names_every_file_and_what_the_checkpoint_belongs_to(
    train_stage: Any, stage: PreferenceStageConfig, tmp_path: Path
) -> None:
    interrupt(train_stage, stage, step=3)
    checkpoint = checkpoints(tmp_path)["checkpoint-2"]
    manifest = read_manifest(checkpoint)
    files = manifest.pop("files")
    assert set(files) == {path.name for path in checkpoint.iterdir()} - {MANIFEST}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", STATE_FILE} <= set(files)
    written = (checkpoint / "optimizer.pt").read_bytes()
    assert files["optimizer.pt"] == {"size": len(written), "xxh3_128": xxhash.xxh3_128_hexdigest(written)}
    assert manifest["versions"].keys() >= {"torch", "transformers", "trl"}
    assert {key: manifest[key] for key in ("step", "num_processes", "engine", "examples_per_step")} == {
        "step": 2,
        "num_processes": 1,
        "engine": "single",
        "examples_per_step": 8,
    }
    assert len(manifest["recipe"]) == 16


def test_a_checkpoint_of_another_run_is_refused(
    train_stage: Any, stage: PreferenceStageConfig, tmp_path: Path
) -> None:
    """Whatever the folder says: with other steps the order of the data would not fit."""
    interrupt(train_stage, stage, step=3)
    with pytest.raises(
        TrainingError, match=r"saved by a run of another recipe \(\w{16}, this one is \w{16}\); remove"
    ):
        train_stage(replace(stage, learning_rate=1.0), run="interrupted")
    changed = replace(stage, gradient_accumulation_steps=1)
    let_in(tmp_path)
    with pytest.raises(
        TrainingError, match=r"checkpoint-2: its steps have 8 examples, those of this run 4; remove"
    ):
        train_stage(changed, run="interrupted")
    changed = replace(stage, num_steps=1)
    with pytest.raises(TrainingError, match="it stands behind step 2, and the stage has 1 steps"):
        train_stage(changed, run="interrupted")


def test_more_steps_end_where_as_many_from_the_start_do(
    train_stage: Any, make_stage: Callable[..., PreferenceStageConfig], tmp_path: Path
) -> None:
    """At a constant learning rate; to rounding, as the reference's log-probabilities were computed in other batches."""
    long, short = make_stage(num_steps=5, save_every=2), make_stage(num_steps=3, save_every=2)
    whole = train_stage(long, run="whole")
    train_stage(short, run="interrupted")
    assert set(checkpoints(tmp_path)) == {"checkpoint-2", "checkpoint-3"}
    let_in(tmp_path)
    resumed = train_stage(long, run="interrupted")
    assert resumed.started_at == 3
    assert resumed.series("train/loss") == pytest.approx(whole.series("train/loss")[3:], abs=1e-5)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], weight, rtol=0, atol=1e-4)


def test_the_same_step_in_smaller_batches_goes_on(
    train_stage: Any, stage: PreferenceStageConfig, tmp_path: Path
) -> None:
    whole = train_stage(stage, run="whole")
    interrupt(train_stage, stage, step=3)
    smaller = replace(stage, per_device_batch_size=2, gradient_accumulation_steps=4)
    let_in(tmp_path)
    resumed = train_stage(smaller, run="interrupted")
    assert resumed.started_at == 2
    assert resumed.series("train/loss") == pytest.approx(whole.series("train/loss")[2:], abs=1e-5)


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


def test_what_an_evaluation_draws_does_not_reach_the_training() -> None:
    """A resumed run finds the report of an evaluation in the middle of a stage, and draws nothing."""

    def drawn() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    set_seed(3)
    expected = drawn()
    set_seed(3)
    with random_state_kept():
        drawn()
    assert drawn() == expected


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
