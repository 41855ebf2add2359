"""The engine for any OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve`, a vendor's."""

import asyncio
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity import wait_random_exponential as exponential_with_jitter

from equipoise.eval.generation.requests import EngineError, Finish, Progress, Reply, Request
from equipoise.eval.generation.server_replies import (
    GarbledError,
    error_message,
    is_context_error,
    reply_of,
    request_body,
)
from equipoise.eval.generation.settings import GenerationSettings

log = logging.getLogger(__name__)

Sleep = Callable[[float], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Where the server is, and how patient we are with it."""

    url: str
    """Its base, as in http://localhost:8000/v1."""
    key_env: str | None = None
    """The environment variable that holds the API key; None: no key is sent."""
    concurrency: int = 32
    """Requests under way at once."""
    timeout: float = 120.0
    """Seconds for one attempt, from sending to the last byte."""
    deadline: float | None = None
    """Seconds for one `complete`; what is not finished by then has failed. None: no limit."""
    max_attempts: int = 6
    """Of one request, where the server is busy, broken or silent."""
    max_wait: float = 60.0
    """Longest wait in seconds between two attempts, unless the server names a longer one (Retry-After)."""
    top_logprobs: int = 20
    """How many first tokens are asked for where a request has choices. OpenAI and vLLM give 20 at most."""

    def __post_init__(self) -> None:
        parsed = httpx.URL(self.url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"url is {self.url!r}; expected as in http://localhost:8000/v1.")
        if parsed.userinfo:
            raise ValueError(
                f"url holds a password for {parsed.host}; put the key into an environment variable (key_env)."
            )
        for name in ("concurrency", "timeout", "max_attempts", "max_wait", "top_logprobs"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected above 0.")
        if self.deadline is not None and self.deadline <= 0:
            raise ValueError(f"deadline is {self.deadline}; expected above 0, or none.")


class _TryAgainError(Exception):
    """An attempt that may succeed later."""

    def __init__(self, message: str, retry_after: float | None = None, unreachable: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.unreachable = retry_after, unreachable


@dataclass(slots=True)
class _Run:
    """One `complete` under way."""

    client: httpx.AsyncClient
    requests: Sequence[Request]
    progress: Progress | None
    replies: dict[int, Reply] = field(default_factory=dict)


class ServerEngine:
    """Complete requests through chat/completions (messages) and completions (text).

    Tried again with exponential back-off and jitter: 429 (after Retry-After if the server names one), 408, 5xx,
    time-outs, broken connections, answers that are no completion. Other errors of the client are FAILED at once,
    with the server's message; a context that is too small is OVERLONG. Replies' log-probabilities are those the
    server gives, whatever it calls them (vLLM: the model's own, before sampling); choices not among its most
    probable first tokens are absent. `Reply.num_tokens` is what the server counted, thinking and end token included.

    Every request is sent with its own seed; whether a server keeps to it, and whether batching changes greedy answers,
    is up to the server. `GenerationSettings.max_prompt_tokens` and `batch_size` are not used: the server has its own.
    """

    def __init__(
        self,
        model: str,
        server: ServerSettings,
        settings: GenerationSettings,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`transport` and `sleep` are for tests. Raises EngineError where the key's variable is not set."""
        self.model, self.server, self.settings = model, server, settings
        self._transport, self._sleep = transport, sleep
        self._key = os.environ.get(server.key_env, "").strip() if server.key_env else ""
        if server.key_env and not self._key:
            raise EngineError(
                f"The environment variable {server.key_env} is not set: export the server's API key."
            )
        self._answered = False
        self._limit_name = "max_tokens"
        self.served: dict[str, set[str]] = {"model": set(), "system_fingerprint": set()}
        """What the server said that it is, over all replies: provenance. Not part of `description`, which has to be
        known before the first reply."""

    @property
    def description(self) -> Mapping[str, Any]:
        """Server, model and sampling; never the key."""
        return {
            "engine": "server",
            "url": str(httpx.URL(self.server.url)),
            "model": self.model,
            "temperature": self.settings.temperature,
            "top_p": self.settings.top_p,
            "seed": self.settings.seed,
            "top_logprobs": self.server.top_logprobs,
        }

    def complete(self, requests: Sequence[Request], progress: Progress | None = None) -> list[Reply]:
        """Complete every request; works inside a running event loop too (in a thread of its own).

        Raises:
            EngineError: before anything was answered, the server refuses the key (401, 403), does not know the model or
                the address (404), or cannot be reached in all attempts.
        """
        if not requests:
            return []
        work = self._complete(requests, progress)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(work)
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_run, work).result()

    async def _complete(self, requests: Sequence[Request], progress: Progress | None) -> list[Reply]:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(
            max_connections=self.server.concurrency, max_keepalive_connections=self.server.concurrency
        )
        async with httpx.AsyncClient(
            base_url=self.server.url, headers=headers, timeout=None, limits=limits, transport=self._transport
        ) as client:
            run = _Run(client, requests, progress)
            waiting = iter(range(len(requests)))
            workers = [
                asyncio.create_task(self._work(run, waiting))
                for _ in range(min(self.server.concurrency, len(requests)))
            ]
            try:
                done, _ = await asyncio.wait(
                    workers, timeout=self.server.deadline, return_when=asyncio.FIRST_EXCEPTION
                )
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
            for worker in done:
                if not worker.cancelled() and (error := worker.exception()) is not None:
                    raise error
        late = Reply(None, Finish.FAILED, error=f"not finished by the deadline of {self.server.deadline} s")
        replies = [run.replies.get(index, late) for index in range(len(requests))]
        num_failed = sum(reply.finish == Finish.FAILED for reply in replies)
        if num_failed:
            log.warning("%d of %d requests to %s failed.", num_failed, len(requests), self.server.url)
        return replies

    async def _work(self, run: _Run, waiting: Iterator[int]) -> None:
        for index in waiting:
            run.replies[index] = await self._persistently(run.client, run.requests[index])
            if run.progress is not None:
                run.progress(len(run.replies), len(run.requests), "answers")

    async def _persistently(self, client: httpx.AsyncClient, request: Request) -> Reply:
        """One request with its further attempts."""
        retrying = AsyncRetrying(
            sleep=self._sleep,
            stop=stop_after_attempt(self.server.max_attempts),
            wait=self._wait,
            retry=retry_if_exception_type(_TryAgainError),
            reraise=True,
        )
        try:
            return await retrying(self._attempt, client, request)
        except _TryAgainError as error:
            if error.unreachable and not self._answered:
                raise EngineError(
                    f"No server answers at {self.server.url} ({error}, {self.server.max_attempts} attempts). Is it "
                    "running, and is the address right?"
                ) from None
            return Reply(None, Finish.FAILED, error=f"{error} ({self.server.max_attempts} attempts)")

    def _wait(self, state: RetryCallState) -> float:
        """Seconds until the next attempt: back-off with jitter, or what the server asked for if that is longer."""
        wait = exponential_with_jitter(multiplier=1, max=self.server.max_wait)(state)
        error = state.outcome.exception() if state.outcome is not None else None
        asked = error.retry_after if isinstance(error, _TryAgainError) else None
        return wait if asked is None else max(asked, wait)

    async def _attempt(self, client: httpx.AsyncClient, request: Request) -> Reply:
        body = request_body(request, self.model, self.settings, self.server.top_logprobs)
        limit_name = self._limit_name
        body[limit_name] = body.pop("max_tokens")
        path = "completions" if request.messages is None else "chat/completions"
        try:
            # httpx's own time-outs are between two bytes: a server that drips would never run into them.
            async with asyncio.timeout(self.server.timeout):
                response = await client.post(path, json=body)
        except TimeoutError:
            raise _TryAgainError(f"no answer within {self.server.timeout:g} s") from None
        except httpx.TransportError as error:
            unreachable = isinstance(error, httpx.ConnectError)
            raise _TryAgainError(
                self._said(f"{type(error).__name__}: {error}"), unreachable=unreachable
            ) from None
        payload = _json(response)
        if response.status_code == 200:
            try:
                reply = reply_of(payload, request)
            except GarbledError as error:
                raise _TryAgainError(self._said(str(error))) from None
            self._note(payload)
            return reply
        message, code = error_message(payload)
        said = self._said(f"{response.status_code}: {message or response.text or response.reason_phrase}")
        if response.status_code in (408, 429) or response.status_code >= 500:
            raise _TryAgainError(said, _retry_after(response))
        if is_context_error(message, code):
            return Reply(None, Finish.OVERLONG, error=said)
        if response.status_code == 400 and "max_completion_tokens" in message and limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"  # OpenAI's newer models know no other name
            raise _TryAgainError(said)
        if response.status_code in (401, 403, 404) and not self._answered:
            raise EngineError(await self._refused(client, response.status_code, said))
        return Reply(None, Finish.FAILED, error=said)

    async def _refused(self, client: httpx.AsyncClient, status: int, said: str) -> str:
        """What to do about a 401, 403 or 404."""
        if status != 404:
            how = (
                f"in {self.server.key_env}"
                if self.server.key_env
                else "; name its environment variable (key_env)"
            )
            return f"{self.server.url} refuses the API key {how} ({said})."
        try:
            response = await client.get("models", timeout=min(self.server.timeout, 10))
            served = [str(entry["id"]) for entry in _json(response)["data"]]
        except (httpx.HTTPError, KeyError, TypeError):
            return f"{self.server.url} has no such address ({said}). Most servers' addresses end in /v1."
        return (
            f"{self.server.url} does not know the model {self.model!r} ({said}). It serves: "
            f"{', '.join(served[:20]) or 'none'}."
        )

    def _note(self, payload: Mapping[str, Any]) -> None:
        self._answered = True
        for name, seen in self.served.items():
            value = payload.get(name)
            if isinstance(value, str) and value not in seen:
                if seen:
                    log.warning(
                        "The server's %s changed from %s to %s.", name, ", ".join(sorted(seen)), value
                    )
                seen.add(value)

    def _said(self, message: str) -> str:
        """A message of the server on one line, cut short and without the key."""
        flat = " ".join(message.split())
        if self._key:
            flat = flat.replace(self._key, "***")
        return flat if len(flat) <= 300 else f"{flat[:300]} ..."


def _run(work: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    return asyncio.run(work)


def _json(response: httpx.Response) -> Any:
    """The body; None where it is no JSON."""
    try:
        return response.json()
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        return None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds, from a number or a date (RFC 9110, 10.2.3); None where the header is missing or unreadable."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdigit():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - time.time()) if date >= datetime.fromtimestamp(0, UTC) else None
