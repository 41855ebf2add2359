"""Runs cells in processes of their own, within a time limit each; what they did is kept in their folders."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from matrixing import tiny
from matrixing.cells import ENGINES, TRAINERS, Engine, overrides

RESULT = "result.json"
"""In a cell's folder, written last: what its processes came to."""
BEGINS = "===== cell: "
"""In a launch's log: what follows is of this trainer."""
_NUM_TAIL_LINES = 15
_POLL_SECONDS = 0.5

Result = dict[str, Any]
Told = Callable[[str, Result], None]
"""(trainer, result): a cell has ended."""


def prepare(folder: Path) -> None:
    """The model, the scorers and the pairs that all cells take."""
    inputs = folder / "inputs"
    (inputs / "models").mkdir(parents=True, exist_ok=True)
    if not (inputs / "pairs.jsonl").exists():
        tiny.write_model(inputs / "model")
        for seed, kind in enumerate(("reward", "cost")):
            tiny.write_scorer(inputs / "model", inputs / kind, kind, seed)
        tiny.write_pairs(inputs / "pairs.jsonl")  # last: the folder is whole


def run_cells(
    folder: Path, engine: str, trainers: Sequence[str], dtype: str, limit_seconds: float, told: Told
) -> dict[str, Result]:
    """Run an engine's cells that have not run yet, failed ones again; returns all: error (None: it ran), seconds, tail.

    They share a launch, whose imports take longer than a cell. One that fails, or is not done within the limit, ends
    the launch, and those behind it get another.
    """
    results: dict[str, Result] = {}
    waiting = []
    for trainer in trainers:
        path = folder / trainer / engine / RESULT
        if path.exists():
            results[trainer] = json.loads(path.read_text(encoding="utf-8"))
        if not path.exists() or results[trainer]["error"]:
            waiting.append(trainer)

    def ended(trainer: str, result: Result) -> None:
        path = folder / trainer / engine / RESULT
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        results[trainer] = result
        told(trainer, result)

    while waiting:
        done = _launch(folder, ENGINES[engine], waiting, dtype, limit_seconds, ended)
        waiting = waiting[done:]
    return results


def _launch(
    folder: Path, engine: Engine, trainers: Sequence[str], dtype: str, limit_seconds: float, ended: Told
) -> int:
    """Launch these cells; returns how many of them have a result now, a failed one among them."""
    targets = [folder / trainer / engine.name for trainer in trainers]
    for trainer, target in zip(trainers, targets, strict=True):
        shutil.rmtree(target, ignore_errors=True)
        (target / "cache").mkdir(parents=True)
        # Of the cache, what a cell computes is its own; the embedded judge's model is the same for all.
        (target / "cache" / "models").symlink_to(folder / "inputs" / "models")
        of = TRAINERS[trainer]
        job = {
            "trainer": trainer,
            "folder": str(target),
            "overrides": overrides(of, engine, folder / "inputs", dtype),
            "judged": f"stages.{of.stage}.evaluate" if of.judged else None,
            "fsdp_on_cpu": engine.fsdp_on_cpu,
            "shard_all": engine.shard_all,
        }
        (target / "job.json").write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
    log = targets[0] / "log"
    jobs = [str(target / "job.json") for target in targets]
    command = [*engine.launch, str(Path(__file__).with_name("rank.py")), *jobs]
    own = {name: value for name, value in os.environ.items() if not _of_a_launch(name)}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            env=own | {"OMP_NUM_THREADS": "1", **engine.environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            return _watch(process, engine, trainers, targets, log, limit_seconds, ended)
        finally:
            _end(process)


def _watch(
    process: subprocess.Popen[bytes],
    engine: Engine,
    trainers: Sequence[str],
    targets: Sequence[Path],
    log: Path,
    limit_seconds: float,
    ended: Told,
) -> int:
    started = time.perf_counter()
    for number, (trainer, target) in enumerate(zip(trainers, targets, strict=True)):
        files = [target / f"rank{rank}.json" for rank in range(engine.num_ranks)]
        while not all(file.exists() for file in files):
            code = process.poll()
            late = time.perf_counter() - started > limit_seconds
            if code is None and not late:
                time.sleep(_POLL_SECONDS)
                continue
            if all(file.exists() for file in files):  # written between the two looks
                break
            text = log.read_text(encoding="utf-8", errors="replace").rpartition(f"{BEGINS}{trainer}\n")[2]
            seconds = round(time.perf_counter() - started, 1)
            error = f"not done after {limit_seconds:g} s" if code is None else _error(text.splitlines(), code)
            ended(trainer, {"error": error, "seconds": seconds, "tail": text.splitlines()[-_NUM_TAIL_LINES:]})
            return number + 1
        now = time.perf_counter()
        ended(trainer, {"error": None, "seconds": round(now - started, 1), "tail": []})
        started = now
    return len(trainers)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a launch that is still running, its ranks with it: they are in sessions of their own."""
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            member.send_signal(signal.SIGKILL)
        process.wait()


def _of_a_launch(variable: str) -> bool:
    return variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") or variable.startswith(
        ("ACCELERATE_", "FSDP_", "MASTER_", "TORCHELASTIC_")
    )


def _error(lines: Sequence[str], code: int) -> str:
    """The first error that the log tells of: ours, or a package's own message; else how it ended."""
    of_a_library = re.compile(r"^(\w+\.)*\w*(Error|Exception): .+")
    for line in lines:
        if line.startswith("equipoise") and ": " in line and "told to end" not in line:
            return line
        if of_a_library.match(line):
            return line
    return f"exit code {code}"
