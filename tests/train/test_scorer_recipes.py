import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from equipoise.data.sources import SafetyData
from equipoise.eval.scorer_card import read_card
from equipoise.train import run as run_module
from equipoise.train.recipe import Recipe, RecipeError
from equipoise.train.recipe.loading import load_recipe
from equipoise.train.recipe.stages import CostModelStageConfig, RewardModelStageConfig
from equipoise.train.run import run

STAGES = {"reward_model": "reward", "cost_model": "cost"}


def loaded(*overrides: str) -> Recipe:
    with initialize_config_module("equipoise.recipes", version_base="1.3"):
        return load_recipe(compose("config", list(overrides)))


def test_the_recipes_load() -> None:
    assert isinstance(loaded("recipe=reward_model").stages["reward"], RewardModelStageConfig)
    assert isinstance(loaded("recipe=cost_model").stages["cost"], CostModelStageConfig)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.cost.mixture.safety=0", "mixture: a cost model needs safety pairs"),
        ("+stages.cost.evaluate=true", "evaluate: found True, but the stage leaves the policy as it was"),
        ("stages.cost.held_out_fraction=1", r"held_out_fraction: found 1.0, expected a share in \[0, 1\)"),
        ("stages.cost.held_out_fraction=0", "eval_every: found 10, but held_out_fraction=0 leaves no pairs"),
        ("stages.cost.regularization=-1", "regularization: found -1.0, expected at least 0"),
        ("stages.cost.weight.mode=gdro", r"weight.mode: found 'gdro', did you mean 'group_dro'\?"),
        ("+stages.cost.beta=0.1", "beta: unknown key"),
        ("+stages.cost.mixture.harmful=1", "mixture.harmful: unknown key"),
    ],
)
def test_what_cannot_work_is_said(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=rf"stages.cost.{message}"):
        loaded("recipe=cost_model", override)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_a_recipe_dry_runs_and_trains(
    name: str,
    tmp_path: Path,
    tiny_model_folder: Path,
    make_data: Callable[..., SafetyData],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_module, "load_data", lambda *_: make_data())
    stage = STAGES[name]
    common: list[Any] = [
        f"recipe={name}",
        "model=hub",
        f"model.id={tiny_model_folder}",
        "model.dtype=float32",
        f"output_dir={tmp_path}",
        f"+stages.{stage}.num_steps=3",
    ]
    assert run(loaded(*common, "dry_run=true")) == 0
    assert name in capsys.readouterr().out
    assert run(loaded(*common)) == 0
    folder = tmp_path / name / "seed0"
    done = json.loads((folder / "stages" / stage / "done.json").read_text())
    assert done["model_folder"] == str(tiny_model_folder)
    assert read_card(done["scorer_folder"]).kind == stage
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    facts = json.loads((folder / "summary.json").read_text())["stages"][stage]
    assert facts["held_out"]["all"]["accuracy"]["num"] > 0
