import math

import numpy as np
import pytest
from scipy import stats

from equipoise.eval.statistics import (
    IntervalMethod,
    detectable_rate,
    detectable_rise,
    mean_interval,
    num_pairs_for_non_inferiority,
    num_pairs_for_rise,
    num_pairs_to_settle,
    num_samples_for_limit,
    num_samples_to_settle,
    num_scores_for_non_inferiority,
    num_scores_to_settle,
    paired_change,
    rate_interval,
    tango_interval,
    wilson_interval,
)

Z = 1.959963984540054


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


@pytest.mark.parametrize("method", [IntervalMethod.CLOPPER_PEARSON, IntervalMethod.JEFFREYS])
def test_the_other_intervals_are_settled_where_they_clear_too(method: IntervalMethod) -> None:
    needed = num_samples_to_settle(0.1, 0.25, method=method)
    assert needed is not None
    assert rate_interval(0.1 * needed, needed, method=method)[1] <= 0.25
    assert rate_interval(0.1 * (needed - 1), needed - 1, method=method)[1] > 0.25
    wilson = num_samples_to_settle(0.1, 0.25)
    assert wilson is not None
    assert (needed > wilson) is (method is IntervalMethod.CLOPPER_PEARSON)


@pytest.mark.parametrize(("gained", "lost", "margin"), [(4, 1, 0.05), (0, 0, 0.02), (12, 2, 0.05)])
def test_num_pairs_to_settle_is_where_tangos_interval_clears(gained: int, lost: int, margin: float) -> None:
    needed = num_pairs_to_settle(gained, lost, 100, margin)
    assert needed is not None

    def clears(n: int) -> bool:
        low, high = tango_interval(gained * n / 100, lost * n / 100, n)
        return high <= margin or low > margin

    assert clears(needed)
    assert not clears(needed - 1)
    assert num_pairs_to_settle(6, 1, 100, 0.05) is None  # on the margin
    assert num_pairs_to_settle(0, 0, 0, 0.05) is None


def test_num_scores_to_settle_is_where_the_t_interval_clears() -> None:
    scores = [-0.1 + 0.2 * (i % 2) for i in range(20)]  # mean 0, deviation 0.1026
    needed = num_scores_to_settle(mean_interval(scores), margin=-0.05)
    assert needed is not None
    deviation = np.std(scores, ddof=1)

    def half(n: int) -> float:
        return float(stats.t.ppf(0.975, n - 1) * deviation / math.sqrt(n))

    assert half(needed) <= 0.05 < half(needed - 1)
    assert num_scores_to_settle(mean_interval([1.0]), margin=0.0) is None


def test_power_of_a_limit_by_enumeration() -> None:
    needed = num_samples_for_limit(0.1, 0.25, power=0.8)
    assert needed is not None

    def power(n: int) -> float:
        return sum(
            float(stats.binom.pmf(count, n, 0.1))
            for count in range(n + 1)
            if wilson_interval(count, n)[1] <= 0.25
        )

    assert power(needed) >= 0.8
    assert max(power(n) for n in range(1, needed)) < 0.8
    assert num_samples_for_limit(0.25, 0.25) is None
    rate = detectable_rate(needed, 0.25)
    assert rate is not None
    assert 0.1 <= rate < 0.12
    assert detectable_rate(11, 0.25) is None  # 0 of 11 has an upper end of 25.9 %
    assert detectable_rate(12, 0.25) == pytest.approx(1 - 0.8 ** (1 / 12))  # only 0 of 12 passes


def test_the_minimum_detectable_rise_by_hand() -> None:
    # Nothing lost, 9 of 12 pairs must be gained for p <= 0.05 / 13; P(Binomial(12, p) >= 9) = 0.8.
    rise = detectable_rise(12, alpha=0.05 / 13)
    assert rise is not None
    assert stats.binom.sf(8, 12, rise) == pytest.approx(0.8, abs=1e-4)
    assert detectable_rise(8, alpha=0.05 / 13) is None


def test_num_pairs_for_a_rise_has_its_power_in_simulation() -> None:
    needed = num_pairs_for_rise(0.2, 0.05)
    assert needed is not None
    generator = np.random.default_rng(8)
    found = 0
    for gained, lost, _ in generator.multinomial(needed, [0.2, 0.05, 0.75], size=1000):
        found += stats.binom.sf(gained - 1, gained + lost, 0.5) <= 0.05
    assert found / 1000 == pytest.approx(0.8, abs=0.04)
    assert num_pairs_for_rise(0.1, 0.1) is None


def test_num_pairs_for_non_inferiority_by_hand_and_in_simulation() -> None:
    # (1.95996 + 0.84162)² * 0.1 / 0.05² = 313.96
    assert num_pairs_for_non_inferiority(0.05, 0.05, margin=0.05) == 314
    generator = np.random.default_rng(9)
    shown = 0
    for gained, lost, _ in generator.multinomial(314, [0.05, 0.05, 0.9], size=400):
        shown += tango_interval(int(gained), int(lost), 314)[1] <= 0.05
    assert shown / 400 == pytest.approx(0.8, abs=0.07)
    assert num_pairs_for_non_inferiority(0.1, 0.05, margin=0.05) is None
    # (2.80158)² * 0.2² / 0.05² = 125.58
    assert num_scores_for_non_inferiority(0.2, 0.0, margin=0.05) == 126
    assert num_scores_for_non_inferiority(0.2, -0.05, margin=0.05) is None


def test_a_few_pairs_agree_with_the_test_itself() -> None:
    assert paired_change([False] * 12, [True] * 9 + [False] * 3).p_increase == pytest.approx(0.5**9)
