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
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lem import flops, host
from lem._version import VERSION
from lem.backends import Backend, make_backend
from lem.carbon import carbon_intensity
from lem.energy import Meter, NoMeter, make_meter
from lem.errors import Interrupted, LemError
from lem.measure import MeasuredRequest, Measurement, measure
from lem.plan import Plan, timestamp
from lem.progress import Event, PipeReport, Report, silent
from lem.record import FORMAT_VERSION, ErrorInfo, Flops, Note, ProcessRecord, RequestRecord, Status
from lem.store import ExperimentDir


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


def run(directory: ExperimentDir, rank: int, report: Report) -> ProcessRecord:
    """Run one rank of a planned experiment, write its records, and return the process's."""
    plan = directory.plan()
    started_at = timestamp()
    here = host.look()
    experiment = plan.experiment
    measurement = Measurement()
    status: Status = "completed"
    error: ErrorInfo | None = None
    backend = make_backend(experiment)
    meter: Meter = NoMeter()
    try:
        report(Event("load"))
        backend.start()
        meter = make_meter(experiment.energy, backend.gpus_in_use(here))
        meter.open()
        measure(
            directory.prompts(),
            backend=backend,
            meter=meter,
            warmup_prompts=experiment.warmup.prompts,
            report=report,
            into=measurement,
        )
    except BaseException as caught:
        _ignore_signals()
        status = "interrupted" if isinstance(caught, (Interrupted, KeyboardInterrupt)) else "failed"
        error = _error_info(caught, measurement)
        traceback.print_exc()
    record = _record(plan, rank, started_at, here, status, error, measurement, backend)
    _write(directory, record, measurement)
    _close(meter, backend)
    return record


def _record(
    plan: Plan,
    rank: int,
    started_at: str,
    here: host.Host,
    status: Status,
    error: ErrorInfo | None,
    measurement: Measurement,
    backend: Backend,
) -> ProcessRecord:
    requests = measurement.requests
    loaded = any(phase.name == "load" for phase in measurement.phases) and measurement.current != "load"
    return ProcessRecord(
        format_version=FORMAT_VERSION,
        lem_version=VERSION,
        experiment_id=plan.experiment_id,
        rank=rank,
        world_size=plan.processes,
        status=status,
        started_at=started_at,
        hostname=socket.gethostname(),
        error=error,
        model=backend.model_info() if loaded else None,
        engine=backend.engine_info() if loaded else None,
        phases=tuple(measurement.phases),
        requests_planned=plan.prompts.count,
        requests_completed=len(requests),
        input_tokens=sum(len(r.prompt.token_ids) for r in requests),
        output_tokens=sum(len(r.generation.token_ids) for r in requests),
        memory=backend.peak_memory() if loaded else None,
        flops=_flops(backend, requests) if loaded else None,
        carbon=carbon_intensity(plan.experiment.energy),
        environment=host.environment(here),
        notes=tuple(_notes(plan, backend, requests, here)) if loaded else (),
    )


def _flops(backend: Backend, requests: Sequence[MeasuredRequest]) -> Flops | None:
    arch = backend.architecture()
    if arch is None:
        return None
    sizes = ((len(r.prompt.token_ids), len(r.generation.token_ids)) for r in requests)
    return Flops(flops.total_flops(arch, sizes), flops.METHOD)


def _notes(plan: Plan, backend: Backend, requests: Sequence[MeasuredRequest], here: host.Host) -> list[Note]:
    notes = backend.notes()
    if type(backend).wants_gpu(plan.experiment, here) and not backend.gpus_in_use(here):
        notes.append(Note("gpu_unused", "A GPU is visible, but the engine was built without CUDA and ran on the CPU."))
    truncated = sum(r.prompt.truncated for r in requests)
    if truncated:
        text = f"{truncated} of {len(requests)} prompts were cut to {plan.experiment.max_input_tokens} tokens."
        notes.append(Note("input_truncated", text))
    wanted = plan.experiment.dataset.sample_size
    if wanted is not None and plan.prompts.count < wanted:
        text = f"{wanted} prompts were asked for, the dataset holds {plan.prompts.count} that are not empty."
        notes.append(Note("fewer_prompts", text))
    return notes


def _write(directory: ExperimentDir, record: ProcessRecord, measurement: Measurement) -> None:
    """Write the request rows, then the record: a record says that its rows are there."""
    from lem import parquet

    rows = [_request_row(record, request) for request in measurement.requests]
    parquet.write_rows(directory.requests_file(record.rank), RequestRecord, rows)
    directory.write_record(record)


def _request_row(record: ProcessRecord, request: MeasuredRequest) -> RequestRecord:
    return RequestRecord(
        experiment_id=record.experiment_id,
        rank=record.rank,
        request=request.generation.index,
        batch=request.generation.batch,
        input_tokens=len(request.prompt.token_ids),
        output_tokens=len(request.generation.token_ids),
        input_truncated=request.prompt.truncated,
        finish_reason=request.generation.finish_reason,
        start_s=request.start_s,
        end_s=request.end_s,
        latency_s=request.end_s - request.start_s,
    )


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

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)


def _ignore_signals() -> None:
    """Let nothing come between a run that ended early and its record."""
    for number in (signal.SIGINT, signal.SIGTERM):
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
