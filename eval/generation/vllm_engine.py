"""The engine for vLLM in this process (`vllm.LLM`), with TSDI through `vllm_processor.py`.

Written against vLLM's sources (vllm/entrypoints/llm.py and offline_utils.py, sampling_params.py, outputs.py: the
releases that `vllm_processor.py` names) and tested on a double of its interface; not run with vLLM itself.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise.eval.generation.encoding import Encoded, RefusedError, encode_request
from equipoise.eval.generation.reasoning import split_reasoning
from equipoise.eval.generation.requests import EngineError, Finish, Progress, Reply, Request
from equipoise.eval.generation.settings import GenerationSettings

log = logging.getLogger(__name__)

NUM_LOGPROBS = 20
"""vLLM's own upper limit, unless `max_logprobs` of the options raises it."""


class VLLMEngine:
    """Complete requests with vLLM, all of them in one call: it batches for itself.

    Prompts are encoded here as `TransformersEngine` encodes them, so that both ask a model the same. Sampling
    parameters are given whole, so that a model's own generation defaults do not count. Log-probabilities of choices
    are the model's own (vLLM's `raw_logprobs`), without TSDI; choices not among the 20 most probable tokens are absent.
    Every request has a seed of its own, so that sampling is repeatable as far as vLLM's batching allows.
    """

    def __init__(
        self,
        model: str,
        settings: GenerationSettings,
        options: Mapping[str, Any] | None = None,
        token_bias: str | Path | None = None,
    ) -> None:
        """Load `model`, a hub id or folder.

        options: further arguments of `vllm.LLM` (tensor_parallel_size, revision, dtype, gpu_memory_utilization ...).
        token_bias: a token-bias file, taken out by TSDI; None: nothing is, even if the model's folder has one.

        Raises EngineError where vLLM is not installed.
        """
        try:
            import vllm
        except ImportError as error:
            raise EngineError(
                f"engine=vllm needs the extra vllm ({error}): pip install 'equipoise[vllm]', or, in an environment "
                "whose torch is vLLM's own, pip install vllm and then pip install --no-deps equipoise. Or serve the "
                "model with `vllm serve` and ask it with engine=server."
            ) from error
        self.model, self.settings, self.options = model, settings, dict(options or {})
        self.token_bias = None if token_bias is None else Path(token_bias)
        self._version = vllm.__version__
        self._sampling_params = vllm.SamplingParams
        self._llm = vllm.LLM(model=model, seed=settings.seed, **_with_tsdi(self.options, self.token_bias))
        self._tokenizer = self._llm.get_tokenizer()

    @property
    def description(self) -> Mapping[str, Any]:
        """Model, vLLM's version and options, sampling, TSDI."""
        return {
            "engine": "vllm",
            "vllm": self._version,
            "model": self.model,
            "options": self.options,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "seed": self.settings.seed,
            "max_prompt_tokens": self.settings.max_prompt_tokens,
            "tsdi": None if self.token_bias is None else str(self.token_bias),
        }

    def complete(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        """Complete every request; what the chat template refuses is FAILED, what does not fit OVERLONG.

        Raises EngineError: messages, and the tokenizer has no chat template.
        """
        replies: dict[int, Reply] = {}
        asked: dict[int, Encoded] = {}
        context = int(self._llm.llm_engine.model_config.max_model_len)
        for index, request in enumerate(requests):
            try:
                encoded = encode_request(self._tokenizer, request)
            except RefusedError as error:
                replies[index] = Reply(None, Finish.FAILED, error=str(error))
                continue
            room = min(self.settings.max_prompt_tokens, context - request.max_new_tokens)
            if len(encoded.row) > room:
                message = f"the prompt has {len(encoded.row)} tokens, {room} fit (context {context})"
                replies[index] = Reply(None, Finish.OVERLONG, error=message)
            else:
                asked[index] = encoded
        if asked:
            outputs = self._llm.generate(
                [{"prompt_token_ids": encoded.row} for encoded in asked.values()],
                [self._params(requests[index], encoded) for index, encoded in asked.items()],
                use_tqdm=False,
            )
            for index, output in zip(asked, outputs, strict=True):
                replies[index] = self._reply(output.outputs[0], asked[index])
        if progress is not None and requests:
            progress(len(requests), len(requests), "answers")
        num_failed = sum(reply.finish == Finish.FAILED for reply in replies.values())
        if num_failed:
            log.warning("%d of %d requests failed.", num_failed, len(requests))
        return [replies[index] for index in range(len(requests))]

    def _params(self, request: Request, encoded: Encoded) -> Any:
        return self._sampling_params(
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            seed=request.seed(self.settings.seed),
            max_tokens=encoded.limit,
            logprobs=NUM_LOGPROBS if encoded.choices else None,
        )

    def _reply(self, output: Any, asked: Encoded) -> Reply:
        """From vLLM's CompletionOutput."""
        if output.finish_reason not in ("stop", "length"):
            return Reply(None, Finish.FAILED, error=f"vLLM ended it with {output.finish_reason!r}")
        ended = output.finish_reason == "stop"
        answer, reasoning = split_reasoning(output.text, asked.prompt_end)
        positions = zip(output.token_ids, output.logprobs or [], strict=False)
        first: Mapping[int, Any] = next(
            (top for token, top in positions if self._tokenizer.decode([token]).strip()), {}
        )
        logprobs = {
            choice: float(first[token].logprob) for choice, token in asked.choices.items() if token in first
        }
        # Its end token is among token_ids, and not in the text.
        num_tokens = len(output.token_ids) - ended
        return Reply(answer, Finish.STOP if ended else Finish.LENGTH, num_tokens, logprobs, reasoning)


def _with_tsdi(options: Mapping[str, Any], token_bias: Path | None) -> dict[str, Any]:
    """Options with the logits processor for the model runner that this vLLM has, and the file that it reads."""
    if token_bias is None:
        return dict(options)
    if not token_bias.is_file():
        raise EngineError(f"There is no token bias at {token_bias}.")
    from equipoise.eval.generation import vllm_processor

    newest = (
        vllm_processor.V2LogitsProcessor is not object and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") != "0"
    )
    name = "TSDIProcessorV2" if newest else "TSDIProcessor"
    return {
        "logits_processors": [f"{vllm_processor.__name__}:{name}"],  # options may name the other class
        **options,
        "additional_config": {**options.get("additional_config", {}), "token_bias": str(token_bias)},
    }
