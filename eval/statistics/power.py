"""How many prompts a rule needs, and what a given number of them can show.

`num_..._to_settle`: when would the interval clear the limit if everything stays as it was observed. `num_..._for_...`
and `detectable_...`: planning, with a power: how often the check would come out as the truth is.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy import optimize, stats

from equipoise.eval.statistics.intervals import IntervalMethod, Mean, rate_interval, z_value
from equipoise.eval.statistics.paired import tango_interval

MAX_SAMPLES = 10_000_000
"""Beyond that no evaluation goes, and "no number would do" is the honest answer."""


def num_samples_to_settle(
    rate: float, limit: float, confidence: float = 0.95, method: IntervalMethod = IntervalMethod.WILSON
) -> int | None:
    """How many samples in all put the interval around `rate` wholly on one side of `limit`.

    Wilson's interval inverts the score test, hence N = z² limit (1 - limit) / (rate - limit)²; the others are searched.
    None when no number would do (the rate lies on the limit). It assumes that the rate stays as observed.
    """
    if rate == limit:
        return None
    if method is IntervalMethod.WILSON:
        z = z_value(confidence)
        # The tolerance keeps 4.000000001 from becoming 5.
        return max(1, math.ceil(z * z * limit * (1 - limit) / (rate - limit) ** 2 - 1e-9))

    def clears(n: int) -> bool:
        low, high = rate_interval(rate * n, n, confidence, method)
        return high <= limit or low > limit

    return _smallest(clears, 1)


def num_pairs_to_settle(
    num_gained: float, num_lost: float, n: float, margin: float, confidence: float = 0.95
) -> int | None:
    """How many pairs in all put Tango's interval of the change wholly on one side of `margin`, at these shares."""
    if n == 0 or (num_gained - num_lost) / n == margin:
        return None

    def clears(total: int) -> bool:
        low, high = tango_interval(num_gained * total / n, num_lost * total / n, total, confidence)
        return high <= margin or low > margin

    return _smallest(clears, 1)


def num_scores_to_settle(mean: Mean, margin: float, confidence: float = 0.95) -> int | None:
    """How many scores in all put the t interval around `mean` wholly on one side of `margin`, at this spread.

    `mean` must have been computed at `confidence`. None where it has no interval, or lies on the margin.
    """
    if mean.mean is None or mean.high is None or mean.low is None or mean.mean == margin:
        return None
    quantile = float(stats.t.ppf((1 + confidence) / 2, mean.n - 1))
    deviation = (mean.high - mean.low) / 2 / quantile * math.sqrt(mean.n)
    distance = abs(mean.mean - margin)
    return _smallest(
        lambda n: float(stats.t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n) <= distance, 2
    )


def num_samples_for_limit(
    rate: float, limit: float, power: float = 0.8, confidence: float = 0.95
) -> int | None:
    """Samples with which a true `rate` shows itself within `limit` (Wilson's upper end) with probability `power`.

    Exact binomial power; None unless rate < limit.
    """
    if not rate < limit:
        return None
    z = z_value(confidence)
    spread = z * math.sqrt(limit * (1 - limit)) + float(stats.norm.ppf(power)) * math.sqrt(rate * (1 - rate))
    about = (spread / (limit - rate)) ** 2
    sizes = np.arange(1, math.ceil(3 * about) + 100)
    # The upper end is within the limit where count <= n limit - z sqrt(n limit (1 - limit)).
    most = np.floor(sizes * limit - z * np.sqrt(sizes * limit * (1 - limit)) + 1e-9)
    enough = stats.binom.cdf(most, sizes, rate) >= power
    return int(sizes[enough.argmax()]) if enough.any() else None


def detectable_rate(n: int, limit: float, power: float = 0.8, confidence: float = 0.95) -> float | None:
    """The highest true rate that `n` samples show to be within `limit` with probability `power`.

    None where not even 0 of n would: Wilson's upper end of 0 / n lies above the limit.
    """
    most = math.floor(n * limit - z_value(confidence) * math.sqrt(n * limit * (1 - limit)) + 1e-9)
    if most < 0:
        return None
    # P(X <= most | rate) = power, and that probability is a beta tail in the rate.
    return float(stats.beta.ppf(1 - power, most + 1, n - most)) if most < n else 1.0


def rise_power(n: int, p_gained: float, p_lost: float, alpha: float = 0.05) -> float:
    """Probability that McNemar's exact one-sided test at `alpha` finds the rise p_gained - p_lost in n pairs."""
    discordant = np.arange(n + 1)
    weights = stats.binom.pmf(discordant, n, p_gained + p_lost)
    # Smallest number gained that is significant among so many discordant pairs; more than all of them: never.
    critical = stats.binom.isf(alpha, discordant, 0.5) + 1
    share = p_gained / (p_gained + p_lost) if p_gained + p_lost > 0 else 0.0
    return float((weights * stats.binom.sf(critical - 1, discordant, share)).sum())


def num_pairs_for_rise(p_gained: float, p_lost: float, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Pairs with which McNemar's exact one-sided test finds the rise p_gained - p_lost with probability `power`.

    alpha: after the correction for many categories, alpha / their number is the strictest that Holm asks for.
    None unless p_gained > p_lost.
    """
    if not p_gained > p_lost:
        return None
    return _smallest(lambda n: rise_power(n, p_gained, p_lost, alpha) >= power, 1, 100_000)


def detectable_rise(n: int, p_lost: float = 0.0, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The minimum detectable effect: the smallest rise of the rate that n pairs find with probability `power`.

    p_lost: share of the pairs that change the other way. None where no rise would be found.
    """

    def missing(p_gained: float) -> float:
        return rise_power(n, p_gained, p_lost, alpha) - power

    if missing(1 - p_lost) < 0:
        return None
    return float(optimize.brentq(missing, p_lost, 1 - p_lost, xtol=1e-6)) - p_lost


def num_pairs_for_non_inferiority(
    p_gained: float, p_lost: float, margin: float, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """Pairs that show with probability `power` that a paired rate has not risen by more than `margin`.

    alpha: of the two-sided interval. (z_α/2 + z_β)² (p_gained + p_lost - Δ²) / (margin - Δ)², Δ = p_gained - p_lost
    (Nam 1997, Biometrics 53, with the variance at Δ). None unless Δ < margin.
    """
    change = p_gained - p_lost
    variance = p_gained + p_lost - change * change
    return _num_for_margin(variance, margin - change, alpha, power)


def num_scores_for_non_inferiority(
    deviation: float, change: float, margin: float, alpha: float = 0.05, power: float = 0.8
) -> int | None:
    """Paired scores that show with probability `power` that their mean has not fallen by more than `margin`.

    deviation: standard deviation of the differences; change: their true mean, up is better. Normal approximation;
    None unless change > -margin.
    """
    return _num_for_margin(deviation * deviation, change + margin, alpha, power)


def _num_for_margin(variance: float, distance: float, alpha: float, power: float) -> int | None:
    if distance <= 0:
        return None
    quantiles = z_value(1 - alpha) + float(stats.norm.ppf(power))
    return max(1, math.ceil(quantiles * quantiles * variance / distance**2 - 1e-9))


def _smallest(holds: Callable[[int], bool], start: int, most: int = MAX_SAMPLES) -> int | None:
    """The smallest number for which a condition holds that, once true, stays true; None beyond `most`."""
    above = start
    while not holds(above):
        if above >= most:
            return None
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        if middle < start or not holds(middle):
            below = middle
        else:
            above = middle
    return max(above, start)
