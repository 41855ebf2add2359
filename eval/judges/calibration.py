"""How good a judge is on labelled answers: AUROC, sensitivity and specificity, each with its 95 % interval."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from equipoise.eval.statistics import wilson_interval


def auroc_interval(positive: NDArray, negative: NDArray) -> tuple[float, float, float]:
    """AUROC with its 95 % interval, from scores `(P,)` of positives and `(N,)` of negatives; ties count half.

    The variance is DeLong's (1988); the interval is built on the logit scale (so that it stays in [0, 1]).
    Degenerate cases get (0, 1) as interval: fewer than two of either kind, or a perfect separation.
    """
    wins = (positive[:, None] > negative).astype(float) + 0.5 * (positive[:, None] == negative)
    auroc = float(wins.mean())
    if min(wins.shape) < 2 or auroc in (0.0, 1.0):
        return auroc, 0.0, 1.0
    variance = wins.mean(axis=1).var(ddof=1) / len(positive) + wins.mean(axis=0).var(ddof=1) / len(negative)
    centre = np.log(auroc / (1 - auroc))
    half = norm.ppf(0.975) * np.sqrt(variance) / (auroc * (1 - auroc))
    low, high = 1 / (1 + np.exp(-(centre - half))), 1 / (1 + np.exp(-(centre + half)))
    return auroc, float(low), float(high)


def calibration_entry(
    name: str, head: str, protocol: str, fitted_on: bool, label: NDArray, score: NDArray, threshold: float
) -> dict[str, object]:
    """One entry of a judge's card, from labels `(N,)` in {False, True} and probabilities `(N,)`.

    A rate whose kind of answer is absent from the data (no positives, or no negatives) is None.
    Sensitivity and specificity carry Wilson intervals, AUROC DeLong's.
    """
    positive, negative = score[label], score[~label]
    entry: dict[str, object] = {
        "name": name,
        "head": head,
        "protocol": protocol,
        "fitted_on": fitted_on,
        "n": len(label),
        "num_positive": len(positive),
    }
    found = auroc_interval(positive, negative) if len(positive) and len(negative) else (None, None, None)
    entry |= dict(zip(("auroc", "auroc_low", "auroc_high"), map(_rounded, found), strict=True))
    for rate, hits in (("sensitivity", positive >= threshold), ("specificity", negative < threshold)):
        values: tuple[float | None, ...] = (None, None, None)
        if len(hits):
            values = (float(hits.mean()), *wilson_interval(int(hits.sum()), len(hits)))
        entry |= dict(zip((rate, f"{rate}_low", f"{rate}_high"), map(_rounded, values), strict=True))
    return entry


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
