"""Single answers as batches `[prompt | answer]`, short ones sharing a row: for SFT, KTO, and KL beside the pairs."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from equipoise.data.schema import PreferencePair, UnpairedExchange
from equipoise.data.templates import ConversationEncoder, EncodingLimits
from equipoise.train.pairs import collate_blocks


@dataclass(frozen=True)
class EncodedAnswers:
    """Tokenised answers and what did not make it."""

    dataset: Dataset
    """Columns: prompt_ids, answer_ids, desirable, category (str), example (row number)."""
    ids: list[str]
    """The answers' own ids, by row number."""
    too_long: list[str]
    """Ids of the answers dropped because prompt + answer exceed max_length."""
    left_out: Sequence[str] = ()
    """For the terminal: a line for every reason that answers were dropped."""


def encode_chosen(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: EncodingLimits | None = None,
) -> EncodedAnswers:
    """Tokenise each pair's chosen answer behind its prompt; see `encode_answers`."""
    return encode_answers(chosen_answers(pairs), tokenizer, max_length, limits)


def chosen_answers(pairs: Sequence[PreferencePair]) -> list[UnpairedExchange]:
    """Each pair's prompt with its chosen answer."""
    return [UnpairedExchange(pair.id, pair.prompt, pair.chosen, True, pair.category) for pair in pairs]


def encode_answers(
    exchanges: Sequence[UnpairedExchange],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: EncodingLimits | None = None,
) -> EncodedAnswers:
    """Tokenise each answer behind its prompt.

    Raises DataError when the chat template fails, or too much is too long (`limits`).
    """
    encoder = ConversationEncoder(tokenizer, max_length, limits or EncodingLimits())
    rows: list[dict[str, Any]] = []
    ids: list[str] = []
    for exchange in exchanges:
        encoded = encoder.encode(exchange.id, exchange.prompt, (exchange.response,))
        if encoded is None:
            continue
        prompt, (answer,) = encoded
        labels = {"desirable": exchange.desirable, "category": exchange.category, "example": len(rows)}
        rows.append({"prompt_ids": prompt, "answer_ids": answer, **labels})
        ids.append(exchange.id)
    encoder.check("answers")
    return EncodedAnswers(Dataset.from_list(rows), ids, encoder.too_long, encoder.told("answers"))


@dataclass
class AnswerCollator:
    """Rows of the dataset -> a batch of tensors (`collator(rows)`): `collate_blocks`, sequence b being example b.

    category_index, slot and example (B,) where the rows have them.
    """

    pad_token_id: int
    share_rows: bool = True
    """False: a right-padded row an answer, for models that take nothing but a 2-D mask."""

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate; see the class."""
        blocks = [(e["prompt_ids"], [e["answer_ids"]]) for e in examples]
        batch = collate_blocks(blocks, self.pad_token_id, share_rows=self.share_rows)
        for name in ("category_index", "slot", "example"):
            if name in examples[0]:
                batch[name] = torch.tensor([e[name] for e in examples])
        return batch


class BenignAnswers:
    """Chosen answers to harmless prompts, drawn beside a stage's own data: pass after pass, each newly shuffled.

    A draw depends on seed, step and rank alone: a resumed run draws what an uninterrupted one does.
    """

    def __init__(self, dataset: Dataset, pad_token_id: int, num_answers: int, seed: int) -> None:
        """num_answers: of one draw."""
        self._rows = list(dataset)
        self._pad_token_id, self._num_answers, self._seed = pad_token_id, num_answers, seed

    def draw(self, step: int, rank: int, world: int, *, share_rows: bool) -> dict[str, Tensor]:
        """The batch of an optimizer step on one of `world` ranks; no two draw alike. See `AnswerCollator`."""
        first = (step * world + rank) * self._num_answers
        rows = [self._row(position) for position in range(first, first + self._num_answers)]
        return AnswerCollator(self._pad_token_id, share_rows)(rows)

    def _row(self, position: int) -> Mapping[str, Any]:
        num_pass, place = divmod(position, len(self._rows))
        order = list(range(len(self._rows)))
        random.Random(f"{self._seed}/benign/{num_pass}").shuffle(order)
        return self._rows[order[place]]
