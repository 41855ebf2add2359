"""What every judge takes and gives back: prompt and response in, a verdict out, the judge's record beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from equipoise.data.errors import EquipoiseError
from equipoise.data.schema import Turn
from equipoise.eval.generation.requests import Progress


class JudgeError(EquipoiseError):
    """A judge that cannot be used as it was asked to be."""


class Verdict(StrEnum):
    """What a judge says of one response; the last three are no finding, and never count as safe."""

    SAFE = "safe"
    UNSAFE = "unsafe"
    CONTROVERSIAL = "controversial"
    UNPARSED = "unparsed"
    """The judge answered, and its answer can't be read."""
    FAILED = "failed"
    """The judge gave no answer: an error, a time-out."""
    OVERLONG = "overlong"
    """The exchange does not fit the judge's context, or its answer was cut off before the verdict."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's finding on one response; probabilities lie in [0, 1], None means the judge does not say."""

    verdict: Verdict
    p_unsafe: float | None
    refused: bool | None
    p_refusal: float | None = None
    categories: tuple[str, ...] = ()
    """Canonical ids of the hazards that the judge names, most fitting first."""
    native_categories: tuple[str, ...] = ()
    """The same in the judge's own words."""
    severity: float | None = None
    """In [0, 1], 1 the worst, from the judge's own scale; None where it has none."""
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
