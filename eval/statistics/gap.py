"""How far the worst category lies from the best one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from equipoise.eval.statistics.intervals import wilson_interval


@dataclass(frozen=True, slots=True)
class Gap:
    """The highest category rate minus the lowest."""

    gap: float | None
    """None for fewer than two categories with an outcome."""
    low: float
    high: float
    worst: int | None = None
    """Index of the category with the highest rate."""
    best: int | None = None
    """Index of the one with the lowest."""
    smallest_n: float = 0.0
    """Samples with an outcome in the smallest category."""


def worst_to_best_gap(
    counts: Sequence[float],
    totals: Sequence[float],
    num_unknown: Sequence[float] | None = None,
    confidence: float = 0.95,
) -> Gap:
    """The gap of the rates counts / totals, with an interval for the gap of the true rates.

    num_unknown: per category, samples without an outcome, not in `totals`; each end takes the reading of them that
    moves it outward.

    The largest of several measured differences overshoots the largest true one, and a bootstrap of it overshoots once
    more. So the ends come from the differences of all pairs of categories, each with the square-and-add interval out
    of Wilson's (Newcombe 1998, Statistics in Medicine 17, method 10). Upper end: the largest upper end. The true gap
    is one pair's difference, so one pair's error is the error of all (intersection-union, Berger 1982, Technometrics
    24). Lower end: the largest lower end, with Bonferroni's correction for all ordered pairs. (0, 1) for fewer than
    two categories.
    """
    unknown = [0.0] * len(totals) if num_unknown is None else num_unknown
    rates = {index: counts[index] / total for index, total in enumerate(totals) if total > 0}
    if len(rates) < 2:
        return Gap(None, 0.0, 1.0)
    worst, best = max(rates, key=lambda index: rates[index]), min(rates, key=lambda index: rates[index])
    # A category of which nothing has an outcome has no rate, but it moves both ends as far as it can.
    whole = {i: totals[i] + unknown[i] for i in range(len(totals)) if totals[i] + unknown[i] > 0}
    fewest = {i: (counts[i], n) for i, n in whole.items()}
    most = {i: (counts[i] + unknown[i], n) for i, n in whole.items()}
    num_pairs = len(whole) * (len(whole) - 1)
    return Gap(
        gap=rates[worst] - rates[best],
        low=max(0.0, _largest_end(fewest, most, 1 - (1 - confidence) / num_pairs, upper=False)),
        high=min(1.0, _largest_end(most, fewest, confidence, upper=True)),
        worst=worst,
        best=best,
        smallest_n=min(totals),
    )


def _largest_end(
    plus: dict[int, tuple[float, float]],
    minus: dict[int, tuple[float, float]],
    confidence: float,
    upper: bool,
) -> float:
    """The largest end among the intervals of rate i of `plus` minus rate j of `minus`, over all i != j."""
    first = {i: (count / n, *wilson_interval(count, n, confidence)) for i, (count, n) in plus.items()}
    second = {i: (count / n, *wilson_interval(count, n, confidence)) for i, (count, n) in minus.items()}
    ends = []
    for i, (rate, low, high) in first.items():
        for j, (other, other_low, other_high) in second.items():
            if i != j:
                difference = rate - other
                ends.append(
                    difference + math.hypot(high - rate, other - other_low)
                    if upper
                    else difference - math.hypot(rate - low, other_high - other)
                )
    return max(ends)
