"""The heart: settle, load, warm up, open the window, generate, synchronise, close.

A phase is a stretch of work with its own clock and energy, and phases do not overlap. The measured window holds
the generation of exactly the planned prompts: idling, loading, tokenizing and warm-up are outside. Windows are timed
with `perf_counter_ns`; the device is synchronised and the processes wait for each other at both edges. A window that
is cut short ends with its last finished batch. Here alone a backend meets a meter; neither knows the other, and this
module knows no engine and no sensor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from msgspec import structs

from lem.backends.base import Backend, Encoded, Generation
from lem.energy.base import Meter
from lem.record import CpuLoad, Phase, PhaseName, WarmupEnd, WarmupInfo
from lem.results.journal import Checkpoint
from lem.runner.progress import Event, Report
from lem.runner.ranks import Ranks
from lem.spec.experiment import Warmup
from lem.units import NS_PER_S
from lem.workload.traffic import Arrivals

# How often the meter is asked inside of the window, at most.
MOST_OFTEN_NS = 100_000_000


@dataclass(frozen=True)
class MeasuredRequest:
    """A generation beside the prompt it belongs to; times are relative to the window's opening."""

    generation: Generation
    prompt: Encoded
    start_s: float
    end_s: float
    arrived_s: float | None = None


@dataclass
class Measurement:
    """What has been measured of one cycle so far; filled as the run goes, so that nothing is lost when it ends early.

    `indices` are the positions of this process's prompts among the experiment's, those of earlier attempts left out.
    Of a window that was cut short, at what it had finished last, `lost_s` is how long it had gone on since, and
    `energy_behind_s` how long before its end its energy is known to; None else, and where nothing metered it.
    """

    indices: list[int] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    requests: list[MeasuredRequest] = field(default_factory=list)
    warmup: WarmupInfo | None = None
    cpu_load: CpuLoad | None = None
    current: PhaseName | None = None
    window_opened_ns: int = 0
    window_opened_unix_s: float | None = None
    lost_s: float | None = None
    energy_behind_s: float | None = None

    def add(self, generation: Generation, prompt: Encoded) -> MeasuredRequest:
        """Take in one finished request of the measured window."""
        request = MeasuredRequest(
            generation,
            prompt,
            start_s=(generation.start_ns - self.window_opened_ns) / NS_PER_S,
            end_s=(generation.end_ns - self.window_opened_ns) / NS_PER_S,
            arrived_s=None
            if generation.arrived_ns is None
            else (generation.arrived_ns - self.window_opened_ns) / NS_PER_S,
        )
        self.requests.append(request)
        return request


@dataclass(frozen=True)
class Queue:
    """How the prompts of a window arrive: at times after its opening, or `concurrency` at any time.

    The engine takes `at_most` of those that wait.
    """

    times_s: Sequence[float] | None
    concurrency: int
    at_most: int


class Recorder(Protocol):
    """Is told what is finished, as soon as it is."""

    def opens(self) -> None:
        """The measured window is about to open."""

    def finished(self, batch: Sequence[MeasuredRequest], checkpoint: Checkpoint) -> None:
        """A batch is finished, or nothing but time has passed; the window up to here is `checkpoint`."""


@dataclass
class Bench:
    """What a process measures with, over all its cycles: an engine, a meter, its peers, and who is told."""

    backend: Backend
    meter: Meter
    ranks: Ranks
    report: Report

    # -------------------------------------------------------------- once
    def prepare(self, texts: Sequence[str], indices: Sequence[int], idle_s: float, into: Measurement) -> list[Encoded]:
        """Idle, load the model, encode the prompts, and idle with the model resident.

        Args:
            texts: the prompts of this process.
            indices: their positions among the experiment's.
            idle_s: length of each of the two idle phases; 0 for none.
            into: takes the phases.

        Returns:
            The encoded prompts, which know their positions.
        """
        self._idle("idle_before", idle_s, into)
        with self.phase("load", into):
            self.report(Event("load"))
            self.backend.load()
        # An engine numbers the texts that it is given; from here on they go by their place in the experiment.
        prompts = [replace(p, index=indices[p.index]) for p in self.backend.encode(texts)]
        self._idle("idle_loaded", idle_s, into)
        return prompts

    def _idle(self, name: PhaseName, seconds: float, into: Measurement) -> None:
        if seconds <= 0:
            return
        self.report(Event(name))
        with self.phase(name, into):
            time.sleep(seconds)

    # -------------------------------------------------------------- each cycle
    def warm_up(self, prompts: Sequence[Encoded], warmup: Warmup, batch_size: int, into: Measurement) -> None:
        """Run some prompts before the window, as many as `warmup` says."""
        if prompts and (warmup.prompts or warmup.until_cv is not None):
            with self.phase("warmup", into):
                into.warmup = _warm_up(prompts, warmup, batch_size, self.backend, self.report)
        self.backend.forget()
        self.backend.reset_peak_memory()

    def run_window(
        self,
        prompts: Sequence[Encoded],
        recorder: Recorder,
        into: Measurement,
        *,
        first_batch: int = 0,
        queue: Queue | None = None,
    ) -> None:
        """Run the prompts once, in the measured window; on an error `into` keeps what was finished until then.

        Args:
            prompts: what is to be run; may be empty, so that this process only waits for the others.
            recorder: is told of each batch.
            into: takes the phase and the requests.
            first_batch: number of the first batch; not 0 when a former attempt has run some.
            queue: how the prompts arrive; None when all are there from the beginning.
        """
        self.report(Event("measured", 0, len(prompts)))
        window = _Window(self, into)
        recorder.opens()  # before the window, for it takes time
        window.open()
        try:
            by_index = {prompt.index: prompt for prompt in prompts}
            output_tokens = 0
            for batch in self._generate(prompts, queue, into.window_opened_ns):
                if first_batch:
                    batch = [replace(g, batch=g.batch + first_batch) for g in batch]
                done = [into.add(g, by_index[g.index]) for g in batch]
                recorder.finished(done, window.checkpoint())
                output_tokens += sum(g.output_tokens for g in batch)
                self.report(Event("measured", len(into.requests), len(prompts), output_tokens))
            window.close(recorder)
        except BaseException:
            window.cut()
            raise

    def _generate(
        self, prompts: Sequence[Encoded], queue: Queue | None, opened_ns: int
    ) -> Iterator[Sequence[Generation]]:
        """Yield what the engine makes of the prompts, all at once or as they arrive."""
        if not prompts:
            return
        if queue is None:
            yield from self.backend.generate(prompts)
            return
        arrivals = Arrivals(prompts, queue.times_s, queue.concurrency, opened_ns)
        yield from self.backend.serve(arrivals, queue.at_most)

    @contextmanager
    def phase(self, name: PhaseName, into: Measurement) -> Iterator[None]:
        """Time and meter a phase; it is kept, with what it took, also when it ends in an error."""
        into.current = name
        self.backend.synchronize()
        self.meter.settle()
        self.ranks.barrier()
        self.meter.begin()
        opened_ns = time.perf_counter_ns()
        try:
            yield
            self.backend.synchronize()
            self.ranks.barrier()
        finally:
            closed_ns = time.perf_counter_ns()
            self.meter.mark()
            into.phases.append(Phase(name, (closed_ns - opened_ns) / NS_PER_S, self.meter.end()))
        into.current = None


class _Window:
    """The measured window: opened and closed with the other processes; ends at its last batch when it is cut short."""

    def __init__(self, bench: Bench, into: Measurement) -> None:
        self._bench, self._into = bench, into
        self._load = _LoadClock()
        self._of_engine: Sequence[int] = ()
        self._last: Checkpoint | None = None
        self._metered: Checkpoint | None = None
        self._ask_again_ns = 0

    def open(self) -> None:
        """Synchronise, wait for the others, and note time and energy."""
        into = self._into
        into.current = "measured"
        self._of_engine = self._bench.backend.server_pids()
        self._bench.backend.synchronize()
        self._bench.meter.settle()
        self._bench.ranks.barrier()
        self._bench.meter.begin()
        into.window_opened_unix_s = time.time()
        into.window_opened_ns = time.perf_counter_ns()
        self._load.start(self._of_engine)

    def checkpoint(self) -> Checkpoint:
        """Return how far the window has come; asks the meter as often as costs a hundredth of the time."""
        now_ns = time.perf_counter_ns()
        energy, energy_at_s = None, None
        if now_ns >= self._ask_again_ns:
            energy = self._bench.meter.so_far()
            asked_ns = time.perf_counter_ns()
            energy_at_s = None if energy is None else self._since(asked_ns)
            self._ask_again_ns = asked_ns + max(MOST_OFTEN_NS, 100 * (asked_ns - now_ns))
            now_ns = asked_ns
        self._last = Checkpoint(self._since(now_ns), energy=energy, energy_at_s=energy_at_s)
        if energy is not None:
            self._metered = self._last
        return self._last

    def close(self, recorder: Recorder) -> None:
        """Synchronise, wait for the others, and note time and energy; those who work on may be killed meanwhile."""
        into = self._into
        self._bench.backend.synchronize()
        self._bench.ranks.barrier(lambda: recorder.finished((), self.checkpoint()))
        duration_s = self._since(time.perf_counter_ns())
        self._bench.meter.mark()
        into.cpu_load = self._load.stop()
        into.phases.append(Phase("measured", duration_s, self._bench.meter.end()))
        into.current = None

    def cut(self) -> None:
        """End the window with the last batch: what was begun after it will be run again, or was never finished."""
        broken_off_s = self._since(time.perf_counter_ns())
        readings = self._bench.meter.end()
        if self._last is None:
            return
        self._into.lost_s = broken_off_s - self._last.duration_s
        if self._metered is None:
            lost = "the window was broken off, and the meter cannot tell what it had read before"
            readings = tuple(structs.replace(r, energy_j=None, trace_energy_j=None, reason=lost) for r in readings)
        else:
            readings = self._metered.energy or ()
            if readings:
                self._into.energy_behind_s = self._last.duration_s - (self._metered.energy_at_s or 0.0)
        self._into.phases.append(Phase("measured", self._last.duration_s, readings))

    def _since(self, now_ns: int) -> float:
        return (now_ns - self._into.window_opened_ns) / NS_PER_S


# ------------------------------------------------------------------ warm-up
def _warm_up(
    prompts: Sequence[Encoded], warmup: Warmup, batch_size: int, backend: Backend, report: Report
) -> WarmupInfo:
    if warmup.until_cv is not None:
        return _warm_up_until_steady(prompts, warmup, batch_size, backend, report)
    report(Event("warmup", 0, warmup.prompts))
    # The prompts' own indices may repeat here; warm-up generations are never looked up by index.
    repeated = [prompts[i % len(prompts)] for i in range(warmup.prompts)]
    done = 0
    for batch in backend.generate(repeated):
        done += len(batch)
        report(Event("warmup", done, warmup.prompts))
    return WarmupInfo(warmup.prompts, "fixed", None)


def _warm_up_until_steady(
    prompts: Sequence[Encoded], warmup: Warmup, batch_size: int, backend: Backend, report: Report
) -> WarmupInfo:
    """Repeat the first batch, the same work each time, until its latencies are steady or a limit is reached."""
    batch = prompts[:batch_size]
    latencies_s: list[float] = []
    done, began_ns = 0, time.perf_counter_ns()
    while True:
        before_ns = time.perf_counter_ns()
        done += sum(len(finished) for finished in backend.generate(batch))
        latencies_s.append((time.perf_counter_ns() - before_ns) / NS_PER_S)
        report(Event("warmup", done))
        cv = variation(latencies_s[-warmup.cv_batches :]) if len(latencies_s) >= warmup.cv_batches else None
        ended = _end_of_warmup(warmup, cv, done, (time.perf_counter_ns() - began_ns) / NS_PER_S)
        if ended is not None:
            return WarmupInfo(done, ended, cv)


def _end_of_warmup(warmup: Warmup, cv: float | None, done: int, spent_s: float) -> WarmupEnd | None:
    if cv is not None and warmup.until_cv is not None and cv < warmup.until_cv:
        return "converged"
    if done >= warmup.max_prompts:
        return "max_prompts"
    return "max_s" if spent_s >= warmup.max_s else None


def variation(values: Sequence[float]) -> float | None:
    """Return the coefficient of variation (sample standard deviation over mean); None for fewer than two values."""
    if len(values) < 2 or statistics.fmean(values) == 0:
        return None
    return statistics.stdev(values) / statistics.fmean(values)


class _LoadClock:
    """Processor time of the machine, and of this process, its children and the engine's, over a span, in busy cores."""

    def start(self, of_engine: Sequence[int]) -> None:
        """Note the times; an engine's workers have been started by now, and looking for them takes milliseconds."""
        import psutil

        self._children = [*psutil.Process().children(recursive=True), *_living(of_engine)]
        self._wall_ns, self._machine_s, self._process_s = self._now()

    def stop(self) -> CpuLoad:
        """Return the cores that were busy since `start`."""
        wall_ns, machine_s, process_s = self._now()
        span_s = max((wall_ns - self._wall_ns) / NS_PER_S, 1e-9)
        return CpuLoad((machine_s - self._machine_s) / span_s, (process_s - self._process_s) / span_s)

    def _now(self) -> tuple[int, float, float]:
        import psutil

        machine = psutil.cpu_times()
        busy_s = machine.user + machine.system + getattr(machine, "nice", 0.0) + getattr(machine, "softirq", 0.0)
        return time.perf_counter_ns(), float(busy_s), time.process_time() + sum(map(_cpu_s, self._children))


def _living(pids: Sequence[int]) -> Iterator[Any]:
    import psutil

    for pid in pids:
        try:
            yield psutil.Process(pid)
        except psutil.Error:
            continue


def _cpu_s(process: Any) -> float:
    """Return the processor time of a process, 0 when it is gone."""
    import psutil

    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)
