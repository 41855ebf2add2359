"""Answer prompts with a transformers model: sorted by length, in left-padded batches."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from equipoise.data.errors import DataError
from equipoise.data.schema import Turn
from equipoise.eval.generation.batches import base_of, decoding_by, encode_prompts, inference, left_pad
from equipoise.eval.generation.tsdi import TokenBias
from equipoise.eval.generation.tsdi_decoding import TSDILogitsProcessor

Progress = Callable[[int, int, str], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How answers are decoded. Nothing else counts: a model's own generation defaults are not used."""

    max_new_tokens: int = 64
    """Tokens at which an answer is cut off."""
    batch_size: int = 32
    """Prompts answered at a time. On CPU 32 to 96 differ little; on a GPU take what fits."""
    temperature: float = 0.0
    """0: greedy. Above: sampling, reproducible for the same seed, batch size and prompts."""
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
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; expected 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected 0 < top_p <= 1.")
        if self.temperature == 0 and self.top_p != 1:
            log.warning("top_p=%s has no effect: temperature 0 decodes greedily.", self.top_p)


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer."""

    text: str
    """Decoded without special tokens."""
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

    Greedy decoding in fp32 does not depend on the batch size; in bf16 near-ties can fall either way.
    `token_bias` is subtracted from the first positions of every answer, as its settings say (TSDI).
    A LoRA-wrapped model answers with its adapter if that is switched on. The model's training mode and
    generation config are left as they were.

    Raises:
        DataError: prompts longer than `max_prompt_tokens` or than the model's context allows.
    """
    rows = encode_prompts(tokenizer, prompts)
    base = base_of(model)
    _check_lengths(rows, settings, base.config.get_text_config().max_position_embeddings)
    ends = end_tokens(base, tokenizer)
    correction = None
    if token_bias is not None:
        token_bias.expect_vocabulary(base.config.get_text_config().vocab_size)
        correction = token_bias.correction().to(base.device)
    # The longest first: what does not fit into memory fails at once, and rows of a batch are about even.
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    generations: dict[int, Generation] = {}
    with inference(model), decoding_by(base, _config(tokenizer, ends, settings)), _seeded(base, settings):
        for start in range(0, len(order), settings.batch_size):
            batch = order[start : start + settings.batch_size]
            input_ids, attention_mask = left_pad(
                [rows[index] for index in batch], tokenizer.pad_token_id, base.device
            )
            width = input_ids.shape[1]
            processors = LogitsProcessorList()
            if token_bias is not None and correction is not None:
                plausibility = token_bias.settings.plausibility
                processors.append(TSDILogitsProcessor(correction, width, plausibility))
            # The class's own: a folder's custom_generate, loaded with trust_remote_code, would replace base.generate.
            output = type(base).generate(
                base, input_ids=input_ids, attention_mask=attention_mask, logits_processor=processors
            )
            for index, answer in zip(batch, output[:, width:].tolist(), strict=True):
                generations[index] = _read(answer, ends, tokenizer)
            if progress is not None:
                progress(len(generations), len(rows), "answers")
    return [generations[index] for index in range(len(rows))]


def _read(answer: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> Generation:
    """Cut an answer at its first end token; what follows is padding."""
    length = next((index for index, token in enumerate(answer) if token in ends), None)
    tokens = answer if length is None else answer[:length]
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generation(text=text, num_tokens=len(tokens), finished=length is not None)


def end_tokens(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Whatever ends an answer: the model may know more end tokens than its tokenizer, or fewer."""
    configured = base.generation_config.eos_token_id
    known = configured if isinstance(configured, list) else [configured]
    return {token for token in [*known, tokenizer.eos_token_id] if token is not None}


def _check_lengths(rows: list[list[int]], settings: GenerationSettings, context: int) -> None:
    limit = min(settings.max_prompt_tokens, context - settings.max_new_tokens)
    too_long = [index for index, row in enumerate(rows) if len(row) > limit]
    if too_long:
        reason = (
            f"max_prompt_tokens={settings.max_prompt_tokens}"
            if limit == settings.max_prompt_tokens
            else f"the model's context of {context} less max_new_tokens={settings.max_new_tokens}"
        )
        raise DataError(
            f"{len(too_long)} of {len(rows)} prompts are longer than {limit} tokens ({reason}); the longest has "
            f"{max(map(len, rows))}. First of them (counted from 0): {', '.join(map(str, too_long[:10]))}. "
            "Shorten or drop them, or raise the limit: a prompt cut short would be another question."
        )


def _config(
    tokenizer: PreTrainedTokenizerBase, ends: set[int], settings: GenerationSettings
) -> GenerationConfig:
    sampling: dict[str, Any] = {}
    if settings.temperature > 0:
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,  # training switches it off in the model's config
        do_sample=settings.temperature > 0,
        **sampling,
    )


@contextmanager
def _seeded(base: PreTrainedModel, settings: GenerationSettings) -> Iterator[None]:
    """Sample from a seed of our own and leave the random state of the process untouched."""
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices) if settings.temperature > 0 else nullcontext():
        if settings.temperature > 0:
            torch.manual_seed(settings.seed)
        yield
