"""What one process knows of its attempt at an experiment, and the records that it leaves."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from lem import __version__, warning_codes
from lem.backends import Backend
from lem.energy.base import Meter, NoMeter
from lem.energy.carbon import carbon_intensity
from lem.energy.trace import integral_j
from lem.machine import host
from lem.machine.gpu import Gpu
from lem.record import (
    FORMAT_VERSION,
    CodedWarning,
    DeviceState,
    ErrorInfo,
    Flops,
    Memory,
    PowerRecord,
    PowerSample,
    Prefill,
    ProcessRecord,
    RequestRecord,
    Status,
)
from lem.results.directory import ExperimentDir
from lem.results.journal import DIED, Checkpoint, Journal
from lem.results.plan import Plan
from lem.runner.ranks import Ranks
from lem.runner.stopping import UNDISTURBED
from lem.runner.window import MeasuredRequest, Measurement
from lem.units import NS_PER_S, timestamp
from lem.warning_codes import warning
from lem.workload import flops
from lem.workload.flops import Architecture
from lem.workload.tokens import token_times


@dataclass
class Run:
    """One process's run while it goes on: what it works with, and what has become of the cycle it is in."""

    directory: ExperimentDir
    plan: Plan
    rank: int
    attempt: int
    here: host.Host
    backend: Backend
    journal: Journal | None = None
    ranks: Ranks = field(default_factory=Ranks)
    started_at: str = field(default_factory=timestamp)
    meter: Meter = field(default_factory=NoMeter)
    architecture: Architecture | None = None
    gpus: tuple[Gpu, ...] = ()
    devices_before: tuple[DeviceState, ...] = ()
    is_cool: bool = True
    loaded: bool = False
    cycle: int = 1
    measurement: Measurement = field(default_factory=Measurement)
    total_flops: float = 0.0
    traced_until_ns: int = 0
    status: Status = "completed"
    error: ErrorInfo | None = None

    # -------------------------------------------------------------- as a recorder of the measured window
    def opens(self) -> None:
        """Note in the journal that a window opens, with the record as it stands."""
        self.measurement.window_opened_unix_s = time.time()
        if self.journal is not None:
            killed = ErrorInfo(DIED, "The worker was killed before it could write its record.", "measured")
            self.journal.open_window(replace(_record(self), status="interrupted", error=killed))

    def finished(self, batch: Sequence[MeasuredRequest], checkpoint: Checkpoint) -> None:
        """Note a batch in the journal that is done."""
        if self.journal is not None:
            with UNDISTURBED:
                rows = [_request_row(self, request) for request in batch]
                self.journal.add(rows, replace(checkpoint, flops=self._flops_so_far(rows)))

    def _flops_so_far(self, rows: Sequence[RequestRecord]) -> Flops | None:
        if self.architecture is None:
            return None
        self.total_flops += flops.total_flops(self.architecture, ((r.input_tokens, r.output_tokens) for r in rows))
        return Flops(self.total_flops, flops.METHOD)


def _record(this: Run) -> ProcessRecord:
    measurement, backend = this.measurement, this.backend
    requests = measurement.requests if this.plan.counts(this.rank) else []
    return ProcessRecord(
        format_version=FORMAT_VERSION,
        lem_version=__version__,
        experiment_id=this.plan.experiment_id,
        rank=this.rank,
        world_size=this.plan.processes,
        status=this.status,
        started_at=this.started_at,
        hostname=socket.gethostname(),
        cycle=this.cycle,
        attempt=this.attempt,
        config_sha256=this.plan.config_sha256,
        backend=this.plan.experiment.backend.name,
        window_opened_unix_s=measurement.window_opened_unix_s,
        error=this.error,
        model=backend.model_info() if this.loaded else None,
        engine=backend.engine_info() if this.loaded else None,
        phases=tuple(measurement.phases),
        requests_planned=len(measurement.indices) if this.plan.counts(this.rank) else 0,
        requests_completed=len(requests),
        input_tokens=sum(len(r.prompt.token_ids) for r in requests),
        output_tokens=sum(r.generation.output_tokens for r in requests),
        memory=_memory(backend, measurement.requests) if this.loaded else None,
        flops=_flops(this.architecture, requests) if this.loaded else None,
        carbon=carbon_intensity(this.plan.experiment.energy),
        prefill=prefill_of(measurement, this.meter.trace()),
        warmup=measurement.warmup,
        cpu_load=measurement.cpu_load,
        counters=backend.counters() if this.loaded else None,
        environment=host.environment(this.here, this.devices_before, _devices_after(this)),
        warnings=tuple(_warnings(this)) if this.loaded else (),
    )


def _devices_after(this: Run) -> tuple[DeviceState, ...]:
    return host.device_states(this.gpus, this.backend.server_pids() if this.loaded else ())


def _memory(backend: Backend, requests: Sequence[MeasuredRequest]) -> Memory:
    """Return the peak memory, with the cache that the largest batch needs at its end."""
    memory = backend.peak_memory()
    per_token = backend.kv_cache_bytes_per_token()
    if per_token is None or not requests:
        return memory
    batches: dict[int, list[MeasuredRequest]] = {}
    for request in requests:
        batches.setdefault(request.generation.batch, []).append(request)
    slots = max(
        len(members)
        * (max(len(m.prompt.token_ids) for m in members) + max(m.generation.output_tokens for m in members))
        for members in batches.values()
    )
    return replace(memory, kv_cache_bytes=slots * per_token)


def prefill_of(measurement: Measurement, trace: Sequence[PowerSample]) -> Prefill | None:
    """Return the prefill's share of the window, or None when the backend cannot tell where it ends."""
    spans = _merged(
        (r.generation.start_ns, r.generation.prefill_end_ns)
        for r in measurement.requests
        if r.generation.prefill_end_ns is not None
    )
    if not spans:
        return None
    duration_s = sum(end - start for start, end in spans) / NS_PER_S
    by_device: dict[str, list[PowerSample]] = {}
    for sample in trace:
        if sample.component == "gpu":
            by_device.setdefault(sample.device, []).append(sample)
    if not by_device:
        return Prefill(duration_s)
    pieces = [integral_j(samples, start, end) for samples in by_device.values() for start, end in spans]
    if any(piece is None for piece in pieces):
        return Prefill(duration_s)
    energy_j = sum(piece for piece in pieces if piece is not None)
    return Prefill(duration_s, energy_j, _trace_uncertainty_j(by_device, spans))


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans in order, those that overlap as one: requests may be taken in side by side."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _trace_uncertainty_j(by_device: dict[str, list[PowerSample]], spans: Sequence[tuple[int, int]]) -> float:
    """Bound what lies between samples: half a period at each edge of each span, at the range of power seen."""
    total = 0.0
    for samples in by_device.values():
        inside = [s for s in samples if spans[0][0] <= s.t_ns <= spans[-1][1]]
        if len(inside) > 1:
            period_s = (inside[-1].t_ns - inside[0].t_ns) / NS_PER_S / (len(inside) - 1)
            powers = [s.power_w for s in inside]
            total += len(spans) * period_s * (max(powers) - min(powers))
    return total


def _flops(architecture: Architecture | None, requests: Sequence[MeasuredRequest]) -> Flops | None:
    if architecture is None:
        return None
    sizes = ((len(r.prompt.token_ids), r.generation.output_tokens) for r in requests)
    return Flops(flops.total_flops(architecture, sizes), flops.METHOD)


def _warnings(this: Run) -> list[CodedWarning]:
    """Return what is to be doubted apart from the numbers themselves: the engine, the machine, the prompts."""
    notes, experiment = this.backend.warnings(), this.plan.experiment
    if type(this.backend).wants_gpu(experiment, this.here) and not this.gpus:
        notes.append(
            warning("gpu_unused", "a GPU is visible, but the engine was built without CUDA and ran on the CPU.")
        )
    if not this.is_cool:
        notes.append(warning("not_cooled_down", f"a GPU was still above {experiment.cooldown.to_c:g} °C."))
    if this.plan.shared_with:
        others = f"{this.plan.shared_with} other{'s' if this.plan.shared_with > 1 else ''}"
        notes.append(
            warning("shared_hardware", f"it ran beside {others}; what is not of a GPU of its own includes theirs.")
        )
    wanted, there = experiment.dataset.sample_size, this.plan.prompts.count
    if wanted is not None and there < wanted:
        text = f"{wanted} prompts were asked for, the dataset holds {there} that are not empty."
        notes.append(warning("fewer_prompts", text))
    lost_s, behind_s = this.measurement.lost_s, this.measurement.energy_behind_s
    if lost_s is not None:
        energy = f", its energy {behind_s:.3g} s before that" if behind_s else ""
        end = f"{lost_s:.3g} s after its last finished request, with which it ends{energy}"
        notes.append(warning("window_cut", f"the window was broken off {end}."))
    requests = this.measurement.requests
    truncated = sum(r.prompt.truncated for r in requests)
    if truncated:
        notes.append(warning("input_truncated", f"{truncated} of {len(requests)} prompts were cut."))
    return notes


def _write(this: Run) -> None:
    """Write the cycle's power trace, then its record with its doubts: a record says that its rows are there."""
    from lem.results import parquet

    record, requests = _record(this), this.measurement.requests
    trace = [sample for sample in this.meter.trace() if sample.t_ns > this.traced_until_ns]
    rows = [_request_row(this, r) for r in requests] if this.plan.counts(this.rank) else []
    record = replace(record, warnings=(*record.warnings, *warning_codes.of_record(record, rows)))
    if trace:
        samples = _power_rows(this, trace)
        parquet.write_rows(this.directory.power_file(this.rank, this.cycle, this.attempt), PowerRecord, samples)
        this.traced_until_ns = trace[-1].t_ns
    this.directory.write_record(record)


def _power_rows(this: Run, trace: Sequence[PowerSample]) -> Iterator[PowerRecord]:
    zero_ns = this.measurement.window_opened_ns or trace[0].t_ns
    for sample in trace:
        yield PowerRecord(
            experiment_id=this.plan.experiment_id,
            rank=this.rank,
            cycle=this.cycle,
            attempt=this.attempt,
            t_s=(sample.t_ns - zero_ns) / NS_PER_S,
            component=sample.component,
            device=sample.device,
            power_w=sample.power_w,
        )


def _request_row(this: Run, request: MeasuredRequest) -> RequestRecord:
    return RequestRecord(
        experiment_id=this.plan.experiment_id,
        rank=this.rank,
        cycle=this.cycle,
        attempt=this.attempt,
        request=request.generation.index,
        batch=request.generation.batch,
        input_tokens=len(request.prompt.token_ids),
        output_tokens=request.generation.output_tokens,
        input_truncated=request.prompt.truncated,
        finish_reason=request.generation.finish_reason,
        start_s=request.start_s,
        end_s=request.end_s,
        latency_s=request.end_s - (request.start_s if request.arrived_s is None else request.arrived_s),
        arrived_s=request.arrived_s,
        queue_s=_queue_s(request),
        prefill_s=_prefill_s(request),
        **_token_times(request),
    )


def _token_times(request: MeasuredRequest) -> dict[str, Any]:
    generation = request.generation
    begin_ns = generation.start_ns if generation.arrived_ns is None else generation.arrived_ns
    times = token_times(begin_ns, generation.chunks)
    if times is None:
        return {}
    return {"ttft_s": times.ttft_s, "tpot_s": times.tpot_s, "itl_s": list(times.itl_s), "itl_spread": times.spread}


def _queue_s(request: MeasuredRequest) -> float | None:
    """Return how long a request waited; None where it came into no queue, or the engine does not tell its beginning."""
    if request.arrived_s is None or not request.generation.start_is_told:
        return None
    return request.start_s - request.arrived_s


def _prefill_s(request: MeasuredRequest) -> float | None:
    generation = request.generation
    if generation.prefill_end_ns is None:
        return None
    return (generation.prefill_end_ns - generation.start_ns) / NS_PER_S
