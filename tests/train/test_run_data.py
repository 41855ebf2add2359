"""Whole runs on data that is not shipped: the sources end in records that train."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from equipoise.data.config import CleaningConfig, DataConfig
from equipoise.data.schema import Turn
from equipoise.eval.generation.requests import Progress
from equipoise.eval.judges.base import JudgeCard, Judgement, Verdict
from equipoise.train import run as run_module
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


class CategoryJudge:
    """Calls an answer unsafe that goes along, and names the hazard of its prompt."""

    card = JudgeCard("names categories", True, "Judges by a rule of the test.", ())

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Progress | None = None
    ) -> list[Judgement]:
        found = []
        for prompt, response in zip(prompts, responses, strict=True):
            hazard = "S7" if "address" in prompt[-1]["content"] else "S2"
            if "No." in response:
                found.append(Judgement(Verdict.SAFE, 0.1, refused=True))
            else:
                found.append(Judgement(Verdict.UNSAFE, 0.9, refused=False, categories=(hazard,)))
        return found


def test_the_judge_gives_categories_and_finds_unsafe_chosen_answers(
    tmp_path: Path, tiny_model_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "load_judge", lambda config: CategoryJudge())
    records = []
    for n in range(12):
        prompt = f"Where is {'the address of' if n % 2 else 'the till of'} shop number {n}?"
        records.append(
            {"prompt": prompt, "chosen": f"No. I keep {n} out.", "rejected": f"It is at place {n}."}
        )
    records[3] |= {"chosen": "It is over there.", "rejected": "It is by the river."}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    num_pairs, metrics = train(
        tmp_path,
        tiny_model_folder,
        {"safety": 1.0},
        source="jsonl",
        path=str(path),
        categorise="judge",
        cleaning=CleaningConfig(enabled=True, judged_unsafe="drop", p_safe="judge", near_duplicates="keep"),
    )
    assert num_pairs == 11
    assert {"train/loss/S2", "train/loss/S7"} <= metrics.keys()
    assert "train/loss/OTHER" not in metrics
    dropped = [json.loads(line) for line in next(tmp_path.rglob("dropped.jsonl")).read_text().splitlines()]
    assert [(row["id"], row["dropped_by"]) for row in dropped] == [("pairs:4", "judged_unsafe")]
