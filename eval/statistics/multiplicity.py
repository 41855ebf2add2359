"""P-values adjusted for their number."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down method, in the order given: no false alarm at all, with probability 1 - alpha (Holm 1979)."""
    # By hand: statsmodels' multipletests collects garbage at every call, half a second beside a loaded model.
    ascending = np.sort(np.asarray(p_values, dtype=float))
    adjusted = np.minimum(1.0, np.maximum.accumulate(ascending * np.arange(len(ascending), 0, -1)))
    return [float(adjusted[place]) for place in np.argsort(np.argsort(p_values, kind="stable"))]


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's step-up method, in the order given: the expected share of false alarms is alpha.

    For exploring many categories; what decides (the gate) uses Holm. Source: Benjamini and Hochberg 1995, JRSS B 57(1).
    """
    return [float(p) for p in stats.false_discovery_control(p_values)] if p_values else []
