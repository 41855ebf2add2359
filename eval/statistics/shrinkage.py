"""Rates of small categories, drawn toward the overall rate."""

import math
from collections.abc import Sequence

from scipy import optimize, stats


def shrink_rates(counts: Sequence[float], totals: Sequence[float], strength: float) -> list[float]:
    """Rates drawn toward the overall rate, the more the fewer samples a category has.

    (count + strength * overall) / (total + strength): the posterior mean under a beta prior centred on the overall
    rate and worth `strength` samples. A category without samples gets the overall rate.
    Raises ValueError when there are no samples at all, or a count lies outside [0, total].
    """
    _check(counts, totals)
    if strength < 0:
        raise ValueError(f"strength must be >= 0 samples, found {strength}")
    overall = sum(counts) / sum(totals)
    return [
        (count + strength * overall) / (total + strength) if total + strength > 0 else overall
        for count, total in zip(counts, totals, strict=True)
    ]


def empirical_bayes_strength(
    counts: Sequence[int], totals: Sequence[int], bounds: tuple[float, float] = (1.0, 1000.0)
) -> float:
    """How many samples the overall rate is worth, as the categories tell: the `strength` of `shrink_rates`.

    Maximises the beta-binomial likelihood of the counts over the strength, with the prior's mean at the overall rate
    (parametric empirical Bayes: Morris 1983, JASA 78; Casella 1985, The American Statistician 39). Categories that
    differ no more than chance would have it give the upper bound. Raises ValueError as `shrink_rates` does.
    """
    _check(counts, totals)
    overall = sum(counts) / sum(totals)
    if overall in (0.0, 1.0):
        return bounds[1]  # all alike

    def loss(log_strength: float) -> float:
        strength = math.exp(log_strength)
        return -float(
            stats.betabinom.logpmf(counts, totals, strength * overall, strength * (1 - overall)).sum()
        )

    low, high = math.log(bounds[0]), math.log(bounds[1])
    found = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded")
    # The bounded search never reaches its bounds; where the likelihood still rises there, they are the answer.
    return math.exp(min((low, float(found.x), high), key=loss))


def _check(counts: Sequence[float], totals: Sequence[float]) -> None:
    if len(counts) != len(totals):
        raise ValueError(f"{len(counts)} counts but {len(totals)} totals")
    for count, total in zip(counts, totals, strict=True):
        if not 0 <= count <= total:
            raise ValueError(f"a rate needs 0 <= count <= total, found count {count} and total {total}")
    if sum(totals) == 0:
        raise ValueError("rates can't be shrunk toward an overall rate: there are no samples at all")
