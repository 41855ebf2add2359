import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from equipoise.eval.statistics import (
    benjamini_hochberg,
    empirical_bayes_strength,
    holm,
    shrink_rates,
)


def test_holm_by_hand_and_in_the_order_given() -> None:
    # Sorted 0.01, 0.03, 0.04 times 3, 2, 1, then made monotone.
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([]) == []


def test_shrink_rates_by_hand() -> None:
    # Overall 4 / 20 = 0.2; (2 + 8 * 0.2) / (2 + 8) and (2 + 1.6) / (18 + 8); without samples the overall rate.
    assert shrink_rates([2, 2, 0], [2, 18, 0], strength=8) == pytest.approx([0.36, 3.6 / 26, 0.2])
    assert shrink_rates([2, 2, 0], [2, 18, 0], strength=0) == pytest.approx([1.0, 1 / 9, 0.2])


def test_shrink_rates_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="no samples at all"):
        shrink_rates([0, 0], [0, 0], strength=8)
    with pytest.raises(ValueError, match="count 3 and total 2"):
        shrink_rates([3], [2], strength=8)
    with pytest.raises(ValueError, match="strength"):
        shrink_rates([1], [2], strength=-1)


@pytest.mark.parametrize("seed", range(5))
def test_adjusted_p_values_are_those_of_statsmodels(seed: int) -> None:
    p_values = np.random.default_rng(seed).random(9).round(1).tolist()  # with ties
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
    assert benjamini_hochberg(p_values) == pytest.approx(multipletests(p_values, method="fdr_bh")[1])


def test_benjamini_hochberg_by_hand_and_in_the_order_given() -> None:
    # Sorted 0.01, 0.03, 0.04 times 3/1, 3/2, 3/3, then made monotone from above.
    assert benjamini_hochberg([0.04, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert benjamini_hochberg([]) == []


def test_benjamini_hochberg_keeps_the_published_example() -> None:
    # The fifteen p-values of Benjamini and Hochberg 1995, section 3: four are rejected at 0.05, by Holm three.
    p_values = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719,
                0.6528, 0.7590, 1.0]  # fmt: skip
    assert sum(p <= 0.05 for p in benjamini_hochberg(p_values)) == 4
    assert sum(p <= 0.05 for p in holm(p_values)) == 3


@pytest.mark.parametrize("strength", [3.0, 30.0])
def test_empirical_bayes_finds_the_strength_that_rates_were_drawn_with(strength: float) -> None:
    generator = np.random.default_rng(10)
    rates = generator.beta(strength * 0.3, strength * 0.7, size=200)
    totals = generator.integers(20, 80, size=200)
    counts = generator.binomial(totals, rates)
    assert empirical_bayes_strength(counts.tolist(), totals.tolist()) == pytest.approx(strength, rel=0.3)


def test_empirical_bayes_at_its_ends() -> None:
    assert empirical_bayes_strength([0, 0], [10, 20]) == 1000
    assert empirical_bayes_strength([4] * 10, [40] * 10) == pytest.approx(1000)  # less spread than chance
    assert empirical_bayes_strength([0, 40] * 5, [40] * 10) == pytest.approx(1)  # all or nothing
    with pytest.raises(ValueError, match="no samples at all"):
        empirical_bayes_strength([0], [0])


def test_empirical_bayes_rates_lie_nearer_to_the_truth() -> None:
    generator = np.random.default_rng(11)
    rates = generator.beta(3, 7, size=100)
    counts = generator.binomial(12, rates).tolist()
    shrunk = np.array(shrink_rates(counts, [12] * 100, empirical_bayes_strength(counts, [12] * 100)))
    raw = np.array(counts) / 12
    assert np.mean((shrunk - rates) ** 2) < 0.75 * np.mean((raw - rates) ** 2)
