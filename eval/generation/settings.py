"""How answers are decoded: the settings of the model under test."""

import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How answers are decoded. Nothing else counts: a model's own generation defaults are not used."""

    max_new_tokens: int = 64
    """Tokens at which an answer is cut off."""
    batch_size: int = 32
    """Prompts of the longest length allowed that are answered at a time; shorter ones up to eight times as many, in the
    same memory. On a GPU take what fits."""
    temperature: float = 0.0
    """0: greedy. Above: sampling, each answer by a seed of its own, which follows from `seed` and the prompt."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this probability; 1: from all."""
    max_prompt_tokens: int = 1024
    """Longest prompt, chat template included. A longer one is an error: cut, it would be another question."""
    seed: int = 0
    """For sampling."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        check_sampling(self.temperature, self.top_p)


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ValueError where they are impossible; warn where one has no effect."""
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or more.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; expected 0 < top_p <= 1.")
    if temperature == 0 and top_p != 1:
        log.warning("top_p=%s has no effect: temperature 0 decodes greedily.", top_p)
