"""Intervals of rates and means, for independent samples and for several answers to one prompt."""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from scipy import stats
from statsmodels.stats.proportion import proportion_confint

Interval = tuple[float, float]


class IntervalMethod(StrEnum):
    """How the interval of a rate is built."""

    WILSON = "wilson"
    """Wilson's score interval: on average at the nominal level; the default."""
    CLOPPER_PEARSON = "clopper_pearson"
    """Never below the nominal level, hence wider: for a limit that is to be guaranteed."""
    JEFFREYS = "jeffreys"
    """Central posterior interval under Beta(1/2, 1/2), with the ends 0 and 1 where all or none were counted."""


_STATSMODELS_NAMES = {
    IntervalMethod.WILSON: "wilson",
    IntervalMethod.CLOPPER_PEARSON: "beta",
    IntervalMethod.JEFFREYS: "jeffreys",
}


@lru_cache(maxsize=2**16)  # statsmodels takes half a millisecond for one
def rate_interval(
    count: float, n: float, confidence: float = 0.95, method: IntervalMethod = IntervalMethod.WILSON
) -> Interval:
    """The interval for a rate of `count` in `n`; (0, 1) when nothing was counted.

    Counts need not be whole: several answers to one prompt weigh less than so many independent ones.
    Sources: Wilson 1927; Clopper and Pearson 1934; Jeffreys' interval with its two corrected ends and a comparison
    of all three in Brown, Cai and DasGupta 2001, Statistical Science 16(2).
    Raises ValueError unless 0 <= count <= n.
    """
    if not 0 <= count <= n:
        raise ValueError(f"a rate needs 0 <= count <= n, found count {count} and n {n}")
    z_value(confidence)
    if n == 0:
        return 0.0, 1.0
    low, high = proportion_confint(count, n, alpha=1 - confidence, method=_STATSMODELS_NAMES[method])
    # Jeffreys' ends by the correction; the others are there already, but for rounding errors of 1e-17.
    return (0.0 if count == 0 else float(low)), (1.0 if count == n else float(high))


def wilson_interval(count: float, n: float, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a rate of `count` in `n`; see `rate_interval`."""
    return rate_interval(count, n, confidence)


def effective_size(
    values: Sequence[float], prompts: Sequence[Hashable] | None, confidence: float = 0.95
) -> float:
    """How many independent samples the mean of `values` in [0, 1] is worth; at most their number.

    p (1 - p) / variance, with the variance between prompts (linearised, so that prompts may have more answers or
    fewer), times (z / t)² for the few prompts that it is estimated from. Where all values are alike it can't be
    estimated: each prompt counts once. With `prompts` None, or one value in each, it is the number of values.
    Source: Korn and Graubard 1998, Survey Methodology 24(2); with Wilson's interval Franco et al. 2019, Journal of
    Survey Statistics and Methodology 7(3).
    """
    n = len(values)
    if prompts is None or len(set(prompts)) == n:
        return n
    num_prompts = len(set(prompts))
    mean = math.fsum(values) / n
    variance = _variance_between(values, prompts, mean)
    if num_prompts == 1 or variance <= 0:
        return num_prompts
    t = float(stats.t.ppf((1 + confidence) / 2, num_prompts - 1))
    return min(n, mean * (1 - mean) / variance * (z_value(confidence) / t) ** 2)


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean with its t interval; what can't be estimated is None (the mean of nothing, the spread of one)."""

    n: int
    mean: float | None
    low: float | None
    high: float | None
    p_value: float | None = None
    """Two-sided t test against zero."""


def mean_interval(
    values: Sequence[float], confidence: float = 0.95, prompts: Sequence[Hashable] | None = None
) -> Mean:
    """Mean and Student's t interval; for paired scores, give it the differences.

    With `prompts` (of each value) the variance is that between prompts, with one degree of freedom less than there are
    prompts (Liang and Zeger 1986, with the small-sample factor C / (C - 1)).
    Raises ValueError on a value that isn't finite.
    """
    if not all(math.isfinite(value) for value in values):
        raise ValueError("a mean needs finite values; leave unscored samples out and count them")
    n = len(values)
    if n == 0:
        return Mean(0, None, None, None)
    prompts = range(n) if prompts is None else prompts
    mean = math.fsum(values) / n
    degrees = len(set(prompts)) - 1
    if degrees == 0:
        return Mean(n, mean, None, None)
    standard_error = math.sqrt(_variance_between(values, prompts, mean))
    half_width = float(stats.t.ppf((1 + confidence) / 2, degrees)) * standard_error
    if standard_error > 0:
        p_value = float(2 * stats.t.sf(abs(mean) / standard_error, degrees))
    else:
        p_value = 1.0 if mean == 0 else 0.0
    return Mean(n, mean, mean - half_width, mean + half_width, p_value)


@lru_cache
def z_value(confidence: float) -> float:
    """The normal quantile of a two-sided interval; raises ValueError unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie strictly between 0 and 1, found {confidence}")
    return float(stats.norm.ppf((1 + confidence) / 2))


def _variance_between(values: Sequence[float], prompts: Sequence[Hashable], mean: float) -> float:
    """Of the mean: C / (C - 1) times the sum over C prompts of their summed deviations squared, over n²."""
    deviations: dict[Hashable, list[float]] = defaultdict(list)
    for value, prompt in zip(values, prompts, strict=True):
        deviations[prompt].append(value - mean)
    num_prompts = len(deviations)
    if num_prompts < 2:
        return 0.0
    squares = math.fsum(math.fsum(of) ** 2 for of in deviations.values())
    return num_prompts / (num_prompts - 1) * squares / len(values) ** 2
