"""Intervals, paired tests, multiplicity, power and shrinkage: every number in a report passes through here.

All functions are pure and take plain Python numbers, so that a report read back from JSON gives the same
figures as the run that wrote it; what draws at random draws from a fixed seed.
"""

from equipoise.eval.statistics.gap import Gap, worst_to_best_gap
from equipoise.eval.statistics.intervals import (
    IntervalMethod,
    Mean,
    effective_size,
    mean_interval,
    rate_interval,
    wilson_interval,
    z_value,
)
from equipoise.eval.statistics.multiplicity import benjamini_hochberg, holm
from equipoise.eval.statistics.paired import (
    NonInferiority,
    PairedChange,
    bootstrap_interval,
    change_of,
    non_inferiority,
    paired_change,
    sign_flip_p_value,
    tango_interval,
)
from equipoise.eval.statistics.power import (
    detectable_rate,
    detectable_rise,
    num_pairs_for_non_inferiority,
    num_pairs_for_rise,
    num_pairs_to_settle,
    num_samples_for_limit,
    num_samples_to_settle,
    num_scores_for_non_inferiority,
    num_scores_to_settle,
)
from equipoise.eval.statistics.shrinkage import empirical_bayes_strength, shrink_rates

__all__ = [
    "Gap",
    "IntervalMethod",
    "Mean",
    "NonInferiority",
    "PairedChange",
    "benjamini_hochberg",
    "bootstrap_interval",
    "change_of",
    "detectable_rate",
    "detectable_rise",
    "effective_size",
    "empirical_bayes_strength",
    "holm",
    "mean_interval",
    "non_inferiority",
    "num_pairs_for_non_inferiority",
    "num_pairs_for_rise",
    "num_pairs_to_settle",
    "num_samples_for_limit",
    "num_samples_to_settle",
    "num_scores_for_non_inferiority",
    "num_scores_to_settle",
    "paired_change",
    "rate_interval",
    "shrink_rates",
    "sign_flip_p_value",
    "tango_interval",
    "wilson_interval",
    "worst_to_best_gap",
    "z_value",
]
