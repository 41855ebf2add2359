import math

import numpy as np
import pytest
from scipy import special, stats

from equipoise.eval.statistics import tango_interval
from equipoise.eval.statistics.win_rate import Duel, length_controlled, win_rate

WIN, LOSS, TIE, FIRST, SECOND = Duel.WIN, Duel.LOSS, Duel.TIE, Duel.FIRST, Duel.SECOND
UNSURE, NO_FINDING = Duel.UNSURE, Duel.NO_FINDING


def test_the_win_rate_by_hand() -> None:
    duels = [WIN] * 6 + [LOSS] * 2 + [TIE] + [FIRST] * 4 + [SECOND] + [UNSURE] * 2 + [NO_FINDING] * 3
    found = win_rate(duels, [0] * 19)
    assert (found.num_wins, found.num_losses, found.num_ties, found.num_inconsistent) == (6, 2, 8, 7)
    assert (found.num_no_finding, found.n) == (3, 16)
    assert found.rate == pytest.approx((6 + 8 / 2) / 16)
    assert found.p_value == pytest.approx(stats.binomtest(6, 8).pvalue)
    assert (found.num_first, found.num_second) == (4, 1)
    assert found.position_p_value == pytest.approx(stats.binomtest(4, 5).pvalue)


def test_its_interval_is_that_of_the_paired_difference() -> None:
    found = win_rate([WIN] * 6 + [LOSS] * 2 + [TIE] * 8, [0] * 16)
    low, high = tango_interval(6, 2, 16)
    assert (found.low, found.high) == pytest.approx(((1 + low) / 2, (1 + high) / 2))
    assert (found.worst_low, found.best_high) == (found.low, found.high)


def test_pairs_without_a_finding_are_bounded_both_ways() -> None:
    found = win_rate([WIN] * 6 + [LOSS] * 2 + [TIE] * 8 + [NO_FINDING] * 4, [0] * 20)
    assert found.worst_low == pytest.approx((1 + tango_interval(6, 6, 20)[0]) / 2)
    assert found.best_high == pytest.approx((1 + tango_interval(10, 2, 20)[1]) / 2)


def test_the_win_rate_of_nothing() -> None:
    found = win_rate([NO_FINDING], [3])
    assert (found.n, found.rate, found.low, found.high, found.num_no_finding) == (0, None, 0.0, 1.0, 1)
    assert win_rate([], []).rate is None


def test_several_pairs_to_a_prompt_are_not_independent() -> None:
    duels = ([WIN] * 3 + [LOSS]) * 10
    alone = win_rate(duels * 3, [0] * 120)
    together = win_rate(duels * 3, [0] * 120, list(range(40)) * 3)
    assert (together.num_prompts, together.rate) == (40, alone.rate)
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.1, 0.05, 0.85), (0.9, 0.08, 0.02)])
def test_the_win_rate_covers(shares: tuple[float, float, float]) -> None:
    generator = np.random.default_rng(0)
    truth = shares[0] + shares[2] / 2
    num_covered = 0
    for wins, losses, _ in generator.multinomial(60, shares, size=1000):
        low, high = tango_interval(int(wins), int(losses), 60)  # what `win_rate` asks for, as tested above
        num_covered += (1 + low) / 2 <= truth <= (1 + high) / 2
    assert num_covered / 1000 >= 0.93


def draw(generator: np.random.Generator, n: int, theta: float, phi: float) -> tuple[list[float], list[int]]:
    """Scores in {0, 1} of answers that are longer by 200 characters on average, and the differences in length."""
    lengths = generator.normal(200, 300, n).astype(int)
    probability = special.expit(theta + phi * np.tanh(lengths / lengths.std(ddof=1)))
    return (generator.random(n) < probability).astype(float).tolist(), lengths.tolist()


def test_length_control_takes_out_what_length_bought() -> None:
    scores, lengths = draw(np.random.default_rng(1), 4000, theta=0.0, phi=2.0)
    assert np.mean(scores) > 0.65  # better by length alone
    found = length_controlled(scores, lengths, range(4000))
    assert found.rate == pytest.approx(0.5, abs=0.05)
    assert found.length_effect == pytest.approx(2.0, abs=0.3)


def test_length_control_leaves_a_win_rate_that_length_did_not_touch() -> None:
    # Every length occurs with the same share of wins: phi is 0, and the intercept is the raw rate's logit.
    scores, lengths = [1.0, 1.0, 1.0, 0.0] * 20, sorted([-100, 300] * 40)
    found = length_controlled(scores, lengths, range(80))
    assert found.rate == pytest.approx(0.75)
    assert found.length_effect == pytest.approx(0.0, abs=1e-6)


def test_length_control_is_symmetric() -> None:
    scores, lengths = draw(np.random.default_rng(2), 100, 0.5, 1.0)
    found = length_controlled(scores, lengths, range(100))
    swapped = length_controlled([1 - score for score in scores], [-length for length in lengths], range(100))
    assert found.rate is not None
    assert swapped.rate == pytest.approx(1 - found.rate)
    assert (swapped.low, swapped.high) == pytest.approx((1 - found.high, 1 - found.low))


def test_the_intercept_alone_has_the_sandwich_interval_by_hand() -> None:
    # No length differs: logit(0.7) ± t se, with se² = n / (n - 1) * s² / (p (1 - p))² and s² the variance of a mean.
    scores = [1.0] * 14 + [0.0] * 6
    found = length_controlled(scores, [50] * 20, range(20))
    error = math.sqrt(20 / 19 * (0.3**2 * 14 + 0.7**2 * 6)) / (20 * 0.21)
    half = stats.t.ppf(0.975, 19) * error
    centre = special.logit(0.7)
    assert found.rate == pytest.approx(0.7)
    assert (found.low, found.high) == pytest.approx(
        (special.expit(centre - half), special.expit(centre + half))
    )
    assert found.message == "all pairs have the same difference in length"


@pytest.mark.parametrize(("n", "theta", "phi"), [(30, 0.0, 1.0), (100, 0.7, 1.5), (100, -1.0, -1.0)])
def test_the_length_controlled_rate_covers(n: int, theta: float, phi: float) -> None:
    generator = np.random.default_rng(3)
    num_covered = 0
    for _ in range(250):
        scores, lengths = draw(generator, n, theta, phi)
        found = length_controlled(scores, lengths, range(n))
        num_covered += found.low <= special.expit(theta) <= found.high
    assert num_covered / 250 >= 0.93


def test_ties_count_as_half() -> None:
    found = length_controlled([1.0] * 10 + [0.5] * 10, [0] * 20, range(20))
    assert found.rate == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("scores", "lengths", "message"),
    [
        ([1.0] * 5, [1, 2, 3, 4, 5], "5 prompts; at least 10"),
        ([1.0] * 20, list(range(20)), "ended alike"),
        ([0.0] * 10 + [1.0] * 10, list(range(20)), "separated by length"),
    ],
)
def test_what_cannot_be_fitted_is_said(scores: list[float], lengths: list[int], message: str) -> None:
    found = length_controlled(scores, lengths, range(len(scores)))
    assert (found.rate, found.low, found.high) == (None, 0.0, 1.0)
    assert message in found.message


def test_missing_verdicts_bound_the_length_controlled_rate_too() -> None:
    duels = [WIN, LOSS, WIN, TIE, WIN] * 8 + [NO_FINDING] * 5
    lengths = [10, -20, 30, 5, -25] * 8 + [0] * 5
    found = win_rate(duels, lengths).length_controlled
    assert found.worst_low < found.low < found.high < found.best_high
