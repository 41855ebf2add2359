"""Made-up reports: hostile text everywhere, answers without a finding, a calibrated judge, a win rate."""

from collections.abc import Callable
from typing import Any

import pytest

from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.gate import gate
from equipoise.eval.gate_rules import GateRules
from equipoise.eval.judges.base import Verdict
from equipoise.eval.judges.calibration import HeadCalibration, JudgeCalibration
from equipoise.eval.judges.pairwise import Preference
from equipoise.eval.rates import Rate
from equipoise.eval.report.content import ReportContent
from equipoise.eval.suites.win_rate import PairSample, Pairwise

HOSTILE = (
    "<script>document.title = 'owned'; fetch('https://example.invalid/x')</script>"
    "<img src=x onerror=\"document.title='owned'\"></pre></details></style>\" onload='alert(1)' "
    "{{ 7 * 7 }} </script><!-- --> \u202egnihtyna\u202c \x00\x1b[31m \ud800 \U000e0041"
)
CATEGORIES = {
    "S1": "Violent crimes",
    "S2": f"cost $5 & more $ {HOSTILE}",
    "S10": "Indiscriminate weapons, of a kind whose name is far too long to fit on one line of any plot or table",
}
JUDGE: dict[str, Any] = {
    "name": "fake judge",
    "stand_in": True,
    "description": f"A judge for tests. {HOSTILE}",
    "calibration": [
        {
            "name": "labelled set",
            "head": "unsafe",
            "n": 300,
            "auroc": 0.75,
            "auroc_low": 0.7,
            "auroc_high": 0.8,
            "sensitivity": 0.61,
            "specificity": 0.72,
            "fitted_on": False,
        }
    ],
}


def _report(state: str, num_unsafe: int, num_without: int = 0, **changes: Any) -> CategoryReport:
    """Twelve harmful prompts a category, the first `num_unsafe` answered unsafely, the last without a finding."""
    prompt = ({"role": "user", "content": HOSTILE},)
    without = [Verdict.UNPARSED, Verdict.FAILED, Verdict.OVERLONG]

    def verdict(i: int) -> Verdict:
        if i >= 12 - num_without:
            return without[i % 3]
        return Verdict.UNSAFE if i < num_unsafe else Verdict.SAFE

    samples = [
        SampleResult(
            f"{category}-{i}", "harmful", category, prompt, f"{state}: {HOSTILE}",
            verdict(i), 0.5, i >= num_unsafe,
        )
        for category in CATEGORIES for i in range(12)
    ]  # fmt: skip
    samples += [
        SampleResult(f"l{i}", "lookalike", "S1", prompt, HOSTILE, Verdict.SAFE, 0.1, i < 2) for i in range(16)
    ]
    samples += [
        SampleResult(f"h{i}", "helpfulness", "helpful", prompt, HOSTILE, score=-1 - i / 10 + num_unsafe / 20)
        for i in range(12)
    ]
    fields: dict[str, Any] = {
        "judge": JUDGE,
        "settings": {"generation": {"max_new_tokens": 40}},
        "num_left_out": {"harmful": 1},
        "suites": ({"suite": "harmful", "source": HOSTILE, "licence": "Apache-2.0", "revision": "0123abc"},),
    }
    return CategoryReport(state, "tiny", samples=tuple(samples), **(fields | changes))


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE


@pytest.fixture(scope="session")
def category_names() -> dict[str, str]:
    return CATEGORIES


@pytest.fixture(scope="session")
def make_report() -> Callable[..., CategoryReport]:
    return _report


@pytest.fixture(scope="session")
def calibration() -> JudgeCalibration:
    """30 unsafe answers of which it found 24, 60 safe ones of which it cleared 54; five without a finding."""
    found = Rate.of(
        [True] * 24 + [False] * 6 + [None] * 3, verdicts=[Verdict.SAFE] * 30 + [Verdict.FAILED] * 3
    )
    cleared = Rate.of(
        [True] * 54 + [False] * 6 + [None] * 2, verdicts=[Verdict.SAFE] * 60 + [Verdict.FAILED] * 2
    )
    head = HeadCalibration(95, found, cleared, 0.91, 0.85, 0.95, 90)
    return JudgeCalibration(
        judge="fake judge",
        data="labelled set",
        date="2026-01-02",
        settings={"model": HOSTILE},
        controversial_is_unsafe=True,
        n=95,
        num_no_finding={"failed": 5},
        unsafe=head,
        unsafe_by_category={"S1": head},
        refusal=None,
    )


@pytest.fixture(scope="session")
def pairwise() -> Pairwise:
    """Six wins, three losses, two verdicts that followed the position, one without a finding."""
    shown = (
        [(Preference.FIRST, Preference.SECOND)] * 6
        + [(Preference.SECOND, Preference.FIRST)] * 3
        + [(Preference.FIRST, Preference.FIRST)] * 2
        + [(Preference.FAILED, Preference.FIRST)]
    )
    return Pairwise(
        f"base {HOSTILE}",
        {"name": "pairwise judge"},
        tuple(
            PairSample(f"h{i}", "helpful", ({"role": "user", "content": HOSTILE},), "x" * i, "y" * 5, *each)
            for i, each in enumerate(shown)
        ),
    )


@pytest.fixture(scope="session")
def reports(calibration: JudgeCalibration, pairwise: Pairwise) -> dict[str, CategoryReport]:
    return {
        "base": _report("base", 6),
        "aligned": _report("aligned", 3, 2),
        "tsdi": _report("tsdi", 1, calibration=calibration, pairwise=pairwise),
    }


@pytest.fixture(scope="session")
def content(reports: dict[str, CategoryReport]) -> ReportContent:
    gates = {state: gate(reports[state], reports["base"], GateRules()) for state in ("aligned", "tsdi")}
    return ReportContent(
        f"run {HOSTILE}",
        reports,
        gates,
        CATEGORIES,
        {"version": HOSTILE, "torch": "2.13.0"},
        f"name: {HOSTILE}",
    )
