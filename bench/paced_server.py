"""A local server that speaks OpenAI's streaming protocol at a set pace, and knows when it sent each token.

Run the server as a program, in a process of its own: `python -m bench.paced_server --port N`. It runs no model. It
answers each request with as many words as `max_tokens` asks for. The first word comes after a time that varies between
half and one and a half times `first_s`; the other words follow after gaps that vary in the same way around `gap_s`. For
every request, the server notes when the whole request had arrived and when each token was handed to the kernel, as
readings of CLOCK_MONOTONIC in nanoseconds. The times that clients report are compared with these true times.
`POST /pace` sets the pace, and `POST /take` returns the notes and forgets them. The server knows nothing about lem.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import json
import selectors
import time
from dataclasses import asdict, dataclass, field
from typing import Any

MODEL = "paced"
WORD = " word"
HEADERS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
# Gaps follow the fractional parts of this number's multiples instead of being random. They differ within a request and
# between requests, but have the same distribution for every client.
GOLDEN = 0.618_033_988_75


@dataclass
class Pace:
    """How long a request waits, on average, for its first token and for each further token, in seconds."""

    first_s: float = 0.05
    gap_s: float = 0.01


@dataclass
class Note:
    """What truly happened to one request; times are readings of CLOCK_MONOTONIC, in nanoseconds."""

    id: str
    request_id: str | None
    prompt: Any
    arrived_ns: int
    due_ns: list[int] = field(default_factory=list)
    sent_ns: list[int] = field(default_factory=list)


@dataclass
class State:
    """The server's pace, and the notes that it has made since notes were last taken."""

    pace: Pace = field(default_factory=Pace)
    notes: list[Note] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)


class Connection(asyncio.Protocol):
    """One connection of a client, with at most one request at a time."""

    def __init__(self, state: State) -> None:
        self._state, self._received = state, bytearray()
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport, through which answers are sent."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer a request as soon as all of it has arrived."""
        self._received += data
        head, end, rest = bytes(self._received).partition(b"\r\n\r\n")
        if not end:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        arrived_ns = time.monotonic_ns()
        self._received.clear()
        method, path, *_ = first.split(" ")
        self._answer(method, path, headers, rest, arrived_ns)

    def _answer(self, method: str, path: str, headers: dict[str, str], body: bytes, arrived_ns: int) -> None:
        state = self._state
        if path in ("/v1/completions", "/v1/chat/completions"):
            self._complete(json.loads(body), headers.get("x-request-id"), "chat" in path, arrived_ns)
        elif path == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "bench"}]})
        elif path == "/health":
            self._json(200, {})
        elif path == "/pace":
            state.pace = Pace(**json.loads(body))
            self._json(200, asdict(state.pace))
        elif path == "/take":
            self._json(200, [asdict(note) for note in state.notes])
            state.notes = []
            gc.collect()
        else:
            self._json(404, {"detail": f"there is no {method} {path}"})

    def _complete(self, body: dict[str, Any], request_id: str | None, is_chat: bool, arrived_ns: int) -> None:
        state, number = self._state, next(self._state.numbers)
        count = body.get("max_tokens") or body.get("max_completion_tokens") or 16
        prompt = body["messages"] if is_chat else body["prompt"]
        note = Note(f"cmpl-{number}", request_id, prompt, arrived_ns)
        state.notes.append(note)
        note.due_ns = due(state.pace, number, count, arrived_ns)
        if body.get("stream"):
            events = self._events(note.id, count, is_chat, body)
            self._transport.write(HEADERS)
            self._send(note, events, 0)
        else:
            content = {"message": {"role": "assistant", "content": WORD * count}} if is_chat else {"text": WORD * count}
            whole: dict[str, Any] = {"id": note.id, "model": MODEL, "usage": usage(count)}
            whole["choices"] = [{"index": 0, "finish_reason": "length", **content}]
            self._loop.call_at(note.due_ns[-1] / 1e9, self._json, 200, whole)

    def _events(self, id_: str, count: int, is_chat: bool, body: dict[str, Any]) -> list[bytes]:
        """Return the events of an answer: one for each token, and then the usage and the end marker in one packet."""
        base = {"id": id_, "object": f"{'chat' if is_chat else 'text'}_completion{'.chunk' * is_chat}", "model": MODEL}
        content = {"delta": {"role": "assistant", "content": WORD}} if is_chat else {"text": WORD}
        choice = {"index": 0, "finish_reason": None, **content}
        token = packet({**base, "choices": [choice]})
        last = packet({**base, "choices": [{**choice, "finish_reason": "length"}]})
        end = packet({**base, "choices": [], "usage": usage(count)})
        is_asked = (body.get("stream_options") or {}).get("include_usage")
        end = (end if is_asked else b"") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
        return [*[token] * (count - 1), last, end]

    def _send(self, note: Note, events: list[bytes], position: int) -> None:
        """Send all events that are due, and schedule the next call for the time at which the next event is due."""
        if self._transport.is_closing():
            return
        while position < len(note.due_ns):
            if note.due_ns[position] > time.monotonic_ns():
                self._loop.call_at(note.due_ns[position] / 1e9, self._send, note, events, position)
                return
            note.sent_ns.append(time.monotonic_ns())
            self._transport.write(events[position])
            position += 1
        self._transport.write(events[-1])

    def _json(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        reason = "OK" if status == 200 else "Not Found"
        head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        self._transport.write(head.encode() + data)


def due(pace: Pace, number: int, count: int, arrived_ns: int) -> list[int]:
    """Return the times at which the tokens of a request are due, in nanoseconds."""
    at_s, times = pace.first_s * (0.5 + (number * GOLDEN) % 1.0), []
    for position in range(count):
        times.append(arrived_ns + int(at_s * 1e9))
        at_s += pace.gap_s * (0.5 + ((number + 1) * (position + 1) * GOLDEN) % 1.0)
    return times


def usage(count: int) -> dict[str, int]:
    """Return the usage of an answer; the server has no tokenizer, so it counts no input tokens."""
    return {"prompt_tokens": 0, "completion_tokens": count, "total_tokens": count}


def packet(content: dict[str, Any]) -> bytes:
    """Return an event as a chunk of the response."""
    return chunk(b"data: " + json.dumps(content).encode() + b"\n\n")


def chunk(data: bytes) -> bytes:
    """Return bytes as a chunk of a chunked response."""
    return b"%x\r\n%s\r\n" % (len(data), data)


async def serve(port: int) -> None:
    """Serve until killed."""
    state = State()
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(state), "127.0.0.1", port, backlog=1024, reuse_address=True
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve until killed; print the port first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="the port; 0 chooses a free one (default: 0)")
    options = parser.parse_args()
    # select() waits with a resolution of a microsecond, epoll only of a millisecond. Garbage collection would delay
    # tokens.
    gc.disable()
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(serve(options.port))


if __name__ == "__main__":
    main()
