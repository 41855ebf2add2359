import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from equipoise.eval.generation.requests import EngineError, Finish, Reply, Request
from equipoise.eval.generation.server_engine import ServerEngine, ServerSettings
from equipoise.eval.generation.settings import GenerationSettings

KEY = "sk-very-secret"


def asked(*texts: str) -> list[Request]:
    return [Request(messages=({"role": "user", "content": text},), max_new_tokens=4) for text in texts]


def completion(text: str | None, **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "choices": [{"message": message, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 1},
        **more,
    }


class Waits:
    """In place of asyncio.sleep: notes what it was asked for and lets others run."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        await asyncio.sleep(0)


def engine_of(
    handler: Callable[[httpx.Request], Any], waits: Waits | None = None, **server: Any
) -> ServerEngine:
    settings = ServerSettings(**{"url": "http://server.test/v1", **server})
    transport = httpx.MockTransport(handler)
    return ServerEngine("m", settings, GenerationSettings(seed=3), transport, waits or Waits())


def in_turn(*responses: httpx.Response) -> Callable[[httpx.Request], httpx.Response]:
    left = iter(responses)
    return lambda _: next(left)


def echo(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json=completion(json.loads(request.content)["messages"][0]["content"]))


def test_replies_come_in_the_order_of_the_requests_however_they_arrive() -> None:
    async def later_the_earlier(request: httpx.Request) -> httpx.Response:
        number = int(json.loads(request.content)["messages"][0]["content"])
        for _ in range(50 - number):
            await asyncio.sleep(0)
        return echo(request)

    seen: list[int] = []
    replies = engine_of(later_the_earlier, concurrency=8).complete(
        asked(*map(str, range(40))), lambda done, total, _: seen.append(done)
    )
    assert [reply.text for reply in replies] == [str(number) for number in range(40)]
    assert seen == list(range(1, 41))


def test_no_more_requests_are_under_way_than_allowed() -> None:
    under_way, most = 0, 0

    async def count(request: httpx.Request) -> httpx.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.002)
        under_way -= 1
        return echo(request)

    engine_of(count, concurrency=3).complete(asked(*"abcdefghij"))
    assert most == 3


def test_it_works_inside_a_running_event_loop() -> None:
    async def notebook() -> list[Reply]:
        return engine_of(echo).complete(asked("a", "b"))

    assert [reply.text for reply in asyncio.run(notebook())] == ["a", "b"]
    assert engine_of(echo).complete([]) == []


def test_messages_and_text_go_to_their_own_addresses() -> None:
    paths: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        body = json.loads(request.content)
        assert body["model"] == "m"
        assert body["seed"] in [request.seed(3) for request in (*asked("a"), Request(text="x"))]
        return echo(request) if "messages" in body else httpx.Response(200, json={"choices": [{"text": "t"}]})

    replies = engine_of(note, concurrency=1).complete([*asked("a"), Request(text="x")])
    assert ([reply.text for reply in replies], paths) == (
        ["a", "t"],
        ["/v1/chat/completions", "/v1/completions"],
    )


def test_retry_after_is_honoured_in_seconds_and_as_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
    waits = Waits()
    handler = in_turn(
        httpx.Response(429, headers={"retry-after": "7"}),
        httpx.Response(429, headers={"retry-after": date}),
        httpx.Response(200, json=completion("a")),
    )
    (reply,) = engine_of(handler, waits, max_wait=0.5).complete(asked("a"))
    assert reply.text == "a"
    assert waits.seconds[0] == 7
    assert 80 < waits.seconds[1] <= 90


def test_broken_and_garbled_answers_are_asked_for_again_with_growing_waits() -> None:
    waits = Waits()
    handler = in_turn(
        httpx.Response(500),
        httpx.Response(503, json={"error": "loading"}),
        httpx.Response(200, content=b'{"choices": [{"mess'),
        httpx.Response(200, json={"object": "nothing"}),
        httpx.Response(200, json=completion(None)),
    )
    (reply,) = engine_of(handler, waits).complete(asked("a"))
    assert (reply.text, reply.finish) == (None, Finish.STOP)
    assert len(waits.seconds) == 4
    assert all(0 <= wait <= 2**turn for turn, wait in enumerate(waits.seconds))
    assert len(set(waits.seconds)) == 4  # jitter


def test_what_stays_garbled_has_failed() -> None:
    (reply,) = engine_of(lambda _: httpx.Response(200, content=b"<html>"), max_attempts=3).complete(
        asked("a")
    )
    assert reply.finish == Finish.FAILED
    assert "no completion" in reply.error
    assert "3 attempts" in reply.error


def test_an_error_of_the_client_fails_at_once_with_the_servers_message() -> None:
    waits = Waits()
    handler = in_turn(httpx.Response(400, json={"error": {"message": "no role 'bot'"}}))
    (reply,) = engine_of(handler, waits).complete(asked("a"))
    assert (reply.text, reply.finish, reply.error) == (None, Finish.FAILED, "400: no role 'bot'")
    assert waits.seconds == []


def test_a_prompt_that_does_not_fit_is_overlong() -> None:
    message = "This model's maximum context length is 16 tokens. However, you requested 99 tokens"
    (reply,) = engine_of(in_turn(httpx.Response(400, json={"message": message}))).complete(asked("a"))
    assert reply.finish == Finish.OVERLONG


def test_a_server_that_knows_the_limit_by_its_new_name_is_asked_by_it() -> None:
    bodies: list[dict[str, Any]] = []

    def strict(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        if "max_tokens" in bodies[-1]:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return httpx.Response(400, json={"error": {"message": message}})
        return echo(request)

    assert [reply.text for reply in engine_of(strict, concurrency=1).complete(asked("a", "b"))] == ["a", "b"]
    assert [body.get("max_completion_tokens") for body in bodies] == [None, 4, 4]


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_is_said_without_telling_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)

    def refuse(request: httpx.Request) -> httpx.Response:
        assert request.headers["authorization"] == f"Bearer {KEY}"
        return httpx.Response(status, json={"error": {"message": f"Incorrect API key provided: {KEY}"}})

    engine = engine_of(refuse, key_env="MY_KEY")
    with pytest.raises(EngineError, match="refuses the API key in MY_KEY") as caught:
        engine.complete(asked("a", "b"))
    assert KEY not in f"{caught.value} {caplog.text} {engine.description} {engine.server}"


def test_a_key_that_is_not_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(EngineError, match="MY_KEY is not set"):
        engine_of(echo, key_env="MY_KEY")


def test_a_wrong_model_names_those_that_are_served() -> None:
    def know_others(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "guard"}, {"id": "chat"}]})
        return httpx.Response(404, json={"message": "The model `m` does not exist."})

    with pytest.raises(EngineError, match=r"does not know the model 'm' .*It serves: guard, chat\."):
        engine_of(know_others).complete(asked("a"))
    with pytest.raises(EngineError, match="addresses end in /v1"):
        engine_of(lambda _: httpx.Response(404)).complete(asked("a"))


def test_refusals_after_the_first_answer_concern_one_request_only() -> None:
    handler = in_turn(
        httpx.Response(200, json=completion("a")), httpx.Response(403, json={"error": "blocked"})
    )
    replies = engine_of(handler, concurrency=1).complete(asked("a", "b"))
    assert [reply.finish for reply in replies] == [Finish.STOP, Finish.FAILED]


def test_what_is_not_finished_by_the_deadline_has_failed(caplog: pytest.LogCaptureFixture) -> None:
    async def hang_on_b(request: httpx.Request) -> httpx.Response:
        if b'"b"' in request.content:
            await asyncio.Event().wait()
        return echo(request)

    started = time.perf_counter()
    replies = engine_of(hang_on_b, deadline=0.05, concurrency=2).complete(asked("a", "b", "c"))
    assert time.perf_counter() - started < 2
    assert [reply.text for reply in replies] == ["a", None, "c"]
    assert replies[1].finish == Finish.FAILED
    assert "deadline of 0.05 s" in replies[1].error
    assert "1 of 3 requests" in caplog.text


def test_a_silent_server_times_out_and_is_asked_again() -> None:
    calls = 0

    async def silent_once(request: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        if calls == 1:
            await asyncio.Event().wait()
        return echo(request)

    (reply,) = engine_of(silent_once, timeout=0.02).complete(asked("a"))
    assert (reply.text, calls) == ("a", 2)


def test_what_the_server_says_it_is_is_kept_and_a_change_is_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    handler = in_turn(
        httpx.Response(200, json=completion("a", model="m-2", system_fingerprint="fp1")),
        httpx.Response(200, json=completion("b", model="m-2", system_fingerprint="fp2")),
    )
    engine = engine_of(handler, concurrency=1)
    before = engine.description
    engine.complete(asked("a", "b"))
    assert engine.served == {"model": {"m-2"}, "system_fingerprint": {"fp1", "fp2"}}
    assert "system_fingerprint changed from fp1 to fp2" in caplog.text
    assert engine.description == before
    assert (before["seed"], before["model"], before["temperature"]) == (3, "m", 0.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"url": "localhost:8000"}, "expected as in http"),
        ({"url": f"http://user:{KEY}@host/v1"}, "environment variable"),
        ({"concurrency": 0}, "concurrency"),
        ({"deadline": 0.0}, "deadline"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        ServerSettings(**{"url": "http://host/v1", **wrong})
    assert KEY not in str(caught.value)


class Moody(BaseHTTPRequestHandler):
    """A real server that does, request by request, what the test has put into `moods`."""

    moods: list[str]

    def do_POST(self) -> None:
        mood = self.moods.pop(0) if self.moods else "well"
        body = json.dumps(completion("answer")).encode()
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if mood == "killed":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
            return
        if mood == "dripping":
            for byte in body[:20]:  # slower than the time-out, byte by byte
                time.sleep(0.01)
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def moody() -> Iterator[tuple[str, type[Moody]]]:
    handler = type("Handler", (Moody,), {"moods": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("mood", ["killed", "dripping"])
def test_a_connection_that_breaks_or_drips_is_tried_again(moody: tuple[str, type[Moody]], mood: str) -> None:
    url, handler = moody
    handler.moods = [mood]
    engine = ServerEngine("m", ServerSettings(url, timeout=0.08), GenerationSettings(), sleep=Waits())
    (reply,) = engine.complete(asked("a"))
    assert reply.text == "answer"
    assert handler.moods == []


def test_a_server_that_breaks_every_answer_fails_every_request(moody: tuple[str, type[Moody]]) -> None:
    url, handler = moody
    handler.moods = ["killed"] * 6
    engine = ServerEngine("m", ServerSettings(url, max_attempts=3), GenerationSettings(), sleep=Waits())
    assert [reply.finish for reply in engine.complete(asked("a", "b"))] == [Finish.FAILED] * 2


def test_no_server_at_all_is_an_error() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Moody) as server:
        url = f"http://127.0.0.1:{server.server_port}/v1"  # closed again by the next line
    engine = ServerEngine("m", ServerSettings(url, max_attempts=2), GenerationSettings(), sleep=Waits())
    with pytest.raises(EngineError, match="No server answers at"):
        engine.complete(asked("a", "b"))
