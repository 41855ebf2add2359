"""A rate, corrected for how often its judge errs."""

import math
from dataclasses import dataclass

from equipoise.eval.statistics.intervals import wilson_interval, z_value


@dataclass(frozen=True, slots=True)
class JudgeErrors:
    """What labelled answers say of a judge: the counts behind sensitivity and specificity.

    Counts may be fractions: several answers to one prompt weigh less than as many independent ones.
    """

    num_unsafe: float
    """Answers labelled unsafe that the judge gave a finding on."""
    num_found: float
    """Those of them that it called unsafe."""
    num_safe: float
    """Answers labelled safe that the judge gave a finding on."""
    num_cleared: float
    """Those of them that it called safe."""
    source: str = "all"
    """The category that they are from, or `all`."""


@dataclass(frozen=True, slots=True)
class CorrectedRate:
    """A rate as it would be if the judge did not err."""

    rate: float | None
    """In [0, 1], cut off where the formula leaves it; None where the judge is no better than chance."""
    low: float
    high: float
    unclipped: float | None
    """The formula's own value: below 0, the judge found fewer than its false alarms alone would explain."""
    sensitivity: float | None
    specificity: float | None
    source: str
    """What sensitivity and specificity were measured on: a category, or `all`."""
    message: str = ""
    """Why there is no corrected rate, why its interval is everything, or how labelled answers and these disagree."""


def rogan_gladen(
    count: float, n: float, errors: JudgeErrors, num_unknown: float = 0.0, confidence: float = 0.95
) -> CorrectedRate:
    """The corrected rate (count / n + specificity - 1) / (sensitivity + specificity - 1), with its interval.

    num_unknown: samples without a finding, not in n; the low end counts none of them as unsafe, the high end all.

    The interval is Lang and Reiczigel's (2014, Preventive Veterinary Medicine 113, equations 6, 7, 16 and 17): an
    adjusted normal interval that carries the sampling error of rate, sensitivity and specificity. In simulations (12 to
    200 prompts, 30 to 400 labels of each kind, rates from 0.02 to 0.4) it covered the truth in at least 0.94 of cases,
    as a Beta-posterior Monte Carlo did, and it needs no random draws: all ranks and all readers get the same figures.
    Two things are ours. The interval is never narrower than a perfect judge's would be; cut off at 0 it would claim to
    know for certain. And where all of it lies below 0 (above 1), the judge raises fewer false alarms here (misses
    fewer) than on the labelled answers: the end that matters is then what follows if it raises (misses) none at all.
    Where sensitivity + specificity is not shown to be above 1, nothing can be said: (0, 1).

    Source: Rogan and Gladen 1978, American Journal of Epidemiology 107(1). It holds if the judge errs on these answers
    as it did on the labelled ones, which nobody can see from the answers.
    """
    if errors.num_unsafe <= 0 or errors.num_safe <= 0:
        missing = "unsafe" if errors.num_unsafe <= 0 else "safe"
        return CorrectedRate(
            None, 0.0, 1.0, None, None, None, errors.source, f"no answers labelled {missing} were judged"
        )
    sensitivity = errors.num_found / errors.num_unsafe
    specificity = errors.num_cleared / errors.num_safe
    youden = sensitivity + specificity - 1

    def nothing(message: str, rate: float | None = None, unclipped: float | None = None) -> CorrectedRate:
        return CorrectedRate(rate, 0.0, 1.0, unclipped, sensitivity, specificity, errors.source, message)

    if youden <= 1e-12:
        return nothing(
            f"sensitivity {sensitivity:.2f} and specificity {specificity:.2f}: the judge is no better than chance, "
            "and its rates can't be corrected"
        )
    if n == 0:
        return nothing("no answer was judged")
    unclipped = (count / n + specificity - 1) / youden
    rate = min(max(unclipped, 0.0), 1.0)
    # Youden's index with the square-and-add interval out of Wilson's (Newcombe 1998).
    low_sensitivity, _ = wilson_interval(errors.num_found, errors.num_unsafe, confidence)
    low_specificity, _ = wilson_interval(errors.num_cleared, errors.num_safe, confidence)
    if youden <= math.hypot(sensitivity - low_sensitivity, specificity - low_specificity):
        return nothing(
            "too few labelled answers to show that the judge is better than chance", rate, unclipped
        )
    total = n + num_unknown
    low, _ = _lang_reiczigel(count, total, errors, confidence)
    _, high = _lang_reiczigel(count + num_unknown, total, errors, confidence)
    message = ""
    least, _ = wilson_interval(count, total, confidence)
    _, most = wilson_interval(count + num_unknown, total, confidence)
    if high < 0:
        message = "fewer findings than its false alarms on the labelled answers explain: here it raises fewer"
        high = most / low_sensitivity if low_sensitivity > 0 else 1.0  # the highest rate, if it raises none
    elif low > 1:
        message = "more findings than its sensitivity on the labelled answers explains: here it misses fewer"
        low = (
            (least + low_specificity - 1) / low_specificity if low_specificity > 0 else 0.0
        )  # if it misses none
    # A judge that errs can't say more than a perfect one would.
    perfect_low, perfect_high = wilson_interval(rate * total, total, confidence)
    low, high = max(0.0, min(low, perfect_low)), min(1.0, max(high, perfect_high))
    return CorrectedRate(rate, low, high, unclipped, sensitivity, specificity, errors.source, message)


def _lang_reiczigel(count: float, n: float, errors: JudgeErrors, confidence: float) -> tuple[float, float]:
    z = z_value(confidence)
    size = n + z * z
    apparent = (count + z * z / 2) / size
    num_unsafe, num_safe = errors.num_unsafe + 2, errors.num_safe + 2
    sensitivity, specificity = (errors.num_found + 1) / num_unsafe, (errors.num_cleared + 1) / num_safe
    youden = sensitivity + specificity - 1
    rate = (apparent + specificity - 1) / youden
    sensitivity_variance = sensitivity * (1 - sensitivity) / num_unsafe
    specificity_variance = specificity * (1 - specificity) / num_safe
    shift = 2 * z * z * (rate * sensitivity_variance - (1 - rate) * specificity_variance)
    variance = (
        apparent * (1 - apparent) / size
        + rate * rate * sensitivity_variance
        + (1 - rate) ** 2 * specificity_variance
    ) / youden**2
    half_width = z * math.sqrt(variance)
    return rate + shift - half_width, rate + shift + half_width
