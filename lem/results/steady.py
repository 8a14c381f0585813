"""The steady state of batched serving: the span from the first to the last moment when all slots are taken.

While the first requests fill the slots, and while the last ones leave them, an engine works on smaller batches. With
few prompts, these two periods are a large part of the window. Published figures of served models, such as ML.ENERGY's,
exclude both periods. This module knows nothing about engines.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from lem.record import EnergySoFar, RequestRecord

# The minimum occupancy of the slots. It is below 1 because a slot is empty for one engine step between two requests.
LEAST_OCCUPANCY = 0.95


class Steady(NamedTuple):
    """A steady state: its length, the tokens generated in it, and its energy if the meter was read at both ends."""

    duration_s: float
    output_tokens: int
    energy_j: float | None


def places(strategy: str, batch_size: int, pattern: str, concurrency: int | None, *, by_client: bool) -> int | None:
    """Return how many requests are in flight at full load; None if nothing keeps the load full.

    The load is not kept full by padded batches, which empty as their requests end, or by open-loop traffic.

    Args:
        strategy: the batching strategy.
        batch_size: the number of the engine's slots.
        pattern: the traffic pattern.
        concurrency: the number of requests that each replica holds at a time, for the pattern `concurrency`.
        by_client: true if a server runs the model. With the pattern `concurrency`, requests in the server's queue then
            count as well, so `batch_size` is no limit.
    """
    if strategy != "continuous" or pattern not in ("closed", "concurrency"):
        return None
    if pattern == "closed" or concurrency is None:
        return batch_size
    return concurrency if by_client else min(concurrency, batch_size)


def steady_state(
    requests: Sequence[RequestRecord], taken: int, energy: Sequence[EnergySoFar], *, ends_at_readings: bool
) -> Steady | None:
    """Return the steady state of a cycle; None if there is none, or if the cycle ran in several attempts.

    Args:
        requests: the requests of all processes.
        taken: how many requests each replica has in flight at full load; see `places`.
        energy: readings of the window's energy, in order.
        ends_at_readings: begin at the first reading in the steady state and end at the last, so that time, tokens and
            energy belong to the same span. With fewer than two readings in the steady state, None is returned.
    """
    ranks = {r.rank for r in requests}
    spans = [full_span([r for r in requests if r.rank == rank], taken) for rank in ranks]
    known = [span for span in spans if span is not None]
    if not known or len(known) < len(spans) or len({r.attempt for r in requests}) > 1:
        return None
    begin_s, end_s = max(begin for begin, _ in known), min(end for _, end in known)
    energy_j = None
    if ends_at_readings:
        inside = [each for each in energy if begin_s <= each.at_s <= end_s]
        if len(inside) < 2:
            return None
        begin_s, end_s = inside[0].at_s, inside[-1].at_s
        energy_j = inside[-1].energy_j - inside[0].energy_j
    if end_s <= begin_s:
        return None
    return Steady(end_s - begin_s, sum(tokens_between(r, begin_s, end_s) for r in requests), energy_j)


def full_span(requests: Sequence[RequestRecord], taken: int) -> tuple[float, float] | None:
    """Return the start and end of the span in which a process had `taken` requests in flight, ignoring brief gaps.

    Returns None in three cases:

    - The process never had `taken` requests in flight.
    - No request took over another request's slot, so there was no queue to keep the engine full.
    - Slots were empty for longer than a brief gap, for example because the engine had too little memory to use them
      all.
    """
    if len(requests) <= taken:
        return None
    # At equal times, ends come before beginnings.
    events = sorted([(r.start_s, 1) for r in requests] + [(r.end_s, -1) for r in requests])
    running, begin_s, end_s = 0, None, None
    for at_s, change in events:
        if change < 0 and running >= taken:
            end_s = at_s
        running += change
        if begin_s is None and running >= taken:
            begin_s = at_s
    if begin_s is None or end_s is None:
        return None
    taken_s = sum(max(0.0, min(r.end_s, end_s) - max(r.start_s, begin_s)) for r in requests)
    return (begin_s, end_s) if taken_s >= LEAST_OCCUPANCY * taken * (end_s - begin_s) else None


def tokens_between(request: RequestRecord, begin_s: float, end_s: float) -> int:
    """Return how many of a request's tokens came after `begin_s` and no later than `end_s`.

    Without streaming, the tokens of a request are assumed to come at equal intervals. If the end of the request's
    prefill is known, the intervals begin there.
    """
    if request.end_s <= begin_s or request.start_s >= end_s:
        return 0
    if request.start_s >= begin_s and request.end_s <= end_s:
        return request.output_tokens or 0
    times = _token_times_s(request)
    return bisect_right(times, end_s) - bisect_right(times, begin_s)


def _token_times_s(request: RequestRecord) -> list[float]:
    count = request.output_tokens or 0
    if request.ttft_s is not None and request.itl_s is not None:
        at_s = (request.start_s if request.arrived_s is None else request.arrived_s) + request.ttft_s
        times = [at_s]
        for gap_s in request.itl_s:
            at_s += gap_s
            times.append(at_s)
        return times
    if request.prefill_s is None or count < 2:
        step_s = (request.end_s - request.start_s) / max(count, 1)
        return [request.start_s + (i + 1) * step_s for i in range(count)]
    first_s = request.start_s + request.prefill_s
    return [first_s + i * (request.end_s - first_s) / (count - 1) for i in range(count)]
