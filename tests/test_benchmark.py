import argparse
import importlib
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from equipoise.data.errors import EquipoiseError

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def preference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("benchmarks.preference")


def parsed(benchmark: ModuleType, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmark.add_command(parser.add_subparsers())
    return parser.parse_args(arguments)


def write_pairs(path: Path, num_pairs: int, length: int) -> Path:
    rows = [
        {
            "prompt": f"question {i}",
            "chosen": f"no {i}",
            "rejected": f"yes {i} " + "on " * length,
            "category": "S1",
        }
        for i in range(num_pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_both_sides_train_alike(
    preference: ModuleType,
    tiny_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process but for the two whose memory is measured, which are scripts/benchmark itself."""
    for name in ("EQUIPOISE_CACHE", "TQDM_DISABLE"):  # what the command sets is taken back
        monkeypatch.setenv(name, "")
    files = [write_pairs(tmp_path / "short.jsonl", 4, 3), write_pairs(tmp_path / "long.jsonl", 4, 30)]
    arguments = [
        "preference",
        "--model",
        str(tiny_model_folder),
        "--json",
        "--steps",
        "3",
        "--batch-size",
        "2",
    ]
    options = parsed(preference, [*arguments, "--pairs", str(files[0]), "--pairs", str(files[1])])
    assert options.run(options, SCRIPTS / "benchmark") == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])

    assert 0 <= result["max_loss_difference"] <= 1e-4
    ours, trl = result["losses"]["equipoise"], result["losses"]["trl"]
    assert len(ours) == len(trl) == 4  # the warm-up too
    assert ours[0] == pytest.approx(0.693147, abs=1e-5)  # nothing learnt yet
    assert abs(ours[-1] - ours[0]) > 1e-3  # and then something
    assert result["max_loss_difference"] == max(abs(a - b) for a, b in zip(ours, trl, strict=True))

    seconds = result["seconds"]
    assert [len(seconds[side]) for side in ("trl", "equipoise", "trl_precomputed")] == [3, 3, 2]
    for name in ("pairs_per_second_ratio", "peak_memory_ratio", "category_terms_ratio"):
        assert result[name] > 0
    tokens = result["setting"]["tokens_in_batches"]
    assert tokens["equipoise"] < tokens["trl"]
    assert result["setting"]["pairs"] == ["short.jsonl", "long.jsonl"]
    assert "pairs a second, training steps" in printed


def test_ratios_by_hand(preference: ModuleType) -> None:
    summarise = importlib.import_module("benchmarks.preference_result").summarise
    measured = {
        "losses": {"trl": [0.5, 0.25], "equipoise": [0.5, 0.125]},
        "seconds": {"trl": [8.0, 6.0, 10.0], "equipoise": [2.0, 2.0, 2.0], "trl_precomputed": [4.0, 8.0]},
        "reference_seconds": {"equipoise": 3.0, "trl_precomputed": 3.0},
        "terms_ratios": [1.0, 1.5, 1.25],
    }
    memory = {"trl": {"before_training": 2, "peak": 10}, "equipoise": {"before_training": 3, "peak": 5}}
    result = summarise(memory, measured)
    assert result["max_loss_difference"] == 0.125
    assert result["pairs_per_second_ratio"] == 4.0  # the median of 4, 3, 5
    assert result["pairs_per_second_ratio_spread"] == {
        "min": 3.0,
        "q1": 3.5,
        "median": 4.0,
        "q3": 4.5,
        "max": 5.0,
    }
    assert result["whole_epoch_ratio"] == pytest.approx(24 / 9)
    assert result["peak_memory_ratio"] == 0.5
    assert result["memory_ratio_of_training"] == 0.25
    assert result["category_terms_ratio"] == 1.25
    # Two of three steps: 15 seconds against 4 and two thirds of our reference pass.
    assert result["trl_precomputed"]["pairs_per_second_ratio"] == 3.0
    assert result["trl_precomputed"]["whole_epoch_ratio"] == pytest.approx(15 / 6)


def test_a_difference_that_is_no_number_is_not_equal(preference: ModuleType) -> None:
    summarise = importlib.import_module("benchmarks.preference_result").summarise
    measured = {
        "losses": {"trl": [0.5, float("nan"), 0.25], "equipoise": [0.5, 0.125, 0.25]},
        "seconds": {"trl": [8.0], "equipoise": [2.0], "trl_precomputed": [4.0]},
        "reference_seconds": {"equipoise": 3.0, "trl_precomputed": 3.0},
        "terms_ratios": [1.0],
    }
    memory = {"trl": {"before_training": 2, "peak": 10}, "equipoise": {"before_training": 3, "peak": 5}}
    assert not summarise(memory, measured)["max_loss_difference"] <= 1e-4


def test_too_few_pairs(preference: ModuleType, tiny_model_folder: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 5, 3)
    arguments = ["preference", "--model", str(tiny_model_folder), "--pairs", str(pairs)]
    options = parsed(preference, [*arguments, "--steps", "3", "--batch-size", "8"])
    with pytest.raises(EquipoiseError, match=r"5 pairs fit into 512 tokens; 3 steps of 8 need 24"):
        preference.prepare(options)


def test_a_side_takes_the_first_batches_of_the_same_draw(
    preference: ModuleType, tiny_model_folder: Path, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 8, 3)
    arguments = ["preference", "--model", str(tiny_model_folder), "--pairs", str(pairs)]
    options = parsed(preference, [*arguments, "--steps", "4", "--batch-size", "2"])
    work = preference.prepare(options)
    assert work.batches == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [pair.prompt[0]["content"] for pair in work.pairs] != [
        f"question {i}" for i in range(8)
    ]  # shuffled
    part = work.first(2)
    assert part.batches == [[0, 1], [2, 3]]
    assert part.rows["prompt_ids"] == work.rows["prompt_ids"][:4]
    assert part.pairs == work.pairs[:4]
    assert part.num_tokens == {side: tokens[:2] for side, tokens in work.num_tokens.items()}


def test_decoding_with_and_without_tsdi(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPTS)
    tsdi = importlib.import_module("benchmarks.tsdi")
    arguments = ["tsdi", "--model", str(tiny_model_folder), "--json", "--pairs-of-runs", "3"]
    arguments += ["--batch-size", "2", "--max-new-tokens", "6", "--num-positions", "2"]
    options = parsed(tsdi, arguments)
    assert options.run(options, SCRIPTS / "benchmark") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [len(result["seconds"][side]) for side in ("without", "with")] == [3, 3]
    assert 0 < result["processor_share"] < 1
    assert result["tsdi_ratio"] > 0
    assert result["setting"]["vocabulary"] == 259
    by_hand = tsdi.summarise({"with": [3.0, 4.0, 8.0], "without": [2.0, 4.0, 4.0]}, [0.5, 0.25, 0.75])
    assert by_hand["tsdi_ratio"] == 1.5
    assert by_hand["tsdi_ratio_spread"]["max"] == 2.0
    assert by_hand["processor_share"] == 0.5


def test_several_processes_beside_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands and the reading of what they log; training itself is not run."""
    monkeypatch.syspath_prepend(SCRIPTS)
    processes = importlib.import_module("benchmarks.processes")
    seconds_a_step = {"1": 10, "2": 5}

    def train(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        num_processes = command[command.index("--nproc_per_node") + 1]
        keys = dict(argument.split("=", 1) for argument in command if "=" in argument)
        folder = Path(keys["output_dir"]) / "run" / "seed0"
        folder.mkdir(parents=True)
        passes = int(keys["stages.safe.gradient_accumulation_steps"])
        assert passes * int(num_processes) == 4 * 2  # the same global batch
        lines = [{"stage": "safe", "step": 0, "time": "2026-01-01T00:00:00+00:00"}]  # of another event
        lines += [
            {
                "stage": "safe",
                "step": step,
                "train/loss": 0.5 + 0.01 * (num_processes == "2"),
                "time": f"2026-01-01T00:01:{seconds_a_step[num_processes] * step:02}+00:00",
            }
            for step in range(1, int(keys["stages.safe.num_steps"]) + 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(processes.subprocess, "run", train)
    options = parsed(processes, ["processes", "--json", "--repeats", "2"])
    assert options.run(options, SCRIPTS / "benchmark") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["seconds"] == {"1": [10.0] * 8, "2": [5.0] * 8}
    assert result["pairs_per_second_ratio"] == 2.0
    assert result["max_loss_difference"] == pytest.approx(0.01)
    with pytest.raises(EquipoiseError, match="--processes: found 1"):
        processes.run(parsed(processes, ["processes", "--processes", "1"]), SCRIPTS / "benchmark")
