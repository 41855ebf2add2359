"""Comparisons with a baseline: what can be compared, regressions, over-refusal and helpfulness."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.gate import GateCheck, GateRules, GateVerdict, gate
from equipoise.eval.judges.base import Verdict

SAFE, UNSAFE, UNPARSED = Verdict.SAFE, Verdict.UNSAFE, Verdict.UNPARSED
PASS, FAIL, INCONCLUSIVE = GateVerdict.PASS, GateVerdict.FAIL, GateVerdict.INCONCLUSIVE
LENIENT = GateRules(category_limit=1.0, overall_limit=1.0)

PROMPT = ({"role": "user", "content": "question"},)
MakeReport = Callable[..., CategoryReport]
Check = Callable[..., GateCheck]
Drawn = Callable[..., CategoryReport]


@pytest.fixture
def good_s1(make_report: MakeReport) -> CategoryReport:
    return make_report({"S1": [SAFE] * 40})


# What can be compared.


def test_without_a_baseline_it_is_inconclusive_at_best(check: Check, good: CategoryReport) -> None:
    result = gate(good, None, GateRules())
    assert result.verdict == INCONCLUSIVE
    assert "no baseline" in check(result, "comparable").message


def test_rules_that_ask_for_no_comparison_need_no_baseline(good: CategoryReport) -> None:
    alone = GateRules(regression=False, over_refusal_margin=None, helpfulness_margin=None)
    result = gate(good, None, alone)
    assert result.verdict == PASS
    assert {c.name for c in result.checks} == {"unsafe_rate", "no_finding_rate"}
    # Nothing but the comparison of refusals.
    result = gate(good, good, GateRules(regression=False, helpfulness_margin=None))
    assert {c.name for c in result.checks} == {"unsafe_rate", "no_finding_rate", "over_refusal"}
    assert gate(good, None, replace(alone, regression=True)).verdict == INCONCLUSIVE


def test_a_category_that_was_not_evaluated_cannot_pass(
    make_report: MakeReport, check: Check, good: CategoryReport
) -> None:
    result = gate(make_report({"S1": [SAFE] * 40}), good, GateRules())
    assert check(result, "unsafe_rate", "S2").verdict == INCONCLUSIVE
    assert "40 samples are in one report only" in check(result, "comparable").message


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"judge": {"name": "other"}}, "judges differ"),
        ({"controversial_is_unsafe": False}, "controversial"),
        ({"settings": {"generation": {"max_new_tokens": 1}}}, "different settings"),
    ],
)
def test_reports_of_another_evaluation_are_not_compared(
    change: dict[str, Any], why: str, check: Check, good: CategoryReport
) -> None:
    result = gate(replace(good, **change), good, GateRules())
    assert result.verdict == INCONCLUSIVE
    assert why in check(result, "comparable").message
    assert "helpfulness" not in {c.name for c in result.checks}


@pytest.mark.parametrize(
    ("number", "change", "why"),
    [
        (0, {"category": "S2"}, "not the same prompt"),
        (-1, {"response": "new"}, "not the same reference"),
    ],
)
def test_reports_on_other_samples_are_not_compared(
    number: int, change: dict[str, Any], why: str, check: Check, good: CategoryReport
) -> None:
    samples = list(good.samples)
    samples[number] = replace(samples[number], **change)
    result = gate(replace(good, samples=tuple(samples)), good, GateRules())
    assert result.verdict == INCONCLUSIVE
    assert why in check(result, "comparable").message
    assert "helpfulness" not in {c.name for c in result.checks}


# Regressions.


def test_regression_fails_only_after_holms_correction(make_report: MakeReport, check: Check) -> None:
    # 5 newly unsafe, none newly safe: p = 1/32 < 0.05 alone, but 2/32 > 0.05 among two categories.
    before = make_report({"S1": [SAFE] * 40, "S2": [SAFE] * 40})
    after = make_report({"S1": [UNSAFE] * 5 + [SAFE] * 35, "S2": [SAFE] * 40})
    found = check(gate(after, before, LENIENT), "unsafe_regression", "S1")
    assert (found.verdict, found.p_value, found.p_adjusted) == (
        PASS,
        pytest.approx(1 / 32),
        pytest.approx(2 / 32),
    )
    after = make_report({"S1": [UNSAFE] * 6 + [SAFE] * 34, "S2": [SAFE] * 40})
    found = check(gate(after, before, LENIENT), "unsafe_regression", "S1")
    assert (found.verdict, found.p_adjusted, found.value) == (FAIL, pytest.approx(2 / 64), 0.15)


def test_a_small_rise_everywhere_fails_over_all_categories(make_report: MakeReport, check: Check) -> None:
    before = make_report({f"S{i}": [SAFE] * 12 for i in range(1, 14)})
    after = make_report({f"S{i}": [UNSAFE] + [SAFE] * 11 for i in range(1, 14)})
    result = gate(after, before, LENIENT)
    assert {check(result, "unsafe_regression", f"S{i}").verdict for i in range(1, 14)} == {PASS}
    assert check(result, "unsafe_regression").verdict == FAIL


def test_an_improvement_is_no_regression(
    make_report: MakeReport, check: Check, good_s1: CategoryReport
) -> None:
    before = make_report({"S1": [UNSAFE] * 40})
    assert check(gate(good_s1, before, LENIENT), "unsafe_regression", "S1").verdict == PASS


def test_a_regression_hidden_in_unparsed_answers_is_inconclusive(
    make_report: MakeReport, check: Check, good_s1: CategoryReport
) -> None:
    after = make_report({"S1": [UNPARSED] * 8 + [SAFE] * 32})
    assert check(gate(after, good_s1, LENIENT), "unsafe_regression", "S1").verdict == INCONCLUSIVE


def test_a_regression_test_that_could_not_fail_does_not_pass(make_report: MakeReport, check: Check) -> None:
    # 13 categories: p = 0.5 ** k needs k = 9 (0.05 / 13 > 1/512); 8 pairs can't show it.
    report = make_report({f"S{i}": [SAFE] * 8 for i in range(1, 14)})
    found = check(gate(report, report, replace(LENIENT, min_samples=2)), "unsafe_regression", "S3")
    assert found.verdict == INCONCLUSIVE
    assert "no fewer than 9" in found.message
    assert found.num_more == 1


def test_copies_of_an_answer_are_no_evidence(check: Check, good: CategoryReport) -> None:
    def copied(verdict: Verdict, num_copies: int) -> CategoryReport:
        samples = tuple(
            SampleResult(
                f"{i}-{copy}",
                "harmful",
                "S1",
                PROMPT,
                "",
                verdict if i < 2 else SAFE,
                None,
                False,
                None,
                str(i),
            )
            for i in range(40)
            for copy in range(num_copies)
        )
        return replace(good, samples=samples)

    before, after = copied(SAFE, 8), copied(UNSAFE, 8)
    found = check(gate(after, before, LENIENT), "unsafe_regression", "S1")
    assert (found.n, found.verdict, found.p_value) == (320, PASS, pytest.approx(1 / 4))
    # 16 of 320, as if independent, would lie within 10 %; two of 40 prompts don't.
    rules = replace(LENIENT, category_limit=0.1)
    assert check(gate(after, before, rules), "unsafe_rate", "S1").verdict == INCONCLUSIVE


def test_false_alarms_of_the_regression_checks_stay_below_alpha(drawn: Drawn) -> None:
    """Nothing changed but chance: among 13 categories, any alarm at all in at most 5 % of evaluations."""
    generator = np.random.default_rng(0)
    rates = [0.1, 0.3, 0.5] * 4 + [0.2]
    num_alarms = num_overall = 0
    for _ in range(120):
        result = gate(drawn(generator, rates, 30), drawn(generator, rates, 30), LENIENT)
        failed = [c for c in result.checks if c.name == "unsafe_regression" and c.verdict == FAIL]
        num_alarms += any(c.category is not None for c in failed)
        num_overall += any(c.category is None for c in failed)
    # 0.05 and two standard errors.
    assert num_alarms / 120 <= 0.05 + 2 * 0.02
    assert num_overall / 120 <= 0.05 + 2 * 0.02


# Over-refusal and helpfulness.


@pytest.mark.parametrize(
    ("num_refused", "num_unread", "verdict"),
    [(0, 0, PASS), (2, 0, PASS), (10, 0, INCONCLUSIVE), (40, 0, FAIL), (2, 10, INCONCLUSIVE)],
)
def test_over_refusal_is_held_to_its_margin(
    num_refused: int,
    num_unread: int,
    verdict: GateVerdict,
    make_report: MakeReport,
    check: Check,
    good_s1: CategoryReport,
) -> None:
    refused: list[bool | None] = [True] * num_refused + [None] * num_unread
    after = make_report({"S1": [SAFE] * 40}, refused=refused + [False] * (200 - len(refused)))
    found = check(gate(after, good_s1, GateRules()), "over_refusal")
    assert found.verdict == verdict
    assert found.n == 200 - num_unread
    assert found.value == pytest.approx(num_refused / found.n)


def test_what_would_settle_over_refusal_does(make_report: MakeReport, check: Check) -> None:
    def refusing(num: int, total: int) -> CategoryReport:
        return make_report({"S1": [SAFE] * 40}, refused=[True] * num + [False] * (total - num))

    found = check(gate(refusing(2, 60), refusing(0, 60), GateRules()), "over_refusal")
    assert found.verdict == INCONCLUSIVE
    assert found.num_more is not None
    assert f"about {found.num_more} prompts more" in found.message
    total = 60 + found.num_more
    assert (
        check(gate(refusing(total // 30, total), refusing(0, total), GateRules()), "over_refusal").verdict
        == PASS
    )
    half = total // 2
    found = check(gate(refusing(half // 30, half), refusing(0, half), GateRules()), "over_refusal")
    assert found.verdict == INCONCLUSIVE


@pytest.mark.parametrize(
    ("shift", "spread", "verdict"),
    [
        (0.0, 0.01, PASS),
        (-0.02, 0.01, PASS),
        (-0.05, 0.05, INCONCLUSIVE),
        (-0.2, 0.01, FAIL),
        (0.5, 0.01, PASS),
    ],
)
def test_helpfulness_is_held_to_its_margin(
    shift: float, spread: float, verdict: GateVerdict, make_report: MakeReport, check: Check
) -> None:
    before = make_report({"S1": [SAFE] * 40}, scores=[-1.0] * 30)
    after = make_report({"S1": [SAFE] * 40}, scores=[-1.0 + shift + spread * (-1) ** i for i in range(30)])
    found = check(gate(after, before, GateRules()), "helpfulness")
    assert (found.verdict, found.value) == (verdict, pytest.approx(shift))


def test_reference_answers_that_lost_their_score_cannot_pass(
    make_report: MakeReport, check: Check, good_s1: CategoryReport
) -> None:
    after = make_report({"S1": [SAFE] * 40}, scores=[None] + [-1.0] * 29)
    assert check(gate(after, good_s1, GateRules()), "helpfulness").verdict == INCONCLUSIVE


def test_what_would_settle_helpfulness_does(make_report: MakeReport, check: Check) -> None:
    before = make_report({"S1": [SAFE] * 40}, scores=[-1.0] * 30)
    after = make_report({"S1": [SAFE] * 40}, scores=[-1.0 + 0.2 * (-1) ** i for i in range(30)])
    found = check(gate(after, before, GateRules()), "helpfulness")
    assert found.verdict == INCONCLUSIVE
    assert found.num_more is not None
    total = 30 + found.num_more + found.num_more % 2
    before = make_report({"S1": [SAFE] * 40}, scores=[-1.0] * total)
    after = make_report({"S1": [SAFE] * 40}, scores=[-1.0 + 0.2 * (-1) ** i for i in range(total)])
    assert check(gate(after, before, GateRules()), "helpfulness").verdict == PASS
