"""What every judge takes and gives back: prompt and response in, a verdict out, the judge's record beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from equipoise.data.errors import EquipoiseError
from equipoise.data.schema import Turn

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, what)`."""


class JudgeError(EquipoiseError):
    """A judge that cannot be used as it was asked to be."""


class Verdict(StrEnum):
    """What a judge says of one response; whatever it could not say is `UNPARSED` and never safe."""

    SAFE = "safe"
    UNSAFE = "unsafe"
    CONTROVERSIAL = "controversial"
    UNPARSED = "unparsed"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's finding on one response; probabilities lie in [0, 1], None means the judge does not say."""

    verdict: Verdict
    p_unsafe: float | None
    refused: bool | None
    p_refusal: float | None = None
    category: str | None = None
    """Canonical category id of the hazard, where the judge names one."""
    raw: str = ""
    """The judge's own words, or what kept it from a verdict."""


@dataclass(frozen=True, slots=True)
class JudgeCard:
    """What is known of a judge: printed beside every rate it produces."""

    name: str
    stand_in: bool
    """True: it stands in for a stronger judge, and every report says so."""
    description: str
    calibration: tuple[dict[str, object], ...]
    """One entry for each data set and head: `name`, `head` (`unsafe` or `refusal`), `n`, `auroc`, `sensitivity`,
    `specificity`, each with `_low` and `_high` (95 %), and `fitted_on`."""


class Judge(Protocol):
    """Anything that judges responses; results come in input order, one for each response.

    Implementations raise `JudgeError` where the judge itself cannot work; a single response that it cannot
    judge is `Verdict.UNPARSED` instead.
    """

    card: JudgeCard

    def judge(
        self, prompts: Sequence[Sequence[Turn]], responses: Sequence[str], progress: Progress | None = None
    ) -> list[Judgement]:
        """Judge `responses[i]`, given to the conversation `prompts[i]`."""
        ...
