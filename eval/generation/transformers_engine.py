"""The engine for a transformers model in this process: in slots where the model can, else in sorted batches."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from xxhash import xxh3_128

from equipoise.eval.generation.batches import base_of, decoding_by, inference, left_pad
from equipoise.eval.generation.drawing import DrawnToken, Sampler, random_numbers
from equipoise.eval.generation.encoding import Encoded, RefusedError, encode_request
from equipoise.eval.generation.reasoning import split_reasoning
from equipoise.eval.generation.requests import Finish, Progress, Reply, Request
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.generation.slots import decode_in_slots, decodes_in_slots
from equipoise.eval.generation.tsdi import TokenBias
from equipoise.eval.generation.tsdi_decoding import TSDILogitsProcessor, take_out

log = logging.getLogger(__name__)

MOST_SLOTS = 8
"""Slots a prompt of `batch_size`, where prompts are short: beyond that, larger matrices gained little on a CPU."""


class TransformersEngine:
    """Complete requests with a transformers model, whose mode and generation config stay as they were.

    A LoRA-wrapped model answers with its adapter if that is switched on. `token_bias` is taken out of the first
    positions of every answer, as its settings say (TSDI). `choice_logprobs` are the model's own, in fp32: neither TSDI
    nor temperature nor top_p has touched them, since they ask what the model thinks, not what it is made to say.
    Choices that begin with the same token get the same number; one without any token is absent.

    Replies in fp32 do not depend on what else is asked, greedy or sampled; in bf16 near-ties can fall either way.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings,
        token_bias: TokenBias | None = None,
    ) -> None:
        """Raises TokenBiasError where the bias is of another vocabulary."""
        self.model, self.tokenizer, self.settings, self.token_bias = model, tokenizer, settings, token_bias
        self.base = base_of(model)
        self.ends = end_tokens(self.base, tokenizer)
        self._in_slots: bool | None = None
        self._correction: Tensor | None = None
        if token_bias is not None:
            token_bias.expect_vocabulary(self.base.config.get_text_config().vocab_size)
            self._correction = token_bias.correction().to(self.base.device)

    @property
    def description(self) -> Mapping[str, Any]:
        """Model, weights (a hash of all of them, adapters included), tokenizer's template, settings, TSDI, versions.

        Computed anew at every access, for a model in training changes.
        """
        bias = self.token_bias
        return {
            "engine": "transformers",
            "model": self.base.name_or_path,
            "weights": _hash_of_weights(self.model),
            "adapters": _adapters(self.model),
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "device": self.base.device.type,
            "chat_template": xxh3_128(str(self.tokenizer.chat_template).encode()).hexdigest(),
            "tokenizer": self.tokenizer.name_or_path,
            "ends": sorted(self.ends),
            **{f"settings.{name}": value for name, value in asdict(self.settings).items()},
            "tsdi": None
            if bias is None or self._correction is None
            else {"correction": _hash([self._correction]), "plausibility": bias.settings.plausibility},
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def complete(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        """Complete every request; what the chat template refuses is FAILED, what does not fit OVERLONG.

        A batch that runs out of memory is tried again at half the size, down to one prompt, which is then FAILED.

        Raises:
            EngineError: messages, and the tokenizer has no chat template.
        """
        replies: dict[int, Reply] = {}
        asked: dict[int, Encoded] = {}
        for index, request in enumerate(requests):
            try:
                encoded = encode_request(self.tokenizer, request)
            except RefusedError as error:
                replies[index] = Reply(None, Finish.FAILED, error=str(error))
                continue
            room, reason = self.room(request.max_new_tokens)
            if len(encoded.row) > room:
                message = f"the prompt has {len(encoded.row)} tokens, {room} fit ({reason})"
                replies[index] = Reply(None, Finish.OVERLONG, error=message)
            else:
                asked[index] = encoded
        numbers: dict[int, list[float]] = {}
        if self.settings.temperature > 0:
            seeds = {index: requests[index].seed(self.settings.seed) for index in asked}
            numbers = {index: random_numbers(seed, asked[index].limit) for index, seed in seeds.items()}
        for index, reply in self._decode(asked, numbers):
            replies[index] = reply
            if progress is not None:
                progress(len(replies), len(requests), "answers")
        num_failed = sum(reply.finish == Finish.FAILED for reply in replies.values())
        if num_failed:
            log.warning("%d of %d requests failed.", num_failed, len(requests))
        return [replies[index] for index in range(len(requests))]

    def room(self, max_new_tokens: int) -> tuple[int, str]:
        """The longest prompt in tokens that leaves room for the answer, and what sets that limit."""
        allowed = self.settings.max_prompt_tokens
        context = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        if context is not None and context - max_new_tokens < allowed:
            reason = f"the model's context of {context} less max_new_tokens={max_new_tokens}"
            return context - max_new_tokens, reason
        return allowed, f"max_prompt_tokens={allowed}"

    def num_prompt_tokens(self, request: Request) -> int:
        """Tokens of a request as the model reads it."""
        return len(encode_request(self.tokenizer, request).row)

    def _decode(
        self, asked: Mapping[int, Encoded], numbers: Mapping[int, Sequence[float]]
    ) -> Iterator[tuple[int, Reply]]:
        """Replies as they come; halves the batch size when memory runs out.

        numbers: to draw each answer's tokens by; {}: greedy.
        """
        # The longest first: what does not fit into memory fails at once, and rows of a batch are about even.
        waiting = sorted(asked, key=lambda index: len(asked[index].row), reverse=True)
        with inference(self.model):
            if self._in_slots is None:
                self._in_slots = decodes_in_slots(self.base)
            at_once = self._num_at_once(asked) if self._in_slots else self.settings.batch_size
            answers = self._answers_in_slots if self._in_slots else self._answers_in_batches
            while waiting:
                done: set[int] = set()
                try:
                    for index, tokens, logprobs in answers(waiting, asked, numbers, at_once):
                        done.add(index)
                        yield index, self._reply(asked[index], tokens, logprobs)
                except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                    if not _out_of_memory(error):
                        raise
                    message = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
                    waiting = [index for index in waiting if index not in done]
                    if at_once > 1:
                        at_once //= 2
                        log.warning("Out of memory; %d prompts at a time from here on.", at_once)
                    else:
                        yield waiting.pop(0), Reply(None, Finish.FAILED, error=f"out of memory: {message}")
                    _free_memory()
                else:
                    return

    def _num_at_once(self, asked: Mapping[int, Encoded]) -> int:
        """Slots in the memory that `batch_size` prompts of the longest length allowed would take.

        Where answers run to their limit, slots fall free together: no more than share the prompts evenly, or the last
        few would pass over the weights by themselves.
        """
        if not asked:
            return 1
        batch_size = self.settings.batch_size
        longest = max(len(one.row) + one.limit for one in asked.values())
        allowed = self.settings.max_prompt_tokens + max(one.limit for one in asked.values())
        most = min(batch_size * allowed // longest, MOST_SLOTS * batch_size)
        return math.ceil(len(asked) / math.ceil(len(asked) / most))

    def _answers_in_slots(
        self,
        waiting: Sequence[int],
        asked: Mapping[int, Encoded],
        numbers: Mapping[int, Sequence[float]],
        num_slots: int,
    ) -> Iterator[tuple[int, list[int], dict[str, float]]]:
        """(index, answer's tokens, log-probabilities of its choices), as they end."""
        logprobs: dict[int, dict[str, float]] = {}
        begun: set[int] = set()  # places whose answer has said something else than white space
        sampler = Sampler(self.settings) if numbers else None

        def choose(logits: Tensor, places: list[int], answered: list[int]) -> Tensor:
            wanted = [
                at for at, place in enumerate(places) if asked[waiting[place]].choices and place not in begun
            ]
            for at in wanted:
                logprobs[places[at]] = _choice_logprobs(logits[at], asked[waiting[places[at]]].choices)
            scores = self._corrected(logits, answered)
            if sampler is None:
                tokens = scores.argmax(-1)
            else:
                at_hand = zip(places, answered, strict=True)
                tokens = sampler(scores, [numbers[waiting[place]][position] for place, position in at_hand])
            begun.update(places[at] for at in wanted if not self._is_blank(int(tokens[at])))
            return tokens

        rows, limits = [asked[index].row for index in waiting], [asked[index].limit for index in waiting]
        for place, tokens in decode_in_slots(self.base, rows, limits, self.ends, num_slots, choose):
            yield waiting[place], tokens, logprobs[place] if place in begun else {}

    def _is_blank(self, token: int) -> bool:
        """Whether the token is white space: a judge's empty line before its verdict."""
        return not self.tokenizer.decode([token]).strip()

    def _corrected(self, logits: Tensor, answered: list[int]) -> Tensor:
        """Logits (n, V) with the token bias of each row's position taken out."""
        if self._correction is None or self.token_bias is None:
            return logits
        rows = [at for at, position in enumerate(answered) if position < len(self._correction)]
        if not rows:
            return logits
        correction = self._correction[[answered[at] for at in rows]]
        logits[rows] = take_out(logits[rows], correction, self.token_bias.settings.plausibility)
        return logits

    def _answers_in_batches(
        self,
        waiting: Sequence[int],
        asked: Mapping[int, Encoded],
        numbers: Mapping[int, Sequence[float]],
        batch_size: int,
    ) -> Iterator[tuple[int, list[int], dict[str, float]]]:
        """The same by the model's own `generate`, for what cannot be decoded in slots; one limit a batch."""
        for limit in sorted({asked[index].limit for index in waiting}):
            alike = [index for index in waiting if asked[index].limit == limit]
            with decoding_by(self.base, _config(self.tokenizer, self.ends, limit)):
                for start in range(0, len(alike), batch_size):
                    batch = alike[start : start + batch_size]
                    input_ids, attention_mask = left_pad(
                        [asked[index].row for index in batch], self.tokenizer.pad_token_id, self.base.device
                    )
                    width = input_ids.shape[1]
                    first = _FirstLogits(width, self._is_blank)
                    processors = LogitsProcessorList([first])
                    if self._correction is not None and self.token_bias is not None:
                        plausibility = self.token_bias.settings.plausibility
                        processors.append(TSDILogitsProcessor(self._correction, width, plausibility))
                    if numbers:
                        processors.append(
                            DrawnToken(Sampler(self.settings), width, [numbers[index] for index in batch])
                        )
                    # The class's own: a folder's custom_generate, loaded with trust_remote_code, would replace it.
                    output = type(self.base).generate(
                        self.base,
                        input_ids=input_ids,
                        attention_mask=attention_mask,
                        logits_processor=processors,
                    )
                    for at, (index, answer) in enumerate(zip(batch, output[:, width:].tolist(), strict=True)):
                        choices = asked[index].choices
                        begun = choices and not all(map(self._is_blank, answer))
                        yield index, answer, _choice_logprobs(first.logits[at], choices) if begun else {}

    def _reply(self, asked: Encoded, tokens: Sequence[int], logprobs: Mapping[str, float]) -> Reply:
        """Cut an answer at its first end token; what follows is padding."""
        length = next((at for at, token in enumerate(tokens) if token in self.ends), None)
        said = tokens if length is None else tokens[:length]
        text = self.tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answer, reasoning = split_reasoning(text, asked.prompt_end)
        finish = Finish.LENGTH if length is None else Finish.STOP
        return Reply(answer, finish, len(said), logprobs, reasoning)


class _FirstLogits(LogitsProcessor):
    """Keep the logits (n, V) of each answer's first position that is not white space.

    It comes before any other processor, which would change them.
    """

    def __init__(self, width: int, is_blank: Callable[[int], bool]) -> None:
        self.width, self.is_blank = width, is_blank
        self.logits = torch.empty(0)
        self.blank_rows: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self.width:
            self.logits = scores.clone()
            self.blank_rows = list(range(len(scores)))
        elif self.blank_rows:
            self.blank_rows = [row for row in self.blank_rows if self.is_blank(int(input_ids[row, -1]))]
            self.logits[self.blank_rows] = scores[self.blank_rows]
        return scores


def end_tokens(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Whatever ends an answer: the model may know more end tokens than its tokenizer, or fewer."""
    configured = base.generation_config.eos_token_id
    known = configured if isinstance(configured, list) else [configured]
    return {token for token in [*known, tokenizer.eos_token_id] if token is not None}


def _choice_logprobs(logits: Tensor, choices: Mapping[str, int]) -> dict[str, float]:
    """Log-probabilities in nats, given logits (V,) fp32."""
    values = logits.log_softmax(-1)[list(choices.values())].tolist()
    return dict(zip(choices, values, strict=True))


def _config(tokenizer: PreTrainedTokenizerBase, ends: set[int], max_new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,  # training switches it off in the model's config
        do_sample=False,  # `DrawnToken` leaves one token to choose
    )


def _out_of_memory(error: BaseException) -> bool:
    """CUDA has an error class of its own; the CPU allocator's is a RuntimeError like any other."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _adapters(model: Any) -> list[str]:
    """Names of the LoRA adapters that are switched on."""
    layers = [
        module
        for module in model.modules()
        if hasattr(module, "active_adapters") and hasattr(module, "lora_A")
    ]
    return sorted({name for layer in layers if not layer.disable_adapters for name in layer.active_adapters})


def _hash_of_weights(model: Any) -> str:
    state = model.state_dict()
    return _hash([state[name] for name in sorted(state)])


def _hash(tensors: Sequence[Tensor]) -> str:
    digest = xxh3_128()
    for tensor in tensors:
        digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
