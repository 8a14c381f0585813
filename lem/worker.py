"""A worker process: an experiment's directory in, records out. `python -m lem.worker <directory> --attempt 1`.

Without a directory it is the direct form, for a launcher of the user's own: see `lem.apps.direct`.
Starts from spec.json and knows nothing of how the configuration came about. The model is loaded once and stays for
all cycles. Whatever happens it leaves a record with a status: an error, a signal and a missing package included; and
what it has finished is in its journal already. Its exit code is 0 when it completed.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lem import doubts, flops, host, journal
from lem._version import VERSION
from lem.backends import Backend, Encoded, make_backend
from lem.carbon import carbon_intensity
from lem.doubts import note
from lem.energy import Meter, NoMeter, make_meter
from lem.energy.trace import integral_j
from lem.errors import Interrupted, LemError, RunError
from lem.flops import Architecture
from lem.gpu import Gpu
from lem.journal import DIED, Checkpoint, Journal
from lem.latency import token_times
from lem.measure import Bench, MeasuredRequest, Measurement, Queue
from lem.plan import Plan, timestamp
from lem.progress import Event, PipeReport, Report, silent
from lem.ranks import Ranks, join
from lem.record import (
    ENERGY_OWNER,
    FORMAT_VERSION,
    DeviceState,
    ErrorInfo,
    Flops,
    Memory,
    Note,
    Phase,
    PowerRecord,
    PowerSample,
    Prefill,
    ProcessRecord,
    RequestRecord,
    Status,
)
from lem.spec import Cooldown, Experiment, Warmup
from lem.stopping import UNDISTURBED, end_with_launcher, ignore_signals, interrupt_on_signals
from lem.store import ExperimentDir
from lem.traffic import arrival_times_s
from lem.units import NS_PER_S

COOLDOWN_POLL_S = 1.0


def main(argv: Sequence[str] | None = None, report: Report = silent) -> int:
    """Run one process of an experiment; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lem.worker", description="Run one process of an experiment.")
    parser.add_argument("directory", type=Path, help="the experiment's directory, with its spec.json")
    parser.add_argument("--attempt", type=int, default=1)
    parser.add_argument("--progress", type=Path, default=None, help="a FIFO that takes progress, as JSON lines")
    parser.add_argument("--lifeline", type=Path, default=None, help="a FIFO; its end is the end of the launcher")
    options = parser.parse_args(argv)
    interrupt_on_signals(except_for=() if options.lifeline is None else (signal.SIGINT,))
    try:
        if options.lifeline is not None:
            end_with_launcher(options.lifeline)
        if options.progress is not None:
            report = PipeReport(_open_progress(options.progress), int(os.environ.get("RANK", "0")))
        directory = ExperimentDir(options.directory)
        with directory.hold():
            _check_attempt(directory, options.attempt)
            status = run(directory, options.attempt, report)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except LemError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return {"completed": 0, "interrupted": Interrupted.exit_code, "failed": 1}[status]


def _open_progress(fifo: Path) -> int:
    """Open the launcher's FIFO, never waiting: not for a launcher that is gone, later not for one that is busy."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        raise Interrupted(f"The launcher is gone: {fifo}: {error.strerror}.") from None


def _check_attempt(directory: ExperimentDir, attempt: int) -> None:
    """Raise when another attempt has taken over, while this process was still starting."""
    now = directory.state().attempt
    if now > attempt:
        raise RunError(f"{directory.id} is at attempt {now} already; this process belongs to attempt {attempt}.")


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


def run(directory: ExperimentDir, attempt: int, report: Report) -> Status:
    """Run one process of a planned experiment through all cycles that are not finished, and write its records."""
    plan = directory.plan()
    rank = int(os.environ.get("RANK", "0"))
    this = Run(directory, plan, rank, attempt, host.look(), make_backend(plan.experiment))
    try:
        _attempt(this, report)
    except BaseException as caught:
        ignore_signals()
        this.status = "interrupted" if isinstance(caught, (Interrupted, KeyboardInterrupt)) else "failed"
        this.error = _error_info(caught, this.measurement)
        _tell(caught)
        _keep_what_is_journaled(this)
        _write(this)
    _close(this)
    return this.status


def _attempt(this: Run, report: Report) -> None:
    """Start the engine, wait until the machine is ready, and measure each cycle that is not finished."""
    experiment, plan = this.plan.experiment, this.plan
    report(Event("load"))
    this.ranks = join(plan.processes, share_a_model=plan.replicas < plan.processes)
    this.backend.local_rank, this.backend.log_folder = this.ranks.local_rank, this.directory.path
    finished = this.directory.finished(before_attempt=this.attempt)
    texts = this.directory.prompts()
    pending = [c for c in range(1, experiment.cycles + 1) if len(finished.get(c, ())) < len(texts)]
    this.cycle = pending[0]
    this.backend.start()
    this.gpus = tuple(this.backend.gpus_in_use(this.here))
    this.is_cool = cool_down(experiment.cooldown, this.gpus, report)
    this.devices_before = host.device_states(this.gpus, this.backend.server_pids())
    is_metered = experiment.energy.name != "none" and not this.backend.runs_elsewhere()
    if this.rank == ENERGY_OWNER:
        this.meter = make_meter(experiment.energy, this.gpus) if is_metered else NoMeter()
    this.meter.open()
    bench = Bench(this.backend, this.meter, this.ranks, report)
    share = plan.share(this.rank)
    prompts = bench.prepare(
        [texts[i] for i in share], share, experiment.energy.idle_s if is_metered else 0.0, this.measurement
    )
    this.loaded, this.architecture = True, this.backend.architecture()
    if plan.counts(this.rank):
        this.journal = Journal(this.directory.journal_file(this.rank, this.attempt))
    once = list(this.measurement.phases)
    for cycle in pending:
        this.cycle, this.total_flops = cycle, 0.0
        this.measurement = Measurement(phases=list(once))
        _cycle(this, bench, prompts, finished.get(cycle, set()))
        _write(this)


def _cycle(this: Run, bench: Bench, prompts: Sequence[Encoded], finished: set[int]) -> None:
    """Warm up, and measure what earlier attempts have left of a cycle."""
    experiment = this.plan.experiment
    left = [p for p in prompts if p.index not in finished]
    this.measurement.indices = [p.index for p in left]
    bench.report(Event("cycle", this.cycle, experiment.cycles))
    bench.warm_up(prompts, _warmup(experiment), experiment.batching.batch_size, this.measurement)
    bench.run_window(
        left,
        this,
        this.measurement,
        first_batch=this.directory.batches(this.rank, this.cycle, this.attempt),
        queue=_queue(this, left, finished),
    )


def _queue(this: Run, left: Sequence[Encoded], finished: set[int]) -> Queue | None:
    """Return how the prompts that are left arrive: where a former attempt has ended, its last arrival is time 0."""
    plan = this.plan
    traffic, at_most = plan.experiment.traffic, plan.experiment.batching.batch_size
    if traffic.pattern == "closed":
        return None
    if traffic.pattern == "concurrency":
        return Queue(None, (traffic.concurrency or 1) // plan.replicas, at_most)
    if plan.arrivals_sha256:  # those of the trace as it was when the experiment was begun
        times_s = this.directory.arrivals_s()
    else:
        times_s = arrival_times_s(traffic, plan.prompts.count, plan.experiment.seed)
    begin_s = max((times_s[i] for i in finished), default=0.0)
    return Queue([max(0.0, times_s[p.index] - begin_s) for p in left], 1, at_most)


def _warmup(experiment: Experiment) -> Warmup:
    """Return the warm-up: with streaming a number of its own, unless latencies decide."""
    if not experiment.streaming.enabled or experiment.warmup.until_cv is not None:
        return experiment.warmup
    return replace(experiment.warmup, prompts=experiment.streaming.warmup_requests)


# ------------------------------------------------------------------ the record
def _record(this: Run) -> ProcessRecord:
    measurement, backend = this.measurement, this.backend
    requests = measurement.requests if this.plan.counts(this.rank) else []
    return ProcessRecord(
        format_version=FORMAT_VERSION,
        lem_version=VERSION,
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


def _warnings(this: Run) -> list[Note]:
    """Return what is to be doubted apart from the numbers themselves: the engine, the machine, the prompts."""
    notes, experiment = this.backend.notes(), this.plan.experiment
    if type(this.backend).wants_gpu(experiment, this.here) and not this.gpus:
        notes.append(note("gpu_unused", "a GPU is visible, but the engine was built without CUDA and ran on the CPU."))
    if not this.is_cool:
        notes.append(note("not_cooled_down", f"a GPU was still above {experiment.cooldown.to_c:g} °C."))
    if this.plan.shared_with:
        others = f"{this.plan.shared_with} other{'s' if this.plan.shared_with > 1 else ''}"
        notes.append(
            note("shared_hardware", f"it ran beside {others}; what is not of a GPU of its own includes theirs.")
        )
    wanted, there = experiment.dataset.sample_size, this.plan.prompts.count
    if wanted is not None and there < wanted:
        text = f"{wanted} prompts were asked for, the dataset holds {there} that are not empty."
        notes.append(note("fewer_prompts", text))
    lost_s, behind_s = this.measurement.lost_s, this.measurement.energy_behind_s
    if lost_s is not None:
        energy = f", its energy {behind_s:.3g} s before that" if behind_s else ""
        end = f"{lost_s:.3g} s after its last finished request, with which it ends{energy}"
        notes.append(note("window_cut", f"the window was broken off {end}."))
    requests = this.measurement.requests
    truncated = sum(r.prompt.truncated for r in requests)
    if truncated:
        notes.append(note("input_truncated", f"{truncated} of {len(requests)} prompts were cut."))
    return notes


# ------------------------------------------------------------------ the files
def _keep_what_is_journaled(this: Run) -> None:
    """End the window with the last batch that is in the journal: a signal or a full disk may have come before it."""
    if this.journal is None:
        return
    windows = journal.read(this.directory.journal_file(this.rank, this.attempt).read_bytes())
    of_cycle = [window for window in windows if window.record.cycle == this.cycle]
    if not of_cycle or len(of_cycle[-1].rows) == len(this.measurement.requests):
        return
    del this.measurement.requests[len(of_cycle[-1].rows) :]
    window = of_cycle[-1].salvaged().phase("measured")
    move_the_end(this.measurement, window, of_cycle[-1].metered)
    others = [phase for phase in this.measurement.phases if phase.name != "measured"]
    this.measurement.phases = [*others, window] if window else others


def move_the_end(measurement: Measurement, window: Phase | None, metered: Checkpoint | None) -> None:
    """Note what is lost of a broken-off window, and how far it was metered, when its end is put earlier."""
    before = next((phase for phase in measurement.phases if phase.name == "measured"), None)
    lost_s, measurement.lost_s, measurement.energy_behind_s = measurement.lost_s, None, None
    if window is None or before is None or lost_s is None:
        return
    measurement.lost_s = lost_s + before.duration_s - window.duration_s
    if metered is not None and metered.energy:
        measurement.energy_behind_s = window.duration_s - (metered.energy_at_s or 0.0)


def _write(this: Run) -> None:
    """Write the cycle's power trace, then its record with its doubts: a record says that its rows are there."""
    from lem import parquet

    record, requests = _record(this), this.measurement.requests
    trace = [sample for sample in this.meter.trace() if sample.t_ns > this.traced_until_ns]
    rows = [_request_row(this, r) for r in requests] if this.plan.counts(this.rank) else []
    record = replace(record, warnings=(*record.warnings, *doubts.of_record(record, rows)))
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
    elif isinstance(caught, OSError) and caught.errno in (errno.ENOSPC, errno.EDQUOT):
        message = "There is no space left for the results. Free some; lem experiment --resume goes on from here."
    else:
        message = f"{type(caught).__name__}: {' '.join(str(caught).split())[:500]}"
    return ErrorInfo(type(caught).__name__, message, measurement.current)


def _tell(caught: BaseException) -> None:
    """Say on stderr what ended the run; where it comes from only where nobody foresaw it."""
    if isinstance(caught, Interrupted):
        print(f"\n{caught}", file=sys.stderr)
    elif isinstance(caught, LemError):
        print(f"Error: {caught}", file=sys.stderr)
    else:
        traceback.print_exc()


def _close(this: Run) -> None:
    """Release what the run held; the records are written, so a failure here costs nothing but its message."""
    for part in (this.journal, this.meter, this.backend, this.ranks):
        try:
            if part is not None:
                part.close()
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    if any(Path(argument).is_dir() for argument in sys.argv[1:2]):
        sys.exit(main())
    from lem.apps.direct import main as direct

    sys.exit(direct())
