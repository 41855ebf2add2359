"""In which order pairs are drawn: shares of subsets kept in every stretch of the order, reproducible by seed."""

import math
from collections.abc import Mapping, Sequence

from equipoise.data.sampling import balanced_rows, shuffled_passes
from equipoise.train.recipe import RecipeError


def order_pairs(
    subsets: Mapping[str, Sequence[int]],
    mixture: Mapping[str, float],
    num_draws: int | None,
    seed: int,
    categories: Sequence[str] | None = None,
    temperature: float = 0.0,
) -> list[int]:
    """Row numbers in training order.

    subsets: name -> rows; mixture: name -> share (normalised here). Each draw comes from the subset that is furthest
    behind its share, so any prefix keeps the shares within one draw; inside a subset, pass after pass, each newly
    shuffled. num_draws None: as many as bring the subset that needs most draws through once. With `categories`, one a
    row, a subset's draws are balanced instead (`balanced_rows`), and as many as it has rows are an epoch. Raises
    RecipeError for a share of an empty subset.
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
    streams = {
        name: shuffled_passes(subsets[name], f"{seed}/{name}")
        if categories is None
        else balanced_rows(
            subsets[name], [categories[row] for row in subsets[name]], temperature, f"{seed}/{name}"
        )
        for name in shares
    }
    drawn = dict.fromkeys(shares, 0)
    order = []
    for position in range(1, num_draws + 1):
        name = max(shares, key=lambda n: shares[n] * position - drawn[n])
        order.append(next(streams[name]))
        drawn[name] += 1
    return order
