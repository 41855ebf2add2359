"""One point as a process: what is started, where its output goes, and how it is stopped so that it can go on.

Nothing of this folder or of equipoise is imported: submitit pickles the module by value.
"""

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

PASSED, FAILED_GATE, INCONCLUSIVE = 0, 3, 4
"""Exit codes of train.py that are results."""
REQUEUE = 75
"""Exit code of train.py after a signal: a checkpoint is saved, the same command goes on."""
INTERRUPTED = 130
GRACE_SECONDS = 120.0
"""Between SIGTERM and SIGKILL: a step and a checkpoint have to fit in."""
NUM_TAIL_LINES = 30


@dataclass
class Job:
    """A command that may be run again and again until it has ended; calling it runs it."""

    name: str
    command: list[str]
    log: str
    failure: str
    """Written when the command fails, removed when it does not."""
    result: str
    """The file that a command which has ended leaves."""
    exit_code_file: str
    """Where train.py leaves its exit code: a launcher makes 1 of all but 0."""
    exit_code_variable: str
    environment: dict[str, str] = field(default_factory=dict)
    """On top of the environment it is started in."""
    _group: int | None = None
    """Process group of the running command."""
    _stopped: bool = False

    def __call__(self, environment: Mapping[str, str] | None = None) -> int:
        """Run the command to its end; returns train.py's exit code, and leaves `failure` where that is no result."""
        Path(self.log).parent.mkdir(parents=True, exist_ok=True)
        Path(self.exit_code_file).unlink(missing_ok=True)
        variables = os.environ | self.environment | dict(environment or {})
        variables[self.exit_code_variable] = self.exit_code_file
        with open(self.log, "a", encoding="utf-8") as output:
            output.write(f"$ {shlex.join(self.command)}\n")
            output.flush()
            try:
                # A session of its own: the terminal's Ctrl-C reaches the sweep, and the sweep stops its points.
                process = subprocess.Popen(
                    self.command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=variables,
                    start_new_session=True,
                )
            except OSError as error:
                output.write(f"{self.command[0]} cannot be started: {error}\n")
                output.flush()
                return self.record(127)
            self._group = process.pid
            if self._stopped:  # while it was being started
                _signal(process.pid, signal.SIGTERM)
            try:
                code = process.wait()
            except BaseException:
                stop([self])
                raise
            if not self._stopped:  # else `stop` waits for those that are still saving
                _signal(process.pid, signal.SIGKILL)  # what a launcher that crashed has left
            self._group = None
        return self.record(self._own_exit_code(code))

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """What submitit calls when its job is preempted: the point saves and ends, and the job is queued again."""
        from submitit.helpers import DelayedSubmission

        stop([self])
        again = Job(**vars(self) | {"_group": None, "_stopped": False})
        return DelayedSubmission(again, *args, **kwargs)

    def _own_exit_code(self, code: int) -> int:
        try:
            return int(Path(self.exit_code_file).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # it crashed before it could say so
            return code or 1

    def record(self, code: int) -> int:
        """Write `failure` for an exit code that is neither a result nor an interruption; returns the code, never 0."""
        failure = Path(self.failure)
        if Path(self.result).exists() and code in (PASSED, FAILED_GATE, INCONCLUSIVE):
            failure.unlink(missing_ok=True)
            return code
        if self._stopped or code in (REQUEUE, INTERRUPTED):
            return code or REQUEUE
        record = {
            "exit_code": code,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "log": self.log,
            "tail": tail(Path(self.log)),
        }
        aside = failure.with_name(f".{failure.name}.{os.getpid()}.part")
        aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        aside.replace(failure)
        return code or 1


def tail(log: Path, num_lines: int = NUM_TAIL_LINES) -> list[str]:
    """The last lines of a log of the last attempt; of a long one no more than its last 64 kB are read."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - 2**16, 0))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
    return lines[starts[-1] if starts else 0 :][-num_lines:]


def stop(jobs: Iterable[Job], grace: float = GRACE_SECONDS) -> None:
    """Ask running commands to save and end, all at once; kill what has not ended after `grace` seconds.

    It may be called from a signal handler that interrupted the job's own wait, so it only looks at process groups. A
    launcher that dies of SIGTERM may leave a child that is still saving: the whole group counts.
    """
    groups = []
    for job in jobs:
        job._stopped = True
        if job._group is not None:
            groups.append(job._group)
            _signal(job._group, signal.SIGTERM)
    deadline = time.monotonic() + grace
    try:
        while _alive(groups) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        for group in groups:
            _signal(group, signal.SIGKILL)


def _alive(groups: Iterable[int]) -> bool:
    wanted = set(groups)
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) in wanted and process.status() != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return False


def _signal(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # all of them have ended


Told = Callable[[str, int], None]
"""(name of a job, its exit code), as each ends."""
