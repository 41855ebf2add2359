"""The suites' names, and what they are drawn from."""

from collections.abc import Sequence
from typing import Protocol

from equipoise.data.schema import Exchange

HARMFUL = "harmful"
LOOKALIKE = "lookalike"
HELPFULNESS = "helpfulness"
SUITES = (HARMFUL, LOOKALIKE, HELPFULNESS)
"""In the order in which they are run and reported."""


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
