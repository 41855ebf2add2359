"""How a published judge is asked and how its answer is read: what each judge's file is made of."""

from collections.abc import Sequence
from typing import Protocol

from equipoise.data.schema import Turn
from equipoise.eval.generation.requests import Reply, Request
from equipoise.eval.judges.base import Judgement


class JudgeForm(Protocol):
    """One published judge: exchange in, requests out; replies in, judgement out. Pure: no model, no network.

    `prompt` and `response` come with the control tokens of every known template made harmless
    (`neutralise.py`). `read` never raises on what a model said, and never turns what it can't read into safe: it says
    safe only where the answer as a whole has the documented form of a safe one. A form inherits from this class.
    """

    @property
    def name(self) -> str:
        """As in `judge.name`."""
        ...

    @property
    def description(self) -> str:
        """For the card: whose judge it is, its source, and where its wording is from: `own wording` if it is ours."""
        ...

    @property
    def crosswalk(self) -> str | None:
        """The crosswalk of its native categories, a shipped one (`data/crosswalks/`) or a user's YAML; None: it names
        none, or canonical ones."""
        ...

    def ask(self, prompt: Sequence[Turn], response: str) -> list[Request]:
        """The first calls for one exchange, one or more."""
        ...

    def ask_again(self, prompt: Sequence[Turn], response: str, replies: Sequence[Reply]) -> list[Request]:
        """Further calls that depend on the first replies (a severity behind `unsafe`); most judges have none."""
        return []

    def read(self, replies: Sequence[Reply]) -> Judgement:
        """The judgement from all replies, in the order asked; `categories` is left to the crosswalk if it has one."""
        ...
