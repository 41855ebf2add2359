"""An OpenAI-compatible server's bodies: a request in, its JSON out; its JSON in, a reply out. Pure.

The shapes are those of OpenAI's API reference for chat/completions and completions, with what vLLM, SGLang, llama.cpp
and `transformers serve` add: `chat_template_kwargs`, `reasoning` or `reasoning_content`, and context errors in their
own words.
"""

import re
from collections.abc import Mapping
from typing import Any

from equipoise.eval.generation.reasoning import split_reasoning
from equipoise.eval.generation.requests import Finish, Reply, Request
from equipoise.eval.generation.settings import GenerationSettings

_TOP_LEVEL = ("reasoning_effort", "add_generation_prompt", "continue_final_message")
"""Options of a chat template that servers take beside `messages`, not inside `chat_template_kwargs`."""

_CONTEXT_CODES = {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
_CONTEXT = re.compile(
    r"maximum context length|max(imum)? (model|sequence|input|prompt|total) (len|length|tokens)\b|max_model_len"
    r"|context (length|size|window)|(prompt|input)\b.{0,40}\b(too long|longer than|exceeds)"
    r"|`?inputs`? tokens \+ `?max_new_tokens",
    re.IGNORECASE | re.DOTALL,
)


class GarbledError(ValueError):
    """A body that is no completion."""


def request_body(
    request: Request, model: str, settings: GenerationSettings, top_logprobs: int
) -> dict[str, Any]:
    """What is posted: to chat/completions for messages, to completions for text."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": request.seed(settings.seed),
    }
    if request.messages is None:
        body["prompt"] = request.text
        if request.choices:
            body["logprobs"] = top_logprobs
        return body
    body["messages"] = [dict(message) for message in request.messages]
    for name, value in request.template_options.items():
        if name in _TOP_LEVEL:
            body[name] = value
        else:
            body.setdefault("chat_template_kwargs", {})[name] = value
    if request.choices:
        body |= {"logprobs": True, "top_logprobs": top_logprobs}
    return body


def reply_of(payload: Any, request: Request) -> Reply:
    """The reply in a body with status 200. Raises GarbledError where there is none."""
    try:
        choice = payload["choices"][0]
        reason = choice.get("finish_reason")
        if request.messages is None:
            text, reasoning = choice["text"], None
        else:
            message = choice["message"]
            text = _text(message.get("content"))
            if text is None:
                text = _text(message.get("refusal"))
            reasoning = message.get("reasoning_content") or message.get("reasoning") or None
        num_tokens = int((payload.get("usage") or {}).get("completion_tokens") or 0)
        logprobs = _choice_logprobs(choice.get("logprobs"), request)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise GarbledError(f"no completion in the answer ({type(error).__name__}: {error})") from error
    if not isinstance(text, str | None) or not isinstance(reasoning, str | None):
        raise GarbledError("no completion in the answer: its text is not text")
    if reason == "content_filter":
        return Reply(None, Finish.FAILED, num_tokens, error="the server's content filter withheld the answer")
    if text is not None and reasoning is None:
        text, reasoning = split_reasoning(text, request.text or "")
    # With reasoning, the first position is one of the thinking, not of the answer.
    finish = Finish.LENGTH if reason == "length" else Finish.STOP
    return Reply(text, finish, num_tokens, {} if reasoning else logprobs, reasoning)


def error_message(payload: Any) -> tuple[str, str]:
    """(message, code) of an error's body in any of the shapes in use; message "" where there is none."""
    if not isinstance(payload, Mapping):
        return "", ""
    error = payload.get("error", payload)
    if isinstance(error, Mapping):
        message = error.get("message") or error.get("detail") or error.get("msg") or ""
        return str(message), str(error.get("code") or error.get("type") or "")
    return str(error), ""


def is_context_error(message: str, code: str) -> bool:
    """Whether an error says that prompt and answer do not fit the model's context."""
    return code in _CONTEXT_CODES or _CONTEXT.search(message) is not None


def _text(content: Any) -> str | None:
    """Content as text: a list of parts is put together."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return content


def _choice_logprobs(logprobs: Any, request: Request) -> dict[str, float]:
    """`Request.choices` among the most probable tokens of the first position that is not white space.

    A choice that is not among them is absent; so are all where nothing but white space was said.
    """
    if not request.choices or not logprobs:
        return {}
    if request.messages is None:
        positions = logprobs.get("top_logprobs") or []
        tokens = logprobs.get("tokens") or ["?"] * len(positions)
    else:
        content = logprobs.get("content") or []
        positions = [
            {entry["token"]: entry["logprob"] for entry in reversed(position.get("top_logprobs") or [])}
            for position in content
        ]
        tokens = [position.get("token", "?") for position in content]
    said = (top for token, top in zip(tokens, positions, strict=True) if token.strip())
    nothing: Mapping[str, float] = {}
    first = next(said, nothing) or nothing
    found = {}
    for choice in request.choices:
        logprob = first_token_logprob(choice, first)
        if logprob is not None:
            found[choice] = logprob
    return found


def first_token_logprob(choice: str, first: Mapping[str, float]) -> float | None:
    """Log-probability of the token that `choice` begins with, given the most probable tokens as text.

    Which token that is only the tokenizer knows: the whole text if it is among them, else the longest of at least two
    characters that it begins with (`un` of `unsafe`). Spaces before a token, in any tokenizer's writing, do not count.
    """
    by_text: dict[str, float] = {}
    for token, logprob in first.items():
        bare = token.lstrip(" \u2581\u0120")
        by_text[bare] = max(logprob, by_text.get(bare, -float("inf")))
    if choice in by_text:
        return float(by_text[choice])
    beginnings = [token for token in by_text if len(token) > 1 and choice.startswith(token)]
    return float(by_text[max(beginnings, key=len)]) if beginnings else None
