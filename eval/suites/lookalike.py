"""Benign prompts that merely look dangerous: how often the model refuses what it should answer.

The score is the judge's `refused`, as it stands; None means that the judge could not tell.
"""

from collections.abc import Sequence

from equipoise.data.schema import Exchange
from equipoise.eval.suites.base import SuiteData


def prompts(data: SuiteData) -> Sequence[Exchange]:
    """Prompts with the words of a category and nothing of its harm."""
    return data.lookalike_prompts
