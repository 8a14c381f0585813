"""The steady state of batched serving: from when all places are first taken until they are last.

While the first requests fill the places, and while the last ones leave them, an engine works on smaller batches; with
few prompts that is much of the window. Published figures of served models, such as ML.ENERGY's, leave it out. Knows
nothing about engines.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from lem.record import EnergySoFar, RequestRecord

# The share of the places' time that must be taken. Between a request and the next one in its place lies a step.
LEAST_OCCUPANCY = 0.95


class Steady(NamedTuple):
    """A steady state: its length, the tokens that came in it, and its energy if that was read at both of its ends."""

    duration_s: float
    output_tokens: int
    energy_j: float | None


def places(strategy: str, batch_size: int, pattern: str, concurrency: int | None, *, by_client: bool) -> int | None:
    """Return how many requests an engine has under way when it is fully used; None if nothing keeps it so.

    Padded batches lose requests from the first that ends, and open-loop traffic arrives as it will.

    Args:
        strategy: of batching.
        batch_size: the engine's places.
        pattern: of traffic.
        concurrency: the requests in each replica's system, for that pattern.
        by_client: only the client knows what is under way, as with a server.
    """
    if strategy != "continuous" or pattern not in ("closed", "concurrency"):
        return None
    if pattern == "closed" or concurrency is None:
        return batch_size
    return concurrency if by_client else min(concurrency, batch_size)


def steady_state(
    requests: Sequence[RequestRecord], taken: int, energy: Sequence[EnergySoFar], *, ends_at_readings: bool
) -> Steady | None:
    """Return the steady state of a cycle that ran at one go; None if there is none.

    Args:
        requests: those of all processes.
        taken: the places of each replica.
        energy: readings of the window's energy, in order.
        ends_at_readings: begin and end with the first and the last of these readings in the steady state, so that
            its time, tokens and energy are those of the same span.
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
    """Return from when to when a process had that many requests under way, apart from moments between two of them.

    None if it never had, if none of them took another's place, as then there was no queue to keep it so, or if places
    were empty for more than moments, as in an engine without memory for all of them.
    """
    if len(requests) <= taken:
        return None
    # An end comes before a beginning at the same time.
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
    """Return how many of a request's tokens came after `begin_s` and by `end_s`.

    Without streaming they are taken to be spread evenly, after the prefill if its end is known.
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
