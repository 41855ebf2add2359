from typing import Any

import numpy as np
import pytest


def test_the_front_by_hand(sweeping: Any) -> None:
    gain = np.array([3.0, 2.0, 1.0, 2.0, 2.0, np.nan])
    cost = np.array([0.9, 0.5, 0.2, 0.6, 0.5, 0.0])
    assert list(sweeping("front").on_front(gain, cost)) == [True, True, True, False, True, False]


def test_hypervolume_by_hand(sweeping: Any) -> None:
    """Against (0, 1): strips of gain 1 * 0.8, 1 * 0.5 and 1 * 0.1; dominated and worse points add nothing."""
    area = sweeping("front").hypervolume
    assert area([1, 2, 3], [0.2, 0.5, 0.9], (0, 1)) == pytest.approx(0.8 + 0.5 + 0.1)
    assert area([1, 2, 3, 1.5], [0.2, 0.5, 0.9, 0.7], (0, 1)) == pytest.approx(1.4)
    assert area([1, 2, 3, 9, -1], [0.2, 0.5, 0.9, 1.0, 0.0], (0, 1)) == pytest.approx(1.4)
    assert area([], [], (0, 1)) == 0
    assert area([2], [0.25], (0, 1)) == 1.5


def test_hypervolume_is_the_share_of_random_points_that_are_dominated(sweeping: Any) -> None:
    generator = np.random.default_rng(0)
    gain, cost = generator.random(12), generator.random(12)
    drawn = generator.random((100_000, 2))
    dominated = ((gain >= drawn[:, :1]) & (cost <= drawn[:, 1:])).any(axis=1).mean()
    assert sweeping("front").hypervolume(gain, cost, (0, 1)) == pytest.approx(dominated, abs=0.01)
