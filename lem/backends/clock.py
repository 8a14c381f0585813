"""Moments of an engine's clock on this process's."""

from __future__ import annotations

import time

# Less is the time between two readings.
SAME_CLOCK_NS = 1_000_000


def clock_offset_ns() -> int:
    """Return what is to be added to the engine's clock, `time.monotonic`, for `time.perf_counter`: 0 on Linux."""
    before_ns = time.perf_counter_ns()
    engine_ns = time.monotonic_ns()
    offset_ns = (before_ns + time.perf_counter_ns()) // 2 - engine_ns
    return offset_ns if abs(offset_ns) > SAME_CLOCK_NS else 0
