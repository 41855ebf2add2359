"""P-values adjusted for their number."""

from collections.abc import Sequence

from statsmodels.stats.multitest import multipletests


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down method, in the order given: no false alarm at all, with probability 1 - alpha (Holm 1979)."""
    return _adjusted(p_values, "holm")


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Benjamini and Hochberg's step-up method, in the order given: the expected share of false alarms is alpha.

    For exploring many categories; what decides (the gate) uses Holm. Source: Benjamini and Hochberg 1995, JRSS B 57(1).
    """
    return _adjusted(p_values, "fdr_bh")


def _adjusted(p_values: Sequence[float], method: str) -> list[float]:
    if not p_values:
        return []
    return [float(p) for p in multipletests(list(p_values), method=method)[1]]
