from types import SimpleNamespace

import pytest

from equipoise.data.errors import FirstRankError
from equipoise.train import ranks
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
