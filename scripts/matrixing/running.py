"""Runs a cell in processes of its own, within a time limit; what it did is kept in its folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from matrixing import tiny
from matrixing.cells import ENGINES, TRAINERS, overrides

RESULT = "result.json"
"""In a cell's folder, written last: what its processes came to."""
_NUM_TAIL_LINES = 15


def prepare(folder: Path) -> None:
    """The model, the scorers and the pairs that all cells take."""
    inputs = folder / "inputs"
    if not (inputs / "pairs.jsonl").exists():
        tiny.write_model(inputs / "model")
        for seed, kind in enumerate(("reward", "cost")):
            tiny.write_scorer(inputs / "model", inputs / kind, kind, seed)
        tiny.write_pairs(inputs / "pairs.jsonl")  # last: the folder is whole


def run_cell(folder: Path, cell: tuple[str, str], limit_seconds: float) -> dict[str, Any]:
    """Run a cell that has no result yet; returns its result: exit_code (None: time limit), seconds, tail, error."""
    trainer, engine = TRAINERS[cell[0]], ENGINES[cell[1]]
    target = folder / cell[0] / cell[1]
    if (target / RESULT).exists():
        found: dict[str, Any] = json.loads((target / RESULT).read_text(encoding="utf-8"))
        return found
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    job = {
        "folder": str(target),
        "overrides": overrides(trainer, engine, folder / "inputs"),
        "judged": f"stages.{trainer.stage}.evaluate" if trainer.judged else None,
        "fsdp_on_cpu": engine.fsdp_on_cpu,
    }
    (target / "job.json").write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
    command = [*engine.launch, str(Path(__file__).with_name("rank.py")), str(target / "job.json")]
    variables = {"EQUIPOISE_CACHE": str(target / "cache"), "OMP_NUM_THREADS": "1", **engine.environment}
    started = time.perf_counter()
    code = _run(command, variables, target / "log", limit_seconds)
    lines = (target / "log").read_text(encoding="utf-8", errors="replace").splitlines()
    result = {
        "exit_code": code,
        "seconds": round(time.perf_counter() - started, 1),
        "error": None if code == 0 else _error(lines, code, limit_seconds),
        "tail": lines[-_NUM_TAIL_LINES:] if code != 0 else [],
    }
    (target / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _run(command: list[str], variables: Mapping[str, str], log: Path, limit_seconds: float) -> int | None:
    """The command's exit code; None where the time limit ended it, with all that it had started."""
    own = {name: value for name, value in os.environ.items() if not _of_a_launch(name)}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            env=own | dict(variables),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            return process.wait(limit_seconds)
        except BaseException as ended:
            # A launcher's ranks are in sessions of their own: told by name they all get it.
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for member in family:
                member.send_signal(signal.SIGKILL)
            process.wait()
            if isinstance(ended, subprocess.TimeoutExpired):
                return None
            raise


def _of_a_launch(variable: str) -> bool:
    return variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE") or variable.startswith(
        ("ACCELERATE_", "FSDP_", "MASTER_", "TORCHELASTIC_")
    )


def _error(lines: list[str], code: int | None, limit_seconds: float) -> str:
    """The first error that the log tells of: a package's own message, or how it ended."""
    if code is None:
        return f"not done after {limit_seconds:g} s"
    of_a_library = re.compile(r"^(\w+\.)*\w*(Error|Exception): .+")
    for line in lines:
        if line.startswith("equipoise: ") and "told to end" not in line:
            return line
        if of_a_library.match(line):
            return line
    return f"exit code {code}"
