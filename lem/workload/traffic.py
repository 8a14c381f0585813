"""The arrival of requests: all at once, at a given rate, with a fixed concurrency, or as recorded in a trace.

Requests of open-loop traffic (constant, poisson, trace) arrive whether or not the engine keeps up, and wait in a queue.
This module knows nothing about engines or meters. All times in ns are readings of `Arrivals.clock`.
"""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from lem.errors import BadInput
from lem.quantities import NS_PER_S
from lem.spec.experiment import Traffic
from lem.workload.clock import REAL, Clock

T = TypeVar("T")
R = TypeVar("R")

# A longer trace is considered a mistake, such as milliseconds in a column of seconds.
LONGEST_S = 30 * 86400.0


def arrival_times_s(traffic: Traffic, count: int, seed: int) -> list[float]:
    """Return the arrival time of each request of open-loop traffic, in seconds after the window opens.

    In Poisson traffic, the gaps between requests and the gap before the first request are exponential, with a mean of
    1 / target_qps. In constant traffic, the first request arrives immediately. The same seed gives the same times, and
    a longer run begins with the same times as a shorter run.

    Raises:
        BadInput: the trace cannot be read, or has fewer arrivals than the run has requests.
    """
    if traffic.pattern == "trace":
        return read_trace(Path(traffic.trace or ""), count)
    assert traffic.target_qps is not None
    if traffic.pattern == "constant":
        return [position / traffic.target_qps for position in range(count)]
    gaps, now_s, times = random.Random(f"arrivals:{seed}"), 0.0, []
    for _ in range(count):
        now_s += gaps.expovariate(traffic.target_qps)
        times.append(now_s)
    return times


def in_system_s(concurrency: int, ends_s: Sequence[float]) -> list[float]:
    """Return the arrival times of the requests that are in the system now, given the ends of earlier requests.

    Args:
        concurrency: the fixed number of requests in the system. That many requests arrive at 0; each later request
            arrives when an earlier one ends.
        ends_s: the times at which requests have ended so far.
    """
    return sorted([*[0.0] * concurrency, *ends_s])[len(ends_s) :]


def recorded_times_s(traffic: Traffic, count: int) -> list[float] | None:
    """Return the arrival times in a trace; None for other patterns, whose times are computed from the configuration.

    Raises:
        BadInput: see `read_trace`.
    """
    if traffic.pattern != "trace" or traffic.trace is None:
        return None
    return read_trace(Path(traffic.trace), count)


def read_trace(path: Path, count: int) -> list[float]:
    """Read the first `count` arrivals of a CSV file with the column t_s, shifted so that the first arrives at 0.

    Raises:
        BadInput: the file cannot be read, lacks the column, has fewer than `count` arrivals, or contains a time that is
            not a finite number or is more than `LONGEST_S` after the first.
    """
    try:
        times = _times(path)
    except FileNotFoundError:
        raise BadInput(f"The traffic trace {path} does not exist.") from None
    except KeyError:
        raise BadInput(f"The traffic trace {path} has no column t_s.") from None
    except OSError as error:
        raise BadInput(f"The traffic trace {path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, TypeError, csv.Error) as error:
        raise BadInput(f"The traffic trace {path} cannot be read: {' '.join(str(error).split())}.") from None
    if len(times) < count:
        raise BadInput(
            f"The traffic trace {path} has fewer arrivals ({len(times)}) than the run has requests ({count})."
        )
    return [t - times[0] for t in times[:count]]  # the first arrives when the window opens


def _times(path: Path) -> list[float]:
    """Return the times of a trace in ascending order; raise ValueError, with the line's number, if one is invalid."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        found = [(row["t_s"], rows.line_num) for row in rows]
    times = [(_seconds(text, line), line) for text, line in found]
    first_s, first_line = min(times, default=(0.0, 0))
    for t_s, line in times:
        if t_s - first_s > LONGEST_S:
            days, begin = LONGEST_S / 86400, f"the first arrival ({first_s:g} s on line {first_line})"
            raise ValueError(f"line {line}: {t_s:g} s is more than {days:.0f} days after {begin}")
    return sorted(t_s for t_s, _ in times)


def _seconds(text: str | None, line: int) -> float:
    try:
        t_s = float(text or "")
    except ValueError:
        raise ValueError(f"line {line}: '{text or ''}' is not a number of seconds") from None
    if not math.isfinite(t_s):
        raise ValueError(f"line {line}: {text} is not a valid arrival time")
    return t_s


@dataclass(frozen=True)
class Arrived(Generic[T]):
    """A request and the time at which it arrived."""

    request: T
    at_ns: int


class Arrivals(Generic[T]):
    """The requests of a window as they arrive; with a fixed concurrency, each end lets one more arrive."""

    def __init__(
        self,
        requests: Sequence[T],
        times_s: Sequence[float] | None,
        concurrency: int,
        opened_ns: int,
        first_s: Sequence[float] | None = None,
        clock: Clock = REAL,
    ) -> None:
        """Queue the requests in order.

        Args:
            requests: the requests, in order of arrival.
            times_s: the arrival times in seconds after the window's opening (negative before the opening); None for a
                fixed concurrency.
            concurrency: the number of requests in the system at any time, if `times_s` is None.
            opened_ns: the time when the window opened.
            first_s: the arrival times (as in `times_s`) of the requests that are in the system from the start; None if
                they arrive at the opening.
            clock: the clock for `opened_ns` and for the arrivals.
        """
        self.clock = clock
        self._left = list(requests)[::-1]
        self._times_ns = None if times_s is None else [opened_ns + round(t * NS_PER_S) for t in times_s][::-1]
        first_s = [0.0] * concurrency if first_s is None else first_s
        self._free_at_ns = [opened_ns + round(t * NS_PER_S) for t in first_s]

    def __bool__(self) -> bool:
        """Return whether any requests are left to take."""
        return bool(self._left)

    def next_ns(self) -> int | None:
        """Return when the next request arrives; None if none is left, or if another must finish first."""
        if not self._left:
            return None
        if self._times_ns is not None:
            return self._times_ns[-1]
        return self._free_at_ns[0] if self._free_at_ns else None

    def take(self, now_ns: int, at_most: int) -> list[Arrived[T]]:
        """Take up to `at_most` of the requests that have arrived, in order."""
        taken: list[Arrived[T]] = []
        while len(taken) < at_most and (at_ns := self.next_ns()) is not None and at_ns <= now_ns:
            taken.append(Arrived(self._left.pop(), at_ns))
            if self._times_ns is not None:
                self._times_ns.pop()
            else:
                self._free_at_ns.pop(0)
        return taken

    def finished(self, count: int, at_ns: int) -> None:
        """Record that `count` requests finished at `at_ns`; with a fixed concurrency, each lets one more arrive."""
        if self._times_ns is None:
            self._free_at_ns += [at_ns] * count


def in_turn(
    arrivals: Arrivals[T], at_most: int, run: Callable[[Sequence[T]], Iterator[Sequence[R]]]
) -> Iterator[tuple[Sequence[Arrived[T]], Sequence[R]]]:
    """Serve arrivals with an engine that works on one batch at a time.

    If no request is waiting, the function sleeps until the next arrival. Otherwise, it takes up to `at_most` waiting
    requests.

    Yields:
        The batch that was taken, and the outputs of a part of the batch as soon as that part is finished.
    """
    while arrivals:
        batch = arrivals.take(arrivals.clock.now_ns(), at_most)
        if not batch:
            _sleep_until_the_next(arrivals)
            continue
        for part in run([each.request for each in batch]):
            yield batch, part
        arrivals.finished(len(batch), arrivals.clock.now_ns())


def as_places_become_free(
    arrivals: Arrivals[T],
    at_most: int,
    *,
    running: Callable[[], int],
    begin: Callable[[Arrived[T]], None],
    advance: Callable[[], Sequence[R]],
) -> Iterator[Sequence[R]]:
    """Serve arrivals with an engine that accepts requests between steps of its work.

    If the engine has nothing to do, the function sleeps until the next arrival.

    Args:
        arrivals: the requests and their arrival times.
        at_most: the maximum number of requests that the engine runs at the same time.
        running: a function that returns the number of requests that the engine is running now.
        begin: a function that passes one request to the engine.
        advance: a function that makes the engine take a step, and returns the outputs finished in that step.

    Yields:
        The outputs finished in a step, unless there are none.
    """
    while arrivals or running():
        for each in arrivals.take(arrivals.clock.now_ns(), at_most - running()):
            begin(each)
        if not running():
            _sleep_until_the_next(arrivals)
        elif done := advance():
            arrivals.finished(len(done), arrivals.clock.now_ns())
            yield done


def _sleep_until_the_next(arrivals: Arrivals[T]) -> None:
    next_ns = arrivals.next_ns()
    assert next_ns is not None  # no request is running, so the next arrival does not wait for one to finish
    arrivals.clock.sleep_until(next_ns)
