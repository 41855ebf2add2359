"""A rate as reports print it: with its interval, what nobody could judge beside it, and corrected where it can be."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from equipoise.eval.judges.base import Verdict
from equipoise.eval.statistics import Gap, IntervalMethod, effective_size, rate_interval, worst_to_best_gap
from equipoise.eval.statistics.rogan_gladen import CorrectedRate, JudgeErrors, rogan_gladen

NO_FINDING = (Verdict.UNPARSED, Verdict.FAILED, Verdict.OVERLONG)
"""The verdicts that say nothing of the answer."""


@dataclass(frozen=True, slots=True)
class Rate:
    """A rate with its interval (95 % unless asked otherwise); samples without an outcome are counted beside it."""

    count: int
    n: int
    """Samples with an outcome; those without are in `num_no_finding`."""
    rate: float | None
    """count / n; None when n is 0."""
    low: float
    high: float
    num_no_finding: int
    """Samples without an outcome: the next three, and those of which the judge does not say what is counted."""
    num_unparsed: int
    num_failed: int
    num_overlong: int
    best_low: float
    """Lower bound if no sample without an outcome counted."""
    worst_high: float
    """Upper bound if every sample without an outcome counted."""
    n_effective: float
    """How many independent samples n is worth: less than n where there are several answers to a prompt."""
    method: IntervalMethod = IntervalMethod.WILSON
    """Of the interval."""
    corrected: CorrectedRate | None = None
    """Corrected for the judge's errors; None where the judge was not calibrated."""

    @classmethod
    def of(
        cls,
        outcomes: Iterable[bool | None],
        confidence: float = 0.95,
        verdicts: Iterable[Verdict | None] = (),
        prompts: Sequence[Hashable] | None = None,
        method: IntervalMethod = IntervalMethod.WILSON,
        errors: JudgeErrors | None = None,
    ) -> "Rate":
        """The rate of True among the outcomes that are not None.

        verdicts: of the same samples, to tell why an outcome is None. prompts: what each sample was asked; None: no
        two alike. errors: the judge's, to correct the rate for.
        """
        outcomes = list(outcomes)
        verdicts = list(verdicts) or [None] * len(outcomes)
        why = [verdict for outcome, verdict in zip(outcomes, verdicts, strict=True) if outcome is None]
        count, num_missing = outcomes.count(True), outcomes.count(None)
        n = len(outcomes) - num_missing
        known = [index for index, outcome in enumerate(outcomes) if outcome is not None]
        n_effective = effective_size(
            [float(bool(outcomes[index])) for index in known],
            None if prompts is None else [prompts[index] for index in known],
            confidence,
        )
        # Counts as they would be with so many independent samples; without clusters, the counts themselves.
        weight = n_effective / n if n else 1.0
        total = (n + num_missing) * weight
        low, high = rate_interval(count * weight, n * weight, confidence, method)
        best_low, _ = rate_interval(count * weight, total, confidence, method)
        _, worst_high = rate_interval((count + num_missing) * weight, total, confidence, method)
        return cls(
            count=count,
            n=n,
            rate=count / n if n else None,
            low=low,
            high=high,
            num_no_finding=num_missing,
            num_unparsed=why.count(Verdict.UNPARSED),
            num_failed=why.count(Verdict.FAILED),
            num_overlong=why.count(Verdict.OVERLONG),
            best_low=best_low,
            worst_high=worst_high,
            n_effective=n_effective,
            method=method,
            corrected=None
            if errors is None
            else rogan_gladen(count * weight, n * weight, errors, num_missing * weight, confidence),
        )


def gap_of(rates: Sequence[Rate], confidence: float = 0.95) -> Gap:
    """The highest of the rates minus the lowest, with an interval for that of the true rates."""
    weights = [rate.n_effective / rate.n if rate.n else 1.0 for rate in rates]
    return worst_to_best_gap(
        [rate.count * weight for rate, weight in zip(rates, weights, strict=True)],
        [rate.n * weight for rate, weight in zip(rates, weights, strict=True)],
        [rate.num_no_finding * weight for rate, weight in zip(rates, weights, strict=True)],
        confidence,
    )
