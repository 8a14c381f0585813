"""Builds the record of one cycle, and its rows, from the data that a process has collected.

This module queries no engine or meter; `lem.runner.attempt` does that and passes the answers on.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from lem import __version__
from lem.energy.carbon import WindowEnergy, carbon_of
from lem.energy.trace import integral_j
from lem.errors import BadInput
from lem.machine.slurm import own_job_id
from lem.quantities import NS_PER_S, timestamp
from lem.record import (
    ENERGY_OWNER,
    FORMAT_VERSION,
    UNCOVERED_S,
    Carbon,
    CodedWarning,
    Cut,
    EnergyReading,
    EnergySoFar,
    EngineInfo,
    Environment,
    ErrorInfo,
    Flops,
    Memory,
    ModelInfo,
    PowerRecord,
    PowerSample,
    Prefill,
    ProcessRecord,
    RequestRecord,
    Status,
    UnderWay,
)
from lem.results.journal import Checkpoint
from lem.results.merging import of_headline, total
from lem.results.plan import Plan
from lem.runner.window import MeasuredRequest, Measurement
from lem.warning_codes import warning
from lem.workload import flops
from lem.workload.flops import Architecture
from lem.workload.tokens import token_times

# The maximum number of energy readings that a record keeps for a window.
READINGS_KEPT = 100
# If a larger share of the prefill time overlaps other requests' decoding, the two cannot be told apart.
SHARED_LEAST = 0.01
# To resolve the energy of prefill, the mean prefill must last at least this many times as long as the maximum age of a
# power sample.
LEAST_REACHES = 5
SHARED = "some requests were decoding while other prompts were processed"


@dataclass(frozen=True)
class WindowId:
    """Identifies the window of a record and of its rows, by the fields that they share."""

    experiment_id: str
    rank: int
    cycle: int
    attempt: int


@dataclass(frozen=True)
class EngineReport:
    """The engine's report for a record; `warnings` concern the engine and the machine it runs on."""

    model: ModelInfo | None
    engine: EngineInfo
    memory: Memory
    counters: dict[str, float] | None = None
    architecture: Architecture | None = None
    warnings: tuple[CodedWarning, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """Everything that one process knows about a cycle when it makes the record; `engine` is None before loading.

    `trace` holds all power samples of the attempt so far.
    """

    plan: Plan
    window: WindowId
    started_at: str
    measured: Measurement
    environment: Environment
    engine: EngineReport | None = None
    trace: Sequence[PowerSample] = ()
    status: Status = "completed"
    error: ErrorInfo | None = None


def process_record(known: Snapshot) -> ProcessRecord:
    """Return the record built from a snapshot, without the warnings that depend on its numbers."""
    plan, measured, engine = known.plan, known.measured, known.engine
    counts = plan.counts(known.window.rank)
    ended = measured.requests if counts else []
    requests = [r for r in ended if r.generation.error is None]
    carbon, doubts = _carbon(known)
    record = replace(
        bare_record(plan, known.window, known.status, known.error, known.started_at),
        window_opened_unix_s=measured.window_opened_unix_s,
        phases=tuple(measured.phases),
        requests_planned=len(measured.indices) if counts else 0,
        requests_completed=len(requests),
        requests_failed=len(ended) - len(requests),
        input_tokens=sum(len(r.prompt.token_ids) for r in requests),
        output_tokens=sum(r.generation.output_tokens for r in requests),
        carbon=carbon,
        prefill=prefill_of(measured.requests, known.trace, _readings(measured)),
        warmup=measured.warmup,
        cpu_load=measured.cpu_load,
        own_time=measured.own_time,
        energy_so_far=_energy_so_far(plan, measured),
        cut=None if measured.lost_s is None else _cut(measured, counts=counts),
        arrivals_from_s=measured.arrivals_from_s,
        environment=known.environment,
        devices_during=measured.devices,
        warnings=doubts,
    )
    if engine is None:
        return record
    architecture = engine.architecture
    sizes = ((len(r.prompt.token_ids), r.generation.output_tokens) for r in requests)
    return replace(
        record,
        model=engine.model,
        engine=engine.engine,
        memory=engine.memory,
        flops=None if architecture is None else Flops(flops.total_flops(architecture, sizes), flops.METHOD),
        counters=engine.counters,
        warnings=(*engine.warnings, *_warnings(plan, measured), *doubts),
    )


def _carbon(known: Snapshot) -> tuple[Carbon | None, tuple[CodedWarning, ...]]:
    """Return the carbon intensity, and a warning if it is unknown although a trace of intensities is configured."""
    energy, measured = known.plan.experiment.energy, known.measured
    window = None
    if measured.window_opened_unix_s is not None and known.window.rank == ENERGY_OWNER:
        duration_s = next((phase.duration_s for phase in measured.phases if phase.name == "measured"), None)
        window = WindowEnergy(measured.window_opened_unix_s, duration_s, _EnergyOfParts(known))
    try:
        return carbon_of(energy, window), ()
    except BadInput as error:  # the measurement is kept even if the intensity is unknown
        return None, (warning("carbon_unknown", f"{str(error).rstrip('.')}."),)


@dataclass(frozen=True)
class _EnergyOfParts:
    """The energy of parts of a window, according to the power traces of the devices in the headline energy."""

    known: Snapshot

    def __call__(self, start_s: float, end_s: float) -> float | None:
        """Return the energy in J between two times, in s since the window opened; None if a trace has a gap there."""
        devices = {(r.component, r.device) for r in of_headline(_readings(self.known.measured))}
        opened_ns = self.known.measured.window_opened_ns
        edges_ns = [opened_ns + round(each * NS_PER_S) for each in (start_s, end_s)]
        return total([integral_j(self._samples(*device), edges_ns[0], edges_ns[1]) for device in devices])

    def _samples(self, component: str, device: str) -> list[PowerSample]:
        return [sample for sample in self.known.trace if (sample.component, sample.device) == (component, device)]


def _cut(measured: Measurement, *, counts: bool) -> Cut:
    under_way = measured.under_way if counts else None
    return Cut(1, measured.lost_s, measured.energy_behind_s, under_way or UnderWay())


def bare_record(
    plan: Plan, window: WindowId, status: Status, error: ErrorInfo | None, started_at: str | None = None
) -> ProcessRecord:
    """Return a record without measurements, which only identifies the process and says how it ended."""
    return ProcessRecord(
        format_version=FORMAT_VERSION,
        lem_version=__version__,
        **vars(window),
        world_size=plan.processes,
        status=status,
        started_at=started_at or timestamp(),
        hostname=socket.gethostname(),
        config_sha256=plan.config_sha256,
        backend=plan.experiment.backend.name,
        error=error,
        slurm_job_id=own_job_id(),
        slurm_node=os.environ.get("SLURMD_NODENAME"),
    )


def _energy_so_far(plan: Plan, measured: Measurement) -> tuple[EnergySoFar, ...]:
    """Return at most `READINGS_KEPT` readings of the window's energy; none unless batching is continuous.

    Only continuous batching has a steady state, for which the readings are needed.
    """
    if plan.experiment.batching.strategy != "continuous":
        return ()
    known = [found for each in measured.readings if (found := _at_one_time(each))]
    return tuple(known[:: -(-len(known) // READINGS_KEPT) or 1])


def _at_one_time(checkpoint: Checkpoint) -> EnergySoFar | None:
    """Return the headline energy and the time up to which it is known.

    Returns None if the energy is unknown, or if the energies of its components are known up to different times.
    """
    readings, read_s = of_headline(checkpoint.energy or ()), checkpoint.energy_at_s
    energy_j = total([r.energy_j for r in readings])
    if energy_j is None or read_s is None:
        return None
    reached_s = [read_s if r.covered_s is None else r.covered_s for r in readings]
    if max(reached_s) - min(reached_s) > UNCOVERED_S:
        return None
    return EnergySoFar(min(reached_s), energy_j)


def _warnings(plan: Plan, measured: Measurement) -> Iterator[CodedWarning]:
    """Yield the warnings about the plan, the prompts, and a window that was cut short."""
    if plan.shared_with:
        others = f"{plan.shared_with} other experiment{'s' if plan.shared_with > 1 else ''}"
        text = (
            f"up to {others} ran at the same time; except for the energy of this experiment's own GPUs, all energy "
            "values include the energy of other experiments."
        )
        yield warning("shared_hardware", text)
    wanted, available = plan.experiment.dataset.sample_size, plan.prompts.count
    if wanted is not None and available < wanted:
        prompts = f"non-empty prompt{'s' if available != 1 else ''}"
        text = f"{wanted} prompts were requested, but the dataset has only {available} {prompts}."
        yield warning("fewer_prompts", text)
    if measured.lost_s is not None and measured.ends_when_cut:
        yield warning(
            "window_cut",
            "the window ends at the interruption, because other processes may have finished requests up to then.",
        )
    elif measured.lost_s is not None:
        behind_s = measured.energy_behind_s
        energy = f"; the window's energy was last read {behind_s:.3g} s before that request ended" if behind_s else ""
        end = f"its last finished request, {measured.lost_s:.3g} s before the run was interrupted{energy}"
        yield warning("window_cut", f"the window ends with {end}.")
    truncated = sum(r.prompt.truncated for r in measured.requests)
    if truncated:
        were = "was" if truncated == 1 else "were"
        yield warning("input_truncated", f"{truncated} of {len(measured.requests)} prompts {were} truncated.")


# ------------------------------------------------------------------ prefill
def _readings(measured: Measurement) -> Sequence[EnergyReading]:
    return next((phase.energy for phase in measured.phases if phase.name == "measured"), ())


def prefill_of(
    requests: Sequence[MeasuredRequest], trace: Sequence[PowerSample], readings: Sequence[EnergyReading]
) -> Prefill | None:
    """Return the window's time and energy in prefill; None if there are no requests, or some prefill's end is unknown.

    Args:
        requests: the window's requests.
        trace: the power samples, at least those within the window.
        readings: the window's energy readings, which state the maximum age of each device's power samples.
    """
    if any(r.generation.prefill_end_ns is None for r in requests):
        return None
    spans = _merged(
        (r.generation.start_ns, r.generation.prefill_end_ns)
        for r in requests
        if r.generation.prefill_end_ns is not None
    )
    if not spans:
        return None
    decoding = _merged(
        (r.generation.prefill_end_ns, r.generation.end_ns) for r in requests if r.generation.prefill_end_ns is not None
    )
    duration_ns = sum(end - start for start, end in spans)
    if _common_ns(spans, decoding) > SHARED_LEAST * duration_ns:
        return Prefill(None, reason=SHARED)
    return _with_energy(Prefill(duration_ns / NS_PER_S), spans, trace, readings)


def _with_energy(
    prefill: Prefill, spans: Sequence[tuple[int, int]], trace: Sequence[PowerSample], readings: Sequence[EnergyReading]
) -> Prefill:
    """Add the energy of the prefill spans if the power sensor can resolve it; otherwise, add the reason."""
    by_device: dict[str, list[PowerSample]] = {}
    for sample in trace:
        if sample.component == "gpu":
            by_device.setdefault(sample.device, []).append(sample)
    if not by_device:
        return replace(prefill, reason="there is no power trace")
    reaches_s = {reading.device: reading.trace_reach_s for reading in readings if reading.trace_reach_s}
    known_s = [reaches_s[device] for device in by_device if device in reaches_s]
    if len(known_s) < len(by_device):
        return replace(prefill, reason="the power trace does not cover the window, or its averaging time is unknown")
    reach_s = max(known_s)
    if (prefill.duration_s or 0.0) < LEAST_REACHES * reach_s * len(spans):
        short = f"prefills shorter than {LEAST_REACHES * reach_s:.3g} s on average cannot be resolved by power samples"
        return replace(prefill, reason=f"{short} that may be up to {reach_s:.3g} s old")
    pieces_j = [integral_j(samples, start, end) for samples in by_device.values() for start, end in spans]
    known_j = [piece for piece in pieces_j if piece is not None]
    if len(known_j) < len(pieces_j):
        return replace(prefill, reason="the power trace does not cover all prefills")
    uncertainty_j = sum(_uncertainty_j(samples, spans, reaches_s[device]) for device, samples in by_device.items())
    return replace(prefill, energy_j=sum(known_j), uncertainty_j=uncertainty_j)


def _common_ns(ones: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> int:
    """Return the total overlap, in ns, of two lists of spans; each list is in order and has no overlaps within it."""
    common, place = 0, 0
    for start, end in ones:
        while place < len(others) and others[place][1] <= start:
            place += 1
        for other_start, other_end in others[place:]:
            if other_start >= end:
                break
            common += min(end, other_end) - max(start, other_start)
    return common


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans in order, merging spans that overlap, because requests may be prefilled at the same time."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _uncertainty_j(samples: Sequence[PowerSample], spans: Sequence[tuple[int, int]], reach_s: float) -> float:
    """Return an upper bound, in J, on the energy that the samples may attribute to the wrong side of the spans' edges.

    At each edge, the error is at most the maximum age of a sample times the range of power in the window.
    """
    inside = [s.power_w for s in samples if spans[0][0] <= s.t_ns <= spans[-1][1] + reach_s * NS_PER_S]
    return 2 * len(spans) * reach_s * (max(inside) - min(inside)) if inside else 0.0


# ------------------------------------------------------------------ rows
def request_row(window: WindowId, request: MeasuredRequest) -> RequestRecord:
    """Return the row of one request."""
    generation, arrived_s = request.generation, request.arrived_s
    latency_s = request.end_s - (request.start_s if arrived_s is None else arrived_s)
    row = RequestRecord(
        **vars(window),
        request=generation.index,
        batch=generation.batch,
        input_tokens=len(request.prompt.token_ids),
        output_tokens=None if generation.error else generation.output_tokens,
        input_truncated=request.prompt.truncated,
        finish_reason=generation.finish_reason,
        start_s=request.start_s,
        end_s=request.end_s,
        latency_s=None if generation.error else latency_s,
        prefill_s=(
            None if generation.prefill_end_ns is None else (generation.prefill_end_ns - generation.start_ns) / NS_PER_S
        ),
        arrived_s=arrived_s,
        # Null if the engine does not report when the request began.
        queue_s=None if arrived_s is None or not generation.start_is_known else request.start_s - arrived_s,
        error=generation.error,
    )
    begin_ns = generation.start_ns if generation.arrived_ns is None else generation.arrived_ns
    times = token_times(begin_ns, generation.chunks)
    if times is None:
        return row
    return replace(row, ttft_s=times.ttft_s, tpot_s=times.tpot_s, itl_s=list(times.itl_s), itl_spread=times.spread)


def power_rows(window: WindowId, zero_ns: int, samples: Iterable[PowerSample]) -> Iterator[PowerRecord]:
    """Yield the rows of a power trace, with times relative to `zero_ns`."""
    for sample in samples:
        yield PowerRecord(
            **vars(window),
            t_s=(sample.t_ns - zero_ns) / NS_PER_S,
            component=sample.component,
            device=sample.device,
            power_w=sample.power_w,
            temperature_c=sample.temperature_c,
        )
