"""From conversations to left-padded batches: what generation and TSDI share."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from equipoise.data.schema import Turn


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Turn]]) -> list[list[int]]:
    """Apply the chat template, up to and including the header of the assistant's turn."""
    return [
        tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_dict=True)["input_ids"]
        for prompt in prompts
    ]


def left_pad(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack rows into `input_ids` and `attention_mask`, both (B, T) int64, padded on the left.

    By hand, because the tokenizer's `pad` would need its padding side changed and changed back.
    """
    width = max(map(len, rows))
    input_ids = torch.tensor([[pad_token_id] * (width - len(row)) + list(row) for row in rows])
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return input_ids.to(device), attention_mask.to(device)


@contextmanager
def inference(*models: Any) -> Iterator[None]:
    """Put models into eval mode without gradients, and back into the mode they were in."""
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)


def base_of(model: Any) -> PreTrainedModel:
    """Return the transformers model inside a PeftModel (its LoRA layers stay active), or the model itself.

    `PeftModel.generate` overwrites the base's generation config; the base's own `generate` does not.
    """
    return model.get_base_model() if hasattr(model, "peft_config") else model


@contextmanager
def decoding_by(base: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Make `base.generate` follow `config` and nothing else.

    The model's own config is replaced, not overridden: `generate` fills whatever an override leaves open
    from it, and a repetition penalty some model ships with would quietly change what is measured.
    """
    original = base.generation_config
    base.generation_config = config
    try:
        yield
    finally:
        base.generation_config = original
