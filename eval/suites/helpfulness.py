"""Ordinary prompts: how likely the model finds the reference answer, per token.

No text is generated and no judge is asked, so the score is exact, cheap and paired from run to run: it shows a model
that forgets how to answer long before a judge of quality would.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from equipoise.data.errors import DataError
from equipoise.data.schema import Exchange
from equipoise.eval.generation.batches import base_of, encode_prompts, inference
from equipoise.eval.generation.requests import Progress
from equipoise.eval.generation.tsdi import TokenBias
from equipoise.eval.generation.tsdi_decoding import take_out
from equipoise.eval.suites.base import SuiteData


def prompts(data: SuiteData) -> Sequence[Exchange]:
    """Ordinary prompts with a reference answer; raises DataError naming those without one."""
    without = [exchange.id for exchange in data.helpful_prompts if not exchange.response]
    if without:
        raise DataError(
            f"{len(without)} helpful prompts have no reference answer in `response`: {', '.join(without[:10])}"
            f"{' ...' if len(without) > 10 else ''}; helpfulness is the likelihood of that answer"
        )
    return data.helpful_prompts


def log_likelihoods(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    exchanges: Sequence[Exchange],
    batch_size: int,
    max_length: int,
    token_bias: TokenBias | None = None,
    progress: Progress | None = None,
) -> list[float | None]:
    """Mean log π(token) over the tokens of each reference answer given its prompt, nats, in input order.

    The answer is encoded by itself after the templated prompt, as generation would have produced it, and without
    an end-of-turn token. With a `token_bias`, the first positions are scored as decoding would see them. An exchange
    longer than `max_length` tokens or than the model's context, or whose likelihood isn't finite, is unscored: None.
    """
    rows = [
        (prompt, tokenizer(exchange.response, add_special_tokens=False)["input_ids"])
        for prompt, exchange in zip(
            encode_prompts(tokenizer, [exchange.prompt for exchange in exchanges]), exchanges, strict=True
        )
    ]
    limit = min(max_length, base_of(model).config.get_text_config().max_position_embeddings)
    lengths = [len(prompt) + len(answer) for prompt, answer in rows]
    fitting = sorted((i for i, length in enumerate(lengths) if length <= limit), key=lambda i: -lengths[i])
    scores: list[float | None] = [None] * len(exchanges)
    with inference(model):
        for start in range(0, len(fitting), batch_size):
            batch = fitting[start : start + batch_size]
            for i, score in zip(batch, _score(model, [rows[i] for i in batch], token_bias), strict=True):
                scores[i] = score
            if progress is not None:
                num_unfit = len(exchanges) - len(fitting)
                progress(num_unfit + start + len(batch), len(exchanges), "reference answers")
    return scores


@dataclass(frozen=True)
class ModelScorer:
    """A `ReferenceScorer` with a model that is at hand; the arguments are those of `log_likelihoods`."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    max_length: int
    token_bias: TokenBias | None = None

    @property
    def description(self) -> Mapping[str, Any]:
        """Not enough to keep its scores by: a model in training changes."""
        return {"model": base_of(self.model).name_or_path, "max_length": self.max_length}

    def score(self, exchanges: Sequence[Exchange], progress: Progress | None = None) -> list[float | None]:
        """As `log_likelihoods`."""
        return log_likelihoods(
            self.model,
            self.tokenizer,
            exchanges,
            self.batch_size,
            self.max_length,
            self.token_bias,
            progress,
        )


def _score(
    model: Any, rows: Sequence[tuple[list[int], list[int]]], token_bias: TokenBias | None
) -> list[float | None]:
    """Mean log-probability per answer token of (prompt, answer) rows; None where it isn't finite."""
    device = base_of(model).device
    sequences = [torch.tensor(prompt + answer) for prompt, answer in rows]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    # Padded on the right, with anything: causal attention never looks there, and no logits are read there.
    input_ids = pad_sequence(sequences, batch_first=True)
    attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
    # The shortest prompt's last token is the first position whose logits anybody needs.
    first = min(len(prompt) for prompt, _ in rows) - 1
    num_kept = input_ids.shape[1] - first
    output = model(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        logits_to_keep=num_kept,
        use_cache=False,
    )
    logits = output.logits[:, -num_kept:]  # a model that knows no logits_to_keep returns them all
    scores: list[float | None] = []
    for row, (prompt, answer) in enumerate(rows):
        start = len(prompt) - 1 - first
        answer_logits = logits[row, start : start + len(answer)].float()  # (T, V), T answer tokens
        if token_bias is not None:
            answer_logits = _corrected(answer_logits, token_bias)
        targets = torch.tensor(answer, device=device)
        score = answer_logits.log_softmax(-1).gather(-1, targets[:, None]).mean().item()
        scores.append(score if math.isfinite(score) else None)
    return scores


def _corrected(logits: Tensor, token_bias: TokenBias) -> Tensor:
    """Answer logits (T, V) with the first L positions as TSDI decoding would have them."""
    token_bias.expect_vocabulary(logits.shape[-1])
    correction = token_bias.correction()[: len(logits)].to(logits.device)
    corrected = take_out(logits[: len(correction)], correction, token_bias.settings.plausibility)
    return torch.cat([corrected, logits[len(correction) :]])
