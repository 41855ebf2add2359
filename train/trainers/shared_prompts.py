"""The prompt encoded once a group: sampling from one cache, scoring rows `[prompt | answer | answer | ...]`.

GRPO samples and scores several answers a prompt. Where answers are short beside the prompt (a number, a verdict, a
refusal), rows of their own repeat the prompt for most of the work.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from equipoise.eval.generation.batches import left_pad
from equipoise.train.losses.log_probs import token_entropy
from equipoise.train.pairs import Block, collate_blocks, pair_attention_mask
from equipoise.train.trainers.completion_head import base_causal_lm, lm_head, whole_head

MIN_SAVING = 2.0
"""Share the prompt where that leaves at most one token in so many: attention over the long row costs something too."""
MAX_WIDTH = 4096
"""Tokens of a shared row, at most: its mask is dense."""


def grouped(
    input_ids: Tensor, attention_mask: Tensor, num_answer_tokens: int
) -> tuple[list[Block], list[list[int]]]:
    """Rows `[prompt | answer]` (B, T), prompts padded left and answers right, as blocks, and the rows of each block.

    Equal prompts are one block, in order of appearance. Rows whose answer is masked out are in none.
    """
    blocks: dict[tuple[int, ...], list[list[int]]] = {}
    rows: dict[tuple[int, ...], list[int]] = {}
    split = input_ids.shape[1] - num_answer_tokens
    for row, (ids, kept) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
        prompt = tuple(token for token, keep in zip(ids[:split], kept[:split], strict=True) if keep)
        answer = [token for token, keep in zip(ids[split:], kept[split:], strict=True) if keep]
        if answer:
            blocks.setdefault(prompt, []).append(answer)
            rows.setdefault(prompt, []).append(row)
    return [(list(prompt), answers) for prompt, answers in blocks.items()], list(rows.values())


@torch.no_grad()
def sample_shared(
    model: Any,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    share: bool = True,
    **options: Any,
) -> Tensor:
    """Answers (B, L) to `prompts` (B token lists, equal ones among them), as `model.generate(**options)` would.

    Every prompt but its last token goes through the model once; its cache is then copied to the rows that ask it. Not
    share: `generate` does it all, for models whose cache cannot be copied.
    """
    unique = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
    place = {prompt: i for i, prompt in enumerate(unique)}
    input_ids, mask = left_pad(unique, config.pad_token_id, model.device)
    rows = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=model.device)
    start: dict[str, Any] = {}
    if share and input_ids.shape[1] > 1:
        cache = DynamicCache(config=model.config)
        model(
            input_ids=input_ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, :-1],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_select_indices(rows)
        start["past_key_values"] = cache
    output = model.generate(
        input_ids=input_ids[rows], attention_mask=mask[rows], generation_config=config, **start, **options
    )
    return output[:, input_ids.shape[1] :]


def pays(blocks: Sequence[Block], num_tokens: int) -> bool:
    """Whether shared rows are worth it, `num_tokens` (B * T) being what rows of their own take."""
    lengths = [len(prompt) + sum(map(len, answers)) for prompt, answers in blocks]
    return bool(lengths) and MIN_SAVING * sum(lengths) <= num_tokens and max(lengths) <= MAX_WIDTH


def shared_log_probs(
    model: nn.Module,
    base: Any,
    blocks: Sequence[Block],
    rows: Sequence[Sequence[int]],
    shape: tuple[int, int],
    pad_token_id: int,
    *,
    entropy: bool,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """(log-probabilities, entropies without gradient), each (B, C) = `shape` in fp32, 0 where there is no token.

    model: with the completion head (`add_completion_head`); base: it without what wraps it. Both are those of logits /
    temperature, from which answers are sampled; ValueError for another than 1 where the logits have a soft cap.
    """
    parts = 1 + max(len(answers) for _, answers in blocks)
    batch = collate_blocks(blocks, pad_token_id, share_rows=True, parts=parts)
    device = base.device
    batch = {name: values.to(device) for name, values in batch.items()}
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=pair_attention_mask(batch["segment"], parts),
        position_ids=batch["position_ids"],
        completion_index=batch["completion_index"],
        completion_targets=batch["completion_targets"],
        completion_temperature=temperature,
    )
    row = torch.tensor([r for of_block in rows for r in of_block], device=device)[
        batch["completion_sequence"]
    ]
    lengths = batch["lengths"]
    first = (lengths.cumsum(0) - lengths)[batch["completion_sequence"]]
    place = torch.arange(len(row), device=device) - first

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(shape).index_put((row, place), values)

    if not entropy:
        return spread(output.log_probs), None
    with torch.no_grad(), whole_head(base_causal_lm(base)):
        whole = lm_head(base_causal_lm(base)).at(temperature)
        values = token_entropy(
            output.hidden.detach(), whole.weight, whole.bias, scale=whole.scale, softcap=whole.softcap
        )
    return spread(output.log_probs), spread(values)
