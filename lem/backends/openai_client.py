"""Many concurrent requests to one server's completions endpoint, each answer with the times of its tokens.

Runs in another thread, so that tokens are timed while the caller does something else. All that one
read from the network brings counts as arriving together, however many events it holds; an event split over two
reads counts when it is complete. Tokens are counted by the ids or the usage that the server sends, never by
events. Knows neither prompt texts nor experiments.
"""

from __future__ import annotations

import asyncio
import json
import queue
import re
import resource
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpcore

from lem.backends.engine import reason_of, sentence
from lem.errors import RunError
from lem.units import NS_PER_S
from lem.workload.tokens import Chunk

T = TypeVar("T")

CONNECT_S = 10.0
# Servers close idle connections after 5 s or more; one that is being closed must not be chosen.
KEEP_ALIVE_S = 2.0
OK = 200
CONTENT_TYPE = b"content-type"
END_OF_STREAM = b"[DONE]"
LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # the last \r may be the half of \r\n
SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{.*\})? +(\S+)", re.MULTILINE)


class ServerGone(RunError):
    """Nothing is listening at the server's address, or the connection was lost."""


class Refused(RunError):
    """The server answered with an error."""


@dataclass(frozen=True)
class Answer:
    """A server's output for one prompt; times are readings of `time.perf_counter_ns`.

    `token_ids` is None if the server sends only their number. `chunks` is empty unless the tokens were streamed;
    `chunks_are_known` is False if only the times of the first and the last one are known.
    """

    sent_ns: int
    ended_ns: int
    finish_reason: str | None
    output_tokens: int
    token_ids: tuple[int, ...] | None
    input_tokens: int | None
    chunks: tuple[Chunk, ...] = ()
    chunks_are_known: bool = True


class Client:
    """One server, reached over HTTP/1.1."""

    def __init__(self, address: str, key: str | None, timeout_s: float) -> None:
        """Keep the server's address; nothing is sent yet.

        Args:
            address: scheme, host, port and the path before /v1, without a slash at the end.
            key: sent as a bearer token; never written anywhere.
            timeout_s: longest silence of the server within an answer.
        """
        self._address, self._timeout_s = address, timeout_s
        self._headers = {"content-type": "application/json", "user-agent": "lem", "accept-encoding": "identity"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        self._done: queue.SimpleQueue[tuple[int, Answer | Exception]] = queue.SimpleQueue()
        self._running: set[asyncio.Task[None]] = set()
        # How many times all requests have been cancelled; those sent before the last time are no longer wanted.
        self._cancelled = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._pool: Any = None
        self.on_answer: Callable[[Answer], None] = lambda _: None
        """Called in the client's thread with each answer, before `next_done` hands it out."""

    def start(self) -> None:
        """Start the thread; raise the limit on open files to its maximum, since each request in flight needs one."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._thread.start()
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context() if self._address.startswith("https") else None,
            max_connections=None,
            max_keepalive_connections=None,
            keepalive_expiry=KEEP_ALIVE_S,
            network_backend=_TimedNetwork(),
        )

    def fetch(self, path: str, *, method: str = "GET", timeout_s: float = CONNECT_S) -> tuple[int, str]:
        """Return the status and text of a small response.

        Raises:
            ServerGone: nothing is listening, or the answer does not come in time.
        """
        return self._wait(self._fetch(method, path, timeout_s))

    def send(self, number: int, body: bytes, at_ns: int | None = None) -> None:
        """Send a completion request; `next_done` returns its answer.

        Args:
            number: identifies the answer.
            body: as JSON.
            at_ns: when to send it, as a reading of `time.perf_counter_ns`; None for now.
        """
        self._loop.call_soon_threadsafe(self._begin, number, body, at_ns, self._cancelled)

    def next_done(self) -> tuple[int, Answer | Exception]:
        """Wait for the next request to end; return its number, and its answer or why there is none."""
        return self._done.get()

    def run(self, function: Callable[[], None]) -> None:
        """Call a function in the client's thread, and wait until it has returned."""

        async def call() -> None:
            function()

        self._wait(call())

    def cancel(self) -> None:
        """Cancel all requests that have not ended, and drop their answers."""
        if not self._thread.is_alive():
            return
        self._wait(self._cancel())
        while not self._done.empty():
            self._done.get()

    def close(self) -> None:
        """Close all connections and end the thread."""
        if not self._thread.is_alive():
            return
        with suppress(Exception):
            self._wait(self._cancel())
            self._wait(self._pool.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # -------------------------------------------------------------- in the client's thread
    def _begin(self, number: int, body: bytes, at_ns: int | None, epoch: int) -> None:
        if epoch != self._cancelled:  # an answer sent the next request just before all were cancelled
            return
        task = self._loop.create_task(self._answer(number, body, at_ns))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, number: int, body: bytes, at_ns: int | None) -> None:
        epoch = self._cancelled
        try:
            while at_ns is not None and (left_ns := at_ns - time.perf_counter_ns()) > 0:
                await asyncio.sleep(left_ns / NS_PER_S)
            answer = await self._complete(body)
            if epoch == self._cancelled:
                self.on_answer(answer)
            done: Answer | Exception = answer
        except Exception as error:
            done = error
        if epoch == self._cancelled:
            self._done.put((number, done))

    async def _cancel(self) -> None:
        self._cancelled += 1
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _fetch(self, method: str, path: str, timeout_s: float) -> tuple[int, str]:
        with self._failing_as_gone(timeout_s):
            async with asyncio.timeout(timeout_s):
                response = await self._pool.request(
                    method, self._address + path, headers=self._headers, extensions=_limits(timeout_s)
                )
        return int(response.status), response.content.decode(errors="replace")

    async def _complete(self, body: bytes) -> Answer:
        with self._failing_as_gone(self._timeout_s):
            sent_ns = time.perf_counter_ns()
            async with self._pool.stream(
                "POST",
                f"{self._address}/v1/completions",
                headers=self._headers,
                content=body,
                extensions=_limits(self._timeout_s),
            ) as response:
                events = (b"event-stream" in value for name, value in response.headers if name.lower() == CONTENT_TYPE)
                if response.status != OK or not any(events):
                    content = await response.aread()
                    return _whole_answer(int(response.status), content, sent_ns, time.perf_counter_ns())
                transcript, network = Transcript(sent_ns), response.extensions["network_stream"]
                async for received in response.aiter_stream():
                    transcript.take(received, network.reads, network.read_at_ns)
                return transcript.answer()

    @contextmanager
    def _failing_as_gone(self, timeout_s: float) -> Iterator[None]:
        """Turn transport errors into `ServerGone`, with a readable message."""
        try:
            yield
        except (httpcore.ReadTimeout, TimeoutError):
            silence = f"The server at {self._address} has sent nothing for {timeout_s:g} s"
            raise ServerGone(f"{silence} (backend.timeout_s is {self._timeout_s:g}).") from None
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
            raise ServerGone(f"No server can be reached at {self._address}: {reason_of(error)}") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            raise ServerGone(f"The connection to the server at {self._address} was lost: {reason_of(error)}") from None


def _limits(timeout_s: float) -> dict[str, Any]:
    """Return httpcore's limits: seconds for connecting, and between two reads or writes."""
    return {"timeout": {"connect": CONNECT_S, "read": timeout_s, "write": timeout_s}}


@dataclass(frozen=True)
class _Piece:
    """Data of one read from the network, or the rest of it."""

    read: int
    at_ns: int
    data: bytes


class _Incoming(asyncio.Protocol):
    """Receives the data of one connection, and notes at once when it came."""

    def __init__(self) -> None:
        self.pieces: deque[_Piece] = deque()
        self.has_ended = False
        self.waiter: asyncio.Future[None] | None = None
        self._reads = 0

    def data_received(self, data: bytes) -> None:
        self._reads += 1
        self.pieces.append(_Piece(self._reads, time.perf_counter_ns(), data))
        self._wake()

    def eof_received(self) -> None:
        self.has_ended = True
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self.has_ended = True
        self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class _TimedStream(httpcore.AsyncNetworkStream):  # type: ignore[misc]
    """A connection; `reads` and `read_at_ns` are the number and the time of the read that brought the last data.

    Replaces httpcore's own, which reports no times and takes twice the processor time for each read.
    """

    def __init__(self, transport: asyncio.Transport, incoming: _Incoming) -> None:
        self._transport, self._incoming = transport, incoming
        self.reads, self.read_at_ns = 0, 0

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        incoming = self._incoming
        if not incoming.pieces and not incoming.has_ended:
            await self._wait(timeout)
        if not incoming.pieces:
            return b""
        piece = incoming.pieces.popleft()
        if len(piece.data) > max_bytes:
            incoming.pieces.appendleft(replace(piece, data=piece.data[max_bytes:]))
        self.reads, self.read_at_ns = piece.read, piece.at_ns
        return piece.data[:max_bytes]

    async def _wait(self, timeout_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        waiter = self._incoming.waiter = loop.create_future()

        def expire() -> None:
            if not waiter.done():
                waiter.set_exception(httpcore.ReadTimeout())

        timer = None if timeout_s is None else loop.call_later(timeout_s, expire)
        try:
            await waiter
        finally:
            if timer is not None:
                timer.cancel()

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._transport.is_closing():
            raise httpcore.WriteError("it is closed")
        self._transport.write(buffer)

    async def aclose(self) -> None:
        self._transport.close()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> _TimedStream:
        loop = asyncio.get_running_loop()
        try:
            transport = await loop.start_tls(
                self._transport,
                self._incoming,
                ssl_context,
                server_hostname=server_hostname,
                ssl_handshake_timeout=timeout,
            )
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        if transport is None:
            raise httpcore.ConnectError("the connection was closed")
        return _TimedStream(transport, self._incoming)

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # an idle connection becomes readable when the server closes it
            return self._incoming.has_ended or bool(self._incoming.pieces)
        return self._transport.get_extra_info(info)


class _TimedNetwork(httpcore.AsyncNetworkBackend):  # type: ignore[misc]
    """Makes timed connections."""

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *_options: Any, **_more: Any
    ) -> _TimedStream:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                return _TimedStream(*await loop.create_connection(_Incoming, host, port))
        except TimeoutError:
            raise httpcore.ConnectTimeout(f"no connection within {timeout:g} s") from None
        except OSError as error:
            raise httpcore.ConnectError(error.strerror or str(error)) from error


# ------------------------------------------------------------------ events
class Events:
    """Parses server-sent events from bytes, however these are split."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, received: bytes) -> list[bytes]:
        """Return the data of the events that these bytes complete."""
        *lines, self._rest = LINE_END.split(self._rest + received)
        whole = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                whole.append(b"\n".join(self._data))
                self._data = []
        return whole


@dataclass(frozen=True)
class _Part:
    """The number of tokens in one event, and the read that completed it; None if the event does not count them."""

    read: int
    at_ns: int
    tokens: int | None


class Transcript:
    """One streamed answer, as it comes."""

    def __init__(self, sent_ns: int) -> None:
        self._sent_ns = sent_ns
        self._events = Events()
        self._parts: list[_Part] = []
        self._token_ids: list[int] = []
        self._counted = 0
        self._lacks_ids = False
        self._usage: dict[str, Any] = {}
        self._finish_reason: str | None = None

    def take(self, received: bytes, read: int, at_ns: int) -> None:
        """Add bytes from one read of the network, which may come in several pieces.

        Raises:
            Refused: the server sent an error.
        """
        for data in self._events.feed(received):
            if data != END_OF_STREAM:
                self._take_event(_checked(data), read, at_ns)

    def _take_event(self, event: dict[str, Any], read: int, at_ns: int) -> None:
        self._usage = event.get("usage") or self._usage
        for choice in event.get("choices") or ():
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            tokens = self._tokens(choice, event.get("usage"))
            if tokens or (tokens is None and choice.get("text")):
                self._parts.append(_Part(read, at_ns, tokens))

    def _tokens(self, choice: dict[str, Any], usage: dict[str, Any] | None) -> int | None:
        """Return the number of an event's tokens, by their ids, else by the usage so far; None if it has neither."""
        ids = choice.get("token_ids")
        if ids is not None:
            self._token_ids += ids
            return len(ids)
        self._lacks_ids = self._lacks_ids or bool(choice.get("text"))
        if not usage or usage.get("completion_tokens") is None:
            return None
        before, self._counted = self._counted, int(usage["completion_tokens"])
        return self._counted - before

    def answer(self) -> Answer:
        """Return the answer, after the end of the stream.

        Raises:
            ServerGone: it ended too early.
            Refused: the server did not report the number of tokens.
        """
        if self._finish_reason is None:
            raise ServerGone("The server ended its response before the last token.")
        output_tokens, token_ids = _counted(None if self._lacks_ids else self._token_ids, self._usage)
        chunks, are_known = self._chunks(output_tokens)
        return Answer(
            self._sent_ns,
            chunks[-1].at_ns if chunks else time.perf_counter_ns(),
            self._finish_reason,
            output_tokens,
            token_ids,
            self._usage.get("prompt_tokens"),
            tuple(chunks),
            are_known,
        )

    def _chunks(self, output_tokens: int) -> tuple[list[Chunk], bool]:
        """Return the tokens of each read, and True; if events do not count them, the first and the rest, and False."""
        counts = [part.tokens for part in self._parts]
        if None in counts and len(counts) == output_tokens:
            # Each event with text has at least one token; with as many events as tokens, each has exactly one.
            counts = [1] * output_tokens
        if None in counts or sum(filter(None, counts)) != output_tokens:
            if not self._parts:
                return [], False
            ends = [Chunk(self._parts[0].at_ns, 1), Chunk(self._parts[-1].at_ns, output_tokens - 1)]
            return [chunk for chunk in ends if chunk.tokens > 0], False
        together: dict[int, Chunk] = {}
        for part, tokens in zip(self._parts, counts, strict=True):
            before = together.get(part.read)
            together[part.read] = Chunk(part.at_ns, (tokens or 0) + (before.tokens if before else 0))
        return list(together.values()), True


def _whole_answer(status: int, content: bytes, sent_ns: int, ended_ns: int) -> Answer:
    """Return an answer that came in one piece."""
    if status != OK:
        raise Refused(f"HTTP {status}: {_reason_in(content)}")
    completion = _checked(content)
    choice, usage = (completion.get("choices") or [{}])[0], completion.get("usage") or {}
    output_tokens, token_ids = _counted(choice.get("token_ids"), usage)
    finish_reason, input_tokens = choice.get("finish_reason"), usage.get("prompt_tokens")
    return Answer(sent_ns, ended_ns, finish_reason, output_tokens, token_ids, input_tokens)


def _counted(token_ids: Sequence[int] | None, usage: dict[str, Any]) -> tuple[int, tuple[int, ...] | None]:
    """Return the number of output tokens, and their ids if the server sends them."""
    count = usage.get("completion_tokens")
    if token_ids is None:
        if not isinstance(count, int):
            raise Refused("it sends neither the ids nor the number of the output's tokens (usage.completion_tokens).")
        return count, None
    if count is not None and count != len(token_ids):
        raise Refused(f"it sent {len(token_ids)} token ids but counted {count} output tokens.")
    return len(token_ids), tuple(token_ids)


# ------------------------------------------------------------------ contents
def _checked(data: bytes) -> dict[str, Any]:
    """Parse a response as a JSON object that is not an error.

    Raises:
        Refused: it is not JSON, or it is an error.
    """
    try:
        content = json.loads(data)
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise Refused(f"it sent something other than a JSON object: {data[:80].decode(errors='replace')}.")
    if content.get("error"):
        raise Refused(_reason_in(data))
    return content


def _reason_in(content: bytes) -> str:
    """Return the text of an error, in the forms that servers use."""
    text = content.decode(errors="replace")
    with suppress(ValueError):
        found = json.loads(text)
        for name in ("error", "message", "detail"):
            if isinstance(found, dict) and found.get(name):
                found = found[name]
        text = found if isinstance(found, str) else json.dumps(found)
    return sentence(text)


def samples(text: str) -> dict[str, float]:
    """Return the values of a page of Prometheus metrics by name, summed over labels."""
    totals: dict[str, float] = {}
    for name, value in SAMPLE.findall(text):
        with suppress(ValueError):
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals
