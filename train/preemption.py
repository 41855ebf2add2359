"""SIGTERM and SIGUSR1: the step is finished, a checkpoint saved, and the process ends with `REQUEUE`.

Slurm sends SIGTERM when it preempts a job or its time is up, and SIGUSR1 where `sbatch --signal` asks for a warning.
Inside a stage's training the signal waits for the end of the step (with the evaluation that belongs to it, where
`gate.every` asks for one). Everywhere else it ends the run at once: what is finished is on disk already, and the same
command goes on from there. Nothing heavy is imported here.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

REQUEUE = 75
"""Exit code: run the same command again (EX_TEMPFAIL of sysexits.h)."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """The run was told to end and can go on; like KeyboardInterrupt, no `except Exception` may swallow it."""


@dataclass
class _Request:
    """Of this process; a signal handler has nobody else to tell."""

    process: int = 0
    asked: bool = False
    deferred: bool = False


_request = _Request()


@contextmanager
def handled() -> Iterator[None]:
    """Handle the signals inside the `with`; elsewhere than in the main thread nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _request.process, _request.asked, _request.deferred = os.getpid(), False, False
    before = {number: signal.signal(number, _handle) for number in SIGNALS}
    try:
        yield
    finally:
        _request.asked = False
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside the `with` a signal is only noted (see `asked`); what was noted and not acted on ends the run behind it.

    Raises Preempted.
    """
    _request.deferred = True
    try:
        yield
    finally:
        _request.deferred = False
    if _request.asked:
        raise Preempted


def asked() -> bool:
    """Whether this process was told to end; ranks have to agree, see `training.told_to_end`."""
    return _request.asked


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _request.process:  # a forked child: it ends as it would have without us
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    _request.asked = True
    if not _request.deferred:
        raise Preempted
