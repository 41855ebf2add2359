"""What the first rank does for all of them, however long it takes.

A collective of the training's own process group gives up after ten minutes (NCCL) or thirty (gloo); writing a 70B model
or evaluating it takes longer. The others wait in a group of their own that has the patience.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed

from equipoise.data.errors import FirstRankError
from equipoise.train.preemption import Preempted

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""A first rank that dies is noticed at once, by its closed connection; what it does has time limits of its own."""
SECONDS_BETWEEN_LOOKS = 0.05
"""A waiting rank sleeps in between, so that its signal handlers run: inside a collective they would not."""


@dataclass(frozen=True)
class _Outcome:
    made: Any = None
    error: str | None = None
    preempted: bool = False


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns on the first rank, which alone calls it, on all ranks; collective.

    What it raises ends all ranks: the first with the error itself, the others with a `FirstRankError` that names it
    (Preempted with Preempted).
    """
    state = PartialState()
    if state.num_processes == 1:
        return make()
    outcome = _Outcome()
    raised: BaseException | None = None
    if state.is_main_process:
        try:
            outcome = _Outcome(make())
        except Preempted as preempted:
            outcome, raised = _Outcome(preempted=True), preempted
        except Exception as error:  # whatever it is: the others would wait for ever
            outcome, raised = _Outcome(error=f"{type(error).__name__}: {error}"), error
    if raised is not None:
        with suppress(RuntimeError):  # the others may be gone already: a signal to end goes to all of them
            _told(outcome)
        raise raised
    outcome = _told(outcome)
    if outcome.preempted:
        raise Preempted
    if outcome.error is not None:
        raise FirstRankError(f"the first rank failed: {outcome.error}")
    return outcome.made


def _told(outcome: _Outcome) -> _Outcome:
    """The first rank's outcome, on every rank."""
    group = _patient_group()
    over = distributed.broadcast(torch.zeros(1), src=0, group=group, async_op=True)
    while not over.is_completed():
        time.sleep(SECONDS_BETWEEN_LOOKS)
    over.wait()  # raises where the first rank is gone
    told = [outcome]
    distributed.broadcast_object_list(told, src=0, group=group)
    return told[0]


@cache
def _patient_group() -> Any:
    """A gloo group of all ranks, made when it is first needed: nothing that is sent here lives on a GPU."""
    return distributed.new_group(backend="gloo", timeout=PATIENCE)
