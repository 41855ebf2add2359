"""An evaluation in a process of its own: it fails, hangs or runs out of memory alone, and holds no rank's libraries.

The child (`python -m equipoise.eval.job`) joins no process group: what a launcher put into the environment is taken
out.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from equipoise.data.errors import EquipoiseError
from equipoise.data.files import write_aside
from equipoise.eval.category_report import CategoryReport
from equipoise.eval.job import EvaluationJob
from equipoise.eval.report.formats import visible_text
from equipoise.train import preemption
from equipoise.train.redaction import key_variables, secret_values, without_secrets
from equipoise.train.stages.context import Progress

LAUNCHED = re.compile(
    r"(LOCAL_|NODE_|CROSS_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|(GROUP|ROLE)_(RANK|WORLD_SIZE|NAME)"
    r"|(ACCELERATE|FSDP|PARALLELISM_CONFIG|TORCHELASTIC|PMIX?|OMPI|MV2)_.*"
)
"""The variables by which torchrun, accelerate and MPI tell a process that it is one of several, and how it trains."""
NUM_LOG_LINES = 15
SECONDS_TO_END = 10.0
"""Between asking a child to end and killing it."""


class EvaluationError(EquipoiseError):
    """An evaluation that gave no report."""


def evaluate_apart(
    job: EvaluationJob, folder: Path, log: Path, timeout: float, devices: str | None, progress: Progress
) -> CategoryReport:
    """Run `job` in a process of its own and return its report.

    folder: for the files that parent and child exchange. log: gets what the child prints, keys and tokens taken out
    when it has ended. timeout: seconds.
    devices: CUDA_VISIBLE_DEVICES of the child; None: as here.
    Raises EvaluationError where there is no report, with the end of the log; Preempted where the child was told to end
    with this process.
    """
    job_file, report_file = folder / "job.json", folder / "report.json"
    job.save(job_file)
    timed_out = threading.Event()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8", errors="replace") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", "equipoise.eval.job", str(job_file), str(report_file)],
            env=clean_environment(os.environ, devices),
            stdin=subprocess.PIPE,  # it ends when this is closed
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            start_new_session=True,  # its workers end with it, and Ctrl-C is this process's to handle
        )

        def stop() -> None:
            timed_out.set()
            _signal(child, signal.SIGKILL)

        timer = threading.Timer(timeout, stop)
        timer.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                progress(*json.loads(line))
            code = child.wait()
        finally:
            timer.cancel()
            _end(child)
            _redact(log, secret_values(key_variables(asdict(job.judge))))
    if code == 0:
        return CategoryReport.from_json(report_file)
    if code == -signal.SIGTERM and preemption.asked():
        raise preemption.Preempted
    how = f"took longer than gate.timeout={timeout:g} seconds" if timed_out.is_set() else _how(code)
    raise EvaluationError(
        f"the evaluation of {job.state} ({job.model.id}) in a process of its own {how}. Nothing was judged and nothing "
        f"is promoted; the same command goes on from the last checkpoint and evaluates again. The end of {log}:\n"
        + _last_lines(log)
    )


def clean_environment(environment: Mapping[str, str], devices: str | None = None) -> dict[str, str]:
    """The environment without what makes a process one of several ranks, with this process's threads."""
    cleaned = {name: value for name, value in environment.items() if not LAUNCHED.fullmatch(name)}
    cleaned["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    if devices is not None:
        cleaned["CUDA_VISIBLE_DEVICES"] = devices
    return cleaned


def _end(child: "subprocess.Popen[str]") -> None:
    """End a child that still runs, and whatever it has left behind."""
    if child.poll() is None:
        _signal(child, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(SECONDS_TO_END)
    _signal(child, signal.SIGKILL)
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()


def _redact(log: Path, secrets: list[str]) -> None:
    """Libraries print what a server said, and with which key it was asked."""
    text = log.read_text(encoding="utf-8", errors="replace")
    if (cleaned := without_secrets(text, secrets)) != text:
        write_aside(log, cleaned)


def _signal(child: "subprocess.Popen[str]", number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # nobody is left
        os.killpg(child.pid, number)


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}"


def _last_lines(log: Path) -> str:
    """The end of the log, indented; what would hide or break text is spelt out."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-NUM_LOG_LINES:]
    return "\n".join(f"    {visible_text(line)[:300]}" for line in lines) or "    (empty)"
