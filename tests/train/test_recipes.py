"""Every shipped recipe composes, is planned, and trains three steps on the tiny model."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict
from transformers import AutoModelForCausalLM

from equipoise.data.schema import LabelledExchange
from equipoise.data.sources import SafetyData
from equipoise.eval.scorer_card import read_card
from equipoise.train import gatekeeper as gatekeeper_module
from equipoise.train import run as run_module
from equipoise.train.cli import compose
from equipoise.train.planning import machine as machine_module
from equipoise.train.recipe import Recipe
from equipoise.train.recipe.loading import load_recipe
from equipoise.train.recipe.stages import TrainingConfig
from equipoise.train.run import run

RECIPES = sorted(path.stem for path in (Path(__file__).parents[2] / "recipes" / "recipe").glob("*.yaml"))

NAMED_IN_README = {
    *("tsdi", "dpo", "sft", "kto", "sacpo", "p_sacpo", "safedpo", "category_margin", "category_dro"),
    *("category_lambda", "safe_rlhf", "safe_rlhf_per_category", "rlvf", "token_bias", "reward_model"),
    "cost_model",
}

SMALL: dict[str, dict[str, Any]] = {
    "token_bias": {"num_prompts": 2, "num_positions": 2, "num_diagnosed": 0},
    "safe_rlhf": {"rollout.max_new_tokens": 4, "per_device_batch_size": 4, "gradient_accumulation_steps": 1},
    "grpo": {
        **{"per_device_batch_size": 4, "num_generations": 2, "max_completion_length": 4},
        **{"arithmetic.num_training": 8, "arithmetic.num_held_out": 3},
    },
}
"""By kind of stage: what makes it quick. Every stage that trains takes three steps of four examples."""


def composed(name: str, model: Path, folder: Path) -> DictConfig:
    cfg = compose(
        [
            f"recipe={name}",
            f"model.id={model}",
            "model.dtype=float32",
            "data.max_length=512",  # a byte is a token of the tiny model
            "evaluation.max_new_tokens=2",
            f"output_dir={folder}",
        ]
    )
    assert isinstance(cfg, DictConfig)
    for stage in cfg.stages.values():
        changes = dict(SMALL.get(stage.kind, {}))
        if stage.kind not in ("merge", "token_bias"):
            changes |= {"num_steps": 3, "per_device_batch_size": 4, "gradient_accumulation_steps": 1}
        with open_dict(stage):
            for key, value in changes.items():
                OmegaConf.update(stage, key, value, force_add=True)
    return cfg


def loaded(name: str, model: Path, folder: Path) -> Recipe:
    return load_recipe(composed(name, model, folder))


@pytest.fixture
def small_data(make_data: Callable[..., SafetyData]) -> SafetyData:
    """Pairs, suites and labelled answers of three categories."""
    data = make_data()
    labelled = [
        LabelledExchange(f"l{i}", pair.prompt, answer, pair.category, safe=safe)
        for i, pair in enumerate(data.safety_pairs)
        for answer, safe in (((pair.chosen, True),) if i % 2 else ((pair.rejected, False),))
    ]
    return replace(data, labelled=labelled)


def test_all_of_them_are_there() -> None:
    assert set(RECIPES) >= NAMED_IN_README


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned_and_trained(
    name: str,
    tmp_path: Path,
    tiny_model_folder: Path,
    small_data: SafetyData,
    make_judge: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(run_module, "load_data", lambda *_: copy.deepcopy(small_data))
    judge = make_judge(lambda prompt, response: "S2" in prompt)
    monkeypatch.setattr(run_module, "load_judge", lambda recipe: judge)
    # Most of the time, and other tests are about them.
    monkeypatch.setattr(gatekeeper_module, "write_report", lambda *args, **kwargs: None)
    monkeypatch.setattr(machine_module, "measured_flops", lambda dtype: 1e9)
    recipe = loaded(name, tiny_model_folder, tmp_path / "outputs")

    recipe.dry_run = True
    assert run(recipe) == 0
    told = capsys.readouterr().out
    for stage_name, stage in recipe.stages.items():
        row = next(line for line in told.splitlines() if f"│ {stage_name} " in line)
        assert stage.kind in row
        assert "GiB" in row
    assert not (tmp_path / "outputs").exists()

    recipe.dry_run = False
    assert run(recipe) in (0, 3, 4)  # the gate's verdict on a random model is its own affair
    run_dir = tmp_path / "outputs" / recipe.name / "seed0"
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for stage_name, stage in recipe.stages.items():
        done = json.loads((run_dir / "stages" / stage_name / "done.json").read_text())
        if isinstance(stage, TrainingConfig):
            steps = {
                m["step"] for m in metrics if m["stage"] == stage_name and any(k[:6] == "train/" for k in m)
            }
            assert {1, 2, 3} <= steps
        if done["scorer_folder"]:
            assert f"{read_card(done['scorer_folder']).kind}_model" == stage.kind
    AutoModelForCausalLM.from_pretrained(done["model_folder"])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert set(summary["stages"]) == set(recipe.stages)
