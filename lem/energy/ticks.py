"""Reads an energy counter that advances in ticks, and estimates its value between ticks.

The counter holds the energy up to its last tick. If two readings differ, a tick fell between them. If these readings
are also close together, the time of the tick is known to within a few milliseconds. The times of the ticks around it
are then known as well, because ticks are evenly spaced. Any other reading, even one from a slow call, then gives the
exact energy at the last tick before it. A reading is left out if it is too close to a tick to tell which came first.

The energy at any other time is interpolated between the ticks on either side. If a load starts or stops at that time,
the power changes. The energy between the two ticks is therefore divided in proportion to the power before the first
tick and the power after the second. This module knows nothing about drivers.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lem.quantities import NS_PER_S

# The minimum time for determining the tick period: long enough for five ticks of 100 ms.
LEARN_S = 0.6
# The relative accuracy to which the tick period must be known, and the maximum time for determining it. The slower the
# calls are, the longer it takes to reach this accuracy.
PERIOD_WITHIN = 0.02
LEARN_MOST_S = 2.0
# Maximum time to wait for a tick of a counter with a known tick period.
WATCH_S = 0.3
POLL_S = 0.001
# If more than this share of the readings show a change, the counter ticks as fast as it can be read.
CHANGES_ALWAYS = 0.8
# The energy at a time is estimated only from readings within this distance of that time.
NEAR_S = 0.5
# A tick's time is extrapolated from a known tick at most this many ticks away, because the period varies slightly.
FRESH_TICKS = 5
# A tick may be early or late by this share of the period.
JITTER = 0.03
KEPT = 4096


@dataclass(frozen=True)
class Edge:
    """The energy at a point in time, or None and a reason if the energy is unknown."""

    energy_mj: float | None
    reason: str | None = None


class Reading(NamedTuple):
    """A value of the counter, and the beginning and end of the call that read it."""

    asked_ns: int
    got_ns: int
    value_mj: int

    @property
    def at_ns(self) -> int:
        """The best estimate of when the counter was sampled: the middle of the call."""
        return (self.asked_ns + self.got_ns) // 2


class Tick(NamedTuple):
    """An advance of the counter between two readings, with the values before and after.

    `within_ns` is the uncertainty of the tick's time, and `calls_ns` is the total duration of the two readings' calls.
    """

    at_ns: int
    within_ns: int
    calls_ns: int
    before_mj: int
    after_mj: int

    @property
    def is_late(self) -> bool:
        """Whether the readings are so far apart that this process was evidently not running between them."""
        return 2 * self.within_ns > self.calls_ns + 3 * POLL_S * NS_PER_S


class Counter:
    """An energy counter and its readings. The methods may be called from several threads.

    Args:
        read_mj: a function that returns the counter's value in millijoules.
        failure: the type of error that `read_mj` raises.
    """

    def __init__(self, read_mj: Callable[[], int], failure: type[Exception]) -> None:
        self._read_mj, self._failure = read_mj, failure
        self._lock = threading.Lock()
        self._readings: deque[Reading] = deque(maxlen=KEPT)
        self._ticks: deque[Tick] = deque(maxlen=KEPT)
        self.tick_s: float | None = None
        self.error: Exception | None = None

    @property
    def reason(self) -> str | None:
        """Why the last reading failed, or None if it succeeded."""
        return None if self.error is None else str(self.error)

    # -------------------------------------------------------------- reading
    def poll(self) -> Tick | None:
        """Read the counter; return the tick since the previous reading, or None if there was none or reading failed."""
        asked_ns = time.perf_counter_ns()
        try:
            value_mj = self._read_mj()
        except self._failure as error:
            self.error = error
            return None
        reading = Reading(asked_ns, time.perf_counter_ns(), value_mj)
        with self._lock:
            self.error = None
            before = self._readings[-1] if self._readings else None
            self._readings.append(reading)
            if before is None or before.value_mj == value_mj:
                return None
            width_ns = reading.at_ns - before.at_ns
            calls_ns = reading.got_ns - reading.asked_ns + before.got_ns - before.asked_ns
            tick = Tick((before.at_ns + reading.at_ns) // 2, abs(width_ns) // 2, calls_ns, before.value_mj, value_mj)
            self._ticks.append(tick)
            return tick

    def learn(self) -> None:
        """Read the counter for a while to determine its tick period; `tick_s` stays None if that fails."""
        self.poll()
        ticks: list[Tick] = []
        polls, begun_ns = 0, time.perf_counter_ns()
        while self.error is None and not _is_enough(ticks, (time.perf_counter_ns() - begun_ns) / NS_PER_S):
            time.sleep(POLL_S)
            polls += 1
            if tick := self.poll():
                ticks.append(tick)
        if len(ticks) >= 3 and len(ticks) <= CHANGES_ALWAYS * polls:
            gaps_ns = [later.at_ns - earlier.at_ns for earlier, later in itertools.pairwise(ticks)]
            usual_ns = statistics.median(gaps_ns)
            # A longer gap means that a tick was missed.
            self.tick_s = sum(gaps_ns) / sum(max(1, round(gap_ns / usual_ns)) for gap_ns in gaps_ns) / NS_PER_S

    def watch(self) -> bool:
        """Read the counter until it ticks between two readings that are close together; return whether that happened.

        If the tick period is unknown, the counter is only read twice, and the result is False.
        """
        self.poll()
        until_ns = time.perf_counter_ns() + int(WATCH_S * NS_PER_S)
        while self.error is None and time.perf_counter_ns() < until_ns:
            time.sleep(POLL_S)
            tick = self.poll()
            if not self.tick_s or (tick and self._is_sharp(tick) and not tick.is_late):
                return self.tick_s is not None
        return False

    def watch_end(self) -> None:
        """Read the counter until it ticks and, if it does, once more after the next tick; for the end of a window."""
        if self.watch():
            self._sleep_ticks(1.5)
            self.poll()

    def follow(self) -> None:
        """Read the counter now and once after each of its next two ticks; for the beginning of a window.

        If the times of these ticks cannot be predicted, the counter is read until it ticks, as at the end of a window.
        """
        self.poll()
        if self.error is not None:
            return
        now_ns = time.perf_counter_ns()
        tick = self._best_tick(now_ns)
        if tick is None or not self.tick_s:
            self.watch_end()
            return
        since = (now_ns - tick.at_ns) / (self.tick_s * NS_PER_S)
        asleep = int(since) + 1.5 - since
        for _ in range(2):
            self._sleep_ticks(asleep)
            self.poll()
            asleep = 1.0

    def _sleep_ticks(self, count: float) -> None:
        time.sleep(count * (self.tick_s or 0.0))

    # -------------------------------------------------------------- evaluating the readings
    def at(self, at_ns: int, begun: Edge | None = None, begun_ns: int = 0) -> Edge:
        """Return the energy at a time, interpolated between the ticks on either side of it.

        Args:
            at_ns: the time.
            begun: the energy at the beginning of the window if `at_ns` is the window's end, otherwise None. If all
                readings were taken after the end, they do not show the power before it; the energy is then interpolated
                between the window's beginning and these readings.
            begun_ns: the time of `begun`.
        """
        if self.error is not None:
            return Edge(None, self.reason)
        with self._lock:
            readings = [r for r in self._readings if abs(r.at_ns - at_ns) <= NEAR_S * NS_PER_S]
        if not readings:
            return Edge(None, "it was not read")
        tick = self._best_tick(at_ns)
        if tick is None or not self.tick_s:
            known = [(r.at_ns, float(r.value_mj)) for r in readings]
            step_ns = 0.0 if self.tick_s else NEAR_S * NS_PER_S
        else:
            step_ns = self.tick_s * NS_PER_S
            known = _at_ticks(readings, tick, step_ns)
        if begun is not None and begun.energy_mj is not None and begun_ns < known[0][0]:
            known = [(begun_ns, begun.energy_mj), *known]
        energy_mj = _energy_mj(known, at_ns, longest_step_ns=1.5 * step_ns)
        return Edge(max(energy_mj, _least_mj(readings, at_ns)))

    def last_since(self, begun: Edge) -> Edge:
        """Return the energy at the last reading; unknown if reading failed or the counter is not yet beyond `begun`."""
        if begun.energy_mj is None:
            return begun
        if self.error is not None or not self._readings:
            return Edge(None, self.reason or "it was not read")
        value_mj = self._readings[-1].value_mj
        if value_mj <= begun.energy_mj:
            return Edge(None, "it has not advanced beyond the window's beginning")
        return Edge(float(value_mj))

    def _is_sharp(self, tick: Tick) -> bool:
        return self.tick_s is not None and tick.within_ns <= self.tick_s * NS_PER_S / 4

    def _best_tick(self, at_ns: int) -> Tick | None:
        """Return the best reference tick near a time, or None if no tick is both near and precisely timed."""
        if not self.tick_s:
            return None
        reach_ns = FRESH_TICKS * self.tick_s * NS_PER_S
        with self._lock:
            near = [tick for tick in self._ticks if abs(tick.at_ns - at_ns) <= reach_ns and self._is_sharp(tick)]
        return min(near, key=lambda tick: tick.within_ns + JITTER / 2 * abs(tick.at_ns - at_ns), default=None)


def _is_enough(ticks: Sequence[Tick], seconds: float) -> bool:
    """Return whether to stop reading: the tick period is known precisely, no tick came, or the time is up."""
    if seconds < LEARN_S or not ticks or seconds > LEARN_MOST_S:
        return seconds >= LEARN_S
    return 2 * statistics.median(tick.within_ns for tick in ticks) <= PERIOD_WITHIN * (ticks[-1].at_ns - ticks[0].at_ns)


def _at_ticks(readings: Sequence[Reading], tick: Tick, step_ns: float) -> list[tuple[int, float]]:
    """Return the time of each tick, extrapolated from `tick`, and the counter's value after it, in order of time.

    A reading is left out if it is too close to a tick to tell which of the two came first.
    """
    values = {-1: tick.before_mj, 0: tick.after_mj}
    for reading in readings:
        steps = (reading.at_ns - tick.at_ns) / step_ns
        number = int(steps // 1)
        within = (tick.within_ns + (reading.got_ns - reading.asked_ns) / 2) / step_ns + JITTER
        if within < steps - number < 1 - within:
            values.setdefault(number, reading.value_mj)
    return [(tick.at_ns + round(number * step_ns), float(values[number])) for number in sorted(values)]


def _energy_mj(known: Sequence[tuple[int, float]], at_ns: int, longest_step_ns: float) -> float:
    """Return the energy in millijoules at a time, interpolated from `known`: times and energies, in order of time.

    Outside the known times, the energy is extrapolated at the rate of the nearest step. If that step is longer than
    `longest_step_ns`, the nearest known energy is returned.
    """
    place = bisect_right([time_ns for time_ns, _ in known], at_ns)
    if len(known) == 1:
        return float(known[0][1])
    if 0 < place < len(known):
        before, after = known[max(0, place - 2) : place], known[place : place + 2]
        return before[-1][1] + _share(before, after, at_ns) * (after[0][1] - before[-1][1])
    end = known[0] if place == 0 else known[-1]
    step = known[:2] if place == 0 else known[-2:]
    if step[1][0] - step[0][0] > longest_step_ns:
        return float(end[1])
    return end[1] + _power(step) * (at_ns - end[0])


def _share(before: Sequence[tuple[int, float]], after: Sequence[tuple[int, float]], at_ns: int) -> float:
    """Return the share of the energy between the two ticks around `at_ns` that was used before `at_ns`.

    The power is assumed to change at `at_ns`, from its value before the earlier tick to its value after the later tick.
    """
    (left_ns, left_mj), (right_ns, right_mj) = before[-1], after[0]
    until_ns, since_ns, gained_mj = at_ns - left_ns, right_ns - at_ns, right_mj - left_mj
    first_mj = _power(before) * until_ns if len(before) > 1 else None
    second_mj = _power(after) * since_ns if len(after) > 1 else None
    if first_mj is not None and second_mj is not None and first_mj + second_mj > 0:
        share = first_mj / (first_mj + second_mj)
    elif gained_mj > 0 and (first_mj is not None or second_mj is not None):
        share = first_mj / gained_mj if first_mj is not None else 1 - (second_mj or 0.0) / gained_mj
    else:
        share = until_ns / (right_ns - left_ns)
    return min(max(share, 0.0), 1.0)


def _power(step: Sequence[tuple[int, float]]) -> float:
    """Return the mean power between two known times, in millijoules per nanosecond."""
    return (step[1][1] - step[0][1]) / max(step[1][0] - step[0][0], 1)


def _least_mj(readings: Sequence[Reading], at_ns: int) -> int:
    """Return the last value read before a time, in millijoules; 0 if there is none, or if the counter has restarted."""
    before = [reading.value_mj for reading in readings if reading.got_ns <= at_ns]
    after = [reading.value_mj for reading in readings if reading.got_ns > at_ns]
    return before[-1] if before and min(after, default=before[-1]) >= before[-1] else 0
