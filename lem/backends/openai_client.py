"""A client that sends many concurrent requests to one server's completions endpoint, and times the tokens.

The client runs in its own thread, so that tokens are timed correctly while the caller does something else. All events
in one network read count as having arrived together. `lem.backends.openai_answer` interprets the bytes. This module
knows nothing about prompt texts or experiments.
"""

from __future__ import annotations

import asyncio
import math
import queue
import re
import resource
import socket
import ssl
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, TypeVar

import httpcore

from lem.backends.engine import reason_of
from lem.backends.openai_answer import Answer, Refused, Reply, ServerGone, Unpacking, redirection
from lem.errors import RunError
from lem.quantities import NS_PER_S

T = TypeVar("T")

CONNECT_S = 10.0
# Servers close idle connections after 5 s or more, and a connection that is being closed must not be reused.
KEEP_ALIVE_S = 2.0
# How long to wait for the end of a response after its last event.
ENDING_S = 0.25
# The minimum waiting time before a request is sent to a busy server again.
LEAST_RETRY_S = 0.25
# The maximum size in bytes of a response that is not a completion, such as a list of models.
LARGEST_PAGE = 16 * 2**20
# How late asyncio's timer may be.
TIMER_NS = 1_000_000
# Linux's socket option that adds timestamps to received data (`socket` has no name for it), and their format.
SO_TIMESTAMPNS = 35
TIMESPEC = struct.Struct("@ll")
# Two clocks are read together until both readings take less than CLOCK_NS, but at most CLOCK_TRIES times.
CLOCK_TRIES, CLOCK_NS = 3, 5_000
# If data seems to have waited longer than this to be read, the wall clock was set in the meantime.
OLDEST_NS = 60 * NS_PER_S
SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{.*\})? +(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    """A request without an answer: when it was sent and when it failed (`time.perf_counter_ns`), and the error."""

    sent_ns: int
    ended_ns: int
    error: RunError
    retries: int = 0


class Client:
    """A client that sends requests to one server over HTTP/1.1."""

    def __init__(
        self,
        address: str,
        key: str | None,
        timeout_s: float,
        *,
        largest: int = 2**30,
        most_events: int = sys.maxsize,
        by_text: bool = False,
    ) -> None:
        """Store the server's address without sending anything.

        Args:
            address: scheme, host, port and the path before /v1, without a trailing slash.
            key: the API key, sent as a bearer token and never written anywhere.
            timeout_s: how long the server may be silent during an answer, in seconds.
            largest: the maximum size of a plausible answer in bytes.
            most_events: the maximum number of events with output in a plausible answer.
            by_text: whether tokens are counted from the text, so that the server need not count them.
        """
        self._address, self._timeout_s = address, timeout_s
        self._as_answers: dict[str, Any] = {"largest": largest, "most_events": most_events, "by_text": by_text}
        self._headers = {"content-type": "application/json", "user-agent": "lem", "accept-encoding": "identity"}
        if key:
            self._headers["authorization"] = f"Bearer {key}"
        self._done: queue.SimpleQueue[tuple[int, Answer | Failure | Exception]] = queue.SimpleQueue()
        self._running: set[asyncio.Task[None]] = set()
        # How often all requests have been canceled; answers to requests sent before the last cancellation are dropped.
        self._cancellations = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._pool: Any = None
        self.on_answer: Callable[[Answer | Failure], None] = lambda _: None
        """A function called in the client's thread with each answer or failure, before `next_done` returns it."""

    def start(self) -> None:
        """Start the thread, and raise the limit on open files, because each request in flight needs an open socket."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft != hard:
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        _end_searches_for("sniffio")
        self._thread.start()
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context() if self._address.startswith("https") else None,
            max_connections=None,
            max_keepalive_connections=None,
            keepalive_expiry=KEEP_ALIVE_S,
            network_backend=_TimedNetwork(),
        )

    def fetch(self, path: str, *, method: str = "GET", timeout_s: float = CONNECT_S) -> tuple[int, str]:
        """Send a request other than a completion, such as one for the list of models; return the status and the text.

        Raises:
            ServerGone: nothing is listening, the connection is lost, or the response does not arrive in time.
        """
        return self._wait(self._fetch(method, path, timeout_s))

    def send(self, number: int, body: bytes, at_ns: int | None = None, *, patience_s: float = 0.0) -> None:
        """Send a completion request; `next_done` returns the answer.

        Args:
            number: a number that identifies the answer.
            body: the request's body as JSON.
            at_ns: when to send the request, as a reading of `time.perf_counter_ns`; None means now.
            patience_s: how long to wait in total if the server is busy and says when to send the request again.
        """
        self._loop.call_soon_threadsafe(self._begin, number, body, at_ns, patience_s, self._cancellations)

    def next_done(self) -> tuple[int, Answer | Failure]:
        """Wait until a request ends, and return its number and its answer or failure."""
        number, done = self._done.get()
        if isinstance(done, Exception):
            raise done
        return number, done

    def run(self, function: Callable[[], None]) -> None:
        """Call a function in the client's thread, and wait until it returns."""

        async def call() -> None:
            function()

        self._wait(call())

    def cancel(self) -> None:
        """Cancel all unfinished requests, and drop the answers that `next_done` has not returned."""
        if not self._thread.is_alive():
            return
        self._wait(self._cancel())
        while not self._done.empty():
            self._done.get()

    def close(self) -> None:
        """Close all connections and stop the thread."""
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
    def _begin(self, number: int, body: bytes, at_ns: int | None, patience_s: float, epoch: int) -> None:
        if epoch != self._cancellations:  # an answer triggered this request just before all requests were canceled
            return
        task = self._loop.create_task(self._answer(number, body, at_ns, patience_s))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _answer(self, number: int, body: bytes, at_ns: int | None, patience_s: float) -> None:
        epoch = self._cancellations
        try:
            while at_ns is not None and (left_ns := at_ns - time.perf_counter_ns()) > 0:
                # asyncio's timer may be a millisecond late, so the last millisecond is spent polling the clock.
                await asyncio.sleep(max(0, left_ns - TIMER_NS) / NS_PER_S)
            answer = await self._insist(body, patience_s)
            if epoch == self._cancellations:
                self.on_answer(answer)
            done: Answer | Failure | Exception = answer
        except Exception as error:
            done = error
        if epoch == self._cancellations:
            self._done.put((number, done))

    async def _insist(self, body: bytes, patience_s: float) -> Answer | Failure:
        """Send a request, retrying within `patience_s` as long as the server is busy and says when to retry."""
        sent_ns, retries = time.perf_counter_ns(), 0
        while True:
            try:
                return replace(await self._complete(body, sent_ns if retries else None), retries=retries)
            except RunError as error:
                asked_s = error.retry_after_s if isinstance(error, Refused) else None
                wait_s = max(asked_s or 0.0, LEAST_RETRY_S)
                if asked_s is None or wait_s > patience_s:
                    return Failure(sent_ns, time.perf_counter_ns(), error, retries)
                patience_s, retries = patience_s - wait_s, retries + 1
                await asyncio.sleep(wait_s)

    async def _cancel(self) -> None:
        self._cancellations += 1
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _fetch(self, method: str, path: str, timeout_s: float) -> tuple[int, str]:
        with self._failing_as_gone(timeout_s):
            async with (
                asyncio.timeout(timeout_s),
                self._pool.stream(
                    method, self._address + path, headers=self._headers, extensions=_limits(timeout_s)
                ) as response,
            ):
                status, headers = int(response.status), dict(response.headers)
                if 300 <= status < 400:
                    location = {name.lower(): value for name, value in headers.items()}.get(b"location", b"")
                    return status, redirection(location.decode(errors="replace"))
                unpacking, text = Unpacking.of(response.headers, LARGEST_PAGE), bytearray()
                async for received in response.aiter_stream():
                    text += unpacking.take(received)
                return status, text.decode("utf-8-sig", errors="replace")

    async def _complete(self, body: bytes, sent_ns: int | None) -> Answer:
        """Send a request and read the answer.

        The request counts as sent at `sent_ns` or, if that is None, at the time when it is written.
        """
        reply: Reply | None = None
        with self._failing_as_gone(self._timeout_s):
            try:
                async with (
                    asyncio.timeout(self._timeout_s) as limit,
                    self._pool.stream(
                        "POST",
                        f"{self._address}/v1/completions",
                        headers=self._headers,
                        content=body,
                        extensions=_limits(self._timeout_s),
                    ) as response,
                ):
                    status, written_ns = int(response.status), response.extensions["network_stream"].written_at_ns
                    reply = Reply(sent_ns or written_ns, status, response.headers, **self._as_answers)
                    await self._read(response, reply, limit)
                return reply.answer()
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, TimeoutError):
                # All tokens may have arrived before the failure.
                if reply is None or (answer := _despite_the_end(reply)) is None:
                    raise
                return answer

    async def _read(self, response: Any, reply: Reply, limit: asyncio.Timeout) -> None:
        """Read a response to its end or, if it is an error, until enough of its text has arrived.

        Each event with output extends the time limit.
        """
        network, events, is_ending = response.extensions["network_stream"], 0, False
        async for received in response.aiter_stream():
            reply.take(received, network.reads, network.read_at_ns)
            if is_ending:
                continue
            if reply.is_done:
                is_ending = True
                limit.reschedule(self._loop.time() + ENDING_S)
            elif reply.is_enough:
                return
            elif reply.events > events:
                events = reply.events
                limit.reschedule(self._loop.time() + self._timeout_s)

    @contextmanager
    def _failing_as_gone(self, timeout_s: float) -> Iterator[None]:
        """Turn transport errors into `ServerGone` with a readable message."""
        try:
            yield
        except (httpcore.ReadTimeout, TimeoutError):
            option = " (backend.timeout_s)" if timeout_s == self._timeout_s else ""
            raise ServerGone(f"The server at {self._address} has sent nothing for {timeout_s:g} s{option}.") from None
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
            raise ServerGone(f"No server can be reached at {self._address}: {reason_of(error)}") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException) as error:
            raise ServerGone(f"The connection to the server at {self._address} was lost: {reason_of(error)}") from None


def _despite_the_end(reply: Reply) -> Answer | None:
    """Return the answer in a response that was cut off after its last token; None if tokens may be missing."""
    try:
        return reply.answer(is_whole=False)
    except ServerGone:
        return None


def _limits(timeout_s: float) -> dict[str, Any]:
    """Return httpcore's timeouts in seconds: for connecting, and between two reads or writes."""
    return {"timeout": {"connect": CONNECT_S, "read": timeout_s, "write": timeout_s}}


@dataclass(frozen=True)
class _Piece:
    """The data of one network read, or the part of this data that has not been passed on yet."""

    read: int
    at_ns: int
    data: bytes


class _StampedSocket(socket.socket):
    """A socket that knows, from the kernel's timestamps, when the data of the last read reached this machine.

    asyncio reads with `recv` or, under TLS, with `recv_into`. A read may happen long after its data arrived, if this
    process was busy or was not scheduled.
    """

    arrived_ns: int | None = None

    def stamp(self) -> None:
        """Have the kernel timestamp arriving data; on systems other than Linux, `arrived_ns` remains None."""
        if sys.platform != "linux":
            return
        with suppress(OSError):
            self.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)

    def recv(self, size: int, flags: int = 0) -> bytes:
        data, notes, *_ = self.recvmsg(size, socket.CMSG_SPACE(TIMESPEC.size), flags)
        self._take(notes)
        return data

    def recv_into(self, buffer: Any, size: int = 0, flags: int = 0) -> int:
        view = memoryview(buffer)
        count, notes, *_ = self.recvmsg_into([view[:size] if size else view], socket.CMSG_SPACE(TIMESPEC.size), flags)
        self._take(notes)
        return count

    def _take(self, notes: Sequence[tuple[int, int, bytes]]) -> None:
        self.arrived_ns = None
        for level, kind, data in notes:
            if (level, kind) == (socket.SOL_SOCKET, SO_TIMESTAMPNS) and len(data) == TIMESPEC.size:
                seconds, nanoseconds = TIMESPEC.unpack(data)
                self.arrived_ns = _as_counter_ns(seconds * NS_PER_S + nanoseconds)


def _as_counter_ns(stamp_ns: int) -> int | None:
    """Convert a recent reading of the wall clock to a reading of `time.perf_counter_ns`.

    Both clocks run at the same speed. The result is None if the wall clock has been set since the reading.
    """
    best = None
    for _ in range(CLOCK_TRIES):
        before_ns, wall_ns, after_ns = time.perf_counter_ns(), time.time_ns(), time.perf_counter_ns()
        if best is None or after_ns - before_ns < best[1] - best[0]:
            best = before_ns, after_ns, wall_ns
        if best[1] - best[0] < CLOCK_NS:
            break
    assert best is not None
    age_ns = best[2] - stamp_ns
    return best[0] - age_ns if 0 <= age_ns < OLDEST_NS else None


class _Incoming(asyncio.Protocol):
    """Receives the data of one connection, and records when the data of each read arrived."""

    def __init__(self, connected: _StampedSocket) -> None:
        self.pieces: deque[_Piece] = deque()
        self.has_ended = False
        self.waiter: asyncio.Future[None] | None = None
        self._socket, self._reads, self._last_ns = connected, 0, 0

    def data_received(self, data: bytes) -> None:
        self._reads += 1
        self._last_ns = max(self._last_ns, self._socket.arrived_ns or time.perf_counter_ns())
        self.pieces.append(_Piece(self._reads, self._last_ns, data))
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
    """A connection; `reads` and `read_at_ns` are the number and the time of the read that delivered the last data.

    `written_at_ns` is when the last data was written. Times are readings of `time.perf_counter_ns`.
    This class replaces httpcore's own stream, which reports no times and takes twice the CPU time per read.
    """

    def __init__(self, transport: asyncio.Transport, incoming: _Incoming) -> None:
        self._transport, self._incoming = transport, incoming
        self.reads, self.read_at_ns, self.written_at_ns = 0, 0, 0

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
            raise httpcore.WriteError("the connection is closed")
        if buffer:  # httpcore ends a request with an empty write
            self.written_at_ns = time.perf_counter_ns()
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
    """Opens connections whose reads and writes are timed."""

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *_options: Any, **_more: Any
    ) -> _TimedStream:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                connected = await _connected(host, port)
                return _TimedStream(*await loop.create_connection(lambda: _Incoming(connected), sock=connected))
        except TimeoutError:
            raise httpcore.ConnectTimeout(f"no connection within {timeout:g} s") from None
        except OSError as error:
            raise httpcore.ConnectError(error.strerror or str(error)) from error


async def _connected(host: str, port: int) -> _StampedSocket:
    """Return a socket connected to the first of a host's addresses that accepts the connection."""
    loop = asyncio.get_running_loop()
    error = OSError(f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        candidate = _StampedSocket(family, kind, protocol)
        try:
            candidate.setblocking(False)
            candidate.stamp()
            await loop.sock_connect(candidate, address)
        except OSError as failure:
            candidate.close()
            error = failure
        except BaseException:
            candidate.close()
            raise
        else:
            return candidate
    raise error


def _end_searches_for(package: str) -> None:
    """Make imports of an optional package fail at once if the package is not installed.

    httpcore tries to import sniffio several times for each request. Python does not remember that a package is missing,
    so it would search all of its folders each time. These searches would take most of the time needed to send a
    request.
    """
    if find_spec(package) is None:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]


# ------------------------------------------------------------------ metrics
def samples(text: str) -> dict[str, float]:
    """Return the values on a page of Prometheus metrics, by metric name, summed over labels."""
    totals: dict[str, float] = {}
    for name, value in SAMPLE.findall(text):
        with suppress(ValueError):
            number = float(value)
            if math.isfinite(number):
                totals[name] = totals.get(name, 0.0) + number
    return totals
