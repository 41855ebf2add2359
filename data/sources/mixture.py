"""Parts of the training pairs in stated shares, without repeating a pair."""

from collections.abc import Mapping, Sequence

from equipoise.data.schema import PreferencePair
from equipoise.data.splits import unit_hash


def part_sizes(available: Mapping[str, int], shares: Mapping[str, float]) -> dict[str, int]:
    """How many of each part's records to take: as many as there can be in the proportion of `shares`.

    The part that is scarcest for its share is taken whole; the others are rounded down, to one at least.
    shares: above 0; they need not sum to 1.
    """
    total = min(available[name] / share for name, share in shares.items())
    return {name: min(available[name], max(1, int(total * share + 1e-9))) for name, share in shares.items()}


def take(pairs: Sequence[PreferencePair], number: int, seed: int) -> list[PreferencePair]:
    """`number` of `pairs` in their order, chosen by the hash of their prompts: the order doesn't decide which."""
    ranked = sorted(range(len(pairs)), key=lambda i: (unit_hash(pairs[i].prompt, seed), pairs[i].id))
    return [pairs[i] for i in sorted(ranked[:number])]
