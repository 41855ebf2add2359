import math

import numpy as np
import pytest
from scipy import optimize, stats

from equipoise.eval.statistics import (
    NonInferiority,
    bootstrap_interval,
    change_of,
    non_inferiority,
    paired_change,
    sign_flip_p_value,
    tango_interval,
)

Z = 1.959963984540054


def test_paired_change_counts_and_tests_the_discordant_pairs() -> None:
    before = [False] * 6 + [True] * 4
    after = [True] * 5 + [False] + [True] * 3 + [False]
    change = paired_change(before, after)
    assert (change.n, change.num_gained, change.num_lost) == (10, 5, 1)
    assert change.difference == pytest.approx(0.4)
    # Binomial(6, 1/2): P(X >= 5) = 7/64, two-sided 14/64.
    assert change.p_increase == pytest.approx(7 / 64)
    assert change.p_value == pytest.approx(14 / 64)
    assert change.low < 0.4 < change.high


def test_paired_change_of_nothing_says_nothing() -> None:
    change = paired_change([], [])
    assert (change.n, change.difference, change.low, change.high, change.p_value) == (0, None, -1, 1, 1)


def test_paired_change_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="differ in length: 1 before, 2 after"):
        paired_change([True], [True, False])


def test_mcnemar_rarely_alarms_without_a_change() -> None:
    generator = np.random.default_rng(0)
    num_alarms = 0
    for _ in range(1000):
        before, after = generator.random((2, 40)) < 0.3
        num_alarms += paired_change(before.tolist(), after.tolist()).p_increase <= 0.05
    assert num_alarms / 1000 <= 0.05  # exact, hence conservative
    assert num_alarms > 0


def test_tango_interval_without_discordant_pairs_equals_the_closed_form() -> None:
    # b = c = 0 leaves nΔ / (1 - Δ) = z², that is Δ = z² / (n + z²).
    bound = Z**2 / (12 + Z**2)
    assert tango_interval(0, 0, 12) == pytest.approx((-bound, bound), abs=1e-6)


@pytest.mark.parametrize(
    ("gained", "lost", "n"), [(5, 1, 12), (0, 7, 12), (3, 3, 40), (20, 2, 104), (1, 0, 44)]
)
def test_tango_interval_inverts_the_score_test(gained: int, lost: int, n: int) -> None:
    """At each end the statistic is ±z, with the restricted estimate maximised numerically, not by Tango's formula."""

    def statistic(difference: float) -> float:
        def negative_log_likelihood(q: float) -> float:
            p_gained, p_lost = q + difference, q
            rest = 1 - p_gained - p_lost
            counts = ((gained, p_gained), (lost, p_lost), (n - gained - lost, rest))
            return -sum(count * math.log(max(p, 1e-300)) for count, p in counts if count)

        low, high = max(0.0, -difference), (1 - difference) / 2
        q = optimize.minimize_scalar(
            negative_log_likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}
        ).x
        return (gained - lost - n * difference) / math.sqrt(n * (2 * q + difference - difference**2))

    low, high = tango_interval(gained, lost, n)
    assert statistic(low) == pytest.approx(Z, abs=2e-3)
    assert statistic(high) == pytest.approx(-Z, abs=2e-3)


def test_tango_interval_is_symmetric_and_bounded() -> None:
    low, high = tango_interval(4, 1, 12)
    assert tango_interval(1, 4, 12) == pytest.approx((-high, -low))
    assert tango_interval(12, 0, 12)[1] == 1.0
    assert tango_interval(0, 12, 12)[0] == -1.0


def test_tango_interval_covers_the_difference() -> None:
    generator = np.random.default_rng(1)
    p_gained, p_lost, n = 0.15, 0.05, 104
    num_covered = 0
    for gained, lost, _ in generator.multinomial(n, [p_gained, p_lost, 1 - p_gained - p_lost], size=600):
        low, high = tango_interval(int(gained), int(lost), n)
        num_covered += low <= p_gained - p_lost <= high
    assert num_covered / 600 >= 0.93


def test_sign_flips_of_single_answers_are_mcnemars_test() -> None:
    # Binomial(6, 1/2): P(X >= 5) = 7/64.
    assert sign_flip_p_value([1, 1, 1, 1, 1, -1, 0, 0]) == pytest.approx(7 / 64)
    for num_gained, num_lost in ((0, 0), (9, 0), (40, 25), (3, 17)):
        expected = (
            stats.binomtest(num_gained, num_gained + num_lost, alternative="greater").pvalue
            if num_gained
            else 1.0
        )
        assert sign_flip_p_value([1] * num_gained + [-1] * num_lost) == pytest.approx(expected)


def test_sign_flips_of_prompts_by_hand() -> None:
    # ±3 ±1: totals 4, 2, -2, -4 with 1/4 each.
    assert sign_flip_p_value([3, 1]) == pytest.approx(1 / 4)
    assert sign_flip_p_value([3, -1]) == pytest.approx(2 / 4)
    assert sign_flip_p_value([-3, 1]) == pytest.approx(3 / 4)
    assert sign_flip_p_value([2, 0, 2]) == pytest.approx(1 / 4)


def test_answers_that_repeat_their_prompt_are_no_evidence() -> None:
    """Three copies of every answer: the p-value is that of one, and the interval no narrower by much."""
    before, after = [False] * 6 + [True] * 20, [True] * 5 + [False] + [True] * 20
    once = paired_change(before, after)
    thrice = paired_change(before * 3, after * 3, prompts=list(range(26)) * 3)
    assert (thrice.n, thrice.num_prompts, thrice.method) == (78, 26, "bootstrap")
    assert (once.num_prompts, once.method) == (26, "tango")
    assert thrice.p_increase == pytest.approx(once.p_increase)
    assert thrice.difference == pytest.approx(once.difference)
    assert thrice.high - thrice.low > 0.8 * (once.high - once.low)


def drawn_changes(
    generator: np.random.Generator, num_prompts: int, p_gained: float, p_lost: float, alike: float
) -> np.ndarray:
    """(prompts, 3) changes of 1, -1 and 0; with probability `alike` an answer's is the prompt's own."""
    shares = [p_gained, p_lost, 1 - p_gained - p_lost]
    own = generator.choice([1, -1, 0], p=shares, size=(num_prompts, 1))
    new = generator.choice([1, -1, 0], p=shares, size=(num_prompts, 3))
    return np.where(generator.random(new.shape) < alike, own, new)


@pytest.mark.parametrize("num_prompts", [13, 60])
@pytest.mark.parametrize(("p_gained", "p_lost", "alike"), [(0.05, 0.05, 0.85), (0.15, 0.05, 0.4)])
def test_the_bootstrap_over_prompts_covers(
    num_prompts: int, p_gained: float, p_lost: float, alike: float
) -> None:
    generator = np.random.default_rng(5)
    prompts = [prompt for prompt in range(num_prompts) for _ in range(3)]
    num_covered = 0
    for _ in range(300):
        changes = drawn_changes(generator, num_prompts, p_gained, p_lost, alike).ravel().tolist()
        low, high = bootstrap_interval(changes, prompts, num_resamples=400)
        num_covered += low <= p_gained - p_lost <= high
    assert num_covered / 300 >= 0.93


def test_the_clustered_test_rarely_alarms_without_a_change() -> None:
    generator = np.random.default_rng(6)
    p_values, plain = [], []
    for _ in range(500):
        changes = drawn_changes(generator, 40, 0.15, 0.15, 0.85)
        p_values.append(sign_flip_p_value(changes.sum(axis=1).tolist()))
        plain.append(sign_flip_p_value(changes.ravel().tolist()))
    assert np.mean(np.array(p_values) <= 0.05) <= 0.07  # 0.05 and two standard errors
    assert np.mean(np.array(plain) <= 0.05) > 0.1  # what it would be as if answers were independent


def test_the_bootstrap_is_seeded() -> None:
    changes, prompts = [1, 0, -1, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3]
    assert bootstrap_interval(changes, prompts) == bootstrap_interval(changes, prompts)
    assert bootstrap_interval(changes, prompts) != bootstrap_interval(changes, prompts, seed=1)
    assert bootstrap_interval([1, 1], [0, 0]) == (-1.0, 1.0)
    low, high = bootstrap_interval([0] * 24, [i // 2 for i in range(24)])
    assert low < 0 < high  # no change seen is no certainty


def test_change_of_is_the_paired_change() -> None:
    assert change_of([1, 0, -1, 1]) == paired_change([False, True, True, False], [True, True, False, True])


@pytest.mark.parametrize(
    ("worst", "best", "expected"),
    [
        (0.04, -0.1, NonInferiority.SHOWN),
        (0.05, 0.0, NonInferiority.SHOWN),
        (0.2, 0.06, NonInferiority.REFUTED),
        (0.2, 0.05, NonInferiority.OPEN),
        (0.06, -0.1, NonInferiority.OPEN),
    ],
)
def test_non_inferiority_by_its_interval(worst: float, best: float, expected: NonInferiority) -> None:
    assert non_inferiority(worst, best, margin=0.05) is expected


def test_non_inferiority_errs_at_its_rate_on_the_margin() -> None:
    generator = np.random.default_rng(7)
    verdicts = []
    for gained, lost, _ in generator.multinomial(150, [0.15, 0.05, 0.8], size=1000):  # truly risen by 0.1
        low, high = tango_interval(int(gained), int(lost), 150)
        verdicts.append(non_inferiority(high, low, margin=0.1))
    # Each at alpha / 2 = 0.025, and three standard errors.
    assert verdicts.count(NonInferiority.SHOWN) / 1000 <= 0.04
    assert verdicts.count(NonInferiority.REFUTED) / 1000 <= 0.04
    assert verdicts.count(NonInferiority.SHOWN) > 0
