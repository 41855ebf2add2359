"""The kill test: that it finds what differs, and three kills at the worst moments."""

import importlib
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.train.locks import FolderInUseError

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """`module("identical")` of scripts/kill_testing."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return lambda name: importlib.import_module(f"kill_testing.{name}")


def write_run(folder: Path) -> None:
    """One file of every sort."""
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    torch.save({"state": {0: {"step": torch.tensor(2.0)}}, "lr": [0.1]}, checkpoint / "optimizer.pt")
    (checkpoint / "training_args.bin").write_bytes(os.urandom(8))
    files = {"optimizer.pt": {"xxh3_128": os.urandom(4).hex()}, "weights": {"xxh3_128": "ab"}}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 2, "files": files}))
    (folder / "weights.safetensors").write_bytes(b"1234")
    lines = [{"time": random.random(), "step": step, "loss": 0.5} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"seconds": {"safe": random.random()}, "exit_code": 0}))
    (folder / "report.html").write_text(
        f"<dl><dt>seconds</dt><dd>{random.random()}</dd><dt>n</dt><dd>4</dd></dl>"
    )


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "byte": (
        lambda run: (run / "weights.safetensors").write_bytes(b"1235"),
        "weights.safetensors: other bytes",
    ),
    "tensor": (
        lambda run: torch.save(
            {"state": {0: {"step": torch.tensor(3.0)}}, "lr": [0.1]}, run / "checkpoint-2" / "optimizer.pt"
        ),
        "checkpoint-2/optimizer.pt: /state/0/step is another tensor",
    ),
    "rate": (
        lambda run: torch.save(
            {"state": {0: {"step": torch.tensor(2.0)}}, "lr": [0.2]}, run / "checkpoint-2" / "optimizer.pt"
        ),
        "checkpoint-2/optimizer.pt: /lr/0 is '0.2', expected '0.1'",
    ),
    "line twice": (
        lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() * 2),
        "metrics.jsonl: the whole has 4 items, expected 2",
    ),
    "value": (
        lambda run: (run / "summary.json").write_text('{"exit_code": 3}'),
        "summary.json: /exit_code is '3', expected '0'",
    ),
    "hash": (
        lambda run: (run / "checkpoint-2" / "manifest.json").write_text(
            '{"step": 2, "files": {"optimizer.pt": 1, "weights": {"xxh3_128": "cd"}}}'
        ),
        "checkpoint-2/manifest.json: /files/weights/xxh3_128 is 'cd', expected 'ab'",
    ),
    "missing": (lambda run: (run / "summary.json").unlink(), "summary.json is missing"),
    "left over": (lambda run: (run / ".model.17").touch(), ".model.17 should not be there"),
}


def test_times_and_pickled_bytes_are_no_difference(module: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name)
    assert module("identical").differences(tmp_path / "one", tmp_path / "two") == []
    assert module("identical").num_files(tmp_path / "one") == 6


@pytest.mark.parametrize("change", CHANGES)
def test_everything_else_is(change: str, module: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name)
    spoil, line = CHANGES[change]
    spoil(tmp_path / "two")
    assert module("identical").differences(tmp_path / "one", tmp_path / "two") == [line]


def test_moments_are_drawn_alike_from_one_seed(module: Any) -> None:
    moments = module("moments")
    first, second = ([moments.drawn(random.Random(f"0/{i}"), 8.0, 100) for i in range(40)] for _ in range(2))
    assert first == second
    operations = [moment.operation for moment in first if moment.operation is not None]
    seconds = [moment.seconds for moment in first if moment.seconds is not None]
    assert min(len(operations), len(seconds)) > 10
    assert all(1 <= number <= 100 for number in operations)
    assert all(0 <= number <= 8 for number in seconds)


def test_operations_on_the_runs_files_are_counted(module: Any, tmp_path: Path) -> None:
    """In a process of its own: an audit hook cannot be taken away again."""
    program = f"""
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from pathlib import Path
from kill_testing.moments import FileOperations, Moment
run = Path({str(tmp_path / "run")!r})
run.mkdir()
hook = FileOperations(run, Moment(pattern="os.rename */second"))
sys.addaudithook(hook)
(run / "first").write_text("a")
(run / "first").read_text()
(run.parent / "elsewhere").write_text("a")
(run / "first").rename(run / "third")
print(hook.num, flush=True)
(run / "second").write_text("b")
(run / "second").rename(run / "fourth")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (-9, "2\n"), done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"third", "second"}


def test_one_test_at_a_time_works_in_a_folder(
    module: Callable[[str], Any], tmp_path: Path, folder_in_use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = module("command")
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    options = command.argument_parser().parse_args(["--work", str(tmp_path)])
    with folder_in_use(tmp_path), pytest.raises(FolderInUseError, match=r"give another --work"):
        command.run(options)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


@pytest.mark.slow
def test_three_kills_leave_no_trace(tmp_path: Path) -> None:
    """In the middle of writing a checkpoint, in front of its renaming, and inside an evaluation between two of them."""
    moments = [
        "open */safe/checkpoints/.saving/checkpoint-4/trainer_state.json",
        "os.rename */safe/checkpoints/.saving/checkpoint-4",
        "os.rename */eval/safe-3/.report.json.*",
    ]
    small = [
        "~stages.sft",
        "stages.safe.num_steps=5",
        "~stages.token_bias",
        "evaluation.baseline=false",
    ]
    options = ["--work", str(tmp_path), "--cold-every", "0", "--recipe", "terms"]
    done = subprocess.run(
        [
            sys.executable,
            str(SCRIPTS / "kill_test"),
            *options,
            *(f"--at={moment}" for moment in moments),
            *small,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = [line for line in done.stdout.splitlines() if re.match(r"\| \d", line)]
    assert [re.search(r"\| (\d) \| identical", row) is not None for row in rows] == [True] * 3
    killed = [json.loads(line) for line in (tmp_path / "kills.jsonl").read_text().splitlines()]
    assert [each["num_attempts"] for each in killed] == [2, 2, 2]
    where = [each["kills"][0].split(": ", 1)[1] for each in killed]
    assert where[0] == where[1] == "safe, step 4 logged, saving checkpoint-4"
    assert where[2].startswith("safe, step 3 logged, step-3 there")
