import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from equipoise.data.sources import SafetyData
from equipoise.train import cli
from equipoise.train.trainers.step_table import StepTable

ROOT = Path(__file__).parents[2]
OVERRIDES = [
    "recipe=dpo",
    "model=hub",
    "model.dtype=float32",
    "data=jsonl",
    "evaluation.baseline=false",
    "stages.safe.evaluate=false",
    "stages.safe.num_steps=5",
    "stages.safe.learning_rate=1e-3",
    "stages.safe.kl.coef=0.1",
    "loss.sft_coef=0.5",  # a mean over the tokens of all ranks
    "stages.safe.category.update_every=2",
    "stages.safe.category.margin.enabled=true",
    "stages.safe.category.multiplier.enabled=true",
    "stages.safe.category.weight.mode=group_dro",
    "stages.safe.balance=category",
    "+stages.sft={kind: sft, num_steps: 3, learning_rate: 1e-3, evaluate: false, weight: {mode: group_dro}}",
    "+stages.sft.mixture={safety: 0.75, helpful: 0.25}",
    "+stages.sft.kl={coef: 0.5, on: benign}",
    "+stages.cost={kind: cost_model, start_from: base, num_steps: 3, learning_rate: 1e-2, held_out_fraction: 0.3}",
    "+stages.cost.weight={mode: group_dro}",
]


def batch_of(num: int) -> list[str]:
    """Pairs, answers and benign answers of one rank."""
    sizes = [
        "stages.safe.per_device_batch_size",
        "+stages.sft.per_device_batch_size",
        "+stages.sft.kl.num_benign",
        "+stages.cost.per_device_batch_size",
    ]
    return [f"{key}={num}" for key in sizes]


def write_pairs(data: SafetyData, path: Path) -> None:
    """The pairs as a user's file; what `data=jsonl` takes."""
    keys = {"id", "prompt", "chosen", "rejected", "category", "chosen_safe", "rejected_safe"}
    lines = []
    for pair in data.safety_pairs + data.helpful_pairs:
        row = {name: value for name, value in dataclasses.asdict(pair).items() if name in keys}
        lines.append(json.dumps(row | {"prompt": pair.prompt[0]["content"]}))
    path.write_text("\n".join(lines) + "\n")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


@pytest.mark.slow
def test_two_processes_train_as_one_does(
    tmp_path: Path,
    tiny_model_folder: Path,
    make_data: Callable[..., SafetyData],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_pairs(make_data(), tmp_path / "pairs.jsonl")
    common = [*OVERRIDES, f"model.id={tiny_model_folder}", f"data.path={tmp_path / 'pairs.jsonl'}"]
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache of one"))
    monkeypatch.chdir(tmp_path)
    assert cli.main([*common, "output_dir=one", *batch_of(8)]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "train.py"), *common, "output_dir=two", *batch_of(4)],
        env={**os.environ, "EQUIPOISE_CACHE": str(tmp_path / "cache of two"), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (tmp_path / folder / "dpo" / "seed0" for folder in ("one", "two"))
    alone, together = metrics(one), metrics(two)
    assert [line["stage"] for line in alone] == ["safe"] * 5 + ["sft"] * 3 + ["cost"] * 4 + ["end"]
    assert len(together) == len(alone)  # one process writes
    for mine, theirs in zip(alone, together, strict=True):
        counts = {name for name in mine if "/num_" in name or "accuracy" in name}
        assert {name: theirs[name] for name in counts} == {name: mine[name] for name in counts}
        numbers = mine.keys() - {"stage"}
        assert {name: theirs[name] for name in numbers} == pytest.approx(
            {name: mine[name] for name in numbers}, abs=1e-4, rel=1e-4
        )
    speeds = [
        [json.loads(line) for line in (run / "speed.jsonl").read_text().splitlines()] for run in (one, two)
    ]
    assert [(line["stage"], line["step"]) for line in speeds[1]] == [
        (line["stage"], line["step"]) for line in speeds[0]
    ]  # written once, by the first rank
    for line in (line for run in speeds for line in run if line["stage"] == "safe"):
        assert line["speed/pairs_per_second"] * line["speed/seconds_per_step"] == pytest.approx(
            8
        )  # of all ranks
    assert alone[4]["train/loss"] < alone[0]["train/loss"] - 0.01
    assert alone[7]["train/kl"] > 1e-4
    assert alone[10]["train/loss"] < alone[8]["train/loss"] - 0.05
    assert alone[11]["held_out/num_pairs"] == 6  # an odd number of batches a rank: one repeats a batch
    state_one, state_two = (
        json.loads((d / "stages/safe/category_state.json").read_text()) for d in (one, two)
    )
    for name in ("margin", "weight", "log_multiplier", "error"):
        assert state_two[name] == pytest.approx(state_one[name], abs=1e-5)
    for stage in ("safe", "sft"):
        weights_one, weights_two = (
            load_file(d / "stages" / stage / "model" / "model.safetensors") for d in (one, two)
        )
        for name, weight in weights_one.items():
            torch.testing.assert_close(weights_two[name], weight, atol=1e-4, rtol=0)
    references = [
        load_file(next((tmp_path / f"cache of {n}").rglob("*.safetensors"))) for n in ("one", "two")
    ]
    torch.testing.assert_close(references[0], references[1], atol=1e-4, rtol=1e-6)


def gathered(of_this_rank: list[list[float]], of_another: list[list[float]]) -> dict[str, Tensor]:
    """What the first of two ranks gathers; a row is slot, category, loss."""
    columns = ("slot", "category", "loss")
    num = max(len(of_this_rank), len(of_another))

    def padded(rows: Tensor) -> Tensor:
        return torch.cat([rows, torch.full((num - len(rows), len(columns)), -1.0, dtype=torch.float64)])

    table = StepTable(columns)
    for row in of_this_rank:  # several microbatches
        table.keep(*(torch.tensor([value]) for value in row))
    another = padded(torch.tensor(of_another, dtype=torch.float64))
    accelerator: Any = SimpleNamespace(
        num_processes=2,
        pad_across_processes=lambda rows, dim, pad_index: padded(rows),
        gather=lambda rows: torch.cat([rows, another]),
    )
    found = table.gather(accelerator)
    assert len(table) == 0
    return found


def test_gathered_pairs_stand_in_the_order_of_one_process() -> None:
    found = gathered([[0, 2, 0.5], [1, 0, 0.25], [4, 1, 0.125]], [[2, 0, 1.0], [3, 1, 2.0], [5, 2, 4.0]])
    assert found["slot"].tolist() == [0, 1, 2, 3, 4, 5]
    assert found["category"].tolist() == [2, 0, 0, 1, 1, 2]
    assert found["loss"].tolist() == [0.5, 0.25, 1.0, 2.0, 0.125, 4.0]


def test_draws_that_fill_up_the_last_batch_are_counted_once() -> None:
    # Seven draws on two ranks of four: accelerate repeats the first one for the second rank.
    found = gathered(
        [[8, 0, 1.0], [9, 0, 2.0], [10, 0, 3.0], [11, 0, 4.0]],
        [[12, 0, 5.0], [13, 0, 6.0], [14, 0, 7.0], [8, 0, 1.0]],
    )
    assert found["slot"].tolist() == [8, 9, 10, 11, 12, 13, 14]
    assert float(found["loss"].sum()) == 28


def test_ranks_with_fewer_pairs_add_nothing_but_their_own() -> None:
    found = gathered([[0, 0, 1.0], [1, 0, 2.0]], [[2, 0, 4.0]])
    assert found["slot"].tolist() == [0, 1, 2]
    assert found["loss"].tolist() == [1.0, 2.0, 4.0]
