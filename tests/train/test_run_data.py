"""Whole runs on data that is not shipped: the sources end in records that train."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from equipoise.data.config import DataConfig
from equipoise.train.recipe import EvaluationConfig, ModelConfig, Recipe
from equipoise.train.recipe.stages import PreferenceStageConfig
from equipoise.train.run import run


def train(folder: Path, model: Path, mixture: dict[str, float], **data: Any) -> tuple[int, dict[str, Any]]:
    """Three steps of DPO without a judge; the number of pairs trained on and the last metrics."""
    stage = PreferenceStageConfig(mixture=mixture, num_steps=3, warmup=0.0, evaluate=False)
    recipe = Recipe(
        name="test",
        output_dir=str(folder),
        stages={"safe": stage},
        model=ModelConfig(id=str(model), dtype="float32"),
        # A token a byte: what is long in words is too long here.
        data=DataConfig(max_length=512, max_too_long_rate=1.0, **data),
        evaluation=EvaluationConfig(baseline=False),
    )
    assert run(recipe) == 0
    run_dir = folder / "test" / "seed0"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line.get("step") == 3][-1]
    return json.loads((run_dir / "summary.json").read_text())["stages"]["safe"]["num_pairs"], last


@pytest.mark.slow
@pytest.mark.skipif("EQUIPOISE_DATA" not in os.environ, reason="EQUIPOISE_DATA names no folder of real data")
@pytest.mark.parametrize(
    ("file", "keys", "num_rows"),
    [
        (
            "pku_saferlhf_pairs.jsonl",
            {"taxonomy": "beavertails", "fields": {"category": "category_predicted"}},
            60,
        ),
        ("hh_harmless_pairs.jsonl", {}, 150),
        ("pandalm_pairs.jsonl", {}, 60),
    ],
)
def test_real_pairs_train(
    tmp_path: Path, tiny_model_folder: Path, cache: Path, file: str, keys: dict[str, Any], num_rows: int
) -> None:
    path = Path(os.environ["EQUIPOISE_DATA"]) / file
    num_pairs, metrics = train(
        tmp_path,
        tiny_model_folder,
        {"safety": 1.0},
        source="jsonl",
        path=str(path),
        num_rows=num_rows,
        held_out_fraction=0.1,
        **keys,
    )
    assert num_pairs >= 10
    losses = {name: value for name, value in metrics.items() if name.startswith("train/loss/")}
    assert losses
    assert all(0 < value < 10 for value in losses.values())
    if keys:
        assert set(losses) - {"train/loss/OTHER"}  # by category, mapped from the labels of the file
