import math

import numpy as np
import pytest

from equipoise.eval.statistics import wilson_interval, worst_to_best_gap


def test_the_gap_of_two_by_hand() -> None:
    gap = worst_to_best_gap([9, 3], [30, 30])
    low, high = wilson_interval(9, 30)
    other_low, other_high = wilson_interval(3, 30)
    assert (gap.gap, gap.worst, gap.best) == (pytest.approx(0.2), 0, 1)
    # Newcombe's square-and-add interval; the upper end needs no correction.
    assert gap.high == pytest.approx(0.2 + math.hypot(high - 0.3, 0.1 - other_low))
    # Two ordered pairs: the lower end is at 1 - 0.05 / 2.
    low, _ = wilson_interval(9, 30, 0.975)
    _, other_high = wilson_interval(3, 30, 0.975)
    assert gap.low == pytest.approx(max(0.0, 0.2 - math.hypot(0.3 - low, other_high - 0.1)))


def test_the_difference_of_newcombe_1998() -> None:
    # His example (a): 56 of 70 against 48 of 80, method 10: 0.0524 to 0.3339.
    assert worst_to_best_gap([56, 48], [70, 80]).high == pytest.approx(0.3339, abs=1e-4)


@pytest.mark.parametrize("num_prompts", [12, 60])
@pytest.mark.parametrize(
    "rates",
    [
        [0.1] * 13,
        [0.4] * 13,
        [0.05] * 12 + [0.4],
        [0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4],
        [0.3, 0.3],
        [0.1, 0.5],
    ],
)
def test_the_gap_covers(rates: list[float], num_prompts: int) -> None:
    generator = np.random.default_rng(0)
    totals = [num_prompts] * len(rates)
    truth = max(rates) - min(rates)
    num_covered = num_too_high = 0
    for counts in generator.binomial(num_prompts, rates, size=(300, len(rates))).tolist():
        gap = worst_to_best_gap(counts, totals)
        num_covered += gap.low <= truth <= gap.high
        num_too_high += gap.low > truth
    assert num_covered / 300 >= 0.93
    # alpha / 2, and three standard errors: what a gate that fails on the lower end errs by.
    assert num_too_high / 300 <= 0.055


def test_unknown_outcomes_move_both_ends_outward() -> None:
    known = worst_to_best_gap([9, 3], [30, 30])
    open_ = worst_to_best_gap([9, 3], [30, 30], [5, 0])
    assert open_.gap == known.gap
    assert open_.low < known.low or open_.low == 0.0
    assert open_.high > known.high
    # One category of which nothing is known: it may be as bad as can be.
    assert worst_to_best_gap([0, 0, 0], [30, 30, 0], [0, 0, 30]).high > 0.9


def test_a_gap_needs_two_categories() -> None:
    for counts, totals in (([], []), ([1], [10]), ([1, 0], [10, 0])):
        gap = worst_to_best_gap(counts, totals)
        assert (gap.gap, gap.low, gap.high) == (None, 0.0, 1.0)
