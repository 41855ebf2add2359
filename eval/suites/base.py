"""A suite is data and a score: which prompts are asked, and what is made of the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from equipoise.data.schema import Exchange
from equipoise.eval.generation.requests import Progress

HARMFUL = "harmful"
LOOKALIKE = "lookalike"
HELPFULNESS = "helpfulness"
COMPLIANCE = "compliance"
SUITES = (HARMFUL, LOOKALIKE, HELPFULNESS, COMPLIANCE)
"""How samples name the suite they belong to, in the order in which suites are run and reported."""

ASKS: dict[str, tuple[str, ...]] = {
    "category_safety": (HARMFUL,),
    "over_refusal": (LOOKALIKE,),
    "likelihood": (HELPFULNESS,),
    "compliance": (COMPLIANCE,),
    "win_rate": (COMPLIANCE,),
    "lm_eval": (),
    "gate": (HARMFUL, LOOKALIKE, HELPFULNESS),
}
"""`suite.name`, as a user chooses it -> the suites whose prompts it asks."""


class SuiteData(Protocol):
    """The held-out prompts of the three suites; `equipoise.data.sources.SafetyData` is one."""

    @property
    def harmful_prompts(self) -> Sequence[Exchange]:
        """Prompts that ask for something a category forbids."""
        ...

    @property
    def lookalike_prompts(self) -> Sequence[Exchange]:
        """Benign prompts that merely look dangerous."""
        ...

    @property
    def helpful_prompts(self) -> Sequence[Exchange]:
        """Ordinary prompts, each with a reference answer."""
        ...


@dataclass(frozen=True)
class Suite:
    """The prompts of one suite, and where they are from."""

    name: str
    """One of `SUITES`: it decides the score."""
    exchanges: Sequence[Exchange]
    num_available: int
    """Prompts before a limit."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """For the report: source, licence, revision, faults, rows left out."""


class ReferenceScorer(Protocol):
    """Whatever tells how likely the model under test finds a reference answer."""

    @property
    def description(self) -> Mapping[str, Any]:
        """Whatever determines its scores besides the exchange: weights, dtype, token bias, longest exchange."""
        ...

    def score(self, exchanges: Sequence[Exchange], progress: Progress | None = None) -> list[float | None]:
        """Mean log-probability per token of each reference answer, nats; None: unscored."""
        ...
