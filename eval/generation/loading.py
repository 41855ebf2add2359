"""From a configuration to an engine; a model in this process is loaded when something first has to be computed.

What determines an engine's replies is known before that, so that an evaluation that is all in the cache loads nothing.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from equipoise.data.errors import EquipoiseError
from equipoise.data.schema import Exchange
from equipoise.eval.config import EngineConfig, ModelChoice
from equipoise.eval.fingerprint import file_fingerprint, model_fingerprint
from equipoise.eval.generation.requests import Engine, EngineError, Progress, Reply, Request
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.models import Notify, load_model, load_tokenizer, native_dtype, resolve_model


class LazyEngine:
    """An engine that is made when it is first asked for something."""

    def __init__(self, description: Mapping[str, Any], make: Callable[[], Engine]) -> None:
        self.description = description
        self._make = make

    @cached_property
    def _engine(self) -> Engine:
        return self._make()

    def complete(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        """As the engine itself; no requests make no engine."""
        return self._engine.complete(requests, progress) if requests else []


class LocalModel:
    """A model that is computed in this process: on the rank's accelerator where there is one, else on the CPU.

    token_bias: file or folder of what TSDI takes out. chat: False where all requests are finished text, and the
    tokenizer needs no chat template. Raises `ModelError` at once where there is no such model.
    """

    def __init__(
        self,
        choice: ModelChoice,
        token_bias: str | None = None,
        notify: Notify | None = None,
        chat: bool = True,
    ) -> None:
        self._choice = choice
        self._notify = notify
        self._chat = chat
        self._resolved = resolve_model(choice.id, choice.revision, notify=notify)
        self._dtype = native_dtype() if choice.dtype == "native" else choice.dtype
        self._token_bias_file = None if token_bias is None else token_bias_file(token_bias)

    @cached_property
    def description(self) -> Mapping[str, Any]:
        """What determines its computations, whatever it is called."""
        bias = self._token_bias_file
        return {
            "weights": model_fingerprint(self._resolved, self._choice.revision),
            "dtype": self._dtype,
            "attn_implementation": self._choice.attn_implementation,
            "device": default_device().split(":")[0],
            "tsdi": None if bias is None else file_fingerprint(bias),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        """Model and tokenizer."""
        model, tokenizer = load_model(
            self._resolved,
            dtype=self._dtype,  # type: ignore[arg-type]
            revision=self._choice.revision,
            trust_remote_code=self._choice.trust_remote_code,
            attn_implementation=self._choice.attn_implementation,
            notify=self._notify,
            chat=self._chat,
        )
        return model.to(default_device()), tokenizer

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The control tokens of its tokenizer; loads nothing else."""
        options: dict[str, Any] = {"trust_remote_code": self._choice.trust_remote_code}
        if not Path(self._resolved).is_dir():
            options["revision"] = self._choice.revision
        return tuple(load_tokenizer(self._resolved, chat=False, **options).all_special_tokens)

    @cached_property
    def token_bias(self) -> Any:
        """What TSDI takes out when decoding; None without."""
        from equipoise.eval.generation.tsdi import TokenBias

        return None if self._token_bias_file is None else TokenBias.load(self._token_bias_file)

    def engine(self, settings: GenerationSettings) -> LazyEngine:
        """An engine that decodes with these settings; all engines of one model share it."""

        def make() -> Engine:
            from equipoise.eval.generation.transformers_engine import TransformersEngine

            return TransformersEngine(*self.loaded, settings, self.token_bias)

        return LazyEngine({"engine": "transformers", **self.description, "settings": asdict(settings)}, make)

    def scorer(self, batch_size: int, max_length: int) -> "LocalScorer":
        """What scores reference answers with this model."""
        return LocalScorer(self, batch_size, max_length)


class LocalScorer:
    """A `ReferenceScorer` with a model in this process."""

    def __init__(self, model: LocalModel, batch_size: int, max_length: int) -> None:
        self._model = model
        self._batch_size = batch_size
        self._max_length = max_length

    @property
    def description(self) -> Mapping[str, Any]:
        """The model's, and how long an exchange may be."""
        return {**self._model.description, "max_length": self._max_length}

    def score(self, exchanges: Sequence[Exchange], progress: Progress | None = None) -> list[float | None]:
        """As `helpfulness.log_likelihoods`."""
        from equipoise.eval.suites.helpfulness import log_likelihoods

        model, tokenizer = self._model.loaded
        bias = self._model.token_bias
        return log_likelihoods(
            model,
            tokenizer,
            exchanges,
            self._batch_size,
            self._max_length,
            token_bias=bias,
            progress=progress,
        )


def remote_engine(
    config: EngineConfig, choice: ModelChoice, settings: GenerationSettings, token_bias: str | None = None
) -> Engine:
    """An engine that has its model to itself: a server, or vLLM, which loads it when it is first asked.

    Raises EquipoiseError where it cannot work as it is configured.
    """
    if config.name == "server":
        from equipoise.eval.generation.server_engine import ServerEngine, ServerSettings

        assert config.url is not None, "checked with the configuration"
        server = ServerSettings(
            config.url, config.key_env, config.concurrency, config.timeout, config.deadline
        )
        return ServerEngine(choice.id, server, settings)
    try:
        vllm = version("vllm")
    except PackageNotFoundError as error:
        raise EngineError(
            "engine=vllm: vLLM is not installed; pip install vllm, or serve the model and use engine=server."
        ) from error
    resolved = resolve_model(choice.id, choice.revision)
    bias = None if token_bias is None else token_bias_file(token_bias)
    options = {
        "dtype": "bfloat16" if choice.dtype == "native" else choice.dtype,
        "trust_remote_code": choice.trust_remote_code,
        **({} if choice.revision is None else {"revision": choice.revision}),
        **config.options,
    }
    description = {
        "engine": "vllm",
        "vllm": vllm,
        "weights": model_fingerprint(resolved, choice.revision),
        "options": options,
        "tsdi": None if bias is None else file_fingerprint(bias),
        "settings": asdict(settings),
    }

    def make() -> Engine:
        from equipoise.eval.generation.vllm_engine import VLLMEngine

        return VLLMEngine(resolved, settings, options, bias)

    return LazyEngine(description, make)


def judge_engine(
    config: EngineConfig, choice: ModelChoice, settings: GenerationSettings
) -> tuple[Engine, tuple[str, ...]]:
    """The engine of a judge, and the control tokens of its tokenizer where that is at hand."""
    if config.name != "transformers":
        return remote_engine(config, choice, settings), ()
    model = LocalModel(choice, chat=False)
    return model.engine(settings), model.special_tokens


def token_bias_file(path: str) -> Path:
    """The token bias at `path`, a file or a folder that holds one; raises EquipoiseError where there is none."""
    from equipoise.eval.generation.tsdi_decoding import TOKEN_BIAS_FILE

    place = Path(path).expanduser()
    file = place / TOKEN_BIAS_FILE if place.is_dir() else place
    if not file.is_file():
        raise EquipoiseError(
            f"tsdi={path}: there is no {TOKEN_BIAS_FILE}; expected the file that the stage token_bias writes, or its "
            "folder."
        )
    return file


def default_device() -> str:
    """The accelerator of this rank where there is one, else the CPU."""
    import torch

    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
