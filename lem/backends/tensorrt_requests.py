"""Submits requests to TensorRT-LLM, times their tokens, and waits until any request is finished.

TensorRT-LLM answers each request through a future, which is an asyncio future if an event loop is running. In this
module, a separate thread runs an event loop and follows all requests, so that tokens are timed on arrival even if the
main thread is busy. The main thread sleeps until a request is finished. This module knows nothing about options or
models.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lem.backends.session import Request

CLOSING_S = 5.0


@dataclass
class Followed(Request):
    """A request that the follower handles; `result` is the engine's future, or None before the request is submitted."""

    key: int = 0
    last_ns: int = 0
    result: Any = None
    error: BaseException | None = None


class Follower:
    """A thread that hands requests to the engine and follows them until they are finished."""

    def __init__(self) -> None:
        self._finished: queue.SimpleQueue[Followed] = queue.SimpleQueue()
        self.heard_ns = time.perf_counter_ns()
        """The later of two times: when the engine last delivered tokens, and when it last got a request while idle."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="requests", daemon=True)
        self._thread.start()

    def follow(self, request: Followed, submit: Callable[[Followed], Any], *, streams: bool) -> None:
        """Hand a request to the engine and follow it.

        Args:
            request: the request, which collects the tokens.
            submit: a function, called in the thread, that hands the request to the engine. It returns an object that
                can be awaited or, if tokens are streamed, iterated over.
            streams: whether the engine delivers tokens as they are generated.
        """
        asyncio.run_coroutine_threadsafe(self._follow(request, submit, streams), self._loop)

    async def _follow(self, request: Followed, submit: Callable[[Followed], Any], streams: bool) -> None:
        try:
            request.result = submit(request)
            if streams:
                async for partial in request.result:
                    self._note(request, partial, streams)
            else:
                await request.result
                self._note(request, request.result, streams)
        except BaseException as error:  # any error is raised where the main thread waits for the request
            request.error = error
        self._finished.put(request)

    def _note(self, request: Followed, result: Any, streams: bool) -> None:
        """Record the new tokens; a result contains all tokens so far."""
        now_ns = self.heard_ns = request.last_ns = time.perf_counter_ns()
        request.take(result.outputs[0].token_ids[len(request.token_ids) :], now_ns, timed=streams)

    def finished(self, within_s: float) -> list[Followed]:
        """Return the finished requests; if none has finished, sleep until one does, for at most `within_s` seconds."""
        done = []
        with contextlib.suppress(queue.Empty):
            done.append(self._finished.get(timeout=max(0.0, within_s)))
            while True:
                done.append(self._finished.get_nowait())
        return done

    def abort(self, requests: Sequence[Followed]) -> None:
        """Have the engine abort requests, each of which is then soon reported as finished."""

        def abort() -> None:
            for request in requests:
                if request.result is not None:
                    request.result.abort()

        self._loop.call_soon_threadsafe(abort)

    def close(self) -> None:
        """Stop the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSING_S)
