"""A small completions server over real sockets, for tests: as well or as badly behaved as a test wants.

It runs in a thread of the test (`Running`), or as a program: `python -m tests.http_server --port N`. Its tokens depend
on the prompt alone, or come from a small model through transformers. It knows nothing of lem.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

METRICS = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="m"}} {generated}
vllm:prompt_tokens_total{{engine="0",model_name="m"}} {prompted}
vllm:prefix_cache_queries_total{{engine="0",model_name="m"}} {prompted}
vllm:prefix_cache_hits_total{{engine="0",model_name="m"}} {hits}
vllm:e2e_request_latency_seconds_bucket{{engine="0",le="0.3",model_name="m"}} 7.0
"""


@dataclass
class Behaviour:
    """What the server sends, how its events travel, and what goes wrong at which request."""

    models: tuple[str, ...] = ("m",)
    max_model_len: int | None = None
    sends_ids: bool = True
    usage: str = "final"  # never, final, each
    sends_metrics: bool = True
    resets: bool = True
    key: str | None = None
    tokens_in_event: int = 1
    wait_s: float = 0.0  # before each event
    first_wait_s: float = 0.0
    cut: int | None = None  # bytes in a packet; None sends each event in one
    packet_wait_s: float = 0.002
    merged: int = 1  # events in a packet
    error: tuple[int, str] | None = None  # sent instead of a completion
    error_in_stream: bool = False
    silent_after: int | None = None  # number of events after which nothing more is sent
    dies_after: int | None = None  # number of events after which the connection is closed
    hits: int = 0
    extra_input: int = 0
    finish: str | None = None
    faulty_from: int = 0  # the first request that meets an error, silence or a crash


def counted_tokens(body: dict[str, Any]) -> list[int]:
    """Return as many tokens as are allowed, determined by the prompt."""
    first = sum(body["prompt"])
    return [100 + (first + i) % 50 for i in range(body["max_tokens"])]


@dataclass
class Running:
    """A server in threads of this process; `bodies` holds the request bodies that it received."""

    tokens: Callable[[dict[str, Any]], list[int]] = counted_tokens
    behaviour: Behaviour = field(default_factory=Behaviour)
    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    begun_s: list[float] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    resets: int = 0
    generated: int = 0
    prompted: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    lock: Any = field(default_factory=threading.Lock)

    def __enter__(self) -> Running:
        handler = type("Handler", (_Handler,), {"server_state": self})
        self._http = _Http(("127.0.0.1", self.port), handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: Running
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        state, behaviour = self.server_state, self.server_state.behaviour
        if self._refuses_key():
            return
        if self.path == "/v1/models":
            card = {"owned_by": "tests", "root": "/models/m"}
            card |= {"max_model_len": behaviour.max_model_len} if behaviour.max_model_len else {}
            self._json(200, {"object": "list", "data": [{"id": name, **card} for name in behaviour.models]})
        elif self.path == "/version":
            self._json(200, {"version": "9.9"})
        elif self.path == "/metrics" and behaviour.sends_metrics:
            values = {"generated": float(state.generated), "prompted": float(state.prompted), "hits": behaviour.hits}
            self._send(200, "text/plain", METRICS.format(**values).encode())
        else:
            self._json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        state = self.server_state
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self._refuses_key():
            return
        if self.path == "/reset_prefix_cache" and state.behaviour.resets:
            state.resets += 1
            self._json(200, {"success": True})
        elif self.path == "/v1/completions":
            self._complete(json.loads(body))
        else:
            self._json(404, {"detail": "Not Found"})

    def _refuses_key(self) -> bool:
        self.server_state.keys.append(self.headers.get("authorization"))
        key = self.server_state.behaviour.key
        if key is None or self.headers.get("authorization") == f"Bearer {key}":
            return False
        self._json(401, {"error": "Unauthorized"})
        return True

    def _complete(self, body: dict[str, Any]) -> None:
        state, behaviour = self.server_state, self.server_state.behaviour
        with state.lock:
            number = len(state.bodies)
            state.bodies.append(body)
            state.begun_s.append(time.perf_counter())
            state.in_flight += 1
            state.most_in_flight = max(state.most_in_flight, state.in_flight)
        try:
            is_faulty = number >= behaviour.faulty_from
            if behaviour.error and is_faulty and not behaviour.error_in_stream:
                status, message = behaviour.error
                self._json(status, {"error": {"message": message, "code": status}})
                return
            tokens = state.tokens(body)
            if body.get("stream"):
                self._stream(body, tokens, is_faulty)
            else:
                self._whole(body, tokens, is_faulty)
            with state.lock:
                state.generated += len(tokens)
                state.prompted += len(body["prompt"])
        finally:
            with state.lock:
                state.in_flight -= 1

    def _usage(self, body: dict[str, Any], count: int) -> dict[str, int]:
        prompt = len(body["prompt"]) + self.server_state.behaviour.extra_input
        return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}

    def _finish_reason(self, body: dict[str, Any], tokens: list[int]) -> str:
        ended = bool(tokens) and tokens[-1] in body.get("stop_token_ids", ())
        return self.server_state.behaviour.finish or ("stop" if ended else "length")

    def _whole(self, body: dict[str, Any], tokens: list[int], is_faulty: bool) -> None:
        behaviour = self.server_state.behaviour
        time.sleep(behaviour.first_wait_s + behaviour.wait_s * len(tokens))
        if is_faulty and behaviour.dies_after is not None:
            self._hang_up()
            return
        if is_faulty and behaviour.silent_after is not None:
            time.sleep(3600)
        ids = {"token_ids": tokens} if behaviour.sends_ids and body.get("return_token_ids") else {}
        choice = {"index": 0, "text": "x" * len(tokens), "finish_reason": self._finish_reason(body, tokens), **ids}
        usage = {} if behaviour.usage == "never" else {"usage": self._usage(body, len(tokens))}
        self._json(200, {"choices": [choice], **usage})

    def _stream(self, body: dict[str, Any], tokens: list[int], is_faulty: bool) -> None:
        behaviour = self.server_state.behaviour
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        packet: list[bytes] = []
        with suppress(BrokenPipeError, ConnectionResetError):
            for number, event in enumerate(self._events(body, tokens)):
                if is_faulty and number == behaviour.dies_after:
                    self._hang_up()
                    return
                if is_faulty and number == behaviour.silent_after:
                    time.sleep(3600)
                if is_faulty and behaviour.error_in_stream and number == 1 and behaviour.error:
                    event = {"error": {"message": behaviour.error[1]}}
                time.sleep(behaviour.wait_s if number else behaviour.first_wait_s)
                packet.append(f"data: {json.dumps(event)}\n\n".encode())
                if len(packet) == behaviour.merged:
                    self._packet(packet)
                    packet = []
            self._packet([*packet, b"data: [DONE]\n\n", b""])

    def _events(self, body: dict[str, Any], tokens: list[int]) -> list[dict[str, Any]]:
        behaviour, size = self.server_state.behaviour, self.server_state.behaviour.tokens_in_event
        options = body.get("stream_options") or {}
        events = []
        for begin in range(0, len(tokens), size):
            some, end = tokens[begin : begin + size], begin + size >= len(tokens)
            choice: dict[str, Any] = {"index": 0, "text": "x" * len(some)}
            choice["finish_reason"] = self._finish_reason(body, tokens) if end else None
            if behaviour.sends_ids and body.get("return_token_ids"):
                choice["token_ids"] = some
            event: dict[str, Any] = {"choices": [choice]}
            if behaviour.usage == "each" and options.get("continuous_usage_stats"):
                event["usage"] = self._usage(body, begin + len(some))
            events.append(event)
        if behaviour.usage != "never" and options.get("include_usage"):
            events.append({"choices": [], "usage": self._usage(body, len(tokens))})
        return events

    def _packet(self, parts: list[bytes]) -> None:
        """Send each event as a chunk, in one packet or split into several."""
        data = b"".join(b"%x\r\n%s\r\n" % (len(part), part) if part else b"0\r\n\r\n" for part in parts)
        cut = self.server_state.behaviour.cut
        for begin in range(0, len(data), cut or len(data)):
            self.wfile.write(data[begin : begin + (cut or len(data))])
            self.wfile.flush()
            if cut:
                time.sleep(self.server_state.behaviour.packet_wait_s)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _json(self, status: int, content: dict[str, Any]) -> None:
        self._send(status, "application/json", json.dumps(content).encode())

    def _send(self, status: int, kind: str, content: bytes) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)


class ModelTokens:
    """Tokens of a small transformers model, by the request's own seed; one at a time, equal ones only once."""

    def __init__(self, folder: str) -> None:
        import torch
        import transformers

        self._torch = torch
        self._model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self._lock = threading.Lock()
        self._known: dict[str, list[int]] = {}

    def __call__(self, body: dict[str, Any]) -> list[int]:
        asked = json.dumps({name: value for name, value in body.items() if not name.startswith("stream")})
        if asked not in self._known:
            self._known[asked] = self._make(body)
        return self._known[asked]

    def _make(self, body: dict[str, Any]) -> list[int]:
        torch, ids, made = self._torch, list(body["prompt"]), []
        ends = set(body["stop_token_ids"])
        draw = torch.Generator().manual_seed(body.get("seed", 0) % 2**63)
        with self._lock, torch.inference_mode():
            while len(made) < body["max_tokens"] and not (made and made[-1] in ends):
                scores = self._model(torch.tensor([ids + made])).logits[0, -1]
                if len(made) < body["min_tokens"]:
                    scores[list(ends)] = float("-inf")
                if body["temperature"]:
                    chances = torch.softmax(scores / body["temperature"], -1)
                    made.append(int(torch.multinomial(chances, 1, generator=draw)))
                else:
                    made.append(int(scores.argmax()))
        return made


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default=None, help="a folder; else tokens follow from the prompt alone")
    parser.add_argument("--behaviour", default="{}", help="as JSON")
    parser.add_argument("--children", action="store_true", help="have children, one of them in another session")
    parser.add_argument("--stubborn", action="store_true", help="do not end when asked to")
    options = parser.parse_args()
    print(f"serving at {options.port}, GPUs: {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True)
    if options.stubborn:
        import signal

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.children:
        sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
        subprocess.Popen(sleeping)
        # Its parent, a shell, exits at once.
        subprocess.run(["/bin/sh", "-c", 'setsid "$@" &', "sh", *sleeping], check=True)
    tokens = ModelTokens(options.model) if options.model else counted_tokens
    with Running(tokens, Behaviour(**json.loads(options.behaviour)), options.port):
        threading.Event().wait()


if __name__ == "__main__":
    main()
