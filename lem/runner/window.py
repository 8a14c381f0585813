"""The core of a run: settle, load, warm up, open the window, generate, synchronize, close.

A phase is a stretch of work with its own clock and energy, and phases do not overlap. The measured window contains
only the generation for the planned prompts; idling, loading, tokenizing and warm-up happen outside it. Windows are
timed with the backend's clock; at both edges the device is synchronized and the processes wait for each other. A window
that is cut short ends with its last finished batch, except in the case that `_Window.cut` describes. Work still in
flight at that point is recorded, because the next attempt runs it again. Only this module combines a backend with a
meter: neither knows the other, and this module knows no particular engine or sensor.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from msgspec import structs

from lem.backends.base import Backend, Encoded, Generation
from lem.energy.base import Meter
from lem.errors import RunError
from lem.machine import processes
from lem.machine.watch import Watch
from lem.quantities import NS_PER_S
from lem.record import (
    ENERGY_OWNER,
    CpuLoad,
    DeviceWindow,
    EnergyReading,
    OwnTime,
    Phase,
    PhaseName,
    UnderWay,
    WarmupEnd,
    WarmupInfo,
    covering,
)
from lem.results.journal import Checkpoint
from lem.results.merging import longer
from lem.runner.progress import Event, Report
from lem.runner.ranks import Ranks
from lem.runner.stopping import UNDISTURBED
from lem.spec.experiment import Batching, Warmup
from lem.workload.batching import plan_batches
from lem.workload.traffic import Arrivals

# Shortest interval between two readings of the meter inside the window.
METER_POLL_NS = 100_000_000
# The metering process records a checkpoint whenever the window has grown by this share since the last one.
NOTED_SHARE = 0.01


@dataclass(frozen=True)
class MeasuredRequest:
    """A generation and its prompt; times are in seconds after the opening of the window."""

    generation: Generation
    prompt: Encoded
    start_s: float
    end_s: float
    arrived_s: float | None = None


@dataclass
class Measurement:
    """The measurements of one cycle so far, filled in as the run proceeds, so that an early end loses nothing.

    `indices` are the positions of this process's prompts in the experiment, without those finished by earlier attempts.

    Three values are set only if the window was interrupted:

    - `lost_s`: the time from the window's end, which is normally its last finished request, to the interruption;
    - `energy_behind_s`: how long before the window's end its energy was last read; None if no meter was read;
    - `under_way`: the work that the engine had in progress at the window's end.

    If `ends_when_cut` is true, the window ends at the interruption, because other processes may have finished requests
    up to then.

    `arrivals_from_s` is the time at which the window opens, on the clock of the cycle's arrivals, or None if all
    prompts are available from the start. `readings` are the window's checkpoints with energy.
    """

    indices: list[int] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    requests: list[MeasuredRequest] = field(default_factory=list)
    warmup: WarmupInfo | None = None
    cpu_load: CpuLoad | None = None
    devices: tuple[DeviceWindow, ...] = ()
    current: PhaseName | None = None
    window_opened_ns: int = 0
    window_opened_unix_s: float | None = None
    lost_s: float | None = None
    energy_behind_s: float | None = None
    readings: list[Checkpoint] = field(default_factory=list)
    under_way: UnderWay | None = None
    ends_when_cut: bool = False
    arrivals_from_s: float | None = None
    own_time: OwnTime = field(default_factory=OwnTime)

    def add(self, generation: Generation, prompt: Encoded) -> MeasuredRequest:
        """Add one finished request of the measured window."""
        arrived_ns = generation.arrived_ns
        request = MeasuredRequest(
            generation,
            prompt,
            start_s=self.since_opening_s(generation.start_ns),
            end_s=self.since_opening_s(generation.end_ns),
            arrived_s=None if arrived_ns is None else self.since_opening_s(arrived_ns),
        )
        self.requests.append(request)
        return request

    def since_opening_s(self, at_ns: int) -> float:
        """Convert a clock reading to seconds after the window's opening."""
        return (at_ns - self.window_opened_ns) / NS_PER_S

    def cut_back(
        self, requests: int, window: Phase | None, metered: Checkpoint | None, last: Checkpoint | None = None
    ) -> None:
        """Move the end of an interrupted window back in time, keeping only some of the window's requests.

        Args:
            requests: the number of the window's requests to keep.
            window: the measured phase up to the last of these requests; None if none are kept.
            metered: the last checkpoint within that phase for which the energy is known.
            last: the last checkpoint within that phase.
        """
        before = next((phase for phase in self.phases if phase.name == "measured"), None)
        del self.requests[requests:]
        under_way = None if last is None else last.under_way
        if self.ends_when_cut:  # the end stays; only the finished requests change
            behind_s = 0.0 if before is None or last is None else before.duration_s - last.duration_s
            self.under_way = longer(under_way, behind_s)
            return
        others = [phase for phase in self.phases if phase.name != "measured"]
        self.phases = [*others, window] if window else others
        lost_s, self.lost_s, self.energy_behind_s, self.under_way = self.lost_s, None, None, None
        if window is None or before is None or lost_s is None:
            return
        self.lost_s = lost_s + before.duration_s - window.duration_s
        self.under_way = under_way
        self.energy_behind_s = None if metered is None else metered.energy_behind_s(window.duration_s)


@dataclass(frozen=True)
class Queue:
    """How a window's prompts arrive; times are in seconds after the opening, and negative before it.

    If `times_s` is None, requests arrive so that `concurrency` of them are always in the system; the first ones arrive
    at `first_s` or, if that is None, at the opening. The engine takes up to `at_most` waiting requests at a time.
    """

    times_s: Sequence[float] | None
    concurrency: int
    at_most: int
    first_s: Sequence[float] | None = None


class Recorder(Protocol):
    """Stores each finished batch immediately."""

    def window_opens(self) -> None:
        """Record that the measured window is about to open."""

    def batch_finished(self, batch: Sequence[MeasuredRequest], checkpoint: Checkpoint) -> None:
        """Record a finished batch (empty if only time has passed) and the state of the window up to now."""

    def time_passed(self, checkpoint: Checkpoint) -> None:
        """Record the progress of the window from a thread, while the process is inside a batch."""


@dataclass
class Bench:
    """Everything a process needs to measure its cycles: an engine, a meter, its peers, and a receiver of progress.

    `replicas` is the number of processes, or of groups that share a model, among which the prompts are divided.
    """

    backend: Backend
    meter: Meter
    ranks: Ranks
    report: Report
    replicas: int = 1
    watch: Watch = field(default_factory=Watch)

    def now_ns(self) -> int:
        """Return the time on the clock of the run."""
        return self.backend.clock.now_ns()

    # -------------------------------------------------------------- once
    def prepare(self, texts: Sequence[str], indices: Sequence[int], idle_s: float, into: Measurement) -> list[Encoded]:
        """Idle, load the model, encode the prompts, and idle with the model loaded.

        Args:
            texts: the prompts of this process.
            indices: the positions of these prompts in the experiment.
            idle_s: the length of each of the two idle phases; 0 for none.
            into: receives the phases.

        Returns:
            The encoded prompts; the index of each is its position in the experiment.
        """
        self._idle("idle_before", idle_s, into)
        with self.phase("load", into):
            self.report(Event("load"))
            self.backend.load()
        # The engine numbers the prompts it is given; from here on, a prompt's index is its position in the experiment.
        began_ns = time.perf_counter_ns()
        prompts = [replace(p, index=indices[p.index]) for p in self.backend.encode(texts)]
        encode_s = (time.perf_counter_ns() - began_ns) / NS_PER_S
        into.own_time = structs.replace(into.own_time, encode_s=encode_s)
        self._idle("idle_loaded", idle_s, into)
        return prompts

    def _idle(self, name: PhaseName, seconds: float, into: Measurement) -> None:
        if seconds <= 0:
            return
        self.report(Event(name))
        with self.phase(name, into):
            self.backend.clock.sleep(seconds)

    # -------------------------------------------------------------- each cycle
    def warm_up(self, prompts: Sequence[Encoded], warmup: Warmup, batching: Batching, into: Measurement) -> None:
        """Run the prompts that `warmup` requires, in batches like the measured ones; then drop the state they left."""
        if prompts and (warmup.prompts or warmup.until_cv is not None):
            batches = warmup_batches(prompts, batching)
            with self.phase("warmup", into):
                if warmup.until_cv is None:
                    into.warmup = self._warm_up_fixed(batches, warmup)
                else:
                    into.warmup = self._warm_up_until_steady(batches[0], warmup)
        self.backend.forget()
        self.backend.reset_peak_memory()

    def _warm_up_fixed(self, batches: Sequence[Sequence[Encoded]], warmup: Warmup) -> WarmupInfo:
        """Run whole batches, repeating them if necessary, until enough prompts have run or the time is up.

        Batches are never cut short, so the last one may end after the time limit.
        """
        least, done, began_ns = warmup.prompts, 0, self.now_ns()
        self.report(Event("warmup", 0, least))
        failures = _Failures(self.backend, least)
        for batch in itertools.cycle(batches):
            for finished in self.backend.generate(batch):
                failures.tolerated(finished)
                done += len(finished)
                self.report(Event("warmup", done, max(done, least)))
            if done >= least or (self.now_ns() - began_ns) / NS_PER_S >= warmup.max_s:
                failures.check_warmup()
                return WarmupInfo(done, "fixed" if done >= least else "max_s", None)
        raise AssertionError("warm-up needs at least one batch")

    def _warm_up_until_steady(self, batch: Sequence[Encoded], warmup: Warmup) -> WarmupInfo:
        """Repeat one batch, so that the work is always the same, until its latency is steady or a limit is reached."""
        latencies_s: list[float] = []
        done, began_ns = 0, self.now_ns()
        while True:
            before_ns = self.now_ns()
            failures = _Failures(self.backend, len(batch))
            done += sum(len(failures.tolerated(finished)) for finished in self.backend.generate(batch))
            failures.check_warmup()
            latencies_s.append((self.now_ns() - before_ns) / NS_PER_S)
            self.report(Event("warmup", done))
            last_s = latencies_s[-warmup.cv_batches :]
            cv = statistics.stdev(last_s) / statistics.fmean(last_s) if len(last_s) == warmup.cv_batches else None
            ended = _end_of_warmup(warmup, cv, done, (self.now_ns() - began_ns) / NS_PER_S)
            if ended is not None:
                return WarmupInfo(done, ended, cv)

    def run_window(
        self,
        prompts: Sequence[Encoded],
        recorder: Recorder,
        into: Measurement,
        *,
        first_batch: int = 0,
        queue: Queue | None = None,
    ) -> None:
        """Run the prompts once, in the measured window; on an error, `into` keeps the requests finished by then.

        Args:
            prompts: the prompts to run; if empty, this process only waits for the others.
            recorder: stores each batch.
            into: receives the phase and the requests.
            first_batch: the number of the first batch; above 0 if an earlier attempt ran some.
            queue: how the prompts arrive; None if all are available from the start.
        """
        self.report(Event("measured", 0, len(prompts)))
        window = _Window(self, into, recorder, is_busy_throughout=queue is None)
        recorder.window_opens()  # before the window opens, because recording takes time
        window.open()
        try:
            by_index = {prompt.index: prompt for prompt in prompts}
            output_tokens = 0
            failures = _Failures(self.backend, len(prompts))
            for batch in self._generate(prompts, queue, into.window_opened_ns):
                if first_batch:
                    batch = [replace(g, batch=g.batch + first_batch) for g in batch]
                kept = failures.tolerated(batch)
                done = [into.add(g, by_index[g.index]) for g in kept]
                if kept:
                    window.batch_finished(done)
                failures.check()
                output_tokens += sum(g.output_tokens for g in kept)
                self.report(Event("measured", len(into.requests), len(prompts), output_tokens))
            window.close()
        except BaseException:
            window.cut(is_unfinished=len(into.requests) < len(prompts))
            raise

    def _generate(
        self, prompts: Sequence[Encoded], queue: Queue | None, opened_ns: int
    ) -> Iterator[Sequence[Generation]]:
        """Run the prompts, which arrive as `queue` says or are all available from the start; yield the generations."""
        if not prompts:
            return
        if queue is None:
            yield from self.backend.generate(prompts)
            return
        clock = self.backend.clock
        arrivals = Arrivals(prompts, queue.times_s, queue.concurrency, opened_ns, queue.first_s, clock)
        yield from self.backend.serve(arrivals, queue.at_most)

    @contextmanager
    def phase(self, name: PhaseName, into: Measurement) -> Iterator[None]:
        """Time and meter a phase, and add it to `into` even if it ends in an error."""
        into.current = name
        self.open_together()
        opened_ns = self.now_ns()
        try:
            yield
            self.backend.synchronize()
            self.ranks.barrier()
        finally:
            closed_ns = self.now_ns()
            self.meter.mark()
            duration_s = (closed_ns - opened_ns) / NS_PER_S
            into.phases.append(Phase(name, duration_s, covering(self.meter.end(), duration_s)))
        into.current = None

    def open_together(self) -> None:
        """Synchronize the device, wait for the other processes, settle the meter, and begin metering when all begin.

        The meter settles while all processes stand still, so that they begin exactly when the meter is ready. If the
        meter settled before all processes had arrived, it would have to settle again inside the window.
        """
        self.backend.synchronize()
        self.ranks.barrier()
        self.meter.settle()
        self.ranks.barrier()
        self.meter.begin()


class _Window:
    """The measured window, opened and closed with the other processes; `cut` ends it if the run is interrupted.

    If other processes run a share of the prompts, the metering process also records the window's progress from a
    thread. Without these checkpoints, requests that the others finished would have no energy if the metering process
    were killed during a long batch. The lock keeps that thread and the main thread from using the meter and the
    journal at the same time.

    If the backend can call back while its device is busy, a finished batch is recorded when the next one has begun, so
    that the device does not wait. This is not done if other processes run a share of the prompts, because the thread's
    checkpoints would then come before the batch, or if requests arrive over time (`is_busy_throughout` is False),
    because the next batch may be far off.
    """

    def __init__(self, bench: Bench, into: Measurement, recorder: Recorder, *, is_busy_throughout: bool) -> None:
        self._bench, self._into, self._recorder = bench, into, recorder
        self._may_defer = is_busy_throughout and bench.replicas == 1
        self._defers = False
        self._deferred: tuple[Sequence[MeasuredRequest], Checkpoint] | None = None
        self._deferred_error: OSError | None = None
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._load = _CpuClock()
        self._last: Checkpoint | None = None
        self._metered: Checkpoint | None = None
        self._next_reading_ns = 0
        self._recording_ns = 0

    def open(self) -> None:
        """Open the window together with the other processes."""
        into = self._into
        into.current = "measured"
        self._load.find_processes(self._bench.backend.server_pids())
        self._defers = self._may_defer and self._bench.backend.call_while_busy(self._record_while_busy)
        self._bench.watch.begin()
        self._bench.open_together()
        into.window_opened_unix_s = time.time()
        into.window_opened_ns = self._bench.now_ns()
        self._load.start()
        if self._bench.replicas > 1 and self._bench.ranks.rank == ENERGY_OWNER:
            self.keep_noting()

    def batch_finished(self, batch: Sequence[MeasuredRequest]) -> None:
        """Record a finished batch and the progress of the window, now or when the device is busy again.

        The time for which this keeps the device waiting is recorded as well.
        """
        with self._lock, self._timed_recording():
            checkpoint = self._checkpoint()
            self._record_deferred()  # if the backend has not called since the last batch
            if self._defers:
                self._deferred = batch, checkpoint
            else:
                self._recorder.batch_finished(batch, checkpoint)

    @contextmanager
    def _timed_recording(self) -> Iterator[None]:
        began_ns = time.perf_counter_ns()
        yield
        self._recording_ns += time.perf_counter_ns() - began_ns
        into = self._into
        into.own_time = structs.replace(into.own_time, recording_s=self._recording_ns / NS_PER_S)

    def _record_while_busy(self) -> None:
        """Record the last batch; an error is raised later, because here it would look like an error of the engine."""
        try:
            self._record_deferred()
        except OSError as error:
            self._deferred_error = error

    def _record_deferred(self) -> None:
        if self._deferred_error is not None:
            raise self._deferred_error
        if self._deferred is not None:
            with UNDISTURBED:  # otherwise, a signal could drop the batch
                (batch, checkpoint), self._deferred = self._deferred, None
                self._recorder.batch_finished(batch, checkpoint)

    def _stop_deferring(self) -> None:
        self._defers = False
        self._bench.backend.call_while_busy(None)
        if self._deferred is not None or self._deferred_error is not None:
            with self._timed_recording():
                self._record_deferred()

    def keep_noting(self) -> None:
        """Start the thread that records checkpoints within batches."""

        def run() -> None:
            # A disk error ends this thread; the next batch will meet the same error, which then ends the run.
            with suppress(OSError):
                while not self._is_over.wait(self.until_next_note_s()):
                    self.note()

        threading.Thread(target=run, name="window-notes", daemon=True).start()

    def until_next_note_s(self) -> float:
        """Return how long to wait before the next checkpoint: 1% of the window so far, but at least 100 ms."""
        passed_s = self._into.since_opening_s(self._bench.now_ns())
        return max(METER_POLL_NS / NS_PER_S, NOTED_SHARE * passed_s)

    def note(self) -> None:
        """Record the window's progress within a batch, if its energy is known; do nothing once the window is over."""
        with self._lock:
            if self._is_over.is_set():
                return
            last, now = self._last, self._checkpoint(asks_engine=False)
            if now.energy is None:  # moving the window's end without its energy would gain nothing
                self._last = last
                return
            before = last or Checkpoint(0.0)
            # A thread must not ask the engine; the requests in flight are the same as at the last batch.
            under_way = longer(before.under_way, now.duration_s - before.duration_s)
            self._last = self._metered = structs.replace(now, under_way=under_way)
            self._recorder.time_passed(self._last)

    def _end(self) -> None:
        """Stop recording checkpoints from the thread; if one is being recorded, wait for it to finish."""
        with self._lock:
            self._is_over.set()

    def _checkpoint(self, *, asks_engine: bool = True) -> Checkpoint:
        """Return the progress of the window; the meter is read so rarely that this takes at most 1% of the time."""
        now_ns = self._bench.now_ns()
        energy, energy_at_s = None, None
        if now_ns >= self._next_reading_ns:
            energy = self._bench.meter.so_far()
            read_ns = self._bench.now_ns()
            energy_at_s = None if energy is None else self._into.since_opening_s(read_ns)
            energy = None if energy is None else covering(energy, energy_at_s or 0.0)
            self._next_reading_ns = read_ns + max(METER_POLL_NS, 100 * (read_ns - now_ns))
            now_ns = read_ns
        duration_s = self._into.since_opening_s(now_ns)
        under_way = self._under_way(now_ns) if asks_engine else None
        self._last = Checkpoint(duration_s, energy=energy, energy_at_s=energy_at_s, under_way=under_way)
        if energy is not None:
            self._metered = self._last
            self._into.readings.append(self._last)
        return self._last

    def close(self) -> None:
        """Close the window together with the other processes, recording checkpoints while waiting for them."""
        into = self._into
        self._stop_deferring()
        self._end()
        self._bench.backend.synchronize()
        self._bench.ranks.barrier(lambda: self.batch_finished(()))
        duration_s = into.since_opening_s(self._bench.now_ns())
        self._bench.meter.mark()
        into.devices = self._bench.watch.end()
        # Processor time passes in real time, so it means nothing for a window on a virtual clock.
        into.cpu_load = None if self._bench.backend.clock.is_virtual else self._load.stop()
        into.phases.append(Phase("measured", duration_s, covering(self._bench.meter.end(), duration_s)))
        into.current = None

    def _under_way(self, now_ns: int) -> UnderWay | None:
        """Return the requests in flight, with their tokens and time so far; None if there are none."""
        begun = self._bench.backend.under_way()
        if not begun:
            return None
        opened_ns = self._into.window_opened_ns
        spent_s = [max(0, now_ns - max(each.since_ns, opened_ns)) / NS_PER_S for each in begun]
        tokens = [each.output_tokens for each in begun if each.output_tokens is not None]
        return UnderWay(len(begun), sum(tokens) if len(tokens) == len(begun) else None, sum(spent_s), max(spent_s))

    def cut(self, *, is_unfinished: bool) -> None:
        """End the window with its last batch; requests that had not finished by then will be run again.

        If other processes run a share of the prompts, the metering process ends its window at the interruption instead,
        because the others may have finished requests in the meantime.
        """
        with suppress(OSError):  # a batch that cannot be recorded will be run again
            self._stop_deferring()
        self._end()
        interrupted_s = self._into.since_opening_s(self._bench.now_ns())
        self._bench.meter.mark()
        self._into.devices = self._bench.watch.end()
        readings = self._bench.meter.end()
        if self._bench.replicas > 1 and self._bench.ranks.rank == ENERGY_OWNER:
            self._end_now(interrupted_s, readings, is_unfinished=is_unfinished)
        elif self._last is not None:
            self._end_with(self._last, interrupted_s, readings)

    def _end_now(self, interrupted_s: float, readings: tuple[EnergyReading, ...], *, is_unfinished: bool) -> None:
        last = self._last or Checkpoint(0.0)
        self._into.ends_when_cut, self._into.lost_s = True, 0.0
        self._into.energy_behind_s = 0.0 if readings else None
        self._into.under_way = longer(last.under_way, interrupted_s - last.duration_s) if is_unfinished else None
        self._into.phases.append(Phase("measured", interrupted_s, covering(readings, interrupted_s)))

    def _end_with(self, last: Checkpoint, interrupted_s: float, readings: tuple[EnergyReading, ...]) -> None:
        self._into.lost_s, self._into.under_way = interrupted_s - last.duration_s, last.under_way
        if self._metered is None:
            reason = "the window was interrupted, but the meter reads energy only at the end of a window"
            readings = tuple(structs.replace(r, energy_j=None, trace_energy_j=None, reason=reason) for r in readings)
        else:
            readings = self._metered.energy or ()
            self._into.energy_behind_s = self._metered.energy_behind_s(last.duration_s)
        self._into.phases.append(Phase("measured", last.duration_s, readings))


class _Failures:
    """Counts the failed requests of a window or a warm-up, to end the run if too many requests fail.

    The engine sets how many failures a window may have. A failed request beyond this limit is not kept, so that a
    resumed run sends it again.
    """

    def __init__(self, backend: Backend, requests: int) -> None:
        self._most, self._requests = backend.tolerated_failures(requests), requests
        self._tolerates_some = backend.tolerated_failures(sys.maxsize) > 0
        self._failed, self._ended = 0, 0
        self._last: Generation | None = None

    def tolerated(self, batch: Sequence[Generation]) -> list[Generation]:
        """Count the requests of a batch; return the batch without the failed requests that exceed the limit."""
        kept = []
        for generation in batch:
            self._ended += 1
            if generation.error is not None:
                self._failed, self._last = self._failed + 1, generation
            if generation.error is None or self._failed <= self._most:
                kept.append(generation)
        return kept

    def check(self) -> None:
        """Raise RunError if too many requests have failed."""
        if self._last is None or self._failed <= self._most:
            return
        reason = f"prompt {self._last.index}: {self._last.error}"
        if self._most == 0:
            raise RunError(f"The engine did not finish {reason}")
        raise RunError(f"{self._failed} of {self._requests} requests failed, more than allowed; the last was {reason}")

    def check_warmup(self) -> None:
        """Raise RunError if a request of the warm-up failed.

        If the engine tolerates failures, RunError is raised only if all requests failed, so that nothing was warmed up.
        """
        if self._last is not None and (not self._tolerates_some or self._failed == self._ended):
            raise RunError(f"The engine did not finish prompt {self._last.index} of the warm-up: {self._last.error}")


# ------------------------------------------------------------------ warm-up
def warmup_batches(prompts: Sequence[Encoded], batching: Batching) -> list[list[Encoded]]:
    """Divide the warm-up's prompts into batches like those of the window; continuous ones have `batch_size` prompts."""
    if batching.strategy == "continuous":
        size = batching.batch_size
        return [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
    return [[prompts[i] for i in batch] for batch in plan_batches([len(p.token_ids) for p in prompts], batching)]


def _end_of_warmup(warmup: Warmup, cv: float | None, done: int, spent_s: float) -> WarmupEnd | None:
    if cv is not None and warmup.until_cv is not None and cv < warmup.until_cv:
        return "converged"
    if done >= warmup.max_prompts:
        return "max_prompts"
    return "max_s" if spent_s >= warmup.max_s else None


# ------------------------------------------------------------------ processor time
class _CpuClock:
    """Measures the average number of busy cores: of the machine, and of this process with its children and servers."""

    def find_processes(self, server_pids: Sequence[int]) -> None:
        """Find the processes to measure.

        This takes milliseconds, so it is done once, before the window opens. An engine's workers are already running
        at that time.
        """
        import psutil

        self._processes = processes.children()
        for pid in server_pids:
            with suppress(psutil.Error):  # the process may have ended
                self._processes.append(psutil.Process(pid))

    def start(self) -> None:
        """Start measuring."""
        self._wall_ns, self._machine_s, self._process_s = self._now()

    def stop(self) -> CpuLoad:
        """Return the average number of busy cores since `start`."""
        wall_ns, machine_s, process_s = self._now()
        span_s = max((wall_ns - self._wall_ns) / NS_PER_S, 1e-9)
        return CpuLoad((machine_s - self._machine_s) / span_s, (process_s - self._process_s) / span_s)

    def _now(self) -> tuple[int, float, float]:
        import psutil

        machine = psutil.cpu_times()
        busy_s = machine.user + machine.system + getattr(machine, "nice", 0.0) + getattr(machine, "softirq", 0.0)
        return time.perf_counter_ns(), float(busy_s), time.process_time() + sum(map(_cpu_s, self._processes))


def _cpu_s(process: Any) -> float:
    """Return the processor time of a process in seconds, or 0 if the process has ended."""
    import psutil

    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
