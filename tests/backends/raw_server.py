"""A server over real sockets whose responses are raw bytes written by a test, so that they can be arbitrarily odd.

It knows just enough HTTP to read a request, and nothing of lem.
"""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

# The parts of a response: bytes to send, or seconds to wait.
Sent = Iterable[bytes | float]
MODELS = b'{"object": "list", "data": [{"id": "m"}]}'


def response(
    body: bytes, *, status: int = 200, kind: str | None = "application/json", length: bool = True, **headers: str
) -> bytes:
    """Return a response; without a length, it ends when the connection is closed."""
    known = {"Content-Type": kind, "Content-Length": str(len(body)) if length else None, "Connection": "close"}
    known |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{name}: {value}" for name, value in known.items() if value is not None]
    return f"HTTP/1.1 {status} Some\r\n".encode() + "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Scripted:
    """Serves completions as `complete` writes them, given the request's body; any other path is `others`'s."""

    def __init__(
        self,
        complete: Callable[[dict[str, Any]], Sent],
        others: Callable[[str], bytes] | None = None,
    ) -> None:
        self.complete, self.others = complete, others or usual
        self.bodies: list[dict[str, Any]] = []
        self.begun_s: list[float] = []

    def __enter__(self) -> Scripted:
        scripted = self

        class Handler(socketserver.StreamRequestHandler):
            disable_nagle_algorithm = True

            def handle(self) -> None:
                with suppress(OSError):
                    scripted._handle(self)

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handle(self, connection: socketserver.StreamRequestHandler) -> None:
        if not (first := connection.rfile.readline()):
            return  # the client only checks whether the server is listening
        path, length = first.split()[1].decode(), 0
        while line := connection.rfile.readline().strip():
            name, _, value = line.partition(b":")
            length = int(value) if name.lower() == b"content-length" else length
        body = connection.rfile.read(length)
        if path != "/v1/completions":
            connection.wfile.write(self.others(path))
            return
        asked = json.loads(body)
        self.bodies.append(asked)
        self.begun_s.append(time.perf_counter())
        for sent in self.complete(asked):
            if isinstance(sent, bytes):
                connection.wfile.write(sent)
                connection.wfile.flush()
            else:
                time.sleep(sent)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128


def usual(path: str) -> bytes:
    """Return the list of models; no other path exists."""
    return response(MODELS) if path == "/v1/models" else response(b'{"detail": "Not Found"}', status=404)
