"""A worker process: an experiment's directory in, records out. `python -m lem.worker <directory> --rank 0`.

Starts from spec.json and knows nothing of how the configuration came about. Whatever happens it leaves a record
with a status: an error, a signal and a missing package included. Its exit code is 0 when it completed.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

from lem import doubts, flops, host
from lem._version import VERSION
from lem.backends import Backend, make_backend
from lem.carbon import carbon_intensity
from lem.doubts import note
from lem.energy import Meter, NoMeter, make_meter
from lem.energy.trace import integral_j
from lem.errors import Interrupted, LemError
from lem.gpu import Gpu
from lem.measure import MeasuredRequest, Measurement, measure
from lem.plan import Plan, timestamp
from lem.progress import Event, PipeReport, Report, silent
from lem.record import (
    FORMAT_VERSION,
    DeviceState,
    ErrorInfo,
    Flops,
    Memory,
    Note,
    PowerRecord,
    PowerSample,
    Prefill,
    ProcessRecord,
    RequestRecord,
    Status,
)
from lem.spec import Cooldown
from lem.store import ExperimentDir
from lem.units import NS_PER_S

COOLDOWN_POLL_S = 1.0
INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One process meters the node, however many there are: each would see all of its energy.
ENERGY_OWNER = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lem.worker", description="Run one rank of an experiment.")
    parser.add_argument("directory", type=Path, help="the experiment's directory, with its spec.json")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--progress-fd", type=int, default=None, help="where progress goes, as JSON lines")
    options = parser.parse_args(argv)
    _die_with_parent()
    _interrupt_on_signals()
    report = silent if options.progress_fd is None else PipeReport(options.progress_fd)
    record = run(ExperimentDir(options.directory), options.rank, report)
    return 0 if record.status == "completed" else Interrupted.exit_code if record.status == "interrupted" else 1


@dataclass
class Run:
    """One rank's run while it goes on: what it works with, and what has become of it."""

    plan: Plan
    rank: int
    here: host.Host
    backend: Backend
    started_at: str = field(default_factory=timestamp)
    meter: Meter = field(default_factory=NoMeter)
    gpus: tuple[Gpu, ...] = ()
    devices_before: tuple[DeviceState, ...] = ()
    is_cool: bool = True
    measurement: Measurement = field(default_factory=Measurement)
    status: Status = "completed"
    error: ErrorInfo | None = None


def run(directory: ExperimentDir, rank: int, report: Report) -> ProcessRecord:
    """Run one rank of a planned experiment, write its records, and return the process's."""
    plan = directory.plan()
    this = Run(plan, rank, host.look(), make_backend(plan.experiment))
    try:
        _attempt(this, directory.prompts(), report)
    except BaseException as caught:
        _ignore_signals()
        this.status = "interrupted" if isinstance(caught, (Interrupted, KeyboardInterrupt)) else "failed"
        this.error = _error_info(caught, this.measurement)
        traceback.print_exc()
    record = _write(directory, this)
    _close(this.meter, this.backend)
    return record


def _attempt(this: Run, texts: Sequence[str], report: Report) -> None:
    """Start the engine, wait until the machine is ready, and measure."""
    experiment = this.plan.experiment
    report(Event("load"))
    this.backend.start()
    this.gpus = tuple(this.backend.gpus_in_use(this.here))
    this.is_cool = cool_down(experiment.cooldown, this.gpus, report)
    this.devices_before = host.device_states(this.gpus)
    if this.rank == ENERGY_OWNER:
        this.meter = make_meter(experiment.energy, this.gpus)
    this.meter.open()
    this.measurement.indices = list(range(this.rank, len(texts), this.plan.processes))
    measure(
        [texts[i] for i in this.measurement.indices],
        backend=this.backend,
        meter=this.meter,
        warmup=experiment.warmup,
        idle_s=0.0 if experiment.energy.name == "none" else experiment.energy.idle_s,
        batch_size=experiment.batching.batch_size,
        report=report,
        into=this.measurement,
    )


# ------------------------------------------------------------------ the record
def _record(this: Run) -> ProcessRecord:
    measurement, backend, requests = this.measurement, this.backend, this.measurement.requests
    loaded = any(phase.name == "load" for phase in measurement.phases) and measurement.current != "load"
    return ProcessRecord(
        format_version=FORMAT_VERSION,
        lem_version=VERSION,
        experiment_id=this.plan.experiment_id,
        rank=this.rank,
        world_size=this.plan.processes,
        status=this.status,
        started_at=this.started_at,
        hostname=socket.gethostname(),
        error=this.error,
        model=backend.model_info() if loaded else None,
        engine=backend.engine_info() if loaded else None,
        phases=tuple(measurement.phases),
        requests_planned=len(measurement.indices),
        requests_completed=len(requests),
        input_tokens=sum(len(r.prompt.token_ids) for r in requests),
        output_tokens=sum(len(r.generation.token_ids) for r in requests),
        memory=_memory(backend, requests) if loaded else None,
        flops=_flops(backend, requests) if loaded else None,
        carbon=carbon_intensity(this.plan.experiment.energy),
        prefill=prefill_of(measurement, this.meter.trace()),
        warmup=measurement.warmup,
        cpu_load=measurement.cpu_load,
        environment=host.environment(this.here, this.devices_before, host.device_states(this.gpus)),
        warnings=tuple(_warnings(this)) if loaded else (),
    )


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
        * (max(len(m.prompt.token_ids) for m in members) + max(len(m.generation.token_ids) for m in members))
        for members in batches.values()
    )
    return replace(memory, kv_cache_bytes=slots * per_token)


def prefill_of(measurement: Measurement, trace: Sequence[PowerSample]) -> Prefill | None:
    """Return the prefill's share of the window, or None when the backend cannot tell where it ends."""
    spans = sorted(
        {
            (r.generation.start_ns, r.generation.prefill_end_ns)
            for r in measurement.requests
            if r.generation.prefill_end_ns is not None
        }
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


def _flops(backend: Backend, requests: Sequence[MeasuredRequest]) -> Flops | None:
    arch = backend.architecture()
    if arch is None:
        return None
    sizes = ((len(r.prompt.token_ids), len(r.generation.token_ids)) for r in requests)
    return Flops(flops.total_flops(arch, sizes), flops.METHOD)


def _warnings(this: Run) -> list[Note]:
    """Return what is to be doubted apart from the numbers themselves: the engine, the machine, the prompts."""
    notes, experiment = this.backend.notes(), this.plan.experiment
    if type(this.backend).wants_gpu(experiment, this.here) and not this.gpus:
        notes.append(note("gpu_unused", "a GPU is visible, but the engine was built without CUDA and ran on the CPU."))
    if not this.is_cool:
        notes.append(note("not_cooled_down", f"a GPU was still above {experiment.cooldown.to_c:g} °C."))
    wanted, there = experiment.dataset.sample_size, this.plan.prompts.count
    if wanted is not None and there < wanted:
        text = f"{wanted} prompts were asked for, the dataset holds {there} that are not empty."
        notes.append(note("fewer_prompts", text))
    requests = this.measurement.requests
    truncated = sum(r.prompt.truncated for r in requests)
    if truncated:
        notes.append(note("input_truncated", f"{truncated} of {len(requests)} prompts were cut."))
    return notes


# ------------------------------------------------------------------ the files
def _write(directory: ExperimentDir, this: Run) -> ProcessRecord:
    """Write the rows, then the record with its doubts: a record says that its rows are there."""
    from lem import parquet

    record, trace = _record(this), this.meter.trace()
    rows = [_request_row(record, request, this.measurement.indices) for request in this.measurement.requests]
    record = replace(record, warnings=(*record.warnings, *doubts.of_record(record, rows)))
    parquet.write_rows(directory.requests_file(record.rank), RequestRecord, rows)
    if trace:
        parquet.write_rows(directory.power_file(record.rank), PowerRecord, _power_rows(record, this.measurement, trace))
    directory.write_record(record)
    return record


def _power_rows(record: ProcessRecord, measurement: Measurement, trace: Sequence[PowerSample]) -> Iterator[PowerRecord]:
    zero_ns = measurement.window_opened_ns or trace[0].t_ns
    for sample in trace:
        yield PowerRecord(
            experiment_id=record.experiment_id,
            rank=record.rank,
            t_s=(sample.t_ns - zero_ns) / NS_PER_S,
            component=sample.component,
            device=sample.device,
            power_w=sample.power_w,
        )


def _request_row(record: ProcessRecord, request: MeasuredRequest, indices: Sequence[int]) -> RequestRecord:
    return RequestRecord(
        experiment_id=record.experiment_id,
        rank=record.rank,
        request=indices[request.generation.index],
        batch=request.generation.batch,
        input_tokens=len(request.prompt.token_ids),
        output_tokens=len(request.generation.token_ids),
        input_truncated=request.prompt.truncated,
        finish_reason=request.generation.finish_reason,
        start_s=request.start_s,
        end_s=request.end_s,
        latency_s=request.end_s - request.start_s,
        prefill_s=_prefill_s(request),
    )


def _prefill_s(request: MeasuredRequest) -> float | None:
    generation = request.generation
    if generation.prefill_end_ns is None:
        return None
    return (generation.prefill_end_ns - generation.start_ns) / NS_PER_S


# ------------------------------------------------------------------ before the run
def cool_down(cooldown: Cooldown, gpus: Sequence[Gpu], report: Report) -> bool:
    """Wait for a time, and until the GPUs in use are cool enough; False when the patience for it was spent."""
    if cooldown.wait_s or (cooldown.to_c is not None and gpus):
        report(Event("cooldown"))
    time.sleep(cooldown.wait_s)
    if cooldown.to_c is None:
        return True
    until_s = time.monotonic() + cooldown.max_s
    while time.monotonic() < until_s:
        known = [s.temperature_c for s in host.device_states(gpus) if s.temperature_c is not None]
        if all(temperature <= cooldown.to_c for temperature in known):
            return True
        time.sleep(COOLDOWN_POLL_S)
    return False


def _error_info(caught: BaseException, measurement: Measurement) -> ErrorInfo:
    if isinstance(caught, (Interrupted, KeyboardInterrupt)):
        message = str(caught) or "stopped by Ctrl-C"
    elif isinstance(caught, LemError):
        message = str(caught)
    else:
        message = f"{type(caught).__name__}: {' '.join(str(caught).split())[:500]}"
    return ErrorInfo(type(caught).__name__, message, measurement.current)


def _close(meter: Meter, backend: Backend) -> None:
    """Release what the run held; the records are written, so a failure here costs nothing but its message."""
    for part in (meter, backend):
        try:
            part.close()
        except Exception:
            traceback.print_exc()


def _interrupt_on_signals() -> None:
    def interrupt(number: int, _frame: FrameType | None) -> None:
        # Ctrl-C reaches the worker twice, from the terminal and from the parent: the second must not break
        # off the writing of the record.
        _ignore_signals()
        raise Interrupted(f"stopped by {signal.Signals(number).name}")

    for number in INTERRUPTING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def _ignore_signals() -> None:
    """Let nothing come between a run that ended early and its record."""
    for number in INTERRUPTING:
        signal.signal(number, signal.SIG_IGN)


def _die_with_parent() -> None:
    """Ask Linux to end this process when the parent dies, however it dies: no worker is left behind."""
    if sys.platform != "linux":
        return
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    parent = os.getppid()
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
