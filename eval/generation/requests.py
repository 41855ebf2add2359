"""What is asked of a model and what comes back, whoever serves it: transformers, vLLM or a server.

Answers of the model under test and verdicts of a judge travel in the same two records.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Protocol

from equipoise.data.errors import EquipoiseError

Progress = Callable[[int, int, str], None]
"""Called as `progress(done, total, what)`."""

Message = Mapping[str, Any]
"""`{"role": ..., "content": text}`; content is a list of `{"type": "text", "text": ...}` where a template wants one."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to make: a conversation, which the engine puts through the chat template, or finished text."""

    messages: tuple[Message, ...] | None = None
    text: str | None = None
    """In place of `messages`: the prompt as the model reads it, its beginning-of-text token left out."""
    template_options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template (`guardian_config`, `reasoning_effort` ...)."""
    max_new_tokens: int = 64
    choices: tuple[str, ...] = ()
    """Texts whose first token's log-probability is wanted (`safe`, `unsafe`), at the answer's first position that is
    not white space: Llama Guard 3 and 4 write an empty line before their verdict."""
    sample: int = 0
    """Which of several answers to the same prompt, where answers are sampled: each has a seed of its own."""

    def __post_init__(self) -> None:
        if (self.messages is None) == (self.text is None):
            raise ValueError("a request has either messages or text")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")

    def seed(self, seed: int) -> int:
        """The request's own seed, given that of the settings: 31 bits, which every server takes.

        It follows from prompt and `sample` alone, so that a sampled reply depends neither on what else is asked nor on
        how many ranks share the requests.
        """
        messages = None if self.messages is None else [dict(message) for message in self.messages]
        content = json.dumps(
            [seed, self.sample, messages, self.text, dict(self.template_options)], sort_keys=True
        )
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:4]) >> 1


def numbered(requests: Iterable[Request]) -> list[Request]:
    """The requests, equal ones told apart by their `sample`: 0, 1, 2 ..."""
    num_seen: Counter[str] = Counter()
    told_apart = []
    for request in requests:
        key = repr((request.messages, request.text, request.template_options))
        told_apart.append(replace(request, sample=num_seen[key]))
        num_seen[key] += 1
    return told_apart


class EngineError(EquipoiseError):
    """An engine that cannot work as it was asked to: no such model, no access, no chat template."""


class Finish(StrEnum):
    """How a completion ended."""

    STOP = "stop"
    """The model ended it."""
    LENGTH = "length"
    """Cut off at `max_new_tokens`."""
    OVERLONG = "overlong"
    """Not made: the prompt does not fit."""
    FAILED = "failed"
    """Not made: the engine tried and could not; `error` says why."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request."""

    text: str | None
    """Without special tokens; None where nothing came (a server's null content included)."""
    finish: Finish
    num_tokens: int = 0
    """Of the answer, its end token not counted."""
    choice_logprobs: Mapping[str, float] = field(default_factory=dict)
    """`Request.choices` -> log-probability (nats) of their first token, at the first position of the answer that is not
    white space; absent where the engine does not know it."""
    reasoning: str | None = None
    """What the model thought before it answered, where the engine tells the two apart; never part of `text`."""
    error: str = ""


class Engine(Protocol):
    """Anything that completes requests; replies come in their order, one for each.

    A request that cannot be completed is a `Reply` with FAILED or OVERLONG; an engine that cannot work at all raises
    an EquipoiseError.
    """

    @property
    def description(self) -> Mapping[str, Any]:
        """Whatever determines its replies besides the request: engine, model, revision, dtype, sampling, seed, TSDI."""
        ...

    def complete(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        """Complete every request."""
        ...
