"""Intervals, paired tests, multiplicity and shrinkage: every number in a report passes through here.

All functions are pure and take plain Python numbers, so that a report read back from JSON gives the same
figures as the run that wrote it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import optimize, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint


def wilson_interval(count: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a rate of `count` in `n`; (0, 1) when nothing was counted.

    Source: Wilson 1927; recommended for small n by Brown, Cai and DasGupta 2001, Statistical Science 16(2).
    Raises ValueError unless 0 <= count <= n.
    """
    if not 0 <= count <= n:
        raise ValueError(f"a rate needs 0 <= count <= n, found count {count} and n {n}")
    if n == 0:
        return 0.0, 1.0
    low, high = proportion_confint(count, n, alpha=1 - confidence, method="wilson")
    # Rounding leaves 1e-17 where the formula is exactly 0 or 1.
    return (0.0 if count == 0 else float(low)), (1.0 if count == n else float(high))


def num_samples_to_settle(rate: float, limit: float, confidence: float = 0.95) -> int | None:
    """How many samples in all put Wilson's interval around `rate` wholly on one side of `limit`.

    The interval inverts the score test, hence N = z² limit (1 - limit) / (rate - limit)². None when no number
    would do (the rate lies on the limit). It assumes that the rate stays as observed.
    """
    if rate == limit:
        return None
    z = _z(confidence)
    # The tolerance keeps 4.000000001 from becoming 5.
    return max(1, math.ceil(z * z * limit * (1 - limit) / (rate - limit) ** 2 - 1e-9))


@dataclass(frozen=True, slots=True)
class PairedChange:
    """How a yes/no outcome changed between two runs over the same prompts."""

    n: int
    """Prompts with an outcome in both runs."""
    num_gained: int
    """No before, yes after."""
    num_lost: int
    """Yes before, no after."""
    difference: float | None
    """Rate after minus rate before; None when n is 0."""
    low: float
    high: float
    p_value: float
    """Exact McNemar test, two-sided."""
    p_increase: float
    """Exact McNemar test, one-sided: how likely so large a rise is if nothing rose."""


def paired_change(before: Sequence[bool], after: Sequence[bool], confidence: float = 0.95) -> PairedChange:
    """Exact McNemar test and Tango's score interval for paired outcomes.

    The test is the binomial test of the discordant pairs (McNemar 1947). Raises ValueError when the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"paired outcomes differ in length: {len(before)} before, {len(after)} after")
    n = len(before)
    num_gained = sum(b and not a for a, b in zip(before, after, strict=True))
    num_lost = sum(a and not b for a, b in zip(before, after, strict=True))
    discordant = num_gained + num_lost
    low, high = tango_interval(num_gained, num_lost, n, confidence)
    return PairedChange(
        n=n,
        num_gained=num_gained,
        num_lost=num_lost,
        difference=(num_gained - num_lost) / n if n else None,
        low=low,
        high=high,
        p_value=float(stats.binomtest(num_gained, discordant).pvalue) if discordant else 1.0,
        p_increase=(
            float(stats.binomtest(num_gained, discordant, alternative="greater").pvalue)
            if discordant
            else 1.0
        ),
    )


def tango_interval(num_gained: int, num_lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Tango's score interval for the difference of two paired rates, (gained - lost) / n; (-1, 1) when n is 0.

    The ends solve (b - c - nΔ) / sqrt(n (2 q + Δ(1 - Δ))) = ±z, with q the restricted maximum-likelihood estimate
    of the probability of the pairs lost. Unlike Wald's interval it has a width when no pair is discordant.

    Source: Tango 1998, Statistics in Medicine 17(8), equations 13 and 16.
    """
    if num_gained < 0 or num_lost < 0 or num_gained + num_lost > n:
        raise ValueError(f"{num_gained} gained and {num_lost} lost do not fit into {n} pairs")
    if n == 0:
        return -1.0, 1.0
    z = _z(confidence)

    def score(difference: float) -> float:
        """The score statistic; falls from +inf to -inf as the difference grows."""
        linear = -num_gained - num_lost + (2 * n - num_gained + num_lost) * difference
        constant = -num_lost * difference * (1 - difference)
        q = (math.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
        variance = n * (2 * q + difference * (1 - difference))
        gap = num_gained - num_lost - n * difference
        if variance > 0:
            return gap / math.sqrt(variance)
        return math.copysign(math.inf, gap) if gap else 0.0

    def end(target: float, inner: float, outer: float) -> float:
        if (score(outer) - target) * (score(inner) - target) >= 0:
            return outer  # the statistic doesn't reach ±z short of ±1
        return float(optimize.brentq(lambda difference: score(difference) - target, inner, outer))

    estimate = (num_gained - num_lost) / n
    edge = 1 - 1e-9
    low = -1.0 if estimate <= -edge else end(z, estimate, -edge)
    high = 1.0 if estimate >= edge else end(-z, estimate, edge)
    return (-1.0 if low <= -edge else low), (1.0 if high >= edge else high)


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its t interval; what can't be estimated is None (the mean of nothing, the spread of one)."""

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p_value: float | None = None
    """Two-sided t test against zero."""


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Mean:
    """Mean and Student's t interval; for paired scores, give it the differences.

    Raises ValueError on a value that isn't finite.
    """
    if not all(math.isfinite(value) for value in values):
        raise ValueError("a mean needs finite values; leave unscored samples out and count them")
    n = len(values)
    if n == 0:
        return Mean(0, None, None, None)
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(1, mean, None, None)
    standard_error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
    half_width = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * standard_error
    if standard_error > 0:
        p_value = float(2 * stats.t.sf(abs(mean) / standard_error, n - 1))
    else:
        p_value = 1.0 if mean == 0 else 0.0
    return Mean(n, mean, mean - half_width, mean + half_width, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number by Holm's step-down method, in the order given (Holm 1979)."""
    if not p_values:
        return []
    return [float(p) for p in multipletests(list(p_values), method="holm")[1]]


def shrink_rates(counts: Sequence[float], totals: Sequence[float], strength: float) -> list[float]:
    """Rates drawn toward the overall rate, the more the fewer samples a category has.

    (count + strength * overall) / (total + strength): the posterior mean under a beta prior centred on the overall
    rate and worth `strength` samples. A category without samples gets the overall rate.
    Raises ValueError when there are no samples at all, or a count lies outside [0, total].
    """
    if len(counts) != len(totals):
        raise ValueError(f"{len(counts)} counts but {len(totals)} totals")
    if strength < 0:
        raise ValueError(f"strength must be >= 0 samples, found {strength}")
    for count, total in zip(counts, totals, strict=True):
        if not 0 <= count <= total:
            raise ValueError(f"a rate needs 0 <= count <= total, found count {count} and total {total}")
    if sum(totals) == 0:
        raise ValueError("rates can't be shrunk toward an overall rate: there are no samples at all")
    overall = sum(counts) / sum(totals)
    return [
        (count + strength * overall) / (total + strength) if total + strength > 0 else overall
        for count, total in zip(counts, totals, strict=True)
    ]


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, found {confidence}")
    return float(stats.norm.ppf((1 + confidence) / 2))
