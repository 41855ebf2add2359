"""What is kept out of training: by normalised prompt, and stable when data is added or reordered."""

import hashlib
import unicodedata
from collections.abc import Sequence
from typing import Protocol, TypeVar

from equipoise.data.schema import Turn


class Prompted(Protocol):
    """A record with a prompt."""

    @property
    def prompt(self) -> tuple[Turn, ...]:
        """The conversation up to the answer."""


Record = TypeVar("Record", bound=Prompted)


class _Spaced(dict[int, int]):
    """Code point -> itself, or a space for punctuation, separators and control characters; filled as they occur."""

    def __missing__(self, code: int) -> int:
        self[code] = ord(" ") if unicodedata.category(chr(code))[0] in "PZC" else code
        return self[code]


_SPACED = _Spaced()


def normalise_prompt(prompt: str | Sequence[Turn]) -> str:
    """The form by which prompts are compared: two that differ in case, punctuation or spacing are one.

    NFKC, casefolded, apostrophes removed, other punctuation and control characters as spaces. Turns keep
    their order; roles don't count. A prompt of nothing but punctuation keeps it.
    """
    text = prompt if isinstance(prompt, str) else "\n".join(turn["content"] for turn in prompt)
    text = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("\u2019", "")
    words = text.translate(_SPACED).split()
    return " ".join(words or text.split())


def unit_hash(prompt: str | Sequence[Turn], seed: int) -> float:
    """A number in [0, 1) that depends on the normalised prompt and the seed alone."""
    key = f"{seed}\n{normalise_prompt(prompt)}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) / 2**64


def split_by_prompt(
    records: Sequence[Record], held_out_fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """(training, held out): about `held_out_fraction` of the prompts are held out, with all their records.

    A prompt stays on its side when records are added, left out or reordered, and when the fraction grows it only
    ever moves to the held-out side.
    """
    training: list[Record] = []
    held_out: list[Record] = []
    for record in records:
        side = held_out if unit_hash(record.prompt, seed) < held_out_fraction else training
        side.append(record)
    return training, held_out
