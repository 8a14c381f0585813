"""Attempts at an experiment on a virtual clock: sleeping moves a clock instead of waiting.

Processes are threads, each with its own clock, that agree on the time at barriers; one that is stopped raises at an
exact time what ends the process. Each attempt's clock begins at 0. Nothing depends on real time, so a busy machine
changes no result.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from lem.errors import Interrupted
from lem.machine import host
from lem.quantities import NS_PER_S
from lem.results.directory import ExperimentDir
from lem.results.plan import State
from lem.runner.attempt import Attempt
from lem.runner.progress import silent
from lem.runner.ranks import Ranks
from lem.runner.window import Bench, _Window
from tests.records import AT

MACHINE = host.environment(host.look())


@dataclass
class Clock:
    """The clock of one process, which at a given time raises the exception that ends the process."""

    now_ns: int = 0
    cut_ns: int | None = None
    window: _Window | None = None
    noted_ns: int = 0

    def until(self, moment_ns: int) -> None:
        """Move on to a time; on the way, notes are taken of an open window, as a thread would."""
        while (window := self.window) is not None:
            due_ns = self.noted_ns + round(window.until_next_note_s() * NS_PER_S)
            if due_ns > moment_ns or (self.cut_ns is not None and due_ns >= self.cut_ns):
                break
            self.now_ns = self.noted_ns = max(self.now_ns, due_ns)
            window.note()
            if window._is_over.is_set():
                self.window = None
        self._move(moment_ns)

    def _move(self, moment_ns: int) -> None:
        if self.cut_ns is not None and moment_ns >= self.cut_ns:
            self.now_ns, self.cut_ns = max(self.now_ns, self.cut_ns), None
            raise Interrupted("stopped by a test")
        self.now_ns = max(self.now_ns, moment_ns)


class Clocks(threading.local):
    """The clock of the current thread, and what runs in it."""

    clock = Clock()
    ranks: Ranks = Ranks()
    attempt: Attempt | None = None

    def now_ns(self) -> int:
        return self.clock.now_ns

    def now_s(self) -> float:
        return self.clock.now_ns / NS_PER_S

    def sleep(self, seconds: float) -> None:
        self.clock.until(self.clock.now_ns + round(seconds * NS_PER_S))


CLOCKS = Clocks()
# A process that waits longer than this in real time, not virtual, waits in vain.
STUCK_S = 300.0

# When phases of an attempt opened, in process 0, by the attempt's number, its cycle, and the phase.
Openings = dict[tuple[int, int, str], float]


@dataclass
class Meeting:
    """A barrier at which processes wait for each other; if one leaves, the others wait in vain from then on.

    Which of them is faster in real time makes no difference: whoever came to a meeting that was complete knows when it
    took place, even if another process has left before it wakes up. With `threading.Barrier`, it would not.
    """

    size: int
    arrived_ns: list[int] = field(default_factory=list)
    agreed_ns: list[int] = field(default_factory=list)
    one_left: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def meet(self, now_ns: int) -> int | None:
        """Wait for the others; return the time at which the last one came, or None if one has left before."""
        with self.changed:
            number = len(self.agreed_ns)
            self.arrived_ns.append(now_ns)
            if len(self.arrived_ns) == self.size:
                self.agreed_ns.append(max(self.arrived_ns))
                self.arrived_ns.clear()
                self.changed.notify_all()
            known = self.changed.wait_for(lambda: len(self.agreed_ns) > number or self.one_left, STUCK_S)
            assert known, "a process neither came to the barrier nor ended"
            return self.agreed_ns[number] if len(self.agreed_ns) > number else None

    def leave(self) -> None:
        with self.changed:
            self.one_left = True
            self.changed.notify_all()


@dataclass(frozen=True)
class VirtualRanks(Ranks):
    """A group of processes on virtual clocks."""

    meeting: Meeting | None = None

    def barrier(self, meanwhile=lambda: None):
        clock = CLOCKS.clock
        if self.meeting is None:
            return
        agreed_ns = self.meeting.meet(clock.now_ns)
        if agreed_ns is None:  # another process is stopped before it gets here, so this one is, too
            agreed_ns = clock.cut_ns
            assert agreed_ns is not None
        while clock.now_ns + NS_PER_S < agreed_ns:
            clock.until(clock.now_ns + NS_PER_S)
            meanwhile()
        clock.until(agreed_ns)


@contextmanager
def virtual_time(opened: Openings) -> Iterator[None]:
    """Have time be that of the clocks, and note when phases open."""

    def note(name: str) -> None:
        if CLOCKS.attempt is not None and CLOCKS.ranks.rank == 0:
            opened[(CLOCKS.attempt._number, CLOCKS.attempt._cycle.number, name)] = CLOCKS.now_s()

    @contextmanager
    def phase(bench, name, into):
        with timed_phase(bench, name, into):
            note(name)
            yield

    def open_window(window):
        opening(window)
        note("measured")

    def keep_noting(window):
        CLOCKS.clock.window, CLOCKS.clock.noted_ns = window, CLOCKS.clock.now_ns

    timed_phase, opening = Bench.phase, _Window.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Bench, "phase", phase)
        patch.setattr(_Window, "open", open_window)
        patch.setattr(_Window, "keep_noting", keep_noting)
        patch.setattr(time, "perf_counter_ns", CLOCKS.now_ns)
        patch.setattr(time, "time", CLOCKS.now_s)
        patch.setattr(time, "sleep", CLOCKS.sleep)
        patch.setattr("lem.runner.attempt.ignore_signals", lambda: None)
        patch.setattr("lem.runner.attempt._report_error", lambda _: None)
        patch.setattr("lem.runner.attempt.named_by_launcher", lambda: CLOCKS.ranks)
        patch.setattr("lem.runner.attempt.join", lambda *_, **__: CLOCKS.ranks)
        patch.setattr("lem.machine.host.environment", lambda *_: MACHINE)
        yield


def attempt(directory: ExperimentDir, number: int, cut_s: float | None = None) -> tuple[list[str], float]:
    """Run one attempt of all processes; return how each ended, and how long they took."""
    size = directory.plan().processes
    meeting = Meeting(size) if size > 1 else None
    ended, spent_s = ["" for _ in range(size)], [0.0] * size

    def run(rank: int) -> None:
        CLOCKS.clock = Clock(cut_ns=None if cut_s is None else round(cut_s * NS_PER_S))
        CLOCKS.ranks = VirtualRanks(rank, rank, size, meeting)
        try:
            CLOCKS.attempt = Attempt(directory, number)
            ended[rank] = CLOCKS.attempt.run(silent)
        finally:
            spent_s[rank] = CLOCKS.now_s()
            if meeting is not None and ended[rank] != "completed":
                meeting.leave()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(ended) <= {"completed", "interrupted"}, ended
    directory.write_state(State("interrupted", number, AT))
    return ended, max(spent_s)
