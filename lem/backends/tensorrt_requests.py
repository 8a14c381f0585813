"""Requests that TensorRT-LLM works on: handed over one by one, their tokens noted as they come, waited for together.

TensorRT-LLM answers each request through a future of its own, of asyncio where a loop runs. Here a thread runs one, so
that a token's time is that at which it came, whatever the main thread does, and the main thread waits asleep for
whichever request is finished next. Knows neither options nor models.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lem.backends.base import Encoded
from lem.workload.tokens import Chunk

TAKING_BACK_S = 30.0
CLOSING_S = 5.0


@dataclass
class Request:
    """A prompt that the engine works on; `result` is the engine's own, `error` what became of it instead."""

    prompt: Encoded
    batch: int
    arrived_ns: int
    token_ids: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    last_ns: int = 0
    result: Any = None
    error: BaseException | None = None
    was_taken: bool = False


class Requests:
    """The requests of one engine that are under way."""

    def __init__(self, submit: Callable[[Request], Any], *, streams: bool) -> None:
        """Take no request yet.

        Args:
            submit: hands a request to the engine and returns its result, which can be awaited or, where tokens are
                streamed, iterated over; called where an event loop runs.
            streams: whether tokens are handed out as they come.
        """
        self._submit, self._streams = submit, streams
        self._finished: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._running: dict[int, Request] = {}
        self.heard_ns = time.perf_counter_ns()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Return how many are under way."""
        return len(self._running)

    def add(self, request: Request) -> None:
        """Hand a request to the engine."""
        if not self._running:
            self.heard_ns = time.perf_counter_ns()
        self._running[id(request)] = request
        asyncio.run_coroutine_threadsafe(self._follow(request), self._loop)

    async def _follow(self, request: Request) -> None:
        try:
            request.result = self._submit(request)
            request.was_taken = True
            if self._streams:
                async for partial in request.result:
                    self._note(request, partial)
            else:
                await request.result
                self._note(request, request.result)
        except BaseException as error:  # whatever it is, somebody waits for it
            request.error = error
        self._finished.put(request)

    def _note(self, request: Request, result: Any) -> None:
        """Note the tokens that are new: a result holds all of them so far."""
        now_ns = self.heard_ns = request.last_ns = time.perf_counter_ns()
        ids = result.outputs[0].token_ids
        if new := len(ids) - len(request.token_ids):
            request.token_ids = list(ids)
            if self._streams:
                request.chunks.append(Chunk(now_ns, new))

    def finished(self, within_s: float) -> list[Request]:
        """Return those that are finished by now; waits for one, asleep, and not longer than that."""
        done = []
        with contextlib.suppress(queue.Empty):
            done.append(self._finished.get(timeout=max(0.0, within_s)))
            while True:
                done.append(self._finished.get_nowait())
        # One that was taken back may have been finished at the same time.
        return [request for request in done if self._running.pop(id(request), None) is not None]

    def take_back(self) -> None:
        """Take back from the engine what nobody waits for any more, and wait until it has let go of it."""
        self._loop.call_soon_threadsafe(_abort, list(self._running.values()))
        until_s = time.monotonic() + TAKING_BACK_S
        while self._running and time.monotonic() < until_s:
            self.finished(until_s - time.monotonic())
        self.forget()

    def forget(self) -> None:
        """Wait for none of them any more; nothing is told to the engine, which has broken down."""
        self._running.clear()

    def close(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSING_S)


def _abort(requests: Sequence[Request]) -> None:
    for request in requests:
        if request.result is not None:
            request.result.abort()
