"""The heart: load, warm up, open the window, generate, synchronise, close.

A phase is a stretch of work with its own clock and energy, and phases do not overlap. The measured window holds
the generation of exactly the planned prompts: loading, tokenizing and warm-up are outside. Windows are timed
with `perf_counter_ns`; the device is synchronised at both edges. Here alone a backend meets a meter; neither
knows the other, and this module knows no engine and no sensor.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from lem.backends.base import Backend, Encoded, Generation
from lem.energy.base import Meter
from lem.progress import Event, Report
from lem.record import Phase, PhaseName
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
    """What has been measured so far; filled as the run goes, so that nothing is lost when it ends early."""

    phases: list[Phase] = field(default_factory=list)
    requests: list[MeasuredRequest] = field(default_factory=list)
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
    warmup_prompts: int,
    report: Report,
    into: Measurement,
) -> None:
    """Run the prompts once and fill `into`; on an error it keeps what was measured until then.

    Args:
        texts: the prompts of this process.
        backend: started, not yet loaded; it stays loaded.
        meter: opened already.
        warmup_prompts: prompts to run before the window; the first of `texts`, repeated if there are fewer.
        report: is told how far the work is.
        into: filled phase by phase and request by request.
    """
    report(Event("load"))
    with phase("load", backend, meter, into):
        backend.load()
    prompts = backend.encode(texts)
    if warmup_prompts:
        with phase("warmup", backend, meter, into):
            _warm_up(prompts, warmup_prompts, backend, report)
    backend.reset_peak_memory()
    by_index = {prompt.index: prompt for prompt in prompts}
    report(Event("measured", 0, len(prompts)))
    with phase("measured", backend, meter, into):
        output_tokens = 0
        for done, generation in enumerate(backend.generate(prompts), start=1):
            into.add(generation, by_index[generation.index])
            output_tokens += len(generation.token_ids)
            report(Event("measured", done, len(prompts), output_tokens))


def _warm_up(prompts: Sequence[Encoded], count: int, backend: Backend, report: Report) -> None:
    report(Event("warmup", 0, count))
    # The prompts' own indices may repeat here; warm-up generations are never looked up by index.
    repeated = [prompts[i % len(prompts)] for i in range(count)]
    for done, _ in enumerate(backend.generate(repeated), start=1):
        report(Event("warmup", done, count))


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
