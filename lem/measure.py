"""The heart: settle, load, warm up, open the window, generate, synchronise, close.

A phase is a stretch of work with its own clock and energy, and phases do not overlap. The measured window holds
the generation of exactly the planned prompts: idling, loading, tokenizing and warm-up are outside. Windows are timed
with `perf_counter_ns`; the device is synchronised at both edges. Here alone a backend meets a meter; neither
knows the other, and this module knows no engine and no sensor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lem.backends.base import Backend, Encoded, Generation
from lem.energy.base import Meter
from lem.progress import Event, Report
from lem.record import CpuLoad, Phase, PhaseName, WarmupEnd, WarmupInfo
from lem.spec import Warmup
from lem.units import NS_PER_S


@dataclass(frozen=True)
class MeasuredRequest:
    """A generation beside the prompt it belongs to; times are relative to the window's opening."""

    generation: Generation
    prompt: Encoded
    start_s: float
    end_s: float


@dataclass
class Measurement:
    """What has been measured so far; filled as the run goes, so that nothing is lost when it ends early.

    `indices` are the positions of this process's prompts among the experiment's.
    """

    indices: list[int] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    requests: list[MeasuredRequest] = field(default_factory=list)
    warmup: WarmupInfo | None = None
    cpu_load: CpuLoad | None = None
    current: PhaseName | None = None
    window_opened_ns: int = 0

    def add(self, generation: Generation, prompt: Encoded) -> None:
        """Take in one finished request of the measured window."""
        self.requests.append(
            MeasuredRequest(
                generation,
                prompt,
                start_s=(generation.start_ns - self.window_opened_ns) / NS_PER_S,
                end_s=(generation.end_ns - self.window_opened_ns) / NS_PER_S,
            )
        )


def measure(
    texts: Sequence[str],
    *,
    backend: Backend,
    meter: Meter,
    warmup: Warmup,
    idle_s: float,
    batch_size: int,
    report: Report,
    into: Measurement,
) -> None:
    """Run the prompts once and fill `into`; on an error it keeps what was measured until then.

    Args:
        texts: the prompts of this process.
        backend: started, not yet loaded; it stays loaded.
        meter: opened already.
        warmup: how much to run before the window; the first of `texts`, repeated if there are fewer.
        idle_s: length of each of the two idle phases, before loading and with the model resident; 0 for none.
        batch_size: prompts that the warm-up repeats while it waits for steady latencies.
        report: is told how far the work is.
        into: filled phase by phase and request by request.
    """
    _idle("idle_before", idle_s, backend, meter, report, into)
    with phase("load", backend, meter, into):
        report(Event("load"))
        backend.load()
    prompts = backend.encode(texts)
    _idle("idle_loaded", idle_s, backend, meter, report, into)
    if warmup.prompts or warmup.until_cv is not None:
        with phase("warmup", backend, meter, into):
            into.warmup = _warm_up(prompts, warmup, batch_size, backend, report)
    backend.reset_peak_memory()
    by_index = {prompt.index: prompt for prompt in prompts}
    report(Event("measured", 0, len(prompts)))
    load = _LoadClock()
    with phase("measured", backend, meter, into):
        load.start()
        output_tokens = 0
        for done, generation in enumerate(backend.generate(prompts), start=1):
            into.add(generation, by_index[generation.index])
            output_tokens += len(generation.token_ids)
            report(Event("measured", done, len(prompts), output_tokens))
        into.cpu_load = load.stop()


def _idle(name: PhaseName, seconds: float, backend: Backend, meter: Meter, report: Report, into: Measurement) -> None:
    if seconds <= 0:
        return
    report(Event(name))
    with phase(name, backend, meter, into):
        time.sleep(seconds)


# ------------------------------------------------------------------ warm-up
def _warm_up(
    prompts: Sequence[Encoded], warmup: Warmup, batch_size: int, backend: Backend, report: Report
) -> WarmupInfo:
    if warmup.until_cv is not None:
        return _warm_up_until_steady(prompts, warmup, batch_size, backend, report)
    report(Event("warmup", 0, warmup.prompts))
    # The prompts' own indices may repeat here; warm-up generations are never looked up by index.
    repeated = [prompts[i % len(prompts)] for i in range(warmup.prompts)]
    for done, _ in enumerate(backend.generate(repeated), start=1):
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
        done += sum(1 for _ in backend.generate(batch))
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


# ------------------------------------------------------------------ phases
@contextmanager
def phase(name: PhaseName, backend: Backend, meter: Meter, into: Measurement) -> Iterator[None]:
    """Time and meter a phase; it is kept, with what it took, also when it ends in an error."""
    into.current = name
    backend.synchronize()
    meter.begin()
    opened_ns = time.perf_counter_ns()
    if name == "measured":
        into.window_opened_ns = opened_ns
    try:
        yield
        backend.synchronize()
    finally:
        closed_ns = time.perf_counter_ns()
        readings = meter.end()
        into.phases.append(Phase(name, (closed_ns - opened_ns) / NS_PER_S, readings))
    into.current = None


class _LoadClock:
    """Processor time of the machine and of this process over a span, in busy cores."""

    def start(self) -> None:
        """Note the times."""
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
        return time.perf_counter_ns(), float(busy_s), time.process_time()
