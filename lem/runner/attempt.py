"""One process's attempt at an experiment: it starts the engine, measures each cycle, and always writes a record.

`lem.runner.window` defines how a cycle is measured, and `lem.runner.records` defines the content of a record.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from msgspec import structs

from lem import warning_codes
from lem.backends import Encoded, make_backend
from lem.energy import make_meter
from lem.energy.base import Meter, NoMeter
from lem.errors import Interrupted, LemError, RunError
from lem.machine import host, processes
from lem.machine.gpu import Gpu
from lem.machine.watch import Watch
from lem.quantities import NS_PER_S, timestamp
from lem.record import ENERGY_OWNER, CodedWarning, DeviceState, ErrorInfo, Flops, OwnTime, Phase, PowerRecord, Status
from lem.results.directory import ExperimentDir
from lem.results.files import FULL, NO_SPACE
from lem.results.journal import DIED, Checkpoint, Journal, read
from lem.runner.progress import Event, Report
from lem.runner.ranks import Ranks, join, named_by_launcher
from lem.runner.records import EngineReport, Snapshot, WindowId, power_rows, process_record, request_row
from lem.runner.stopping import UNDISTURBED, ignore_signals
from lem.runner.window import Bench, MeasuredRequest, Measurement, Queue
from lem.spec.experiment import Cooldown
from lem.warning_codes import warning
from lem.workload import flops
from lem.workload.clock import REAL, Clock
from lem.workload.flops import Architecture, UnknownArchitecture
from lem.workload.traffic import arrival_times_s, in_system_s

COOLDOWN_POLL_S = 1.0


@dataclass(frozen=True)
class Loaded:
    """All that a process needs to measure cycles once the model is loaded.

    `phases` and `warnings` are the attempt's phases and warnings so far; they go into the record of every cycle.
    """

    bench: Bench
    prompts: Sequence[Encoded]
    architecture: Architecture | None
    phases: tuple[Phase, ...]
    warnings: tuple[CodedWarning, ...]
    journal: Journal | None
    own_time: OwnTime


@dataclass
class Cycle:
    """The cycle being measured."""

    number: int
    measured: Measurement = field(default_factory=Measurement)
    total_flops: float = 0.0


class Attempt:
    """One process's attempt at a planned experiment; as a `Recorder`, it also writes its windows to the journal.

    `import_s` is how long this process spent importing the engine before it was given the experiment.
    """

    def __init__(self, directory: ExperimentDir, number: int, import_s: float = 0.0) -> None:
        self._directory, self._number, self._import_s = directory, number, import_s
        self._plan = directory.plan()
        self._rank = named_by_launcher().rank
        self._host = host.look()
        self._backend = make_backend(self._plan.experiment)
        self._started_at = timestamp()
        self._ranks = Ranks()
        self._meter: Meter = NoMeter()
        self._gpus: tuple[Gpu, ...] = ()
        self._devices_before: tuple[DeviceState, ...] = ()
        self._loaded: Loaded | None = None
        self._cycle = Cycle(1)
        self._traced_until_ns = 0

    def run(self, report: Report) -> Status:
        """Measure all unfinished cycles and write a record of each; return how the attempt ended."""
        status: Status = "completed"
        try:
            self._measure(report)
        except BaseException as caught:
            ignore_signals()
            status = self._record_failure(caught)
        self._close()
        return status

    # -------------------------------------------------------------- start
    def _measure(self, report: Report) -> None:
        """Start the engine, wait until the machine is ready, and measure each unfinished cycle."""
        report(Event("load"))
        self._ranks = join(self._plan.processes, share_a_model=self._plan.replicas < self._plan.processes)
        finished = self._directory.finished(before_attempt=self._number)
        texts = self._directory.prompts()
        unfinished = self._plan.unfinished_cycles(finished)
        self._cycle = Cycle(unfinished[0])
        warnings = self._start(report)
        energy = self._plan.experiment.energy
        is_metered = energy.name != "none" and not self._backend.runs_elsewhere()
        if is_metered and self._rank == ENERGY_OWNER:
            self._meter = make_meter(energy, self._gpus)
            self._meter.clock = self._backend.clock
        self._meter.open()
        watch = Watch(self._gpus if self._rank == ENERGY_OWNER else (), self._own_pids)
        bench = Bench(self._backend, self._meter, self._ranks, report, self._plan.replicas, watch)
        loaded = self._loaded = self._load(bench, texts, energy.idle_s if is_metered else 0.0, warnings)
        for number in unfinished:
            measured = Measurement(phases=list(loaded.phases), own_time=loaded.own_time)
            self._cycle = Cycle(number, measured)
            self._measure_cycle(loaded, finished.get(number, set()))
            self._write("completed")

    def _start(self, report: Report) -> tuple[CodedWarning, ...]:
        """Start the engine and let the GPUs cool down; return warnings about the machine."""
        experiment, backend = self._plan.experiment, self._backend
        backend.local_rank, backend.log_folder = self._ranks.local_rank, self._directory.path
        backend.forced, backend.cell = self._plan.forced, self._plan.campaign
        began_ns = time.perf_counter_ns()
        backend.start()
        import_s = self._import_s + (time.perf_counter_ns() - began_ns) / NS_PER_S
        self._cycle.measured.own_time = OwnTime(import_s=import_s)
        self._gpus = tuple(backend.gpus_in_use(self._host))
        is_cool = cool_down(experiment.cooldown, self._gpus, report, backend.clock)
        self._devices_before = host.device_states(self._gpus, self._others_pids())
        warnings = []
        if type(backend).wants_gpu(experiment, self._host) and not self._gpus:
            text = "a GPU is visible, but the engine was built without CUDA and ran on the CPU."
            warnings.append(warning("gpu_unused", text))
        if not is_cool:
            warnings.append(warning("not_cooled_down", f"a GPU was still warmer than {experiment.cooldown.to_c:g} °C."))
        return tuple(warnings)

    def _load(self, bench: Bench, texts: Sequence[str], idle_s: float, warnings: tuple[CodedWarning, ...]) -> Loaded:
        """Load the model, with an idle phase before and after, and encode this process's prompts."""
        plan, measured = self._plan, self._cycle.measured
        share = plan.share(self._rank)
        prompts = bench.prepare([texts[i] for i in share], share, idle_s, measured)
        architecture, unknown = self._architecture()
        return Loaded(
            bench=bench,
            prompts=prompts,
            architecture=architecture,
            phases=tuple(measured.phases),
            warnings=(*warnings, *unknown),
            journal=(
                Journal(self._directory.journal_file(self._rank, self._number)) if plan.counts(self._rank) else None
            ),
            own_time=measured.own_time,
        )

    def _architecture(self) -> tuple[Architecture | None, tuple[CodedWarning, ...]]:
        """Return the model's dimensions or, if they are unknown, a warning with the reason."""
        try:
            return self._backend.architecture(), ()
        except UnknownArchitecture as error:
            return None, (warning("flops_unknown", f"FLOPs are null: {error}."),)

    def _others_pids(self) -> Sequence[int]:
        """Return the pids of the engine's server and, if there are several ranks, of the launcher and its children."""
        ranks = processes.family_of([os.getppid()]) if self._plan.processes > 1 else ()
        return [*self._backend.server_pids(), *(process.pid for process in ranks)]

    def _own_pids(self) -> set[int]:
        """Return the pids of all processes of the run."""
        return {os.getpid(), *(process.pid for process in processes.children()), *self._others_pids()}

    # -------------------------------------------------------------- a cycle
    def _measure_cycle(self, loaded: Loaded, finished: set[int]) -> None:
        """Warm up, then measure those prompts of the cycle that earlier attempts left unfinished."""
        experiment, cycle = self._plan.experiment, self._cycle
        left = [p for p in loaded.prompts if p.index not in finished]
        cycle.measured.indices = [p.index for p in left]
        loaded.bench.report(Event("cycle", cycle.number, experiment.cycles))
        warmup, streaming = experiment.warmup, experiment.streaming
        if streaming.enabled and warmup.until_cv is None:
            warmup = replace(warmup, prompts=streaming.warmup_requests)
        loaded.bench.warm_up(loaded.prompts, warmup, experiment.batching, cycle.measured)
        loaded.bench.run_window(
            left,
            self,
            cycle.measured,
            first_batch=self._directory.batches(self._rank, cycle.number, self._number),
            queue=self._queue(left),
        )
        errors = [request.generation.error for request in cycle.measured.requests]
        if errors and None not in errors:
            raise RunError(f"No request succeeded ({len(errors)} failed); the last error was: {errors[-1]}")

    def _queue(self, left: Sequence[Encoded]) -> Queue | None:
        """Return how the remaining prompts arrive; None if all of them are available from the start.

        The arrival clock continues from the end of earlier attempts' windows. A request that arrived in an earlier
        attempt but was not finished has therefore been waiting since its arrival.
        """
        plan = self._plan
        traffic, at_most = plan.experiment.traffic, plan.experiment.batching.batch_size
        if traffic.pattern == "closed":
            return None
        earlier = self._directory.earlier(self._cycle.number, self._number)
        from_s = self._cycle.measured.arrivals_from_s = earlier.measured_s
        if traffic.pattern == "concurrency":
            counting = self._rank - self._rank % (plan.processes // plan.replicas)
            concurrency = (traffic.concurrency or 1) // plan.replicas
            first_s = in_system_s(concurrency, earlier.ends_s(counting))
            return Queue(None, concurrency, at_most, [at_s - from_s for at_s in first_s])
        if plan.arrivals_sha256:  # the trace's times, stored when the experiment began
            times_s = self._directory.arrivals_s()
        else:
            times_s = arrival_times_s(traffic, plan.prompts.count, plan.experiment.seed)
        return Queue([times_s[p.index] - from_s for p in left], 1, at_most)

    def window_opens(self) -> None:
        """Open a window in the journal, with the record to be used if this process is killed."""
        self._cycle.measured.window_opened_unix_s = time.time()
        if self._journal is not None:
            killed = ErrorInfo(DIED, "The worker was killed before it could write its record.", "measured")
            self._journal.open_window(process_record(self._snapshot("interrupted", killed)))

    def batch_finished(self, batch: Sequence[MeasuredRequest], checkpoint: Checkpoint) -> None:
        """Write a finished batch to the journal."""
        loaded, cycle = self._loaded, self._cycle
        if loaded is None or loaded.journal is None:
            return
        with UNDISTURBED:
            rows = [request_row(self._window_id, request) for request in batch]
            if loaded.architecture is not None:
                sizes = ((row.input_tokens, row.output_tokens) for row in rows if row.output_tokens is not None)
                cycle.total_flops += flops.total_flops(loaded.architecture, sizes)
                checkpoint = structs.replace(checkpoint, flops=Flops(cycle.total_flops, flops.METHOD))
            loaded.journal.add(rows, checkpoint)

    def time_passed(self, checkpoint: Checkpoint) -> None:
        """Write the window's progress to the journal; this runs in a thread, which signals do not interrupt."""
        loaded, total = self._loaded, self._cycle.total_flops
        if loaded is None or loaded.journal is None:
            return
        if loaded.architecture is not None:
            checkpoint = structs.replace(checkpoint, flops=Flops(total, flops.METHOD))
        loaded.journal.add((), checkpoint)

    # -------------------------------------------------------------- the record
    @property
    def _window_id(self) -> WindowId:
        return WindowId(self._plan.experiment_id, self._rank, self._cycle.number, self._number)

    @property
    def _journal(self) -> Journal | None:
        return None if self._loaded is None else self._loaded.journal

    def _snapshot(self, status: Status, error: ErrorInfo | None) -> Snapshot:
        """Collect from the engine, the machine and the meter everything that the current cycle's record needs."""
        engine = None if self._loaded is None else self._engine_report(self._loaded)
        devices_after = host.device_states(self._gpus, () if self._loaded is None else self._others_pids())
        return Snapshot(
            plan=self._plan,
            window=self._window_id,
            started_at=self._started_at,
            measured=self._cycle.measured,
            environment=host.environment(self._host, self._devices_before, devices_after),
            engine=engine,
            trace=self._meter.trace(),
            status=status,
            error=error,
        )

    def _engine_report(self, loaded: Loaded) -> EngineReport:
        backend = self._backend
        return EngineReport(
            model=backend.model_info(),
            engine=backend.engine_info(),
            memory=backend.peak_memory(),
            counters=backend.counters(),
            architecture=loaded.architecture,
            warnings=(*backend.warnings(), *loaded.warnings),
        )

    def _write(self, status: Status, error: ErrorInfo | None = None) -> None:
        """Write the cycle's power trace and then its record, so that no record exists without its trace."""
        from lem.results import parquet

        known, window = self._snapshot(status, error), self._window_id
        record, requests = process_record(known), known.measured.requests
        rows = [request_row(window, r) for r in requests] if self._plan.counts(self._rank) else []
        record = structs.replace(record, warnings=(*record.warnings, *warning_codes.of_record(record, rows)))
        trace = [sample for sample in known.trace if sample.t_ns > self._traced_until_ns]
        if trace:
            file = self._directory.power_file(self._rank, self._cycle.number, self._number)
            zero_ns = known.measured.window_opened_ns or trace[0].t_ns
            parquet.write_rows(file, PowerRecord, power_rows(window, zero_ns, trace))
            self._traced_until_ns = trace[-1].t_ns
        self._directory.write_record(record)

    # -------------------------------------------------------------- the end
    def _record_failure(self, caught: BaseException) -> Status:
        """Report the error that ended the run and record everything measured by then; return how the run ended."""
        error = _error_info(caught, self._cycle.measured)
        _report_error(caught)
        self._cut_back_to_journal()
        status: Status = "interrupted" if isinstance(caught, (Interrupted, KeyboardInterrupt)) else "failed"
        self._write(status, error)
        return status

    def _cut_back_to_journal(self) -> None:
        """Drop the window's requests that are not in the journal, and adjust the window's end accordingly.

        A signal or a full disk may have kept a batch from being written.
        """
        if self._journal is None:
            return
        windows = read(self._directory.journal_file(self._rank, self._number).read_bytes())
        of_cycle = [window for window in windows if window.record.cycle == self._cycle.number]
        if of_cycle and len(of_cycle[-1].rows) != len(self._cycle.measured.requests):
            kept = of_cycle[-1]
            last = kept.checkpoints[-1] if kept.checkpoints else None
            self._cycle.measured.cut_back(len(kept.rows), kept.salvaged().phase("measured"), kept.metered, last)

    def _close(self) -> None:
        """Release the attempt's resources; the records are already written, so a failure here is only printed."""
        for part in (self._journal, self._meter, self._backend, self._ranks):
            try:
                if part is not None:
                    part.close()
            except Exception:
                traceback.print_exc()


def cool_down(cooldown: Cooldown, gpus: Sequence[Gpu], report: Report, clock: Clock = REAL) -> bool:
    """Wait for a fixed time, then until the GPUs in use are cool; return False if they are still warm after `max_s`."""
    if cooldown.wait_s or (cooldown.to_c is not None and gpus):
        report(Event("cooldown"))
    clock.sleep(cooldown.wait_s)
    if cooldown.to_c is None:
        return True
    until_s = time.monotonic() + cooldown.max_s
    while time.monotonic() < until_s:
        known = [s.temperature_c for s in host.device_states(gpus) if s.temperature_c is not None]
        if all(temperature <= cooldown.to_c for temperature in known):
            return True
        time.sleep(COOLDOWN_POLL_S)
    return False


def _error_info(caught: BaseException, measured: Measurement) -> ErrorInfo:
    if isinstance(caught, (Interrupted, KeyboardInterrupt)):
        message = str(caught) or "stopped by Ctrl-C"
    elif isinstance(caught, LemError):
        message = str(caught)
    elif isinstance(caught, OSError) and caught.errno in FULL:
        message = f"{NO_SPACE} for the results. Free some space, then continue with lem experiment --resume."
    else:
        message = f"{type(caught).__name__}: {' '.join(str(caught).split())[:500]}"
    return ErrorInfo(type(caught).__name__, message, measured.current)


def _report_error(caught: BaseException) -> None:
    """Print the error that ended the run on stderr, with a traceback unless it is one of lem's own errors."""
    if isinstance(caught, Interrupted):
        print(f"\n{caught}", file=sys.stderr)
    elif isinstance(caught, LemError):
        print(f"Error: {caught}", file=sys.stderr)
    else:
        traceback.print_exc()
