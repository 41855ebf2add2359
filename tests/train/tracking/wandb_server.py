"""As much of W&B's server as its client asks for while it starts, logs and ends a run; well, or failing in one way."""

import contextlib
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up in the middle are what the tests are about."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class WandbServer:
    """A server on the loopback: `with WandbServer() as server`; `mode` is healthy, failing (HTTP 500) or hanging."""

    def __init__(self, mode: str = "healthy") -> None:
        self.mode = mode
        self.failure: dict[str, str] = {}
        """What a failing server answers."""
        self.requests: list[tuple[str, str]] = []
        """(path, body) of what was answered."""
        self._over = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "WandbServer":
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """From here on connections are refused."""
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait(self, mode: str) -> bool:
        """What a request meets: True where it is to be answered."""
        if mode == "hanging":
            self._over.wait(600)
        return mode == "healthy"

    def answer(self, path: str, body: bytes) -> Any:
        """The answer of a healthy server, as JSON."""
        self.requests.append((path, body.decode(errors="replace")))
        if path != "/graphql":
            return {"exitcode": None, "limits": {}}
        asked = json.loads(body)
        # The fields at the top of a query; who knows none of what was asked for says null.
        field = re.findall(r"^\t(\w+)", asked["query"], re.MULTILINE)[0]
        project = {"id": "1", "name": "p", "entity": {"id": "1", "name": "me"}}
        known: dict[str, Any] = {
            "model": {**project, "bucket": None},
            "upsertBucket": {
                "inserted": True,
                "bucket": {
                    "id": "1",
                    "name": asked["variables"].get("name"),
                    "project": project,
                    "config": "{}",
                },
            },
            "createRunFiles": {
                "runID": "1",
                "uploadHeaders": [],
                "files": [
                    {"name": name, "uploadUrl": f"{self.url}/upload/{name}"}
                    for name in asked["variables"].get("files") or ()
                ],
            },
        }
        return {"data": {field: known.get(field)}}

    def _handler(server) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                well = server.wait(server.mode)
                answer = json.dumps(server.answer(self.path, body) if well else server.failure).encode()
                self.send_response(200 if well else 500)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                with contextlib.suppress(
                    BrokenPipeError, ConnectionResetError
                ):  # who hung up reads no answer
                    self.wfile.write(answer)

            do_PUT = do_POST  # noqa: N815 - http.server's name

            def log_message(self, *arguments: object) -> None:
                """Say nothing."""

        return Handler
