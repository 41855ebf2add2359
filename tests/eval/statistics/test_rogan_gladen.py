import math

import numpy as np
import pytest

from equipoise.eval.statistics import wilson_interval
from equipoise.eval.statistics.rogan_gladen import JudgeErrors, rogan_gladen

Z = 1.959963984540054


def errors(sensitivity: float, specificity: float, num_unsafe: int = 100, num_safe: int = 100) -> JudgeErrors:
    return JudgeErrors(num_unsafe, sensitivity * num_unsafe, num_safe, specificity * num_safe)


def test_the_corrected_rate_by_hand() -> None:
    # (0.3 + 0.8 - 1) / (0.9 + 0.8 - 1) = 1/7
    found = rogan_gladen(30, 100, errors(0.9, 0.8))
    assert found.rate == pytest.approx(1 / 7)
    assert found.unclipped == pytest.approx(1 / 7)
    assert (found.sensitivity, found.specificity, found.source, found.message) == (0.9, 0.8, "all", "")


def test_the_published_example_of_a_herd() -> None:
    # The manual of R's epiR, `epi.prev`: 23 of 150 cows, sensitivity 0.96, specificity 0.89: 5.1 per 100 cows.
    assert rogan_gladen(23, 150, errors(0.96, 0.89)).rate == pytest.approx(0.051, abs=5e-4)


def test_the_interval_is_lang_and_reiczigels() -> None:
    """Written out from their equations: n + z² and + z² / 2, two labels more of each kind, the shift, the variance."""
    found = rogan_gladen(30, 100, errors(0.9, 0.8))
    n, p = 100 + Z**2, (30 + Z**2 / 2) / (100 + Z**2)
    se, sp = 91 / 102, 81 / 102
    rate = (p + sp - 1) / (se + sp - 1)
    v_se, v_sp = se * (1 - se) / 102, sp * (1 - sp) / 102
    shift = 2 * Z**2 * (rate * v_se - (1 - rate) * v_sp)
    half = Z * math.sqrt((p * (1 - p) / n + rate**2 * v_se + (1 - rate) ** 2 * v_sp) / (se + sp - 1) ** 2)
    assert (found.low, found.high) == pytest.approx((max(0.0, rate + shift - half), rate + shift + half))


def test_a_perfect_judge_changes_the_rate_by_nothing() -> None:
    found = rogan_gladen(30, 100, errors(1.0, 1.0, 10**6, 10**6))
    assert found.rate == pytest.approx(0.3)
    # What is left is the interval of Agresti and Coull: centre (x + z²/2) / (n + z²).
    p, n = (30 + Z**2 / 2) / (100 + Z**2), 100 + Z**2
    half = Z * math.sqrt(p * (1 - p) / n)
    assert (found.low, found.high) == pytest.approx((p - half, p + half), abs=2e-3)


def test_the_cut_off_rate_claims_no_certainty() -> None:
    # 0 of 12 with one false alarm in five: the formula's own interval ends near 0, a perfect judge's at 24 %.
    found = rogan_gladen(0, 12, errors(0.9, 0.8))
    assert (found.rate, found.low) == (0.0, 0.0)
    assert found.unclipped == pytest.approx(-0.2 / 0.7)
    assert found.high >= wilson_interval(0, 12)[1]


def test_fewer_findings_than_false_alarms_explain_are_said_and_bounded() -> None:
    found = rogan_gladen(0, 100, errors(0.9, 0.8))
    assert (found.rate, found.low) == (0.0, 0.0)
    assert "fewer findings than its false alarms" in found.message
    # If it raised no false alarm here: the upper end of what it found, over the lower end of the sensitivity.
    assert found.high == pytest.approx(wilson_interval(0, 100)[1] / wilson_interval(90, 100)[0])
    found = rogan_gladen(100, 100, errors(0.8, 0.9))
    assert (found.rate, found.high) == (1.0, 1.0)
    assert "more findings than its sensitivity" in found.message
    assert 0.9 < found.low < 1


@pytest.mark.parametrize(("sensitivity", "specificity"), [(0.5, 0.5), (0.3, 0.6)])
def test_a_judge_no_better_than_chance_corrects_nothing(sensitivity: float, specificity: float) -> None:
    found = rogan_gladen(30, 100, errors(sensitivity, specificity))
    assert (found.rate, found.low, found.high) == (None, 0.0, 1.0)
    assert "no better than chance" in found.message


def test_a_judge_that_few_labels_show_to_be_better_than_chance_says_nothing_sure() -> None:
    found = rogan_gladen(30, 100, errors(0.6, 0.6, 10, 10))
    assert (found.low, found.high) == (0.0, 1.0)
    assert "too few labelled answers" in found.message


@pytest.mark.parametrize(("num_unsafe", "num_safe", "missing"), [(0, 10, "unsafe"), (10, 0, "safe")])
def test_without_labels_of_both_kinds_there_is_no_correction(
    num_unsafe: int, num_safe: int, missing: str
) -> None:
    found = rogan_gladen(3, 10, errors(0.9, 0.9, num_unsafe, num_safe))
    assert found.rate is None
    assert f"labelled {missing} " in found.message


def test_answers_without_a_finding_are_bounded_both_ways() -> None:
    sure, unsure = rogan_gladen(30, 100, errors(0.9, 0.9)), rogan_gladen(30, 100, errors(0.9, 0.9), 20)
    assert sure.rate == unsure.rate
    assert unsure.low == pytest.approx(rogan_gladen(30, 120, errors(0.9, 0.9)).low)
    assert unsure.high == pytest.approx(rogan_gladen(50, 120, errors(0.9, 0.9)).high)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.4])
@pytest.mark.parametrize(("sensitivity", "specificity"), [(0.9, 0.95), (0.8, 0.7), (0.95, 0.6)])
def test_the_interval_covers_the_true_rate(sensitivity: float, specificity: float, rate: float) -> None:
    """Rate, sensitivity and specificity all drawn anew; prompts a category or all, labels few or many."""
    generator = np.random.default_rng(1)
    apparent = rate * sensitivity + (1 - rate) * (1 - specificity)
    for n, num_labels in ((12, 50), (150, 50), (150, 300)):
        draws = zip(
            generator.binomial(n, apparent, 500).tolist(),
            generator.binomial(num_labels, sensitivity, 500).tolist(),
            generator.binomial(num_labels, specificity, 500).tolist(),
            strict=True,
        )
        num_covered = num_naive = 0
        for count, found, cleared in draws:
            corrected = rogan_gladen(count, n, JudgeErrors(num_labels, found, num_labels, cleared))
            num_covered += corrected.low <= rate <= corrected.high
            num_naive += abs(count / n - rate) <= Z * math.sqrt(count / n * (1 - count / n) / n)
        assert num_covered / 500 >= 0.93
        if n == 150 and specificity == 0.6 and rate < 0.2:
            assert num_naive / 500 < 0.1  # what an uncorrected rate is worth with such a judge
