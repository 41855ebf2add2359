"""SACPO: stages that start from one another, lambda by category, and P-SACPO's merged models."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from equipoise.data.sources import SafetyData
from equipoise.train.merging import Adapter, Weights, add_adapters
from equipoise.train.recipe import GateConfig, ModelConfig, Recipe
from equipoise.train.recipe.stages import (
    CategoryConfig,
    KTOStageConfig,
    MergeStageConfig,
    MultiplierConfig,
    StageConfig,
)
from equipoise.train.reference_cache import reference_key
from equipoise.train.run import run

pytestmark = pytest.mark.slow


@pytest.fixture
def run_stages(
    recipe: Recipe, surroundings: Any, quick_reports: None, make_judge: Any
) -> Callable[..., Path]:
    """`run_stages(stages, unsafe=..., every=0)`: a whole run on the tiny model with made-up data; its folder."""

    def train(
        stages: dict[str, StageConfig],
        unsafe: Callable[[str, str], bool] = lambda p, r: False,
        every: int = 0,
    ) -> Path:
        surroundings.judge = make_judge(unsafe)
        recipe.stages = dict(stages)
        recipe.evaluation.baseline = any(stage.evaluate for stage in stages.values())
        recipe.gate = GateConfig(every=every, rules={"min_samples": 1, "alpha": 0.9})
        run(recipe)
        return Path(recipe.output_dir) / "test" / "seed0"

    return train


def test_the_second_stage_starts_from_and_is_held_against_what_the_first_left(
    run_stages: Any, make_stage: Any, tmp_path: Path
) -> None:
    helpful = KTOStageConfig(  # either stage may be either kind
        mixture={"helpful": 1.0}, split_pairs=True, num_steps=2, learning_rate=1e-3, evaluate=False
    )
    safe = make_stage(mixture={"safety": 1.0}, num_steps=2, lam=4.0)
    folder = run_stages({"helpful": helpful, "safe": safe}) / "stages"
    first, second = folder / "helpful" / "model", folder / "safe" / "model"
    # The reference: its cache is filed under the hash of its files ...
    assert (tmp_path / "cache" / "reference_logps" / reference_key(str(first), ModelConfig())).is_dir()
    # ... and the model: what the second stage left is what the first left plus its adapter, bit by bit.
    adapter = Adapter.load(second)
    assert adapter.base == str(first.resolve())
    add_adapters(Weights(first), ((1.0, adapter),), tmp_path / "sum", lambda done, of: None)
    by_hand, saved = load_file(tmp_path / "sum/model.safetensors"), load_file(second / "model.safetensors")
    assert all(torch.equal(by_hand[name], weight) for name, weight in saved.items())
    start = json.loads((folder.parent / "metrics.jsonl").read_text().splitlines()[2])
    assert (start["stage"], start["step"]) == ("safe", 1)
    assert start["train/loss"] == pytest.approx(math.log(2))  # at the start the policy is its reference


def test_p_sacpo_judges_every_share_and_passes_one_on(run_stages: Any, make_stage: Any) -> None:
    stages = {
        "helpful": make_stage(mixture={"helpful": 1.0}, num_steps=1),
        "safe": make_stage(mixture={"safety": 1.0}, num_steps=1),
        "merged": MergeStageConfig(first="helpful", second="safe", second_weights=[0.25, 0.75], pass_on=0.25),
        "after": make_stage(num_steps=1),
    }
    folder = run_stages(stages)
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary["states"]) == ["base", "aligned-0.75", "aligned-0.25"]
    assert {path.name for path in (folder / "eval").iterdir()} == {"base-0", "merged-0.25", "merged-0.75"}
    assert summary["stages"]["merged"]["pass_on"] == 0.25
    verdicts = [json.loads(line) for line in (folder / "gate.jsonl").read_text().splitlines()]
    assert [verdict["label"] for verdict in verdicts] == ["merged-0.75", "merged-0.25"]
    passed_on = folder / "stages/merged/0.25/model"
    assert Adapter.load(folder / "stages/after/model").base == str(passed_on.resolve())


# ---- lambda by category ---------------------------------------------------------------------------------------------


def only(data: SafetyData, category: str) -> SafetyData:
    return replace(data, safety_pairs=[pair for pair in data.safety_pairs if pair.category == category])


def test_with_one_category_and_lambda_fixed_it_is_sacpo(
    train_stage: Any, make_stage: Any, make_data: Any
) -> None:
    data = only(make_data(), "S1")
    multiplier = MultiplierConfig(enabled=True, eta=0.0, initial={"S1": 4.0})
    common = {"mixture": {"safety": 1.0}, "num_steps": 3}
    per_category = make_stage(**common, category=CategoryConfig(multiplier=multiplier, update_every=1))
    mine = train_stage(per_category, run="category", data=data, unsafe_counts={"S1": (9, 10)})
    sacpo = train_stage(make_stage(**common, lam=4.0), run="sacpo", data=data)
    assert mine.series("train/loss") == sacpo.series("train/loss")
    assert mine.series("train/loss")[-1] < mine.series("train/loss")[0] - 0.01
    assert mine.series("category/multiplier/S1") == pytest.approx([4.0] * 3)
    assert all(torch.equal(mine.weights[name], weight) for name, weight in sacpo.weights.items())


def test_evaluations_move_lambda(run_stages: Any, make_stage: Any) -> None:
    multiplier = MultiplierConfig(enabled=True, eta=0.5, target=0.1, targets={"S2": 0.3}, initial={"S2": 2.0})
    stage = make_stage(
        num_steps=4, evaluate=True, category=CategoryConfig(multiplier=multiplier, update_every=100)
    )
    unsafe = lambda prompt, response: "harmful" in prompt and prompt.endswith("S1")  # noqa: E731
    folder = run_stages({"safe": stage}, unsafe=unsafe, every=2)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "category/multiplier/S1" in line}
    # Judged before the stage and after step 2, both times 2 of 2 unsafe in S1, none in S2 and S10; shrunk by 8.
    bad, good = (2 + 8 / 3) / 10, (8 / 3) / 10
    for times, step in ((1, 1), (1, 2), (2, 3), (2, 4)):
        for category, start, rate, target in (
            ("S1", 1.0, bad, 0.1),
            ("S2", 2.0, good, 0.3),
            ("S10", 1.0, good, 0.1),
        ):
            expected = start * math.exp(times * 0.5 * (rate - target))
            assert found[step][f"category/multiplier/{category}"] == pytest.approx(expected)
