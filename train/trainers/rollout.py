"""Sampled answers: by transformers' `generate`, or by a vLLM server that is sent the policy's weights every step.

Answers are sampled at temperature 1 from the whole vocabulary. With transformers each answer has a random stream of its
own, a function of seed and slot: the same answers whatever the batch size and the number of ranks, and after a resume.

The vLLM server needs GPUs of its own and, for the weights (see TRL's vLLM guide):

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config '{"backend": "nccl"}' \\
        --logprobs-mode processed_logprobs
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from equipoise.eval.generation.batches import base_of, decoding_by, inference, left_pad
from equipoise.eval.generation.engine import end_tokens
from equipoise.train.sharding import is_sharded


@dataclass(frozen=True, slots=True)
class Episode:
    """One sampled answer."""

    slot: int
    """Its number in the order of all answers of the stage."""
    category: int
    """Index of its prompt's category."""
    prompt_ids: list[int]
    answer_ids: list[int]
    """With the end token, where the policy ended the answer itself."""
    finished: bool
    """False: cut off."""


@dataclass(frozen=True)
class RolloutBatch:
    """Episodes as tensors: rows `[prompt | answer]`, padded on the right."""

    episodes: tuple[Episode, ...]
    input_ids: Tensor
    """(B, T) int64."""
    attention_mask: Tensor
    """(B, T) int64."""
    answer_index: Tensor
    """(N,): positions in the flattened (B * T) whose state predicts an answer token, answer by answer."""
    answer_targets: Tensor
    """(N,): these tokens."""
    mask: Tensor
    """(B, L) bool, L the longest answer: which tokens there are."""

    def by_answer(self, per_token: Tensor) -> Tensor:
        """(N,) -> (B, L), 0 under the padding; keeps the gradient."""
        return per_token.new_zeros(self.mask.shape).masked_scatter(self.mask, per_token)


def collate(episodes: Sequence[Episode], pad_token_id: int, device: torch.device) -> RolloutBatch:
    """Episodes as tensors on `device`; an answer without tokens is a row with nothing to predict."""
    lengths = torch.tensor([len(e.answer_ids) for e in episodes])
    width = max(len(e.prompt_ids) + len(e.answer_ids) for e in episodes)
    input_ids = torch.full((len(episodes), width), pad_token_id)
    attention_mask = torch.zeros((len(episodes), width), dtype=torch.int64)
    index = []
    for i, episode in enumerate(episodes):
        row = episode.prompt_ids + episode.answer_ids
        input_ids[i, : len(row)] = torch.tensor(row)
        attention_mask[i, : len(row)] = 1
        index.append(i * width + torch.arange(len(episode.prompt_ids) - 1, len(row) - 1))
    longest = max(1, int(lengths.max()))
    return RolloutBatch(
        episodes=tuple(episodes),
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        answer_index=torch.cat(index).to(device),
        answer_targets=torch.tensor([t for e in episodes for t in e.answer_ids], dtype=torch.int64).to(
            device
        ),
        mask=(torch.arange(longest) < lengths[:, None]).to(device),
    )


class Sampler(Protocol):
    """What samples answers."""

    def sample(
        self, model: Any, prompts: Sequence[list[int]], slots: Sequence[int]
    ) -> list[list[int] | None]:
        """Answer ids to each prompt, the end token included; `slots` number the answers. Every rank has to call it.

        None where the policy had no distribution to sample from (nan, infinity): `stop_unsampled` ends the training.
        """


def ended(answer: Sequence[int], ends: set[int]) -> bool:
    """Whether the policy ended the answer itself."""
    return bool(answer) and answer[-1] in ends


class TransformersSampler:
    """Samples with the policy itself, in left-padded batches."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, batch_size: int, seed: int
    ) -> None:
        self.tokenizer, self.max_new_tokens, self.batch_size = tokenizer, max_new_tokens, batch_size
        self.seed = seed

    def sample(
        self, model: Any, prompts: Sequence[list[int]], slots: Sequence[int]
    ) -> list[list[int] | None]:
        """See `Sampler`; the model is left in the mode it was in."""
        base = base_of(model)
        ends = end_tokens(base, self.tokenizer)
        # Drawn by `GumbelSampling`, so to `generate` it is the most probable token.
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=sorted(ends),
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=False,
            use_cache=True,
        )
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
        answers: dict[int, list[int] | None] = {}
        sharded = is_sharded(base)
        # What FSDP gathers under inference_mode could not be trained through afterwards.
        quiet = torch.no_grad() if sharded else inference(model)
        with quiet, decoding_by(base, config):
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                input_ids, attention_mask = left_pad(
                    [prompts[i] for i in rows], self.tokenizer.pad_token_id, base.device
                )
                drawn = GumbelSampling(self.seed, [slots[i] for i in rows], base.device)
                output = base.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    logits_processor=LogitsProcessorList([drawn]),
                    synced_gpus=sharded,  # a rank whose answers have ended goes on for those that have not
                )
                sampled = output[:, input_ids.shape[1] :].tolist()
                for i, answer, finite in zip(rows, sampled, drawn.finite.tolist(), strict=True):
                    answers[i] = up_to_end(answer, ends) if finite else None
        return [answers[i] for i in range(len(prompts))]


class GumbelSampling(LogitsProcessor):
    """argmax(logits + Gumbel noise) is a draw from softmax(logits); each row has its own noise."""

    def __init__(self, seed: int, slots: Sequence[int], device: torch.device) -> None:
        # ints hash to themselves: the same in every process
        self._generators = [torch.Generator(device).manual_seed(hash((seed, slot)) % 2**63) for slot in slots]
        self.finite = torch.ones(len(slots), dtype=torch.bool, device=device)
        """Rows (B,) that had a distribution to draw from at every position; of nan, argmax makes a token like any."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) whose largest is the draw; called by `generate`."""
        # Of nan and a number the maximum is nan; a token that was ruled out is -inf, and no maximum.
        self.finite &= scores.amax(-1).isfinite()
        noise = torch.empty(scores.shape, dtype=torch.float32, device=scores.device)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return scores.float() - noise.log_()  # -log of a standard exponential is a standard Gumbel


def up_to_end(answer: list[int], ends: set[int]) -> list[int]:
    """Cut behind the first end token; what follows is padding."""
    length = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
    return answer[:length]


class VLLMSampler:
    """Samples on a vLLM server. Rank 0 sends the weights and all ranks' prompts, and hands the answers out.

    client: `trl.generation.vllm_client.VLLMClient`, on rank 0, with its communicator initialised; None elsewhere.
    """

    def __init__(self, client: Any, accelerator: Accelerator, max_new_tokens: int, seed: int) -> None:
        assert (client is not None) == accelerator.is_main_process
        self.client, self.accelerator = client, accelerator
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self._metadata: list[tuple[str, str, list[int]]] | None = None

    def sample(
        self, model: Any, prompts: Sequence[list[int]], slots: Sequence[int]
    ) -> list[list[int] | None]:
        """See `Sampler`; every step is sampled with the weights of that step."""
        if not weights_are_finite(base_of(model), self.accelerator):
            return [None] * len(prompts)
        every = gather_object([list(prompts)])
        answers: list[Any] = [None]
        main = self.accelerator.is_main_process
        with torch.no_grad():
            if main or is_sharded(base_of(model)):  # what is in shards, the first rank gathers from all
                self._send(merged_weights(model), merged_weights(model))
        if main:
            self.client.reset_prefix_cache()
            output = self.client.generate(
                prompts=[prompt for of_rank in every for prompt in of_rank],
                temperature=1.0,
                top_p=1.0,
                max_tokens=self.max_new_tokens,
                generation_kwargs={"seed": hash((self.seed, slots[0])) % 2**31},
            )
            answers = [output["completion_ids"]]
        broadcast_object_list(answers, from_process=0)
        start = sum(len(of_rank) for of_rank in every[: self.accelerator.process_index])
        return [list(answer) for answer in answers[0][start : start + len(prompts)]]

    def _send(self, described: Iterator[tuple[str, Tensor]], sent: Iterator[tuple[str, Tensor]]) -> None:
        """Send the weights from the first rank; the others only go along."""
        if self._metadata is None:
            self._metadata = [
                (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
                for name, weight in described
            ]
        if self.client is not None:
            self.client.update_named_params(self._metadata, sent)
        else:
            deque(sent, maxlen=0)


def weights_are_finite(model: torch.nn.Module, accelerator: Accelerator) -> bool:
    """Whether all weights are, on all ranks; collective. What a server would make of others is its own affair."""
    held = (
        p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p) for p in model.parameters()
    )
    bad = torch.tensor([not all(bool(weight.isfinite().all()) for weight in held)], device=accelerator.device)
    return not bool(accelerator.gather(bad).any())


def merged_weights(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the model with its active LoRA adapters folded in, one at a time.

    The model is not touched: merging in place and back, as PEFT does, would round a bf16 base a little further with
    every step.
    """
    base = base_of(model)
    adapted = {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    parts = {
        f"{name}.{part}"
        for name, module in adapted.items()
        for part, _ in module.named_parameters()
        if not part.startswith("base_layer.")
    }
    for name, weight in base.named_parameters():
        if name in parts:
            continue
        owner = name.removesuffix(".base_layer.weight")
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        if owner in adapted:
            layer = adapted[owner]
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    weight = (weight.float() + layer.get_delta_weight(adapter).float()).to(weight.dtype)
        yield name.replace(".base_layer.", "."), weight.detach()
