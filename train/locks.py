"""Locks between processes; the system takes each of them away from a process that dies, however it dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from equipoise.data.errors import EquipoiseError
from equipoise.eval.terminal import say
from equipoise.train import preemption
from equipoise.train.ranks import from_first

PATIENCE = 6 * 3600.0
"""Seconds. Some file systems keep the lock of a host that is gone: computing twice is then better than never."""
QUIET = 2.0
"""Seconds of waiting before it is said: whoever only reads a file lets go sooner."""
SECONDS_BETWEEN_LOOKS = 0.5


class FolderInUseError(EquipoiseError):
    """Another process works in the folder."""


@contextmanager
def locked_folder(folder: Path, advice: str) -> Iterator[None]:
    """Inside the `with` this process alone works in `folder`, which is made where there is none.

    Raises FolderInUseError, which names the process that is at work there and ends with `advice`. A lock of the process
    (POSIX): its forked children do not inherit it, so that one which outlives it does not hold the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise FolderInUseError(f"{folder} is in use by {holder}. {advice}") from error
        except OSError as error:  # a file system without locks
            say(f"{folder} cannot be locked ({error}): take care that only one command at a time runs there")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield


@contextmanager
def made_once(path: Path | None, what: str) -> Iterator[None]:
    """Inside the `with`, one run at a time looks whether `path` is there, and makes it where it is not. Collective.

    The first rank takes the lock, `<path>.lock`, and lets go behind the `with`. None: nothing is shared or locked.
    what: the run that has the lock is doing, as "evaluate the base". Where the file system has no locks, or the lock
    does not come free within `PATIENCE`, every run does it for itself. Raises Preempted where this run was told to end
    while it waited.
    """
    with ExitStack() as held:
        if path is not None:
            from_first(lambda: _take(path, what, held))
        yield


def _take(path: Path, what: str, held: ExitStack) -> None:
    lock = FileLock(path.with_name(f"{path.name}.lock"), fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=QUIET, poll_interval=SECONDS_BETWEEN_LOOKS, cancel_check=preemption.asked)
        except Timeout:
            say(f"waiting for another run to {what} ({lock.lock_file})")
            lock.acquire(PATIENCE, SECONDS_BETWEEN_LOOKS, cancel_check=preemption.asked)
    except Timeout:
        if preemption.asked():
            raise preemption.Preempted from None
        say(f"no other run was seen to {what} within {PATIENCE / 3600:g} hours: it is done here")
    except OSError as error:
        say(f"{lock.lock_file} cannot be locked ({error}): other runs may {what} at the same time")
    else:
        held.callback(lock.release)
