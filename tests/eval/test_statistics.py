import math

import numpy as np
import pytest
from scipy import optimize, stats

from equipoise.eval.statistics import (
    Mean,
    holm,
    mean_interval,
    num_samples_to_settle,
    paired_change,
    shrink_rates,
    tango_interval,
    wilson_interval,
)

Z = 1.959963984540054


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


@pytest.mark.parametrize(("rate", "limit"), [(0.0, 0.25), (1 / 12, 0.25), (0.4, 0.25), (0.1, 0.15)])
def test_num_samples_to_settle_is_where_the_interval_clears_the_limit(rate: float, limit: float) -> None:
    needed = num_samples_to_settle(rate, limit)
    assert needed is not None

    def clears(n: int) -> bool:
        # Wilson's interval at a rate that need not be a whole number of counts.
        centre = (rate + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n * n)) / (1 + Z**2 / n)
        return centre + half <= limit if rate < limit else centre - half >= limit

    assert clears(needed)
    assert not clears(needed - 1)


def test_no_number_of_samples_settles_a_rate_on_the_limit() -> None:
    assert num_samples_to_settle(0.25, 0.25) is None


def test_paired_change_counts_and_tests_the_discordant_pairs() -> None:
    before = [False] * 6 + [True] * 4
    after = [True] * 5 + [False] + [True] * 3 + [False]
    change = paired_change(before, after)
    assert (change.n, change.num_gained, change.num_lost) == (10, 5, 1)
    assert change.difference == pytest.approx(0.4)
    # Binomial(6, 1/2): P(X >= 5) = 7/64, two-sided 14/64.
    assert change.p_increase == pytest.approx(7 / 64)
    assert change.p_value == pytest.approx(14 / 64)
    assert change.low < 0.4 < change.high


def test_paired_change_of_nothing_says_nothing() -> None:
    change = paired_change([], [])
    assert (change.n, change.difference, change.low, change.high, change.p_value) == (0, None, -1, 1, 1)


def test_paired_change_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="differ in length: 1 before, 2 after"):
        paired_change([True], [True, False])


def test_mcnemar_rarely_alarms_without_a_change() -> None:
    generator = np.random.default_rng(0)
    num_alarms = 0
    for _ in range(1000):
        before, after = generator.random((2, 40)) < 0.3
        num_alarms += paired_change(before.tolist(), after.tolist()).p_increase <= 0.05
    assert num_alarms / 1000 <= 0.05  # exact, hence conservative
    assert num_alarms > 0


def test_tango_interval_without_discordant_pairs_equals_the_closed_form() -> None:
    # b = c = 0 leaves nΔ / (1 - Δ) = z², that is Δ = z² / (n + z²).
    bound = Z**2 / (12 + Z**2)
    assert tango_interval(0, 0, 12) == pytest.approx((-bound, bound), abs=1e-6)


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(5, 1, 12), (0, 7, 12), (3, 3, 40), (20, 2, 104), (1, 0, 44)]
)
def test_tango_interval_inverts_the_score_test(gained: int, lost: int, n: int) -> None:
    """At each end the statistic is ±z, with the restricted estimate maximised numerically, not by Tango's formula."""

    def statistic(difference: float) -> float:
        def negative_log_likelihood(q: float) -> float:
            p_gained, p_lost = q + difference, q
            rest = 1 - p_gained - p_lost
            counts = ((gained, p_gained), (lost, p_lost), (n - gained - lost, rest))
            return -sum(count * math.log(max(p, 1e-300)) for count, p in counts if count)

        low, high = max(0.0, -difference), (1 - difference) / 2
        q = optimize.minimize_scalar(
            negative_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
        ).x
        return (gained - lost - n * difference) / math.sqrt(n * (2 * q + difference - difference**2))

    low, high = tango_interval(gained, lost, n)
    assert statistic(low) == pytest.approx(Z, abs=2e-3)
    assert statistic(high) == pytest.approx(-Z, abs=2e-3)


def test_tango_interval_is_symmetric_and_bounded() -> None:
    low, high = tango_interval(4, 1, 12)
    assert tango_interval(1, 4, 12) == pytest.approx((-high, -low))
    assert tango_interval(12, 0, 12)[1] == 1.0
    assert tango_interval(0, 12, 12)[0] == -1.0


def test_tango_interval_covers_the_difference() -> None:
    generator = np.random.default_rng(1)
    p_gained, p_lost, n = 0.15, 0.05, 104
    num_covered = 0
    for gained, lost, _ in generator.multinomial(n, [p_gained, p_lost, 1 - p_gained - p_lost], size=600):
        low, high = tango_interval(int(gained), int(lost), n)
        num_covered += low <= p_gained - p_lost <= high
    assert num_covered / 600 >= 0.93


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


def test_holm_by_hand_and_in_the_order_given() -> None:
    # Sorted 0.01, 0.03, 0.04 times 3, 2, 1, then made monotone.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


def test_shrink_rates_by_hand() -> None:
    # Overall 4 / 20 = 0.2; (2 + 8 * 0.2) / (2 + 8) and (2 + 1.6) / (18 + 8); without samples the overall rate.
    assert shrink_rates([2, 2, 0], [2, 18, 0], strength=8) == pytest.approx([0.36, 3.6 / 26, 0.2])
    assert shrink_rates([2, 2, 0], [2, 18, 0], strength=0) == pytest.approx([1.0, 1 / 9, 0.2])


def test_shrink_rates_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="no samples at all"):
        shrink_rates([0, 0], [0, 0], strength=8)
    with pytest.raises(ValueError, match="count 3 and total 2"):
        shrink_rates([3], [2], strength=8)
    with pytest.raises(ValueError, match="strength"):
        shrink_rates([1], [2], strength=-1)
