"""Two ranks under torchrun train as one process does at the same global batch, and gate alike: one launch for all.

More engines, and ranks that are told to end: `engines/`, `scripts/matrix`.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from equipoise.data.sources import SafetyData
from equipoise.data.unpaired import read_unpaired
from equipoise.train import cli
from equipoise.train.answers import encode_answers
from equipoise.train.recipe.stages import KTOStageConfig
from equipoise.train.stages.log_ratios import draw

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("commands_on_ranks.py")
NUM_KTO_STEPS = 3

PREFERENCE_SFT_AND_COST = [
    "recipe=dpo",
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
KTO = [
    "recipe=kto",
    "evaluation.baseline=false",
    "stages.safe.evaluate=false",
    f"stages.safe.num_steps={NUM_KTO_STEPS}",
    "stages.safe.learning_rate=1e-3",
    "stages.safe.lr_scheduler=constant",
    "stages.safe.warmup=0",
    "stages.safe.category.weight.mode=group_dro",
    "stages.safe.kl.coef=0.1",
]
SAFE_RLHF = [
    "recipe=safe_rlhf_per_category",
    "~stages.sft",
    "~stages.reward",
    "~stages.cost",
    "stages.safe_rlhf.evaluate=false",
    "stages.safe_rlhf.num_steps=3",
    "stages.safe_rlhf.learning_rate=1e-2",
    "stages.safe_rlhf.gradient_accumulation_steps=1",
    "stages.safe_rlhf.rollout.max_new_tokens=5",
    "evaluation.baseline=false",
]
GRPO = [
    "recipe=rlvf",
    "~stages.warm_up",
    "model.gradient_checkpointing=false",
    "data.max_length=256",
    "stages.answer.num_steps=2",
    "stages.answer.arithmetic.num_held_out=3",
    "+stages.answer.weight.mode=group_dro",
    "stages.answer.rewards={response_length: 1.0}",
    "+stages.answer.length_limit=0",
]
DYING = [
    "recipe=sft",
    "data=jsonl",
    "evaluation.baseline=false",
    "stages.sft.evaluate=false",
    "stages.sft.num_steps=3",
    "stages.sft.per_device_batch_size=2",
]
BATCH_KEYS = {
    "terms": [
        "stages.safe.per_device_batch_size",
        "+stages.sft.per_device_batch_size",
        "+stages.sft.kl.num_benign",
        "+stages.cost.per_device_batch_size",
    ],
    "kto": ["stages.safe.per_device_batch_size"],
    "safe_rlhf": ["stages.safe_rlhf.per_device_batch_size"],
    "grpo": ["stages.answer.per_device_batch_size"],
}
"""By command: keys of examples (answers, benign answers) a rank; eight on one, four on each of two."""


def write_pairs(data: SafetyData, path: Path) -> None:
    """The pairs as a user's file; what `data=jsonl` takes."""
    keys = {"id", "prompt", "chosen", "rejected", "category", "chosen_safe", "rejected_safe"}
    lines = []
    for pair in data.safety_pairs + data.helpful_pairs:
        row = {name: value for name, value in dataclasses.asdict(pair).items() if name in keys}
        lines.append(json.dumps(row | {"prompt": pair.prompt[0]["content"]}))
    path.write_text("\n".join(lines) + "\n")


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


def write_cost_model(folder: Path, model_folder: Path) -> None:
    """A random cost model as PKU publishes them: some of its costs are above 0, some below."""
    folder.mkdir()
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tensors = {f"model.{name}": tensor.clone() for name, tensor in model.model.state_dict().items()}
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(8))
    save_file(tensors | {"score_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {"architectures": ["LlamaForScore"], "score_type": "cost", "do_normalize": False}
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | fields))
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


@dataclass
class Runs:
    """The folders that all commands have left, on one process and on two, and how the launch of two ended."""

    folder: Path
    end: subprocess.CompletedProcess[str]
    ended: float
    """In seconds since the epoch."""

    def run_dir(self, num: str, command: str) -> Path:
        (found,) = (self.folder / num / command).glob("*/seed0")
        return found

    def metrics(self, num: str, command: str) -> list[dict[str, Any]]:
        lines = (self.run_dir(num, command) / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]

    def speeds(self, num: str, command: str) -> list[dict[str, Any]]:
        lines = (self.run_dir(num, command) / "speed.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def weights(self, num: str, command: str, stage: str) -> dict[str, torch.Tensor]:
        return load_file(self.run_dir(num, command) / "stages" / stage / "model" / "model.safetensors")

    def assert_same(self, command: str, tolerance: float, stages: tuple[str, ...]) -> None:
        """Every logged number and the stages' weights; one process of two writes."""
        alone, together = self.metrics("one", command), self.metrics("two", command)
        assert len(together) == len(alone)
        for mine, theirs in zip(alone, together, strict=True):
            counts = {name for name in mine if "/num_" in name or "accuracy" in name}
            assert {name: theirs[name] for name in counts} == {name: mine[name] for name in counts}
            numbers = mine.keys() - {"stage"}
            assert {name: theirs[name] for name in numbers} == pytest.approx(
                {name: mine[name] for name in numbers}, abs=tolerance, rel=tolerance
            )
        for stage in stages:
            weights = self.weights("two", command, stage)
            for name, weight in self.weights("one", command, stage).items():
                torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    make_data: Callable[..., SafetyData],
    scorers: dict[str, str],
) -> Runs:
    """Every command, in this process and on two ranks; GRPO, which draws its answers a rank, on two ranks alone.

    And behind them what each of the two ranks finds when they judge and gate a model (`rank<N>.json`), and a run in
    which the second one fails.
    """
    folder = tmp_path_factory.mktemp("distributed")
    write_pairs(make_data(), folder / "pairs.jsonl")
    write_answers(make_data(), folder / "answers.jsonl")
    keys = {
        "terms": [*PREFERENCE_SFT_AND_COST, f"data.path={folder / 'pairs.jsonl'}"],
        "kto": [*KTO, f"data.unpaired_path={folder / 'answers.jsonl'}"],
        "safe_rlhf": [
            *SAFE_RLHF,
            *(f"stages.safe_rlhf.{kind}_model={scorer}" for kind, scorer in scorers.items()),
        ],
        "grpo": GRPO,
    }

    model = ("model=hub", f"model.id={tiny_model_folder}", "model.dtype=float32")

    def command(name: str, num: str, batch_size: int) -> dict[str, Any]:
        arguments = [
            *keys[name],
            *model,
            f"output_dir={folder / num / name}",
            *(f"{key}={batch_size}" for key in BATCH_KEYS[name]),
        ]
        return {"arguments": arguments, "cache": str(folder / "cache" / num / name)}

    with pytest.MonkeyPatch.context() as patch:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        for name in ("terms", "kto", "safe_rlhf"):
            alone = command(name, "one", 8)
            patch.setenv("EQUIPOISE_CACHE", alone["cache"])
            assert cli.main(alone["arguments"]) == 0
        write_cost_model(folder / "judge", tiny_model_folder)
        gated = {"model": str(tiny_model_folder), "judge": str(folder / "judge"), "out": str(folder)}
        data = f"data.path={folder / 'pairs.jsonl'}"
        dies = {
            "arguments": [*DYING, *model, data, f"output_dir={folder / 'dies'}"],
            "marker": str(folder / "died"),
            "code": str(folder / "code"),
        }
        job = {"commands": [command(name, "two", 4) for name in keys], "gated": gated, "dies": dies}
        (folder / "job.json").write_text(json.dumps(job))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*launch, str(SCRIPT), str(folder / "job.json")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert (folder / "died").exists(), done.stderr[-3000:]  # all that came before has ended well
    return Runs(folder, done, time.time())


def test_preference_sft_and_cost_stages(runs: Runs) -> None:
    runs.assert_same("terms", 1e-4, stages=("safe", "sft"))
    alone = runs.metrics("one", "terms")
    assert [line["stage"] for line in alone] == ["safe"] * 5 + ["sft"] * 3 + ["cost"] * 4 + ["end"]
    assert alone[4]["train/loss"] < alone[0]["train/loss"] - 0.01
    assert alone[7]["train/kl"] > 1e-4
    assert alone[10]["train/loss"] < alone[8]["train/loss"] - 0.05
    assert alone[11]["held_out/num_pairs"] == 6  # an odd number of batches a rank: one repeats a batch


def test_the_speed_is_that_of_all_ranks_and_written_once(runs: Runs) -> None:
    one, two = runs.speeds("one", "terms"), runs.speeds("two", "terms")
    assert [(line["stage"], line["step"]) for line in two] == [(line["stage"], line["step"]) for line in one]
    for line in (line for line in one + two if line["stage"] == "safe"):
        assert line["speed/pairs_per_second"] * line["speed/seconds_per_step"] == pytest.approx(8)


def test_category_state_and_reference_log_probs(runs: Runs) -> None:
    state_one, state_two = (
        json.loads((runs.run_dir(num, "terms") / "stages/safe/category_state.json").read_text())
        for num in ("one", "two")
    )
    for name in ("margin", "weight", "log_multiplier", "error"):
        assert state_two[name] == pytest.approx(state_one[name], abs=1e-5)
    references = [
        load_file(next((runs.folder / "cache" / num / "terms").rglob("*.safetensors")))
        for num in ("one", "two")
    ]
    torch.testing.assert_close(references[0], references[1], atol=1e-4, rtol=1e-6)


def one_sided(answers: Path, model: Path) -> tuple[int, int]:
    """Of the run's steps: (with a rank whose four answers are of one side, all eight answers of one side)."""
    stage = KTOStageConfig(num_steps=NUM_KTO_STEPS)
    encoded = encode_answers(read_unpaired(answers), AutoTokenizer.from_pretrained(model), 512)
    desirable = draw(encoded.dataset, stage, 8, 0)[0]["desirable"]
    steps = [desirable[i : i + 8] for i in range(0, len(desirable), 8)]
    ranks = [len({*step[:4]}) == 1 or len({*step[4:]}) == 1 for step in steps]
    return sum(ranks), sum(len({*step}) == 1 for step in steps)


def test_kto_with_batches_of_one_side(runs: Runs, tiny_model_folder: Path) -> None:
    on_a_rank, on_all = one_sided(runs.folder / "answers.jsonl", tiny_model_folder)
    assert on_a_rank > on_all > 0
    runs.assert_same("kto", 1e-4, stages=("safe",))
    alone = runs.metrics("one", "kto")
    assert len(alone) == NUM_KTO_STEPS + 1
    assert abs(alone[NUM_KTO_STEPS - 1]["train/desirable_log_ratio"]) > 0.1


def test_safe_rlhf_with_a_multiplier_of_each_category(runs: Runs) -> None:
    runs.assert_same("safe_rlhf", 2e-4, stages=("safe_rlhf",))
    alone = runs.metrics("one", "safe_rlhf")
    assert len(alone) == 4
    multipliers = [name for name in alone[2] if name.startswith("train/lambda/")]
    assert len(multipliers) == 13
    assert any(alone[2][name] != pytest.approx(1.0, abs=1e-3) for name in multipliers)


def test_a_group_of_grpo_may_be_spread_over_two_processes(runs: Runs) -> None:
    """Four answers on each rank, compared as the eight of one question; every rank adds to the metrics."""
    steps = [line for line in runs.metrics("two", "grpo") if "train/num_answers" in line]
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step["train/num_answers"] == 8
        assert step["train/num_flat_groups"] in (0, 1)  # one question
        # 0 tokens score 0, the 8 of max_completion_length -1.
        assert step["train/reward_response_length"] == pytest.approx(-step["train/num_tokens"] / 8)


def test_all_ranks_decide_alike_wherever_a_state_is_evaluated(runs: Runs) -> None:
    first, second = (json.loads((runs.folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for where in ("in_process", "subprocess"):
        assert second[where] == first[where]
    assert first["failing"] == "OSError: no space left"
    assert second["failing"] == "FirstRankError: the first rank failed: OSError: no space left"
    here, apart = first["in_process"], first["subprocess"]
    assert here["verdict"] == apart["verdict"]
    assert here["unsafe"] == apart["unsafe"]
    unsafe, judged = here["unsafe"]["S1"]
    assert 0 < unsafe < judged == 5

    def without_floats(report: dict[str, Any]) -> dict[str, Any]:
        """Batches differ between one process and two, and with them the last bits."""
        left = {key: value for key, value in report.items() if key not in ("seconds", "samples")}
        left["samples"] = [
            {key: value for key, value in sample.items() if key not in ("score", "p_unsafe", "judge_raw")}
            for sample in report["samples"]
        ]
        return left

    assert without_floats(here["report"]) == without_floats(apart["report"])
    for key in ("score", "p_unsafe"):
        values = [[sample[key] for sample in found["report"]["samples"]] for found in (here, apart)]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert (runs.folder / "subprocess" / "eval" / "safe-2" / "process.log").exists()
    for where in ("in_process", "subprocess"):
        assert not (runs.folder / where / "eval" / "safe-2" / ".work").exists()


def test_a_rank_that_fails_ends_the_run_with_its_own_error(runs: Runs) -> None:
    """Within a minute, though the other waits for it; one that is killed: `engines/test_rank_death.py`."""
    assert runs.ended - float((runs.folder / "died").read_text()) < 60
    assert runs.end.returncode != 0
    said = runs.end.stderr.rpartition("===== a rank dies")[2]
    assert "equipoise: another rank is gone" in said
    assert "Traceback" not in said.partition("elastic")[0]  # of ours: what follows is the launcher's
    assert "equipoise, rank 1: this rank's disk is gone" in said
    assert (runs.folder / "code").read_text() == "2\n"  # the rank's own, not what became of the first
    assert not list((runs.folder / "dies").rglob("done.json"))
    assert list((runs.folder / "dies").rglob("recipe.yaml"))
