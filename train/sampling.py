"""In which order pairs are drawn: shares of subsets kept in every stretch of the order, reproducible by seed."""

import math
import random
from collections.abc import Mapping, Sequence

from equipoise.train.recipe import RecipeError


def order_pairs(
    subsets: Mapping[str, Sequence[int]], mixture: Mapping[str, float], num_draws: int | None, seed: int
) -> list[int]:
    """Row numbers in training order.

    subsets: name -> rows; mixture: name -> share (normalised here). Each draw comes from the subset that is furthest
    behind its share, so any prefix keeps the shares within one draw; inside a subset, pass after pass, each newly
    shuffled. num_draws None: as many as bring the subset that needs most draws through once. Raises RecipeError
    for a share of an empty subset.
    """
    shares = {name: share for name, share in mixture.items() if share > 0}
    for name in shares:
        if not subsets.get(name):
            raise RecipeError(
                f"mixture: {name} has a share of {shares[name]}, but the data has no {name} pairs; "
                f"set mixture.{name}=0 or add such pairs (found: { {k: len(v) for k, v in subsets.items()} })"
            )
    total = sum(shares.values())
    shares = {name: share / total for name, share in shares.items()}
    if num_draws is None:
        num_draws = max(math.ceil(len(subsets[name]) / share) for name, share in shares.items())
    generators = {name: random.Random(f"{seed}/{name}") for name in shares}
    waiting: dict[str, list[int]] = {name: [] for name in shares}
    drawn = dict.fromkeys(shares, 0)
    order = []
    for position in range(1, num_draws + 1):
        name = max(shares, key=lambda n: shares[n] * position - drawn[n])
        if not waiting[name]:
            waiting[name] = list(subsets[name])
            generators[name].shuffle(waiting[name])
        order.append(waiting[name].pop())
        drawn[name] += 1
    return order
