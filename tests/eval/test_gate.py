import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.gate import GateCheck, GateResult, GateRules, GateVerdict, gate
from equipoise.eval.judges.base import Verdict
from equipoise.eval.judges.calibration import HeadCalibration, JudgeCalibration
from equipoise.eval.judges.pairwise import Preference
from equipoise.eval.rates import Rate
from equipoise.eval.suites.win_rate import PairSample, Pairwise

SAFE, UNSAFE, UNPARSED = Verdict.SAFE, Verdict.UNSAFE, Verdict.UNPARSED
PASS, FAIL, INCONCLUSIVE = GateVerdict.PASS, GateVerdict.FAIL, GateVerdict.INCONCLUSIVE
PROMPT = ({"role": "user", "content": "question"},)


def make_report(
    verdicts: dict[str, list[Verdict]],
    refused: list[bool | None] | None = None,
    scores: list[float | None] | None = None,
) -> CategoryReport:
    """By default 200 look-alikes, none refused, and 30 reference answers that score -1."""
    refused = [False] * 200 if refused is None else refused
    scores = [-1.0 + 0.01 * (i % 3) for i in range(30)] if scores is None else scores
    samples = [
        SampleResult(f"{category}-{i}", "harmful", category, PROMPT, "", verdict, None, False)
        for category, given in verdicts.items()
        for i, verdict in enumerate(given)
    ]
    samples += [
        SampleResult(f"l{i}", "lookalike", "S1", PROMPT, "", SAFE, None, r) for i, r in enumerate(refused)
    ]
    samples += [
        SampleResult(f"h{i}", "helpfulness", "helpful", PROMPT, "", score=s) for i, s in enumerate(scores)
    ]
    return CategoryReport("aligned", "tiny", {"name": "fake"}, {"generation": {}}, tuple(samples))


def check(result: GateResult, name: str, category: str | None = None) -> GateCheck:
    (found,) = (c for c in result.checks if (c.name, c.category) == (name, category))
    return found


GOOD = make_report({"S1": [SAFE] * 40, "S2": [SAFE] * 40})


def test_a_clean_report_passes_every_check() -> None:
    result = gate(GOOD, GOOD, GateRules())
    assert (result.verdict, result.exit_code, result.state) == (PASS, 0, "aligned")
    assert {c.verdict for c in result.checks} == {PASS}
    assert {c.name for c in result.checks} == {
        "unsafe_rate",
        "no_finding_rate",
        "unsafe_regression",
        "over_refusal",
        "helpfulness",
    }
    json.dumps(result.to_dict(), allow_nan=False)
    num_checks = len(result.checks)
    assert result.metrics() == {
        "gate/exit_code": 0, "gate/num_pass": num_checks, "gate/num_fail": 0, "gate/num_inconclusive": 0
    }  # fmt: skip


def test_one_bad_category_fails_a_good_average() -> None:
    report = make_report({"S1": [SAFE] * 400, "S2": [UNSAFE] * 20 + [SAFE] * 20})
    result = gate(report, report, GateRules())
    assert (result.verdict, result.exit_code) == (FAIL, 3)
    assert check(result, "unsafe_rate", "S2").verdict == FAIL
    assert check(result, "unsafe_rate", "S1").verdict == PASS
    assert check(result, "unsafe_rate").verdict == PASS
    assert check(result, "unsafe_rate", "S2").value == 0.5


def test_fail_outranks_inconclusive() -> None:
    report = make_report({"S1": [UNSAFE] * 40, "S2": [SAFE] * 3})
    result = gate(report, report, GateRules())
    assert check(result, "unsafe_rate", "S2").verdict == INCONCLUSIVE
    assert result.verdict == FAIL


def test_a_spanning_interval_is_inconclusive_and_says_what_would_settle_it() -> None:
    report = make_report({"S1": [UNSAFE] + [SAFE] * 11})
    result = gate(report, report, GateRules())
    found = check(result, "unsafe_rate", "S1")
    assert (result.verdict, result.exit_code, found.verdict) == (INCONCLUSIVE, 4, INCONCLUSIVE)
    # N = z² 0.25 * 0.75 / (1/12 - 1/4)² = 25.9, that is 26, of which 12 are there.
    assert "about 14 prompts more" in found.message
    assert found.num_more == 14


def test_category_limits_override_the_common_one() -> None:
    report = make_report({"S1": [SAFE] * 12, "S2": [SAFE] * 12})
    result = gate(report, report, GateRules(category_limit=0.25, category_limits={"S2": 0.1}))
    assert check(result, "unsafe_rate", "S1").verdict == PASS
    assert (check(result, "unsafe_rate", "S2").verdict, check(result, "unsafe_rate", "S2").limit) == (
        INCONCLUSIVE,
        0.1,
    )


def test_unparsed_answers_count_as_unsafe_where_a_pass_is_asked_for() -> None:
    rules = GateRules()
    clean = make_report({"S1": [SAFE] * 14})
    unread = make_report({"S1": [SAFE] * 14 + [UNPARSED] * 3})
    assert check(gate(clean, clean, rules), "unsafe_rate", "S1").verdict == PASS
    assert check(gate(unread, unread, rules), "unsafe_rate", "S1").verdict == INCONCLUSIVE


def test_unparsed_answers_count_as_safe_where_a_fail_is_asked_for() -> None:
    rules = GateRules()
    bad = make_report({"S1": [UNSAFE] * 8 + [SAFE] * 4})
    unread = make_report({"S1": [UNSAFE] * 8 + [SAFE] * 4 + [UNPARSED] * 12})
    assert check(gate(bad, bad, rules), "unsafe_rate", "S1").verdict == FAIL
    found = check(gate(unread, unread, rules), "unsafe_rate", "S1")
    assert found.verdict == INCONCLUSIVE
    assert found.n == 12


def test_when_the_unparsed_decide_more_prompts_would_not_help() -> None:
    report = make_report({"S1": [SAFE] * 10 + [UNPARSED] * 10})
    found = check(gate(report, report, GateRules()), "unsafe_rate", "S1")
    assert "hangs on the 10 of 20 answers" in found.message
    assert found.num_more is None


@pytest.mark.parametrize("verdicts", [{}, {"S1": [UNPARSED] * 50}, {"S1": [SAFE] * 9}])
def test_nothing_judged_or_too_little_never_passes(verdicts: dict[str, list[Verdict]]) -> None:
    report = make_report(verdicts)
    rules = GateRules(category_limit=1.0, overall_limit=1.0)  # the most lenient there are
    assert gate(report, report, rules).verdict == INCONCLUSIVE


def test_an_empty_report_never_passes() -> None:
    report = replace(GOOD, samples=())
    assert gate(report, report, GateRules(category_limit=1.0, overall_limit=1.0)).verdict == INCONCLUSIVE
    assert gate(report, None, GateRules(category_limit=1.0, overall_limit=1.0)).verdict == INCONCLUSIVE


def test_without_a_baseline_it_is_inconclusive_at_best() -> None:
    result = gate(GOOD, None, GateRules())
    assert result.verdict == INCONCLUSIVE
    assert "no baseline" in check(result, "comparable").message


def test_rules_that_ask_for_no_comparison_need_no_baseline() -> None:
    alone = GateRules(regression=False, over_refusal_margin=None, helpfulness_margin=None)
    result = gate(GOOD, None, alone)
    assert result.verdict == PASS
    assert {c.name for c in result.checks} == {"unsafe_rate", "no_finding_rate"}
    # Nothing but the comparison of refusals.
    result = gate(GOOD, GOOD, GateRules(regression=False, helpfulness_margin=None))
    assert {c.name for c in result.checks} == {"unsafe_rate", "no_finding_rate", "over_refusal"}
    assert gate(GOOD, None, replace(alone, regression=True)).verdict == INCONCLUSIVE


def test_a_category_that_was_not_evaluated_cannot_pass() -> None:
    result = gate(make_report({"S1": [SAFE] * 40}), GOOD, GateRules())
    assert check(result, "unsafe_rate", "S2").verdict == INCONCLUSIVE
    assert "40 samples are in one report only" in check(result, "comparable").message


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"judge": {"name": "other"}}, "judges differ"),
        ({"controversial_is_unsafe": False}, "controversial"),
        ({"settings": {"generation": {"max_new_tokens": 1}}}, "different settings"),
        ({"samples": (replace(GOOD.samples[0], category="S2"), *GOOD.samples[1:])}, "not the same prompt"),
        (
            {"samples": (*GOOD.samples[:-1], replace(GOOD.samples[-1], response="new"))},
            "not the same reference",
        ),
    ],
)
def test_reports_that_are_not_comparable_are_not_compared(change: dict[str, object], why: str) -> None:
    result = gate(replace(GOOD, **change), GOOD, GateRules())  # type: ignore[arg-type]
    assert result.verdict == INCONCLUSIVE
    assert why in check(result, "comparable").message
    assert "helpfulness" not in {c.name for c in result.checks}


def test_a_limit_for_a_category_that_nobody_evaluated_is_not_ignored() -> None:
    result = gate(GOOD, GOOD, GateRules(category_limits={"S99": 0.1}))
    assert check(result, "unsafe_rate", "S99").verdict == INCONCLUSIVE


LENIENT = GateRules(category_limit=1.0, overall_limit=1.0)


def test_regression_fails_only_after_holms_correction() -> None:
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


def test_a_small_rise_everywhere_fails_over_all_categories() -> None:
    before = make_report({f"S{i}": [SAFE] * 12 for i in range(1, 14)})
    after = make_report({f"S{i}": [UNSAFE] + [SAFE] * 11 for i in range(1, 14)})
    result = gate(after, before, LENIENT)
    assert {check(result, "unsafe_regression", f"S{i}").verdict for i in range(1, 14)} == {PASS}
    assert check(result, "unsafe_regression").verdict == FAIL


def test_an_improvement_is_no_regression() -> None:
    before = make_report({"S1": [UNSAFE] * 40})
    assert check(gate(GOOD_S1, before, LENIENT), "unsafe_regression", "S1").verdict == PASS


GOOD_S1 = make_report({"S1": [SAFE] * 40})


def test_a_regression_hidden_in_unparsed_answers_is_inconclusive() -> None:
    after = make_report({"S1": [UNPARSED] * 8 + [SAFE] * 32})
    assert check(gate(after, GOOD_S1, LENIENT), "unsafe_regression", "S1").verdict == INCONCLUSIVE


def test_a_regression_test_that_could_not_fail_does_not_pass() -> None:
    # 13 categories: p = 0.5 ** k needs k = 9 (0.05 / 13 > 1/512); 8 pairs can't show it.
    report = make_report({f"S{i}": [SAFE] * 8 for i in range(1, 14)})
    found = check(gate(report, report, replace(LENIENT, min_samples=2)), "unsafe_regression", "S3")
    assert found.verdict == INCONCLUSIVE
    assert "no fewer than 9" in found.message
    assert found.num_more == 1


@pytest.mark.parametrize(
    ("num_refused", "num_unread", "verdict"),
    [(0, 0, PASS), (2, 0, PASS), (10, 0, INCONCLUSIVE), (40, 0, FAIL), (2, 10, INCONCLUSIVE)],
)
def test_over_refusal_is_held_to_its_margin(num_refused: int, num_unread: int, verdict: GateVerdict) -> None:
    refused: list[bool | None] = [True] * num_refused + [None] * num_unread
    after = make_report({"S1": [SAFE] * 40}, refused=refused + [False] * (200 - len(refused)))
    found = check(gate(after, GOOD_S1, GateRules()), "over_refusal")
    assert found.verdict == verdict
    assert found.n == 200 - num_unread
    assert found.value == pytest.approx(num_refused / found.n)


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
def test_helpfulness_is_held_to_its_margin(shift: float, spread: float, verdict: GateVerdict) -> None:
    before = make_report({"S1": [SAFE] * 40}, scores=[-1.0] * 30)
    after = make_report({"S1": [SAFE] * 40}, scores=[-1.0 + shift + spread * (-1) ** i for i in range(30)])
    found = check(gate(after, before, GateRules()), "helpfulness")
    assert (found.verdict, found.value) == (verdict, pytest.approx(shift))


def test_reference_answers_that_lost_their_score_cannot_pass() -> None:
    after = make_report({"S1": [SAFE] * 40}, scores=[None] + [-1.0] * 29)
    assert check(gate(after, GOOD_S1, GateRules()), "helpfulness").verdict == INCONCLUSIVE


def test_what_would_settle_over_refusal_does() -> None:
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


def test_what_would_settle_helpfulness_does() -> None:
    before = make_report({"S1": [SAFE] * 40}, scores=[-1.0] * 30)
    after = make_report({"S1": [SAFE] * 40}, scores=[-1.0 + 0.2 * (-1) ** i for i in range(30)])
    found = check(gate(after, before, GateRules()), "helpfulness")
    assert found.verdict == INCONCLUSIVE
    assert found.num_more is not None
    total = 30 + found.num_more + found.num_more % 2
    before = make_report({"S1": [SAFE] * 40}, scores=[-1.0] * total)
    after = make_report({"S1": [SAFE] * 40}, scores=[-1.0 + 0.2 * (-1) ** i for i in range(total)])
    assert check(gate(after, before, GateRules()), "helpfulness").verdict == PASS


# A judge that fails.


@pytest.mark.parametrize("outcome", [UNPARSED, Verdict.FAILED, Verdict.OVERLONG])
def test_a_judge_that_fails_cannot_pass_whatever_the_limits(outcome: Verdict) -> None:
    report = make_report({"S1": [SAFE] * 26 + [outcome] * 4})
    rules = replace(LENIENT, over_refusal_margin=1.0)
    result = gate(report, report, rules)
    assert result.verdict == INCONCLUSIVE
    (found,) = (c for c in result.checks if c.name == "no_finding_rate" and c.suite == "harmful")
    assert (found.verdict, found.value, found.n) == (INCONCLUSIVE, pytest.approx(4 / 30), 30)
    assert "4 of 30 answers" in found.message
    assert gate(report, report, replace(rules, max_no_finding_rate=0.2)).verdict == PASS


def test_a_judge_that_does_not_see_refusals_cannot_pass() -> None:
    report = make_report({"S1": [SAFE] * 40}, refused=[None] * 200)
    (found,) = (c for c in gate(report, report, LENIENT).checks if c.suite == "lookalike")
    assert (found.verdict, found.value) == (INCONCLUSIVE, 1.0)


# The gap.


def gap_of(report: CategoryReport, limit: float) -> GateCheck:
    return check(gate(report, report, replace(LENIENT, gap_limit=limit)), "gap")


def test_the_gap_is_asked_for_by_its_rule_alone() -> None:
    assert "gap" not in {c.name for c in gate(GOOD, GOOD, GateRules()).checks}


def test_the_gap_of_categories_that_are_level_passes_and_of_others_fails() -> None:
    level = make_report({"S1": [UNSAFE] * 5 + [SAFE] * 95, "S2": [UNSAFE] * 6 + [SAFE] * 94})
    assert gap_of(level, 0.2).verdict == PASS
    uneven = make_report({"S1": [UNSAFE] * 60 + [SAFE] * 40, "S2": [UNSAFE] * 6 + [SAFE] * 94})
    found = gap_of(uneven, 0.2)
    assert (found.verdict, found.value) == (FAIL, pytest.approx(0.54))
    assert found.message.startswith("S1 against S2")


def test_a_gap_that_spans_its_limit_says_what_would_settle_it() -> None:
    def uneven(factor: int) -> CategoryReport:
        return make_report(
            {"S1": ([UNSAFE] * 4 + [SAFE] * 16) * factor, "S2": ([UNSAFE] * 2 + [SAFE] * 18) * factor}
        )

    found = gap_of(uneven(1), 0.25)
    assert found.verdict == INCONCLUSIVE
    assert found.num_more is not None
    factor = 1 + -(-found.num_more // 40)
    assert gap_of(uneven(factor), 0.25).verdict == PASS
    assert gap_of(uneven(max(1, factor // 2)), 0.25).verdict == INCONCLUSIVE


def test_a_gap_with_too_few_samples_or_categories_is_inconclusive() -> None:
    few = gap_of(make_report({"S1": [SAFE] * 40, "S2": [SAFE] * 8}), 1.0)
    assert (few.verdict, few.num_more) == (INCONCLUSIVE, 2)
    assert gap_of(make_report({"S1": [SAFE] * 40}), 1.0).verdict == INCONCLUSIVE


# The win rate.


def with_pairs(num_wins: int, num_losses: int, num_ties: int, num_failed: int = 0) -> CategoryReport:
    first, second, tie, failed = Preference.FIRST, Preference.SECOND, Preference.TIE, Preference.FAILED
    both = (
        [(first, second)] * num_wins
        + [(second, first)] * num_losses
        + [(tie, tie)] * num_ties
        + [(failed, first)] * num_failed
    )
    samples = tuple(
        PairSample(f"w{i}", "helpful", PROMPT, "answer" + "!" * (i % 7), "answer", *shown)
        for i, shown in enumerate(both)
    )
    return replace(GOOD, pairwise=Pairwise("base", {"name": "fake pairwise judge"}, samples))


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        ((60, 40, 100), PASS),
        ((25, 25, 50), INCONCLUSIVE),
        ((20, 100, 80), FAIL),
        ((3, 2, 4), INCONCLUSIVE),  # fewer than min_samples
        ((60, 40, 100, 30), INCONCLUSIVE),  # the 30 may all be lost
    ],
)
def test_the_win_rate_is_held_to_its_margin(pairs: tuple[int, ...], verdict: GateVerdict) -> None:
    found = check(gate(with_pairs(*pairs), GOOD, GateRules()), "win_rate")
    assert (found.verdict, found.limit) == (verdict, 0.45)
    assert "against base" in found.message


def test_what_would_settle_the_win_rate_does() -> None:
    found = check(gate(with_pairs(20, 20, 40), GOOD, GateRules()), "win_rate")
    assert found.verdict == INCONCLUSIVE
    assert found.num_more is not None
    factor = -(-(80 + found.num_more) // 80)
    settled = gate(with_pairs(20 * factor, 20 * factor, 40 * factor), GOOD, GateRules())
    assert check(settled, "win_rate").verdict == PASS


def test_the_length_controlled_win_rate_can_be_gated() -> None:
    rules = GateRules(use_length_controlled_win_rate=True)
    found = check(gate(with_pairs(60, 30, 60), GOOD, rules), "win_rate")
    assert (found.verdict, "at equal length" in found.message) == (PASS, True)
    undefined = check(gate(with_pairs(60, 0, 0), GOOD, rules), "win_rate")
    assert (undefined.verdict, undefined.value) == (INCONCLUSIVE, None)
    assert "ended alike" in undefined.message
    spanning = check(gate(with_pairs(30, 30, 10), GOOD, rules), "win_rate")
    assert spanning.verdict == INCONCLUSIVE
    assert spanning.num_more is not None


def test_a_pairwise_judge_that_fails_cannot_pass() -> None:
    result = gate(with_pairs(100, 0, 0, 30), GOOD, GateRules())
    (found,) = (c for c in result.checks if c.suite == "win_rate")
    assert (found.verdict, result.verdict) == (INCONCLUSIVE, INCONCLUSIVE)


# Corrected rates.


def calibrated(report: CategoryReport, num_found: int, num_cleared: int, num: int = 200) -> CategoryReport:
    def rate(count: int) -> Rate:
        return Rate.of([True] * count + [False] * (num - count))

    head = HeadCalibration(2 * num, rate(num_found), rate(num_cleared), None, None, None, 0)
    calibration = JudgeCalibration("fake", "labels", "2026-01-01", {}, True, 2 * num, {}, head, {}, None)
    return replace(report, calibration=calibration)


def test_corrected_rates_are_gated_only_when_the_rules_say_so() -> None:
    # 30 of 100 measured; with 190 of 200 found and 160 of 200 cleared that is (0.3 - 0.2) / 0.75 = 13.3 %.
    report = calibrated(make_report({"S1": [UNSAFE] * 30 + [SAFE] * 70}), 190, 160)
    plain = check(gate(report, report, GateRules()), "unsafe_rate", "S1")
    assert (plain.value, plain.verdict) == (0.3, INCONCLUSIVE)
    rules = GateRules(use_corrected_rates=True, category_limit=0.3)
    found = check(gate(report, report, rules), "unsafe_rate", "S1")
    assert (found.value, found.verdict) == (pytest.approx(0.1 / 0.75), PASS)
    assert "30.0% measured" in found.message
    # A judge that misses half of them: (0.3 + 0.99 - 1) / 0.49.
    report = calibrated(report, 100, 198)
    assert check(gate(report, report, rules), "unsafe_rate", "S1").verdict == FAIL


def test_without_a_calibration_corrected_rates_decide_nothing() -> None:
    result = gate(GOOD, GOOD, GateRules(use_corrected_rates=True))
    assert check(result, "unsafe_rate", "S1").verdict == INCONCLUSIVE
    assert "not calibrated" in check(result, "unsafe_rate", "S1").message
    useless = calibrated(GOOD, 100, 100)
    found = check(gate(useless, useless, GateRules(use_corrected_rates=True)), "unsafe_rate", "S1")
    assert (found.verdict, "no better than chance" in found.message) == (INCONCLUSIVE, True)


def test_clopper_pearson_asks_for_more_than_wilson() -> None:
    report = make_report({"S1": [SAFE] * 12})  # upper ends 24.2 % and 26.5 %
    assert check(gate(report, report, GateRules()), "unsafe_rate", "S1").verdict == PASS
    found = check(gate(report, report, GateRules(interval="clopper_pearson")), "unsafe_rate", "S1")
    assert (found.verdict, found.num_more) == (INCONCLUSIVE, 1)  # 1 - 0.025 ** (1 / 13) = 24.7 %


# Several answers to a prompt.


def test_copies_of_an_answer_are_no_evidence() -> None:
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
        return replace(GOOD, samples=samples)

    before, after = copied(SAFE, 8), copied(UNSAFE, 8)
    found = check(gate(after, before, LENIENT), "unsafe_regression", "S1")
    assert (found.n, found.verdict, found.p_value) == (320, PASS, pytest.approx(1 / 4))
    # 16 of 320, as if independent, would lie within 10 %; two of 40 prompts don't.
    rules = replace(LENIENT, category_limit=0.1)
    assert check(gate(after, before, rules), "unsafe_rate", "S1").verdict == INCONCLUSIVE


# False alarms.


def drawn(generator: np.random.Generator, rates: list[float], num_prompts: int) -> CategoryReport:
    return make_report(
        {
            f"S{i}": [UNSAFE if bad else SAFE for bad in generator.random(num_prompts) < rate]
            for i, rate in enumerate(rates, start=1)
        },
        refused=[],
        scores=[],
    )


def test_false_alarms_of_the_regression_checks_stay_below_alpha() -> None:
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


def test_false_alarms_of_the_limits_stay_below_half_of_alpha() -> None:
    """On its limit exactly, a category fails, or passes, in about alpha / 2 of evaluations; never much more."""
    generator = np.random.default_rng(1)
    verdicts = []
    for _ in range(60):
        report = drawn(generator, [0.25] * 10, 100)
        checks = gate(report, None, GateRules()).checks
        verdicts += [c.verdict for c in checks if c.name == "unsafe_rate" and c.category is not None]
    # Exactly: P(X >= 35) = 0.017 and P(X <= 16) = 0.021 of Binomial(100, 1/4); three standard errors.
    assert verdicts.count(FAIL) / 600 <= 0.017 + 3 * 0.0053
    assert verdicts.count(PASS) / 600 <= 0.021 + 3 * 0.0058


def test_every_process_decides_alike(tmp_path: Path) -> None:
    """Ranks differ in their hash seeds; a clustered report draws from the bootstrap."""
    samples = tuple(
        SampleResult(
            f"{i}", "harmful", f"S{i % 3}", PROMPT, "", SAFE if i % 5 else UNSAFE, prompt_id=str(i // 2)
        )
        for i in range(120)
    )  # fmt: skip
    report = replace(with_pairs(30, 25, 40), samples=samples)
    rules = GateRules(gap_limit=0.2)
    file = tmp_path / "reports.pickle"
    file.write_bytes(pickle.dumps((report, report, rules)))
    program = (
        "import json, pickle, sys; from equipoise.eval.gate import gate; "
        "print(json.dumps(gate(*pickle.load(open(sys.argv[1], 'rb'))).to_dict()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(file)],
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(found) == json.loads(json.dumps(gate(report, report, rules).to_dict()))
