import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from equipoise.data.sources import SafetyData
from equipoise.data.unpaired import read_unpaired
from equipoise.train import cli
from equipoise.train.answers import encode_answers
from equipoise.train.recipe.stages import KTOStageConfig
from equipoise.train.stages.log_ratios import draw

ROOT = Path(__file__).parents[2]
NUM_STEPS = 3


def write_answers(data: SafetyData, path: Path) -> None:
    """Two of 24 undesirable: a rank's share of a batch, or the whole of it, is desirable alone again and again."""
    lines = [
        {
            "prompt": pair.prompt[0]["content"],
            "response": pair.chosen,
            "desirable": i % 12 > 0,
            "category": pair.category,
        }
        for i, pair in enumerate(data.safety_pairs)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def one_sided(answers: Path, model: Path) -> tuple[int, int]:
    """Of the run's steps: (with a rank whose four answers are of one side, all eight answers of one side)."""
    stage = KTOStageConfig(num_steps=NUM_STEPS)
    encoded = encode_answers(read_unpaired(answers), AutoTokenizer.from_pretrained(model), 512)
    desirable = draw(encoded.dataset, stage, 8, 0)[0]["desirable"]
    steps = [desirable[i : i + 8] for i in range(0, len(desirable), 8)]
    ranks = [len({*step[:4]}) == 1 or len({*step[4:]}) == 1 for step in steps]
    return sum(ranks), sum(len({*step}) == 1 for step in steps)


@pytest.mark.slow
def test_two_ranks_with_one_sided_batches_train_as_one_process_does(
    tmp_path: Path,
    tiny_model_folder: Path,
    make_data: Callable[..., SafetyData],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = tmp_path / "answers.jsonl"
    write_answers(make_data(), answers)
    on_a_rank, on_all = one_sided(answers, tiny_model_folder)
    assert on_a_rank > on_all > 0
    common = [
        "recipe=kto",
        "model=hub",
        f"model.id={tiny_model_folder}",
        "model.dtype=float32",
        f"data.unpaired_path={answers}",
        "evaluation.baseline=false",
        "stages.safe.evaluate=false",
        f"stages.safe.num_steps={NUM_STEPS}",
        "stages.safe.learning_rate=1e-3",
        "stages.safe.lr_scheduler=constant",
        "stages.safe.warmup=0",
        "stages.safe.category.weight.mode=group_dro",
        "stages.safe.kl.coef=0.1",
    ]
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache of one"))
    monkeypatch.chdir(tmp_path)
    assert cli.main([*common, "output_dir=one", "stages.safe.per_device_batch_size=8"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "train.py"), *common, "output_dir=two", "stages.safe.per_device_batch_size=4"],
        env={**os.environ, "EQUIPOISE_CACHE": str(tmp_path / "cache of two"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (tmp_path / folder / "kto" / "seed0" for folder in ("one", "two"))
    alone, together = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)
    )
    assert len(alone) == len(together) == NUM_STEPS + 1
    for mine, theirs in zip(alone, together, strict=True):
        numbers = mine.keys() - {"stage", "time"}
        assert {name: theirs[name] for name in numbers} == pytest.approx(
            {name: mine[name] for name in numbers}, abs=1e-4, rel=1e-4
        )
    assert abs(alone[NUM_STEPS - 1]["train/desirable_log_ratio"]) > 0.1
    weights = load_file(two / "stages/safe/model/model.safetensors")
    for name, weight in load_file(one / "stages/safe/model/model.safetensors").items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=0)
