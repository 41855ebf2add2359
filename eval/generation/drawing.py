"""Draw tokens, each answer with random numbers of its own: whatever is decoded beside it, it stays the same.

`torch.multinomial` takes its numbers from one stream for all rows of a batch, so that an answer would depend on its
neighbours and on its place among them. Here the numbers of an answer, one a position, follow from its seed, and a token
is where the distribution function passes the number: the inverse of that function turns uniform numbers into samples
(Devroye, Non-Uniform Random Variate Generation, 1986, section III.2).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from equipoise.eval.generation.settings import GenerationSettings


def random_numbers(seed: int, num_positions: int) -> list[float]:
    """Uniform in [0, 1), one a position of an answer; an answer cut off earlier has the same ones."""
    return torch.rand(num_positions, generator=torch.Generator().manual_seed(seed)).tolist()


class Sampler:
    """Draw by the settings' temperature and top_p."""

    def __init__(self, settings: GenerationSettings) -> None:
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
        if settings.top_p < 1:
            self.warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(self, logits: Tensor, numbers: Sequence[float]) -> Tensor:
        """Tokens (n,) int64, given logits (n, V) fp32 and a number in [0, 1) for each row."""
        probabilities = self.warpers(None, logits).softmax(-1)  # neither looks at the ids
        # Double: the sum of 100,000 probabilities would be off by more than some of them.
        reached = probabilities.double().cumsum(-1)
        # Numbers have 24 bits, so that none times the sum is rounded up to the sum: a token is always passed.
        targets = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None] * reached[:, -1:]
        return torch.searchsorted(reached, targets, right=True)[:, 0]


class DrawnToken(LogitsProcessor):
    """For `generate`, which then decodes greedily: of each row's scores the drawn token's alone are finite."""

    def __init__(self, sampler: Sampler, width: int, numbers: Sequence[Sequence[float]]) -> None:
        """width: of the prompts. numbers: of each row, one a position."""
        self.sampler, self.width, self.numbers = sampler, width, numbers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (n, V): 0 for the drawn token, -inf for all others."""
        position = input_ids.shape[1] - self.width
        tokens = self.sampler(scores, [row[position] for row in self.numbers])
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)
