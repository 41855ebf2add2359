"""The rate of the worst category: what a floor for every category is held against."""

from collections.abc import Sequence
from dataclasses import dataclass

from equipoise.eval.statistics.intervals import IntervalMethod, rate_interval, wilson_interval


@dataclass(frozen=True, slots=True)
class Worst:
    """The highest of several rates."""

    rate: float | None
    """The highest measured rate; None where nothing was counted."""
    low: float
    """Ends for the highest of the true rates, whichever category it is."""
    high: float
    index: int | None
    """Which one measured highest; the first of those that share it."""


def worst_rate(
    counts: Sequence[float],
    totals: Sequence[float],
    num_unknown: Sequence[float] | None = None,
    confidence: float = 0.95,
) -> Worst:
    """The highest of the rates counts / totals, with an interval for the highest true rate.

    num_unknown: per category, samples without an outcome, not in `totals`; each end takes the reading of them that
    moves it outward. A category of which nothing has an outcome is as unknown as can be: the upper end is then 1.

    Wilson's interval of the category that measured highest would not do: the highest of several measured rates lies
    above the highest true one more often than below. Upper end: the largest of the upper ends; the true worst category
    is one of them, so its error alone counts (intersection-union, Berger 1982, Technometrics 24). Lower end: the
    largest of Clopper and Pearson's lower ends, with Bonferroni's correction: so far out, Wilson's lie too high. (0, 1)
    for no category.
    """
    unknown = [0.0] * len(totals) if num_unknown is None else num_unknown
    whole = [total + missing for total, missing in zip(totals, unknown, strict=True)]
    rates = {index: counts[index] / total for index, total in enumerate(totals) if total > 0}
    if not rates:
        return Worst(None, 0.0, 1.0, None)
    index = max(rates, key=lambda each: rates[each])
    corrected = 1 - (1 - confidence) / len(totals)
    return Worst(
        rate=rates[index],
        low=max(
            rate_interval(count, n, corrected, IntervalMethod.CLOPPER_PEARSON)[0]
            for count, n in zip(counts, whole, strict=True)
        ),
        high=max(
            wilson_interval(count + missing, n, confidence)[1]
            for count, missing, n in zip(counts, unknown, whole, strict=True)
        ),
        index=index,
    )
