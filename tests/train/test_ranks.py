import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from equipoise.data.errors import FirstRankError
from equipoise.train import cli, ranks
from equipoise.train.preemption import Preempted
from equipoise.train.ranks import from_first


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, told: object) -> None:
    """Be one of two ranks, of which the first says `told`; an exception: the others are gone."""

    def tell(outcome: ranks._Outcome) -> object:
        if isinstance(told, Exception):
            raise told
        return outcome if rank == 0 else told

    state = SimpleNamespace(num_processes=2, is_main_process=rank == 0)
    monkeypatch.setattr(ranks, "PartialState", lambda: state)
    monkeypatch.setattr(ranks, "_told", tell)


def fail(error: BaseException) -> None:
    raise error


def test_the_first_rank_makes_it_and_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert from_first(lambda: 3) == 3  # alone
    as_rank(monkeypatch, 0, None)
    assert from_first(lambda: 3) == 3
    as_rank(monkeypatch, 1, ranks._Outcome(made=3))
    assert from_first(lambda: pytest.fail("called on another rank")) == 3


def test_what_the_first_rank_raises_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, None)
    with pytest.raises(OSError, match="no space"):
        from_first(lambda: fail(OSError("no space")))
    as_rank(monkeypatch, 1, ranks._Outcome(error="OSError: no space"))
    with pytest.raises(FirstRankError, match="the first rank failed: OSError: no space"):
        from_first(lambda: None)
    as_rank(monkeypatch, 1, ranks._Outcome(preempted=True))
    with pytest.raises(Preempted):
        from_first(lambda: None)


def test_ranks_that_are_gone_do_not_hide_why_the_first_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    as_rank(monkeypatch, 0, RuntimeError("Connection closed by peer"))
    with pytest.raises(Preempted):
        from_first(lambda: fail(Preempted()))
    with pytest.raises(RuntimeError, match="Connection closed"):
        from_first(lambda: None)


DIES = """
import os, signal, time
from accelerate import PartialState
from equipoise.train.ranks import from_first
PartialState(cpu=True)
from_first(lambda: None)
started = time.monotonic()
try:
    from_first(lambda: os.kill(os.getpid(), signal.SIGKILL))
except RuntimeError as error:
    print(f"{time.monotonic() - started} {error}")
"""


def test_a_first_rank_that_is_killed_is_noticed_by_those_that_wait() -> None:
    """Two real processes; in a group whose own patience is days."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    first, other = (
        subprocess.Popen(
            [sys.executable, "-c", DIES],
            env=shared | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    )
    try:
        said, _ = other.communicate(timeout=100)
        assert first.wait(10) == -9
    finally:
        first.kill()
        other.kill()
        first.communicate()
    seconds, _, message = said.partition(" ")
    assert float(seconds) < 10
    assert any(gone in message for gone in cli._GONE)  # told as another rank's end, not as a crash
