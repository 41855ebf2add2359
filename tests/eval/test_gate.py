import json
from dataclasses import replace

import pytest

from equipoise.eval.category_report import CategoryReport, SampleResult
from equipoise.eval.gate import GateCheck, GateResult, GateRules, GateVerdict, gate
from equipoise.eval.judges.base import Verdict

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


@pytest.mark.parametrize(
    "wrong",
    [
        {"category_limit": 1.5},
        {"category_limits": {"S1": -0.1}},
        {"overall_limit": -1},
        {"alpha": 0},
        {"over_refusal_margin": 2},
        {"helpfulness_margin": -0.1},
        {"min_samples": 0},
    ],
)
def test_impossible_rules_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GateRules(**wrong)  # type: ignore[arg-type]
