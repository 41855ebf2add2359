"""ServerEngine against a real server, `transformers serve`, on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from equipoise.eval.generation.requests import EngineError, Finish, Request
from equipoise.eval.generation.server_engine import ServerEngine, ServerSettings
from equipoise.eval.generation.settings import GenerationSettings
from equipoise.eval.generation.transformers_engine import TransformersEngine
from equipoise.eval.models import load_model

pytestmark = pytest.mark.slow

REQUESTS = [
    *(
        Request(messages=({"role": "user", "content": text},), max_new_tokens=8)
        for text in ("a", "What is the time, please?", "bb")
    ),
    Request(text="Once upon", max_new_tokens=6),
]


@pytest.fixture(scope="module")
def served(
    tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    pytest.importorskip("fastapi", reason="transformers serve needs the extra dev")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [
        sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(tiny_model_folder),
        "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as server,
    ):
        try:
            for _ in range(3000):  # importing takes seconds, on a busy machine many
                if server.poll() is not None:
                    pytest.fail(f"transformers serve ended: {log.read_text()[-2000:]}")
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1", server
        finally:
            server.kill()


def test_a_real_server_answers_as_the_model_does_in_this_process(
    served: tuple[str, subprocess.Popen[bytes]], tiny_model_folder: Path
) -> None:
    url, _ = served
    settings = GenerationSettings()
    model, tokenizer = load_model(str(tiny_model_folder), dtype="float32")
    expected = TransformersEngine(model, tokenizer, settings).complete(REQUESTS)
    engine = ServerEngine(str(tiny_model_folder), ServerSettings(url, concurrency=2), settings)
    replies = engine.complete(REQUESTS)
    assert [reply.finish for reply in replies] == [reply.finish for reply in expected]
    assert [reply.text for reply in replies] == [reply.text for reply in expected]
    assert len(engine.served["model"]) == 1


def test_a_server_killed_in_the_middle_fails_what_is_left_and_is_no_server_for_the_next(
    served: tuple[str, subprocess.Popen[bytes]], tiny_model_folder: Path
) -> None:
    url, server = served

    async def at_once(_: float) -> None:
        pass

    def kill_after_the_first(done: int, _total: int, _what: str) -> None:
        if done == 1:
            server.send_signal(signal.SIGKILL)
            server.wait()

    def engine() -> ServerEngine:
        return ServerEngine(
            str(tiny_model_folder),
            ServerSettings(url, concurrency=1, max_attempts=2),
            GenerationSettings(),
            sleep=at_once,
        )

    replies = engine().complete(REQUESTS[:3], kill_after_the_first)
    assert [reply.finish for reply in replies[1:]] == [Finish.FAILED] * 2
    assert replies[0].text is not None
    with pytest.raises(EngineError, match="No server answers"):
        engine().complete(REQUESTS[:1])
