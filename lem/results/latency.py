"""Statistics derived from the requests' times: latency percentiles, the queue and goodput.

A request's own token latencies are computed by `lem.workload.tokens`. This module knows nothing about engines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol

from lem.record import RequestRecord
from lem.results.statistics import percentile
from lem.warning_codes import PERCENTILES

# The quantities that have percentiles: the prefix of their columns, and their names in warnings.
SAMPLED = {
    "latency": "latency",
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "tpot": "time per output token",
    "queue": "queueing",
}


class Limits(Protocol):
    """The limits within which a request counts as good, as configured for the traffic."""

    ttft_limit_s: float | None
    itl_limit_s: float | None


class Extent(NamedTuple):
    """The span of a cycle's requests according to their own times, which start again from 0 in each attempt's window.

    `first_s` is the earliest start. `last_s` is the latest end, and `busy_s` the time in which at least one request was
    running; both are added up over the attempts. `attempts` is the number of attempts.
    """

    first_s: float
    last_s: float
    busy_s: float
    attempts: int


def extent(requests: Sequence[RequestRecord]) -> Extent:
    """Return the extent of the requests, of which there must be at least one."""
    attempts = dict.fromkeys([r.attempt for r in requests])
    of_attempts = [sorted([(r.start_s, r.end_s) for r in requests if r.attempt == attempt]) for attempt in attempts]
    return Extent(
        min([spans[0][0] for spans in of_attempts]),
        sum([max([end_s for _, end_s in spans]) for spans in of_attempts]),
        sum(map(_union_s, of_attempts)),
        len(of_attempts),
    )


def summary(stem: str, values: Iterable[float]) -> dict[str, float | None]:
    """Return the mean, median, and 95th and 99th percentiles, keyed by column name; all are None without values."""
    return {name: value for name, (value,) in summaries(stem, [list(values)]).items()}


def summaries(stem: str, groups: Sequence[Sequence[float]]) -> dict[str, list[float | None]]:
    """Return the statistics of `summary` for several groups of values: for each column name, one value per group."""
    ordered = [sorted(values) for values in groups]
    columns: dict[str, list[float | None]] = {
        f"{stem}_mean_s": [sum(values) / len(values) if values else None for values in ordered]
    }
    for q in PERCENTILES:
        columns[f"{stem}_p{q}_s"] = [percentile(values, q) if values else None for values in ordered]
    return columns


def of_tokens(requests: Sequence[RequestRecord]) -> dict[str, float | None]:
    """Return summaries of TTFT and TPOT over requests, and of ITL over all tokens; empty if tokens were not timed."""
    timed = [r for r in requests if r.ttft_s is not None]
    if not timed:
        return {}
    return {
        **summary("ttft", (r.ttft_s for r in timed if r.ttft_s is not None)),
        **summary("itl", (gap for r in timed for gap in r.itl_s or ())),
        **summary("tpot", (r.tpot_s for r in timed if r.tpot_s is not None)),
    }


def samples(counts: Sequence[Mapping[str, int]]) -> dict[str, list[int | None]]:
    """Return the columns that hold the numbers of samples, given the `sample_counts` of several cycles."""
    return {f"{stem}_samples": [each.get(name) for each in counts] for stem, name in SAMPLED.items()}


def sample_counts(requests: Sequence[RequestRecord]) -> dict[str, int]:
    """Return the number of values behind each set of percentiles, leaving out sets without values.

    Requests that start and end together, as in a padded batch, have the same times, which count once.
    """
    longest: dict[tuple[object, ...], RequestRecord] = {}
    for r in requests:
        times = (r.attempt, r.rank, r.arrived_s, r.start_s, r.end_s)
        other = longest.get(times)
        if other is None or len(r.itl_s or ()) > len(other.itl_s or ()):
            longest[times] = r
    apart = longest.values()
    streamed = [r for r in apart if r.ttft_s is not None]
    counts = {
        "latency": len(apart),
        "ttft": len(streamed),
        "itl": sum([len(r.itl_s or ()) for r in streamed]),
        "tpot": len([r for r in apart if r.tpot_s is not None]),
        "queue": len([r for r in apart if r.queue_s is not None]),
    }
    return {SAMPLED[stem]: count for stem, count in counts.items() if count}


def under_load(
    requests: Sequence[RequestRecord],
    duration_s: float | None,
    traffic: Limits,
    opened_s: Mapping[int, float | None] = MappingProxyType({}),
) -> dict[str, float | None]:
    """Return the metrics of traffic: the actual arrival rate, the queue, the idle share of the window, and goodput.

    Failed requests count as arrivals and as load, but never as good.

    Args:
        requests: the requests of one cycle.
        duration_s: the total length of all windows.
        traffic: the limits for goodput.
        opened_s: when each attempt's window opened, on the clock of the arrivals; 0 for an attempt that is not listed.
            If any of these times is None, the metrics that depend on this clock are left out.
    """
    arrived = [r for r in requests if r.arrived_s is not None]
    good = _goodput(requests, duration_s, traffic)
    if not arrived:
        return good
    queue = summary("queue", (r.queue_s for r in arrived if r.queue_s is not None))
    if None in opened_s.values():
        return {**queue, **good}
    present = [(_on_clock(r.arrived_s or 0.0, r, opened_s), _on_clock(r.end_s, r, opened_s)) for r in arrived]
    span_s = max(present)[0] - min(present)[0]
    return {
        "arrival_rate_per_s": (len(present) - 1) / span_s if span_s > 0 else None,
        **queue,
        "idle_share": 1 - _union_s(sorted(present)) / duration_s if duration_s else None,
        **good,
    }


def _on_clock(t_s: float, request: RequestRecord, opened_s: Mapping[int, float | None]) -> float:
    """Convert a time within a request's window to the clock of the arrivals."""
    return t_s + (opened_s.get(request.attempt) or 0.0)


def _goodput(requests: Sequence[RequestRecord], duration_s: float | None, traffic: Limits) -> dict[str, float | None]:
    ttft_s, itl_s = traffic.ttft_limit_s, traffic.itl_limit_s
    if (ttft_s is None and itl_s is None) or not duration_s:
        return {}
    good = sum(
        r.error is None
        and r.ttft_s is not None
        and (ttft_s is None or r.ttft_s <= ttft_s)
        and (itl_s is None or r.tpot_s is None or r.tpot_s <= itl_s)
        for r in requests
    )
    return {"goodput_requests_per_s": good / duration_s}


def _union_s(spans: Sequence[tuple[float, float]]) -> float:
    """Return the total time covered by at least one span, given the spans in order of their starts."""
    total, reached = 0.0, float("-inf")
    for begin, end in spans:
        uncovered_from = begin if begin > reached else reached
        if end > uncovered_from:
            total += end - uncovered_from
            reached = end
    return total
