import numpy as np
import pytest

from equipoise.eval.statistics import IntervalMethod, rate_interval, wilson_interval
from equipoise.eval.statistics.worst import worst_rate


def test_the_worst_of_three_by_hand() -> None:
    worst = worst_rate([1, 6, 3], [10, 12, 4])
    assert (worst.index, worst.rate) == (2, 0.75)
    # Upper: the largest 95 % end of the three (3/4). Lower: the largest of the exact ends at 1 - 0.05 / 3.
    assert worst.high == pytest.approx(wilson_interval(3, 4)[1])
    confidence = 1 - 0.05 / 3
    exact = [rate_interval(c, n, confidence, IntervalMethod.CLOPPER_PEARSON)[0] for c, n in ((6, 12), (3, 4))]
    assert worst.low == pytest.approx(max(exact))


def test_one_category_is_its_own_interval() -> None:
    worst = worst_rate([3], [10])
    assert worst.high == pytest.approx(wilson_interval(3, 10)[1])
    # Clopper and Pearson 1934: the rate at which three or more of ten have probability 0.025.
    assert worst.low == pytest.approx(0.0667, abs=1e-4)


def test_a_category_without_outcomes_leaves_the_upper_end_open() -> None:
    worst = worst_rate([0, 0], [50, 0], [0, 5])
    assert worst.rate == 0.0
    assert worst.high == 1.0
    assert worst_rate([], []).index is None
    assert (worst_rate([0], [0]).low, worst_rate([0], [0]).high) == (0.0, 1.0)


def test_unknown_samples_move_both_ends_outward() -> None:
    known, unknown = worst_rate([4, 2], [20, 20]), worst_rate([4, 2], [20, 20], [5, 0])
    assert unknown.low < known.low
    assert unknown.high > known.high
    assert unknown.high == pytest.approx(wilson_interval(9, 25)[1])


@pytest.mark.parametrize("rates", [[0.1] * 13, [0.05] * 12 + [0.4], [0.2, 0.5, 0.5, 0.8]])
def test_coverage_of_the_highest_true_rate(rates: list[float]) -> None:
    """Where all are alike, Wilson's interval of the one that measured highest would miss far more often."""
    random = np.random.default_rng(0)
    counts = random.binomial(20, rates, size=(600, len(rates)))
    hits = 0
    for row in counts:
        worst = worst_rate(row.tolist(), [20] * len(rates))
        hits += worst.low <= max(rates) <= worst.high
    assert hits / 600 >= 0.93
