"""AUROC intervals and card entries against values worked out by hand."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from equipoise.eval.judges.calibration import calibration_entry
from equipoise.eval.statistics.auroc import auroc_interval


def test_auroc_counts_wins_and_half_ties() -> None:
    auroc, low, high = auroc_interval(np.array([0.9, 0.4]), np.array([0.1, 0.4, 0.5]))
    assert auroc == pytest.approx((3 + 1 + 0.5) / 6)
    assert 0 <= low < auroc < high <= 1


def test_auroc_agrees_with_scikit_learn_and_covers() -> None:
    rng = np.random.default_rng(0)
    truth, covered = 0.7602, 0  # Phi(1 / sqrt(2)): scores N(1, 1) against N(0, 1)
    for _ in range(200):
        positive, negative = rng.normal(1, 1, 60), rng.normal(0, 1, 80)
        auroc, low, high = auroc_interval(positive, negative)
        labels = np.r_[np.ones(60), np.zeros(80)]
        assert auroc == pytest.approx(roc_auc_score(labels, np.r_[positive, negative]))
        covered += low <= truth <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_one_positive_says_nothing() -> None:
    assert auroc_interval(np.array([2.0]), np.array([0.0, 0.5])) == (1.0, 0.0, 1.0)


def test_perfect_separation_claims_no_certainty() -> None:
    positive, negative = np.arange(10) + 20.0, np.arange(16) + 0.0
    auroc, low, high = auroc_interval(positive, negative)
    assert (auroc, high) == (1.0, 1.0)
    # Newcombe's method 5: 1 - θ = z sqrt(θ (1 - θ) (1 + 12 (1 - θ) / (2 - θ) + 12 θ / (1 + θ)) / 160).
    variance = low * (1 - low) * (1 + 12 * (1 - low) / (2 - low) + 12 * low / (1 + low)) / 160
    assert 1 - low == pytest.approx(1.959964 * variance**0.5)
    assert 0.8 < low < 0.9
    assert auroc_interval(negative, positive) == (0.0, 0.0, pytest.approx(1 - low))


def test_an_auroc_near_one_is_covered() -> None:
    """Scores N(2.5, 1) against N(0, 1), few of each: often separated perfectly."""
    rng = np.random.default_rng(4)
    truth, num_covered, num_perfect = 0.96145, 0, 0  # Phi(2.5 / sqrt(2))
    for _ in range(400):
        auroc, low, high = auroc_interval(rng.normal(2.5, 1, 10), rng.normal(0, 1, 12))
        num_covered += low <= truth <= high
        num_perfect += auroc == 1.0
    assert num_perfect > 50
    assert num_covered / 400 >= 0.93


def test_entry_by_hand() -> None:
    label, score = np.array([True, True, True, False, False]), np.array([0.9, 0.5, 0.2, 0.1, 0.6])
    entry = calibration_entry("set", "unsafe", "held out", False, label, score, threshold=0.5)
    assert (entry["n"], entry["num_positive"], entry["fitted_on"]) == (5, 3, False)
    assert entry["sensitivity"] == pytest.approx(2 / 3, abs=1e-4)  # p at the threshold means yes
    assert entry["specificity"] == 0.5
    assert entry["auroc"] == pytest.approx(4 / 6, abs=1e-4)
    assert entry["sensitivity_low"] == pytest.approx(0.2077, abs=1e-3)  # Wilson for 2 of 3


def test_a_rate_without_its_answers_is_unknown() -> None:
    entry = calibration_entry("set", "refusal", "held out", False, np.zeros(4, dtype=bool), np.zeros(4), 0.5)
    assert (entry["auroc"], entry["sensitivity"], entry["sensitivity_low"]) == (None, None, None)
    assert entry["specificity"] == 1.0
