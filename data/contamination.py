"""Training records that nearly ask what a suite asks: n-grams of words in common."""

from collections import Counter
from collections.abc import Iterable, Sequence

from equipoise.data.schema import Turn
from equipoise.data.splits import normalise_prompt

NUM_WORDS = 5
"""Of an n-gram. Shorter runs are idioms ("how do I make"); suites' prompts are too short for the 13 words of GPT-3."""


class SuiteIndex:
    """The n-grams of the prompts that a run is judged on."""

    def __init__(self, prompts: Iterable[Sequence[Turn]]) -> None:
        self._suites_of: dict[str, list[int]] = {}
        self._num_grams: list[int] = []
        for prompt in dict.fromkeys(normalise_prompt(prompt) for prompt in prompts):
            grams = _grams(prompt)
            for gram in grams:
                self._suites_of.setdefault(gram, []).append(len(self._num_grams))
            self._num_grams.append(len(grams))

    def overlap(self, prompt: Sequence[Turn]) -> float:
        """Share of a suite prompt's n-grams that `prompt` holds too, in [0, 1]: of the prompt of which it is largest.

        A suite prompt of less than `NUM_WORDS` words has none; those are compared whole (`normalise_prompt`).
        """
        held: Counter[int] = Counter()
        for gram in _grams(normalise_prompt(prompt)):
            held.update(self._suites_of.get(gram, ()))
        return max((number / self._num_grams[suite] for suite, number in held.items()), default=0.0)


def _grams(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + NUM_WORDS]) for i in range(len(words) - NUM_WORDS + 1)}
