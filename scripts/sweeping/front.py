"""The Pareto front of two objectives, and the hypervolume that it dominates."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def on_front(gain: Array, cost: Array) -> NDArray[np.bool_]:
    """(..., K) -> (..., K): whether no other point is better in one objective and no worse in the other.

    Points that are equal in both are on the front together; one with a NaN is on none.
    """
    known = ~(np.isnan(gain) | np.isnan(cost))
    better_gain = gain[..., None, :] >= gain[..., :, None]
    better_cost = cost[..., None, :] <= cost[..., :, None]
    strictly = (gain[..., None, :] > gain[..., :, None]) | (cost[..., None, :] < cost[..., :, None])
    return known & ~(better_gain & better_cost & strictly).any(axis=-1)


def hypervolume(
    gain: Sequence[float] | Array, cost: Sequence[float] | Array, reference: tuple[float, float]
) -> float:
    """Area of all that is no better than some point and no worse than `reference` (gain, cost).

    The sweep along one objective that suffices for two (Fonseca, Paquete and Lopez-Ibanez 2006, section II); points
    that are worse than the reference in either add nothing. In units of gain x cost.
    """
    worst_gain, worst_cost = reference
    area, so_far = 0.0, worst_gain
    points = sorted(zip(cost, gain, strict=True))
    # From the cheapest point on: each adds the strip of gains that no cheaper one has reached.
    for c, g in points:
        if c < worst_cost and g > so_far:
            area += (worst_cost - c) * (g - so_far)
            so_far = g
    return float(area)
