"""Wins, losses and ties against a baseline: the win rate, what the order of the answers did, what length did."""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
from scipy import special, stats
from statsmodels.genmod.families import Binomial
from statsmodels.genmod.generalized_linear_model import GLM
from statsmodels.tools.sm_exceptions import ConvergenceWarning, PerfectSeparationWarning

from equipoise.eval.statistics.paired import change_of


class Duel(StrEnum):
    """What two verdicts on one pair of answers, shown in both orders, say together."""

    WIN = "win"
    LOSS = "loss"
    TIE = "tie"
    FIRST = "first"
    """The answer shown first was preferred both times: the judge contradicts itself, and it counts as a tie."""
    SECOND = "second"
    """The answer shown second was preferred both times: a tie likewise."""
    UNSURE = "unsure"
    """A preference in one order, a tie in the other: a tie too."""
    NO_FINDING = "no_finding"
    """In at least one of the orders there is no verdict."""


MIN_PROMPTS = 10
"""For the length-controlled rate: two parameters and a variance between prompts are estimated from them."""
_SCORES = {Duel.WIN: 1, Duel.LOSS: -1, Duel.TIE: 0, Duel.FIRST: 0, Duel.SECOND: 0, Duel.UNSURE: 0}


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """The win rate that answers of the baseline's length would have."""

    rate: float | None
    """None where the model can't be fitted; `message` says why."""
    low: float
    high: float
    worst_low: float
    """Lower end if every pair without a verdict were lost."""
    best_high: float
    """Upper end if every one were won."""
    length_effect: float | None
    """Change of the log-odds for an answer longer by much more than usual (tanh -> 1); above 0 length is rewarded."""
    message: str = ""


@dataclass(frozen=True, slots=True)
class WinRate:
    """Share of pairs that the model wins, a tie counting half."""

    num_wins: int
    num_losses: int
    num_ties: int
    """The inconsistent ones included."""
    num_inconsistent: int
    """Verdicts that changed with the order of the answers."""
    num_no_finding: int
    """Pairs without a verdict in one order or both; not in `n`."""
    n: int
    rate: float | None
    """(wins + ties / 2) / n; None when n is 0."""
    low: float
    high: float
    worst_low: float
    """Lower end if every pair without a verdict were lost."""
    best_high: float
    """Upper end if every one were won."""
    p_value: float
    """Exact test of as many wins as losses, two-sided."""
    num_prompts: int
    num_first: int
    """Pairs in which the answer shown first won both times ..."""
    num_second: int
    """... and in which the one shown second did."""
    position_p_value: float
    """Exact binomial test of `num_first` against `num_second`, two-sided: small, the judge leans to one position."""
    length_controlled: LengthControlled


def win_rate(
    duels: Sequence[Duel],
    length_differences: Sequence[int],
    prompts: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
) -> WinRate:
    """The win rate of `duels`, with its interval.

    length_differences: characters of the model's answer minus those of the baseline's. prompts: what each pair
    answers; None: no two alike.

    A win, a tie and a loss are a paired change of 1, 0 and -1, so that (1 + mean) / 2 is the rate: its interval is
    Tango's, or the bootstrap over prompts where there are several pairs to one (`change_of`).
    """
    n = len(duels)
    asked = list(range(n)) if prompts is None else list(prompts)
    known = [index for index, duel in enumerate(duels) if duel is not Duel.NO_FINDING]
    differences = [_SCORES[duels[index]] for index in known]
    change = change_of(differences, confidence, [asked[index] for index in known])
    num_unknown = n - len(known)
    worst = best = change
    if num_unknown:
        everywhere = [_SCORES.get(duel) for duel in duels]
        worst = change_of([-1 if score is None else score for score in everywhere], confidence, asked)
        best = change_of([1 if score is None else score for score in everywhere], confidence, asked)
    num_first, num_second = list(duels).count(Duel.FIRST), list(duels).count(Duel.SECOND)
    num_flipped = num_first + num_second
    return WinRate(
        num_wins=change.num_gained,
        num_losses=change.num_lost,
        num_ties=len(known) - change.num_gained - change.num_lost,
        num_inconsistent=num_flipped + list(duels).count(Duel.UNSURE),
        num_no_finding=num_unknown,
        n=len(known),
        rate=None if change.difference is None else (1 + change.difference) / 2,
        low=(1 + change.low) / 2,
        high=(1 + change.high) / 2,
        worst_low=(1 + worst.low) / 2,
        best_high=(1 + best.high) / 2,
        p_value=change.p_value,
        num_prompts=change.num_prompts,
        num_first=num_first,
        num_second=num_second,
        position_p_value=float(stats.binomtest(num_first, num_flipped).pvalue) if num_flipped else 1.0,
        length_controlled=_bounded(duels, length_differences, asked, confidence),
    )


def _bounded(
    duels: Sequence[Duel], length_differences: Sequence[int], prompts: Sequence[Hashable], confidence: float
) -> LengthControlled:
    """The length-controlled rate over what was judged, with the ends if the other pairs were all lost or all won."""

    def fitted(unknown: int | None) -> LengthControlled:
        scores = [_SCORES.get(duel, unknown) for duel in duels]
        known = [index for index, score in enumerate(scores) if score is not None]
        return length_controlled(
            [(1 + (scores[index] or 0)) / 2 for index in known],
            [length_differences[index] for index in known],
            [prompts[index] for index in known],
            confidence,
        )

    judged = fitted(None)
    if Duel.NO_FINDING not in duels:
        return judged
    return replace(judged, worst_low=fitted(-1).low, best_high=fitted(1).high)


def length_controlled(
    scores: Sequence[float],
    length_differences: Sequence[int],
    prompts: Sequence[Hashable],
    confidence: float = 0.95,
) -> LengthControlled:
    """The win rate at equal length, from scores in {0, 1/2, 1}: expit(θ) of a logistic model.

    logit P(win) = θ + φ tanh(Δ / sd(Δ)), Δ the difference of the lengths in characters, as in AlpacaEval 2 (Dubois et
    al. 2024, 2404.04475). Ours differs: their third term, the difficulty of each instruction, is estimated from more
    than a hundred models and is left out; there is neither their L1 penalty nor their weak pull toward a baseline that
    games the length, but an interval: delta method on the logit scale, from the sandwich variance clustered by prompt,
    with a t quantile. A tie counts as half a win and half a loss; both orders of the answers are behind a score, theirs
    shows one at random.
    """
    n, num_prompts = len(scores), len(set(prompts))
    if num_prompts < MIN_PROMPTS:
        return _undefined(f"{num_prompts} prompts; at least {MIN_PROMPTS} are needed")
    if min(scores) == max(scores):
        return _undefined("all pairs ended alike, whatever their lengths")
    lengths = np.asarray(length_differences, dtype=float)
    spread = float(lengths.std(ddof=1))
    columns = [np.ones(n)] + ([np.tanh(lengths / spread)] if spread > 0 else [])
    _, groups = np.unique([str(prompt) for prompt in prompts], return_inverse=True)
    # Where the fit runs away, the linear predictor overflows on its way to the warning that says so.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("error", PerfectSeparationWarning)
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            fit = GLM(np.asarray(scores), np.stack(columns, axis=1), family=Binomial()).fit(
                cov_type="cluster", cov_kwds={"groups": groups, "use_correction": True}
            )
        except (PerfectSeparationWarning, ConvergenceWarning, np.linalg.LinAlgError):
            return _undefined("wins and losses are separated by length alone")
    theta, error = float(fit.params[0]), float(fit.bse[0])
    half_width = float(stats.t.ppf((1 + confidence) / 2, num_prompts - len(columns))) * error
    low, high = float(special.expit(theta - half_width)), float(special.expit(theta + half_width))
    return LengthControlled(
        rate=float(special.expit(theta)),
        low=low,
        high=high,
        worst_low=low,
        best_high=high,
        length_effect=float(fit.params[1]) if spread > 0 else None,
        message="" if spread > 0 else "all pairs have the same difference in length",
    )


def _undefined(message: str) -> LengthControlled:
    return LengthControlled(None, 0.0, 1.0, 0.0, 1.0, None, message)
