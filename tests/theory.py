"""Queueing theory with which runs are compared."""

from __future__ import annotations

from collections.abc import Sequence


def exact_waits_s(arrivals_s: Sequence[float], services_s: Sequence[float]) -> list[float]:
    """Return each request's wait by Lindley's recursion: the engine is free once all earlier requests are served."""
    waits, free_s = [], 0.0
    for at_s, service_s in zip(arrivals_s, services_s, strict=True):
        start_s = max(at_s, free_s)
        waits.append(start_s - at_s)
        free_s = start_s + service_s
    return waits
