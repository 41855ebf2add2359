"""Preference pairs as batches: a pair is one stretch `[prompt | chosen | rejected]`, the prompt encoded once.

A 4-D attention mask hides the chosen answer from the rejected one, and positions restart behind the prompt, so
both answers see what they would see in rows of their own. A short refusal is not padded to the length of a long
answer, and a long prompt is paid for once. Short pairs share a row of little more than the longest pair's length,
hidden from one another the same way: little is left of padding.

    tokens      p0 p1 p2 c0 c1 r0 r1 r2 p0 c0 r0 .
    segment      0  0  0  1  1  2  2  2  3  4  5 -1
    position     0  1  2  3  4  3  4  5  0  1  1  0

A model that cannot take such a mask gets two rows a pair; `can_share_prompt` finds out by trying.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from equipoise.data.schema import PreferencePair
from equipoise.data.templates import ConversationEncoder, EncodingLimits
from equipoise.train.trainers.completion_head import completion_head

PARTS = 3
"""A pair's segments: prompt, chosen, rejected."""

ROW_SLACK = 1.25
"""A row is at most this many times the longest pair: wider rows waste less on padding and more on attention."""


@dataclass(frozen=True)
class EncodedPairs:
    """Tokenised pairs and what did not make it."""

    dataset: Dataset
    """Columns: prompt_ids, chosen_ids, rejected_ids, category (str), pair (row number), chosen_safe and rejected_safe
    (None: nobody said), unsafe_gap (u_l - u_w, with u = 1 for an answer that is labelled unsafe)."""
    ids: list[str]
    """The pairs' own ids, by row number."""
    too_long: list[str]
    """Ids of the pairs dropped because prompt + longer answer exceed max_length."""
    left_out: Sequence[str] = ()
    """For the terminal: a line for every reason that pairs were dropped."""


def encode_pairs(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    limits: EncodingLimits | None = None,
) -> EncodedPairs:
    """Tokenise pairs; raises DataError when the chat template fails, or too much is too long (`limits`)."""
    encoder = ConversationEncoder(tokenizer, max_length, limits or EncodingLimits())
    rows: list[dict[str, Any]] = []
    ids: list[str] = []
    for pair in pairs:
        encoded = encoder.encode(pair.id, pair.prompt, (pair.chosen, pair.rejected))
        if encoded is None:
            continue
        prompt, (chosen, rejected) = encoded
        rows.append(
            {
                "prompt_ids": prompt,
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "category": pair.category,
                "pair": len(rows),
                "unsafe_gap": int(pair.rejected_safe is False) - int(pair.chosen_safe is False),
                "chosen_safe": pair.chosen_safe,
                "rejected_safe": pair.rejected_safe,
            }
        )
        ids.append(pair.id)
    encoder.check("pairs")
    return EncodedPairs(Dataset.from_list(rows), ids, encoder.too_long, encoder.told("pairs"))


def dataset_key(dataset: Dataset) -> str:
    """Hash of every pair's tokens, in order: what cached reference log-probabilities depend on."""
    digest = hashlib.blake2b(digest_size=16)
    for row in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"]):
        digest.update(repr((row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])).encode())
    return digest.hexdigest()


def pack_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Which pairs share a row: as few rows as `ROW_SLACK` allows, evenly filled (longest first, into the emptiest)."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    limit = ROW_SLACK * max(lengths)
    for num_rows in range(math.ceil(sum(lengths) / limit), len(lengths)):
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        filled = [0] * num_rows
        for pair in longest_first:
            row = filled.index(min(filled))
            rows[row].append(pair)
            filled[row] += lengths[pair]
        if max(filled) <= limit:
            return rows
    return [[pair] for pair in longest_first]


@dataclass
class PairCollator:
    """Rows of the dataset -> a batch of tensors (`collator(rows)`).

    input_ids, position_ids, segment (R, T), R <= B: short pairs stand behind one another in a row; completion_index,
    completion_targets, completion_sequence (N,), where sequence 2b is pair b's chosen answer and 2b + 1 its rejected
    one; lengths (2B,), chosen_lengths, rejected_lengths (B,); pair (B,). With `two_rows` a pair takes two rows
    of the same kind (prompt | answer), chosen first.
    """

    pad_token_id: int
    two_rows: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate; see the class."""
        blocks: list[Block] = []
        for e in examples:
            prompt, chosen, rejected = e["prompt_ids"], e["chosen_ids"], e["rejected_ids"]
            blocks += (
                [(prompt, [chosen]), (prompt, [rejected])]
                if self.two_rows
                else [(prompt, [chosen, rejected])]
            )
        batch = collate_blocks(blocks, self.pad_token_id, share_rows=not self.two_rows)
        batch["chosen_lengths"], batch["rejected_lengths"] = batch["lengths"][0::2], batch["lengths"][1::2]
        for name in ("pair", "unsafe_gap", "desirable", "category_index", "slot"):
            if name in examples[0]:
                batch[name] = torch.tensor([e[name] for e in examples])
        return batch


Block = tuple[list[int], list[list[int]]]
"""A prompt and the answers that share it, as token ids."""


def collate_blocks(
    blocks: Sequence[Block], pad_token_id: int, *, share_rows: bool, parts: int = PARTS
) -> dict[str, Tensor]:
    """Blocks in rows, several in one where `share_rows`; the answers are numbered through, S of them with N tokens.

    input_ids, position_ids, segment (R, T); completion_index, completion_targets, completion_sequence (N,); lengths
    (S,): each answer's tokens; end_index (S,): its last one, in the flattened (R * T). parts: segments a block, one
    more than its answers; `pair_attention_mask` has to be told.
    """
    answers_of = [ids for _, answers in blocks for ids in answers]  # by sequence
    first, num_sequences = [], 0  # sequence of each block's first answer
    for _, answers in blocks:
        first.append(num_sequences)
        num_sequences += len(answers)
    lengths = [len(prompt) + sum(map(len, answers)) for prompt, answers in blocks]
    rows = pack_rows(lengths) if share_rows else [[i] for i in range(len(blocks))]
    width = max(sum(lengths[block] for block in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    position_ids = torch.zeros((len(rows), width), dtype=torch.int64)
    segment = torch.full((len(rows), width), -1)
    index: dict[int, Tensor] = {}  # by sequence
    end_index = torch.zeros(num_sequences, dtype=torch.int64)
    for i, row in enumerate(rows):
        start = 0
        for place, block in enumerate(row):
            prompt, answers = blocks[block]
            behind_prompt = start + len(prompt)
            input_ids[i, start:behind_prompt] = torch.tensor(prompt)
            position_ids[i, start:behind_prompt] = torch.arange(len(prompt))
            segment[i, start:behind_prompt] = parts * place
            start = behind_prompt
            for part, ids in enumerate(answers, start=1):
                end = start + len(ids)
                input_ids[i, start:end] = torch.tensor(ids)
                position_ids[i, start:end] = torch.arange(len(prompt), len(prompt) + len(ids))
                segment[i, start:end] = parts * place + part
                # The prompt's last token predicts the first token of either answer.
                predictors = torch.cat([torch.tensor([behind_prompt - 1]), torch.arange(start, end - 1)])
                index[first[block] + part - 1] = i * width + predictors
                end_index[first[block] + part - 1] = i * width + end - 1
                start = end
    tokens_of = torch.tensor([len(ids) for ids in answers_of])
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segment": segment,
        "completion_index": torch.cat([index[number] for number in range(num_sequences)]),
        "completion_targets": torch.tensor([token for ids in answers_of for token in ids]),
        "completion_sequence": torch.arange(num_sequences).repeat_interleave(tokens_of),
        "lengths": tokens_of,
        "end_index": end_index,
    }


def pair_attention_mask(segment: Tensor, parts: int = PARTS) -> Tensor:
    """Boolean mask (R, 1, T, T), True = may attend, from segment (R, T).

    Segment 3k is the prompt of a row's k-th pair, 3k + 1 and 3k + 2 its answers, -1 padding. Causal; an answer sees
    its pair's prompt and itself; padding sees itself only, so that no row is without a key.
    """
    num_tokens = segment.shape[1]
    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=segment.device).tril()
    query, key = segment[:, :, None], segment[:, None, :]
    own_prompt = parts * (query // parts)
    mask = causal & ((key == query) | (key == own_prompt)) & (query >= 0)
    mask |= torch.eye(num_tokens, dtype=torch.bool, device=segment.device)
    return mask[:, None]


def model_inputs(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The keyword arguments of the completion forward for a collated batch.

    Batches of a row an answer are plain right-padded ones, for models that take nothing but a 2-D mask.
    """
    segment = batch["segment"]
    if segment.shape[0] < batch["lengths"].shape[0]:
        layout = {"attention_mask": pair_attention_mask(segment), "position_ids": batch["position_ids"]}
    else:
        layout = {"attention_mask": (segment >= 0).long()}
    return {
        "input_ids": batch["input_ids"],
        **layout,
        "completion_index": batch["completion_index"],
        "completion_targets": batch["completion_targets"],
    }


def sum_by_sequence(per_token: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Per-token values (N,) -> (chosen (B,), rejected (B,)), summed over each answer's tokens, fp32."""
    total = answer_sums(per_token, batch)
    return total[0::2], total[1::2]


def answer_sums(per_token: Tensor, batch: dict[str, Any]) -> Tensor:
    """Per-token values (N,) -> (S,), summed over each answer's tokens."""
    zeros = per_token.new_zeros(batch["lengths"].shape[0])
    return zeros.index_add(0, batch["completion_sequence"], per_token)


@torch.no_grad()
def can_share_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tolerance: float = 0.05
) -> bool:
    """Whether shared rows give the log-probabilities of rows of their own, tried on small made-up pairs.

    False for models that reject a 4-D mask, ignore it, or ignore position ids (recurrent layers, sliding windows built
    from a 2-D mask ...). The model is left as it is. tolerance: nats a token.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(tokenizer), (24,), generator=generator)
    # 24, 10 and 10 tokens: the two short ones share a row.
    cuts = [((0, 8), (8, 13), (13, 24)), ((20, 24), (0, 3), (3, 6)), ((10, 13), (3, 7), (15, 18))]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    examples: list[dict[str, Any]] = [
        {"pair": i, **{name: ids[a:b].tolist() for name, (a, b) in zip(names, cut, strict=True)}}
        for i, cut in enumerate(cuts)
    ]
    was_training = model.training
    model.eval()
    results = []
    try:
        with completion_head(model):
            for two_rows in (False, True):
                batch = PairCollator(pad_token_id=0, two_rows=two_rows)(examples)
                inputs = {name: value.to(model.device) for name, value in model_inputs(batch).items()}
                results.append(model(**inputs).log_probs)
        return bool(torch.allclose(results[0], results[1], atol=tolerance, rtol=0.02))
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError):
        return False  # the model does not take a 4-D mask or position ids at all
    finally:
        model.train(was_training)
