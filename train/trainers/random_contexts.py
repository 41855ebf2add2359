"""Random contexts for the token-bias penalty: prompts that say nothing, and answers that say nothing yet."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from equipoise.data.random_prompts import random_continuations, random_prompts
from equipoise.eval.generation.batches import encode_prompts
from equipoise.train.recipe.stages import TokenBiasPenaltyConfig


class RandomContexts:
    """Draws `num_contexts` fresh prompts with `num_positions` answer positions each, reproducible by step and rank."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: TokenBiasPenaltyConfig,
        words: Sequence[str],
        seed: int,
    ) -> None:
        self.tokenizer, self.config, self.words, self.seed = tokenizer, config, words, seed

    def draw(self, step: int, rank: int) -> dict[str, Any]:
        """Inputs of the completion forward, right-padded.

        input_ids, attention_mask (N, T); completion_index (N * L,) are the positions that predict answer tokens
        1 ... L, completion_targets the random answer tokens themselves.
        """
        config = self.config
        seed = hash((self.seed, step, rank)) % 2**31  # ints hash to themselves: the same in every process
        prompts = random_prompts(
            self.tokenizer,
            config.num_contexts,
            config.prompt_tokens,
            pool=config.pool,  # type: ignore[arg-type]
            words=self.words,
            path=config.path,
            seed=seed,
        )
        answers = torch.as_tensor(
            random_continuations(
                self.tokenizer,
                config.num_contexts,
                config.num_positions,
                pool=config.pool,  # type: ignore[arg-type]
                words=self.words,
                path=config.path,
                seed=seed,
            )
        )
        rows = encode_prompts(self.tokenizer, prompts)
        width = max(map(len, rows)) + config.num_positions
        input_ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
        index: list[Tensor] = []
        for i, row in enumerate(rows):
            end = len(row) + config.num_positions
            input_ids[i, : len(row)] = torch.tensor(row)
            input_ids[i, len(row) : end] = answers[i]
            attention_mask[i, :end] = 1
            index.append(i * width + torch.arange(len(row) - 1, end - 1))
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "completion_index": torch.cat(index),
            "completion_targets": answers.reshape(-1),
        }
