"""The clock that times a run: the machine's own, or a virtual one on which time passes only while the run sleeps.

This module knows nothing about engines or meters. Times are in nanoseconds; only their differences are meaningful.
"""

from __future__ import annotations

import time

from lem.quantities import NS_PER_S


class Clock:
    """The machine's monotonic clock, `time.perf_counter_ns`."""

    is_virtual = False

    def now_ns(self) -> int:
        """Return the time."""
        return time.perf_counter_ns()

    def sleep(self, seconds: float) -> None:
        """Sleep for the given time."""
        time.sleep(seconds)

    def sleep_until(self, moment_ns: int) -> int:
        """Sleep until a time, which may already have passed; return the time of waking."""
        left_ns = moment_ns - time.perf_counter_ns()
        if left_ns > 0:
            time.sleep(left_ns / NS_PER_S)
        return time.perf_counter_ns()


class VirtualClock(Clock):
    """A clock that advances only when the run sleeps; it then jumps ahead, without any real waiting."""

    is_virtual = True

    def __init__(self) -> None:
        self._now_ns = round(NS_PER_S)

    def now_ns(self) -> int:
        """Return the time."""
        return self._now_ns

    def sleep(self, seconds: float) -> None:
        """Advance by the given time."""
        self._now_ns += round(seconds * NS_PER_S)

    def sleep_until(self, moment_ns: int) -> int:
        """Advance to the given time, unless it has already passed; return the current time."""
        self._now_ns = max(self._now_ns, moment_ns)
        return self._now_ns


REAL = Clock()
