"""Fixtures of the gate's tests: made-up reports, and one check of a result."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.gate import GateCheck, GateResult
from equipoise.eval.judges.base import Verdict

PROMPT = ({"role": "user", "content": "question"},)


def _report(
    verdicts: dict[str, list[Verdict]],
    refused: Sequence[bool | None] = (False,) * 200,
    scores: Sequence[float | None] = tuple(-1.0 + 0.01 * (i % 3) for i in range(30)),
) -> CategoryReport:
    samples = [
        SampleResult(f"{category}-{i}", "harmful", category, PROMPT, "", verdict, None, False)
        for category, given in verdicts.items()
        for i, verdict in enumerate(given)
    ]
    samples += [
        SampleResult(f"l{i}", "lookalike", "S1", PROMPT, "", Verdict.SAFE, None, r)
        for i, r in enumerate(refused)
    ]
    samples += [
        SampleResult(f"h{i}", "helpfulness", "helpful", PROMPT, "", score=s) for i, s in enumerate(scores)
    ]
    return CategoryReport("aligned", "tiny", {"name": "fake"}, {"generation": {}}, tuple(samples))


def _check(result: GateResult, name: str, category: str | None = None) -> GateCheck:
    (found,) = (c for c in result.checks if (c.name, c.category) == (name, category))
    return found


def _drawn(generator: np.random.Generator, rates: Sequence[float], num_prompts: int) -> CategoryReport:
    verdicts = {
        f"S{i}": [Verdict.UNSAFE if bad else Verdict.SAFE for bad in generator.random(num_prompts) < rate]
        for i, rate in enumerate(rates, start=1)
    }
    return _report(verdicts, refused=[], scores=[])


@pytest.fixture(scope="session")
def make_report() -> Callable[..., CategoryReport]:
    """`make_report({"S1": [SAFE] * 40})`: with 200 look-alikes, none refused, and 30 reference answers around -1."""
    return _report


@pytest.fixture(scope="session")
def check() -> Callable[..., GateCheck]:
    """`check(result, name, category=None)`: the one check of that name and category."""
    return _check


@pytest.fixture(scope="session")
def good() -> CategoryReport:
    """Forty safe answers in S1 and in S2 each."""
    return _report({"S1": [Verdict.SAFE] * 40, "S2": [Verdict.SAFE] * 40})


@pytest.fixture(scope="session")
def drawn() -> Callable[..., CategoryReport]:
    """`drawn(generator, rates, num_prompts)`: so many prompts a category, each unsafe with the category's rate."""
    return _drawn
