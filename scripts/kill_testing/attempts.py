"""One run of the command line, in a process that may be killed: forked from this one, or started cold.

A fork saves the ten seconds in which a process imports torch, and runs the same code, `cli.main`. It is made before
this process has computed anything that starts threads; every few kills go through cold processes all the same. Half of
what so small a run takes is the drawing of plots: forked processes write their HTML reports without content.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kill_testing.moments import FileOperations, Moment

from equipoise.data.files import write_aside
from equipoise.train import cli, gatekeeper, run  # noqa: F401  # run: what a forked process is spared

_POLL = 0.002


@dataclass(frozen=True)
class Attempt:
    """How a process ended."""

    exit_code: int
    """-9: killed."""
    seconds: float
    num_operations: int
    """On the run's files; of a forked process that came to its end."""

    @property
    def killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.exit_code == -signal.SIGKILL


def forked(arguments: Sequence[str], folder: Path, log: Path, moment: Moment | None) -> Attempt:
    """`cli.main(arguments)` in a child of this process; `folder` is the run's."""
    counted = log.with_suffix(".operations")
    counted.unlink(missing_ok=True)
    started = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        _run_child(arguments, folder, log, counted, moment)
    deadline = None if moment is None or moment.seconds is None else started + moment.seconds
    done = 0
    try:
        while not done:
            time.sleep(_POLL)
            if deadline is not None and time.perf_counter() >= deadline:
                os.kill(pid, signal.SIGKILL)
                deadline = None
            done, status = os.waitpid(pid, os.WNOHANG)
    finally:
        if not done:  # this process is interrupted
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    num = int(counted.read_text()) if counted.exists() else 0
    return Attempt(os.waitstatus_to_exitcode(status), time.perf_counter() - started, num)


def cold(arguments: Sequence[str], log: Path, moment: Moment | None) -> Attempt:
    """`python -m equipoise.train` from nothing; `moment` is one of seconds."""
    command = [sys.executable, "-m", "equipoise.train", *arguments]
    started = time.perf_counter()
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moment.seconds if moment is not None else None)
    finally:
        process.kill()  # nothing where it has ended
        process.wait()
    return Attempt(process.returncode, time.perf_counter() - started, 0)


def _run_child(
    arguments: Sequence[str], folder: Path, log: Path, counted: Path, moment: Moment | None
) -> None:
    """Never returns."""
    code = 70
    try:
        output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(output, stream)
        operations = FileOperations(folder, moment)
        gatekeeper.write_report = lambda path, *_, **__: write_aside(path, "without content\n")
        sys.addaudithook(operations)
        code = cli.main(arguments)
        counted.write_text(f"{operations.num}\n")
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
