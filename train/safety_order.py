"""SafeDPO's order of the pairs: the safe answer of a mixed pair is chosen, and no pair has two unsafe answers.

Kim et al. 2505.20065: a pair is dropped if both answers are unsafe and swapped if only the chosen one is. What is left
prefers as before among safe answers, and a safe answer to an unsafe one whatever was preferred.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from equipoise.data.errors import DataError
from equipoise.data.schema import HELPFUL, PreferencePair


@dataclass(frozen=True)
class SafetyOrder:
    """The pairs in SafeDPO's order, and how many were touched on the way."""

    pairs: list[PreferencePair]
    num_swapped: int
    num_both_unsafe: int
    """Dropped."""
    num_unlabelled: int
    """Dropped: of a harm category, with an answer that nobody labelled safe or unsafe."""

    def counts(self) -> dict[str, object]:
        """For the stage's facts."""
        return {
            "num_swapped": self.num_swapped,
            "num_both_unsafe": self.num_both_unsafe,
            "num_unlabelled": self.num_unlabelled,
        }

    def summary(self) -> str:
        """One line for the terminal."""
        text = (
            f"SafeDPO keeps {len(self.pairs)} pairs: {self.num_swapped} swapped because only the chosen answer was "
            f"unsafe; {self.num_both_unsafe} dropped because both were"
        )
        return text + (f", {self.num_unlabelled} because nobody said" if self.num_unlabelled else "")


def order_by_safety(pairs: Sequence[PreferencePair], unlabelled: str) -> SafetyOrder:
    """Drop and swap; a `helpful` pair without labels has two safe answers, since it carries no hazard.

    unlabelled: what becomes of a pair of a harm category that lacks a label: `error` or `drop`. Raises DataError for
    it, and when no pair is left.
    """
    kept: list[PreferencePair] = []
    without = [pair.id for pair in pairs if _is_unlabelled(pair)]
    if without and unlabelled == "error":
        raise DataError(
            f"SafeDPO needs to know of both answers whether they are safe, and {len(without)} of {len(pairs)} pairs do "
            f"not say (first: {', '.join(without[:3])}). Add chosen_safe and rejected_safe to them, or leave them out "
            "with loss.unlabelled=drop."
        )
    num_swapped = num_both_unsafe = 0
    for pair in pairs:
        if _is_unlabelled(pair):
            continue
        if pair.chosen_safe is not False:
            kept.append(pair)
        elif pair.rejected_safe is False:
            num_both_unsafe += 1
        else:
            num_swapped += 1
            kept.append(
                replace(
                    pair,
                    chosen=pair.rejected,
                    rejected=pair.chosen,
                    chosen_safe=pair.rejected_safe,
                    rejected_safe=pair.chosen_safe,
                )
            )
    if not kept:
        raise DataError(
            f"SafeDPO leaves none of {len(pairs)} pairs: {num_both_unsafe} have two unsafe answers, {len(without)} "
            "lack a label (chosen_safe, rejected_safe)."
        )
    return SafetyOrder(kept, num_swapped, num_both_unsafe, len(without))


def _is_unlabelled(pair: PreferencePair) -> bool:
    return pair.category != HELPFUL and (pair.chosen_safe is None or pair.rejected_safe is None)
