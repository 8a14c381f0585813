"""A worker process: an experiment's directory in, records out. `python -m lem.runner.worker <directory> --attempt 1`.

Starts from spec.json and knows nothing of how the configuration came about. The model is loaded once and stays for
all cycles. Whatever happens it leaves a record with a status: an error, a signal and a missing package included; and
what it has finished is in its journal already. Its exit code is 0 when it completed.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lem.backends import Encoded, make_backend
from lem.energy import make_meter
from lem.energy.base import NoMeter
from lem.errors import Interrupted, LemError, RunError
from lem.machine import host
from lem.machine.gpu import Gpu
from lem.record import (
    ENERGY_OWNER,
    ErrorInfo,
    Phase,
    Status,
)
from lem.results import journal
from lem.results.directory import ExperimentDir
from lem.results.journal import Checkpoint, Journal
from lem.runner.attempt import Run, _write
from lem.runner.progress import Event, PipeReport, Report, silent
from lem.runner.ranks import join
from lem.runner.stopping import end_with_launcher, ignore_signals, interrupt_on_signals
from lem.runner.window import Bench, Measurement, Queue
from lem.spec.experiment import Cooldown, Experiment, Warmup
from lem.workload.traffic import arrival_times_s

COOLDOWN_POLL_S = 1.0


def main(argv: Sequence[str] | None = None, report: Report = silent) -> int:
    """Run one process of an experiment; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m lem.runner.worker", description="Run one process of an experiment."
    )
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
    sys.exit(main())
