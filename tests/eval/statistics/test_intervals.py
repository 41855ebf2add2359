import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from equipoise.eval.statistics import (
    IntervalMethod,
    Mean,
    effective_size,
    mean_interval,
    rate_interval,
    wilson_interval,
)

Z = 1.959963984540054
WILSON, CLOPPER_PEARSON, JEFFREYS = IntervalMethod


def test_wilson_interval_equals_the_formula() -> None:
    # 3 of 12, by hand: centre (p + z²/2n) / (1 + z²/n), half-width z sqrt(p(1-p)/n + z²/4n²) / (1 + z²/n)
    centre = (0.25 + Z**2 / 24) / (1 + Z**2 / 12)
    half = Z * math.sqrt(0.25 * 0.75 / 12 + Z**2 / (4 * 144)) / (1 + Z**2 / 12)
    assert wilson_interval(3, 12) == pytest.approx((centre - half, centre + half))


@pytest.mark.parametrize(("count", "n", "expected"), [(0, 0, (0, 1)), (0, 12, (0, Z**2 / (12 + Z**2)))])
def test_wilson_interval_at_its_edges(count: int, n: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(count, n) == pytest.approx(expected)


def test_wilson_interval_reaches_one_exactly() -> None:
    assert wilson_interval(12, 12)[1] == 1.0


@pytest.mark.parametrize(("count", "n"), [(-1, 3), (4, 3)])
def test_wilson_interval_refuses_impossible_counts(count: int, n: int) -> None:
    with pytest.raises(ValueError, match="0 <= count <= n"):
        wilson_interval(count, n)


@pytest.mark.parametrize("rate", [0.2, 0.3, 0.5])
def test_wilson_interval_covers_the_rate(rate: float) -> None:
    # Exact coverage over all outcomes rather than a simulation of them.
    for n in (12, 50, 156):
        covered = sum(
            stats.binom.pmf(count, n, rate)
            for count in range(n + 1)
            if wilson_interval(count, n)[0] <= rate <= wilson_interval(count, n)[1]
        )
        assert covered >= 0.93


def test_mean_interval_equals_the_t_interval() -> None:
    values = [0.1, 0.2, 0.4, 0.7]
    reference = stats.ttest_1samp(values, 0.0)
    interval = reference.confidence_interval(0.95)
    mean = mean_interval(values)
    assert (mean.n, mean.mean) == (4, pytest.approx(0.35))
    assert (mean.low, mean.high) == pytest.approx((interval.low, interval.high))
    assert mean.p_value == pytest.approx(reference.pvalue)


def test_mean_interval_says_what_it_cannot_estimate() -> None:
    assert mean_interval([]) == Mean(0, None, None, None)
    assert mean_interval([2.0]) == Mean(1, 2.0, None, None)
    assert mean_interval([0.0, 0.0]) == Mean(2, 0.0, 0.0, 0.0, 1.0)


def test_mean_interval_refuses_nan() -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, math.nan])


# 10 of 50, by statistical tables: Clopper-Pearson (0.1003, 0.3372), Jeffreys (0.1075, 0.3273).
@pytest.mark.parametrize(
    ("method", "count", "n", "expected"),
    [
        (CLOPPER_PEARSON, 10, 50, (0.10030, 0.33718)),
        (CLOPPER_PEARSON, 0, 20, (0.0, 1 - 0.025 ** (1 / 20))),
        (CLOPPER_PEARSON, 20, 20, (0.025 ** (1 / 20), 1.0)),
        (JEFFREYS, 0, 20, (0.0, 0.11664)),
        (WILSON, 10, 50, (0.11244, 0.33037)),
    ],
)
def test_intervals_by_published_values(
    method: IntervalMethod, count: int, n: int, expected: tuple[float, float]
) -> None:
    assert rate_interval(count, n, method=method) == pytest.approx(expected, abs=1e-5)


def test_jeffreys_interval_is_the_posterior_under_a_beta_half_prior() -> None:
    low, high = rate_interval(10, 50, method=JEFFREYS)
    posterior = stats.beta(10.5, 40.5)
    assert (posterior.cdf(low), posterior.sf(high)) == pytest.approx((0.025, 0.025))
    assert rate_interval(50, 50, method=JEFFREYS)[1] == 1.0


@pytest.mark.parametrize(("method", "least"), [(WILSON, 0.93), (CLOPPER_PEARSON, 0.95), (JEFFREYS, 0.93)])
def test_every_rate_interval_covers(method: IntervalMethod, least: float) -> None:
    # Exact coverage over all outcomes, at the sizes and rates that reports have.
    for n in (12, 50, 200):
        intervals = np.array([rate_interval(count, n, method=method) for count in range(n + 1)])
        rates = np.array([0.1, 0.2, 0.3, 0.5, 0.7])
        covered = (intervals[:, :1] <= rates) & (rates <= intervals[:, 1:])
        coverage = (stats.binom.pmf(np.arange(n + 1)[:, None], n, rates) * covered).sum(axis=0)
        if method is CLOPPER_PEARSON:
            assert coverage.min() >= least
        else:
            assert coverage.mean() >= 0.945
            assert (
                coverage >= least
            ).mean() >= 0.8  # both oscillate around the level: Brown, Cai, DasGupta 2001
        assert coverage.min() >= 0.9


def drawn(
    generator: np.random.Generator, num_prompts: int, num_answers: int, rate: float, alike: float
) -> np.ndarray:
    """(prompts, answers) of yes and no; with probability `alike` an answer is the prompt's own."""
    own = generator.random((num_prompts, 1)) < rate
    new = generator.random((num_prompts, num_answers)) < rate
    return np.where(generator.random(new.shape) < alike, own, new)


@pytest.mark.parametrize("alike", [0.0, 0.5, 0.9])
@pytest.mark.parametrize(("num_prompts", "rate"), [(13, 0.2), (60, 0.1), (150, 0.3)])
def test_a_rate_of_several_answers_to_a_prompt_covers(num_prompts: int, rate: float, alike: float) -> None:
    generator = np.random.default_rng(2)
    prompts = [prompt for prompt in range(num_prompts) for _ in range(3)]
    num_covered = num_covered_plainly = 0
    for _ in range(300):
        answers = drawn(generator, num_prompts, 3, rate, alike).ravel().astype(float)
        n = effective_size(answers.tolist(), prompts)
        assert n <= len(prompts)
        low, high = wilson_interval(answers.mean() * n, n)
        num_covered += low <= rate <= high
        low, high = wilson_interval(int(answers.sum()), len(prompts))
        num_covered_plainly += low <= rate <= high
    assert num_covered / 300 >= 0.93
    if alike == 0.9:
        assert num_covered_plainly / 300 < 0.88  # as if they were independent


def test_effective_size_by_hand() -> None:
    # Answers that agree with their prompt wholly are worth their prompts: p (1 - p) / variance = C - 1 = 3 here,
    # p = 1/2, deviations ±1 per prompt of two, variance 4/3 * 4 / 64 = 1/12; times (z / t_3)².
    values, prompts = [1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3]
    assert effective_size(values, prompts) == pytest.approx(3 * (Z / stats.t.ppf(0.975, 3)) ** 2)
    assert effective_size([0.0] * 6, [0, 0, 1, 1, 2, 2]) == 3  # nothing to estimate from: each prompt once
    assert effective_size([1, 0, 1], None) == 3
    assert effective_size([1, 0, 1], ["a", "b", "c"]) == 3
    assert effective_size([1, 0, 1], ["a", "a", "a"]) == 1


def test_the_mean_of_several_scores_a_prompt_by_hand() -> None:
    # Two prompts of two alike: mean 2, summed deviations -2 and 2, variance 2 * 8 / 16 = 1, one degree of freedom.
    mean = mean_interval([1.0, 1.0, 3.0, 3.0], prompts=["a", "a", "b", "b"])
    half = stats.t.ppf(0.975, 1)
    assert (mean.n, mean.mean) == (4, 2.0)
    assert (mean.low, mean.high) == pytest.approx((2 - half, 2 + half))
    assert mean_interval([1.0, 2.0], prompts=["a", "a"]) == Mean(2, 1.5, None, None)


@pytest.mark.parametrize("num_prompts", [10, 40])
def test_the_mean_of_several_scores_a_prompt_covers(num_prompts: int) -> None:
    generator = np.random.default_rng(3)
    prompts = [prompt for prompt in range(num_prompts) for _ in range(3)]
    num_covered = 0
    for _ in range(1000):
        scores = generator.normal(0, 1, (num_prompts, 1)) + generator.normal(0, 0.5, (num_prompts, 3))
        mean = mean_interval(scores.ravel().tolist(), prompts=prompts)
        assert mean.low is not None
        assert mean.high is not None
        num_covered += mean.low <= 0 <= mean.high
    assert num_covered / 1000 >= 0.93


@pytest.mark.parametrize("interval", [rate_interval, wilson_interval])
def test_a_confidence_outside_0_and_1_is_refused(interval: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="confidence"):
        interval(1, 2, 1.0)
