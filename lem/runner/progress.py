"""Progress events, sent from the workers through a pipe to the parent.

A worker sends at most a few lines a second, so that reporting costs almost nothing; the parent sleeps until a line
arrives.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Event:
    """Work done in a phase by one process; a `total` of 0 means that the total is unknown.

    The phase `cycle` announces the beginning of cycle `done` of `total`; the events that follow belong to that cycle.
    """

    phase: str
    done: int = 0
    total: int = 0
    output_tokens: int = 0
    rank: int = 0


Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """Report nothing."""


class PipeReport:
    """Writes events as JSON lines to a file descriptor.

    Within a phase, at most one event is sent every `period_s`, but an event that completes the phase is always sent.
    """

    def __init__(self, descriptor: int, rank: int = 0, period_s: float = 0.5) -> None:
        self._descriptor: int | None = descriptor
        self._rank = rank
        self._period_s = period_s
        self._phase = ""
        self._last_s = 0.0

    def __call__(self, event: Event) -> None:
        """Send an event, unless another event of its phase was sent too recently.

        An event that completes its phase is always sent.
        """
        now_s = time.monotonic()
        is_news = event.phase != self._phase or event.done == event.total
        if self._descriptor is None or not (is_news or now_s - self._last_s >= self._period_s):
            return
        self._phase, self._last_s = event.phase, now_s
        try:
            os.write(self._descriptor, json.dumps(asdict(event) | {"rank": self._rank}).encode() + b"\n")
        except BlockingIOError:
            return  # the reader is busy, but a measurement does not wait for it
        except OSError:
            self._descriptor = None  # the reader is gone, but the measurement continues


class CombinedReport:
    """Combines the events of several processes: rank 0 sets the phase.

    In the measured window, the work of all processes is added up; in other phases, only rank 0's work counts.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._last: dict[int, Event] = {}

    def __call__(self, event: Event) -> None:
        """Take in one process's event; report the combined progress if the event belongs to the phase of rank 0."""
        self._last[event.rank] = event
        lead = self._last.get(0)
        if lead is None or (event.rank and (event.phase != lead.phase or event.phase == "cycle")):
            return
        same = [e for e in self._last.values() if e.phase == lead.phase] if lead.phase == "measured" else [lead]
        done, total = sum(e.done for e in same), sum(e.total for e in same)
        self._report(Event(lead.phase, done, total, sum(e.output_tokens for e in same)))
