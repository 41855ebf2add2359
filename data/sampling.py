"""In which order records are drawn so that categories have stated shares, exactly and in every stretch of the order."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import count

BALANCES = ("none", "category", "temperature")


def category_shares(counts: Mapping[str, int], temperature: float) -> dict[str, float]:
    """Share of each category among the draws, ~ n_c ** (1 - temperature).

    counts: category -> records, above 0. temperature 0: as in the data; 1: every category alike.
    """
    weights = {category: number ** (1 - temperature) for category, number in counts.items()}
    total = sum(weights.values())
    return {category: weight / total for category, weight in weights.items()}


def quotas(shares: Mapping[str, float], num_draws: int) -> dict[str, int]:
    """Whole draws of each category, which sum to num_draws: rounded down, the largest remainders up (Hamilton)."""
    wanted = {category: share * num_draws for category, share in shares.items()}
    whole = {category: int(draws + 1e-9) for category, draws in wanted.items()}
    left = num_draws - sum(whole.values())
    by_remainder = sorted(wanted, key=lambda category: (whole[category] - wanted[category], category))
    for category in by_remainder[:left]:
        whole[category] += 1
    return whole


def spread_evenly(numbers: Mapping[str, int]) -> list[str]:
    """Each category as many times as `numbers` says; in every prefix of length t less than one from its share of t.

    Tijdeman, The chairman assignment problem, 1980: of the categories that may come, the one that has to come first.
    """
    total = sum(numbers.values())
    shares = {category: number / total for category, number in numbers.items() if number}
    slack = 1 / (2 * len(shares) - 2) if len(shares) > 1 else 0.0
    placed = dict.fromkeys(shares, 0)
    order = []
    for position in range(1, total + 1):
        eligible = [c for c in shares if shares[c] * position - placed[c] >= slack - 1e-9]
        chosen = min(eligible, key=lambda c: ((placed[c] + 1 - slack) / shares[c], c))
        placed[chosen] += 1
        order.append(chosen)
    return order


def balanced_rows(
    rows: Sequence[int], categories: Sequence[str], temperature: float, seed: int | str
) -> Iterator[int]:
    """`rows` without end, one epoch of len(rows) draws behind the other, categories in the shares of `temperature`.

    categories: of each row. An epoch holds each category exactly its quota of times; inside a category, pass after
    pass, each newly shuffled, goes on from epoch to epoch: rows of a common category that one epoch leaves out come in
    the next. What is drawn depends on the arguments alone, not on ranks or where a run was interrupted.
    """
    of_category: dict[str, list[int]] = {}
    for row, category in zip(rows, categories, strict=True):
        of_category.setdefault(category, []).append(row)
    shares = category_shares({category: len(of) for category, of in of_category.items()}, temperature)
    order = spread_evenly(quotas(shares, len(rows)))
    waiting = {category: shuffled_passes(of, f"{seed}/{category}") for category, of in of_category.items()}
    while True:
        yield from (next(waiting[category]) for category in order)


def shuffled_passes(rows: Sequence[int], seed: int | str) -> Iterator[int]:
    """`rows` without end: pass after pass, each newly shuffled."""
    generator = random.Random(str(seed))
    for _ in count():
        of_pass = list(rows)
        generator.shuffle(of_pass)
        yield from reversed(of_pass)
