"""Answer prompts with the model under test: `TransformersEngine` for a caller who wants every answer or none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from equipoise.data.errors import DataError
from equipoise.data.schema import Turn
from equipoise.eval.generation.requests import EngineError, Finish, Progress, Request, numbered
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.generation.transformers_engine import TransformersEngine, end_tokens
from equipoise.eval.generation.tsdi import TokenBias

__all__ = ["Generation", "GenerationSettings", "Progress", "end_tokens", "generate"]


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer."""

    text: str
    """Decoded without special tokens; thinking, if the model did any, is not part of it."""
    num_tokens: int
    """Tokens of the answer, its end-of-sequence token not counted."""
    finished: bool
    """Whether the model ended the answer itself; False: cut off at `max_new_tokens`."""


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Turn]],
    settings: GenerationSettings,
    token_bias: TokenBias | None = None,
    progress: Progress | None = None,
) -> list[Generation]:
    """Answer `prompts`, each a conversation that ends in a user turn; answers come in the prompts' order.

    As `TransformersEngine`, but all or nothing, and equal prompts are answered anew where answers are sampled.

    Raises:
        DataError: prompts longer than `max_prompt_tokens` or than the model's context allows; before any work.
        EngineError: a prompt that the chat template refuses, or that alone runs out of memory.
    """
    engine = TransformersEngine(model, tokenizer, settings, token_bias)
    requests = numbered(
        Request(messages=tuple(prompt), max_new_tokens=settings.max_new_tokens) for prompt in prompts
    )
    _check_lengths(engine, requests)
    replies = engine.complete(requests, progress)
    for index, reply in enumerate(replies):
        if reply.text is None:
            raise EngineError(f"prompt {index} (counted from 0) has no answer: {reply.error}")
    return [Generation(reply.text or "", reply.num_tokens, reply.finish == Finish.STOP) for reply in replies]


def _check_lengths(engine: TransformersEngine, requests: Sequence[Request]) -> None:
    limit, reason = engine.room(engine.settings.max_new_tokens)
    lengths = [engine.num_prompt_tokens(request) for request in requests]
    too_long = [index for index, length in enumerate(lengths) if length > limit]
    if too_long:
        raise DataError(
            f"{len(too_long)} of {len(lengths)} prompts are longer than {limit} tokens ({reason}); the longest has "
            f"{max(lengths)}. First of them (counted from 0): {', '.join(map(str, too_long[:10]))}. "
            "Shorten or drop them, or raise the limit: a prompt cut short would be another question."
        )
