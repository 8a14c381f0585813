"""A world for the daemon of a schedule, in which a year passes without sleeping.

Time passes only while the daemon sleeps. Clocks are set, the machine is suspended, signals arrive and runs end at the
times that a test says, in seconds since the world began.
"""

from __future__ import annotations

import heapq
import itertools
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from lem.results.schedule import Config, RunOutcome, ScheduleManifest, Start
from lem.spec.schedule import Schedule
from lem.studies.calendar import starts
from lem.studies.daemon import Daemon, Screen

SUSPENDED, STEP, SIGNAL, RUN_ENDS = "suspended", "step", "signal", "run ends"


@dataclass
class World:
    """The time, what will happen, and what the daemon did."""

    wall: datetime
    true_s: float = 0.0
    begun: list[tuple[int, datetime]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    run_s: Callable[[int], float] = lambda _: 600.0
    outcome: Callable[[int], str] = lambda _: "done"
    _events: list[tuple[float, int, str, Any]] = field(default_factory=list)
    _order: Any = field(default_factory=itertools.count)

    def plan(self, after_s: float, what: str, value: Any = None) -> None:
        """Let something happen after a time: suspend for `value` seconds, set the clock by `value`, or send it."""
        heapq.heappush(self._events, (self.true_s + after_s, next(self._order), what, value))

    # ------------------------------------------------------------------ as the daemon's clock
    def now(self) -> datetime:
        """Return the time on the wall."""
        return self.wall

    def sleep(self, seconds: float) -> int | None:
        """Let time pass until the time is over or a signal arrives."""
        until_s = self.true_s + seconds
        while self._events and self._events[0][0] <= until_s:
            at_s, _, what, value = heapq.heappop(self._events)
            self._pass(max(0.0, at_s - self.true_s))
            if what == SUSPENDED:
                self._pass(value)
                until_s += value  # while the machine is suspended, its timers stand still
            elif what == STEP:
                self.wall += timedelta(seconds=value)
            elif what == SIGNAL:
                return int(value)
            elif what == RUN_ENDS:
                return int(signal.SIGCHLD)
        self._pass(until_s - self.true_s)
        return None

    def _pass(self, seconds: float) -> None:
        self.true_s += seconds
        self.wall += timedelta(seconds=seconds)

    # ------------------------------------------------------------------ runs
    def begin_run(self, start: Start) -> SimulatedRun:
        """Begin a run, or go on with one."""
        self.begun.append((start.number, self.wall))
        return SimulatedRun(self, start.number, self.true_s + self.run_s(start.number))


class SimulatedRun:
    """A run that ends by itself."""

    def __init__(self, world: World, number: int, ends_s: float) -> None:
        self._world, self._number, self._ends_s = world, number, ends_s
        self._outcome = world.outcome(number)
        world.plan(ends_s - world.true_s, RUN_ENDS)

    def poll(self) -> RunOutcome | None:
        """Return how the run ended."""
        if self._world.true_s < self._ends_s:
            return None
        error = "no memory" if self._outcome == "failed" else None
        return RunOutcome(self._outcome, f"exp_{self._number}", error=error)  # type: ignore[arg-type]

    def interrupt(self) -> None:
        """End soon."""
        self._outcome, self._ends_s = "interrupted", min(self._ends_s, self._world.true_s + 3)
        self._world.plan(3, RUN_ENDS)


class Said(Screen):
    """Keeps what the daemon says."""

    def __init__(self, world: World) -> None:
        super().__init__(None)
        self._world = world

    def say(self, now: datetime, text: str) -> None:
        """Keep a line."""
        self._world.said.append(text)


def manifest_of(now: str, **settings: Any) -> ScheduleManifest:
    """Return a schedule that begins now."""
    chosen, begin = Schedule(**settings), datetime.fromisoformat(now)
    return ScheduleManifest(
        name="one",
        id="schedule_1",
        created_at=now,
        ends_at=(begin + timedelta(seconds=chosen.duration_s)).isoformat(),
        time_zone=chosen.time_zone,
        settings=chosen,
        config=Config("experiment", "", None, (), "", False, "/"),
        starts=[Start(number, start.isoformat()) for number, start in enumerate(starts(chosen, begin), start=1)],
    )


def daemon_of(world: World, manifest: ScheduleManifest, folder: Path, **values: Any) -> Daemon:
    """Return a daemon that works through a schedule in a simulated world; its table stays in memory."""
    values = {"save": lambda *_: None, **values}
    return Daemon(folder, manifest, world, world.begin_run, Said(world), **values)  # type: ignore[arg-type]
