"""Runs the experiments of a Slurm job inside the job, one after another.

submitit calls `run` with the file that was written when the job, or the array that it belongs to, was submitted.

The experiments have already been planned. An experiment saves its finished requests when Slurm announces the time
limit, and resumes when the job has been requeued. This module writes only records. The command that submitted the job
writes the rows, so that no two jobs write the same file.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lem.errors import Interrupted, LemError
from lem.machine import host, slurm
from lem.record import ErrorInfo
from lem.results.codec import from_json
from lem.results.directory import ExperimentDir
from lem.results.files import DiskFull
from lem.results.plan import FINISHED, State
from lem.results.store import Store
from lem.runner.job import fail, resume
from lem.runner.preflight import check_again
from lem.runner.stopping import signals_raise
from lem.studies.display import Lines

# The signal that submitit asks Slurm to send before the time limit.
LIMIT_SIGNAL = signal.SIGUSR2
# How long to wait until Slurm ends a requeued job, which it does at once unless its controller is busy.
REQUEUED_S = 120.0


@dataclass(frozen=True)
class Step:
    """One experiment of a job: its directory, its number of earlier attempts, and the pause before it in seconds."""

    directory: str
    attempts: int = 0
    pause_s: float = 0.0

    def is_over(self, state: State) -> bool:
        """Return whether this job or an earlier one has run the experiment to its end."""
        return state.status in FINISHED or (state.status == "failed" and state.attempt > self.attempts)


@dataclass(frozen=True)
class JobFile:
    """The experiments of each task of an array, or of a single job, and how often a job may be requeued."""

    tasks: tuple[tuple[Step, ...], ...]
    requeue: bool
    most_requeues: int


class _Limit:
    """Notes Slurm's signal that the time limit is near. All processes of the job get it; only this one acts on it.

    By default, the signal would end the workers at once. The main thread therefore blocks it, and all threads and
    processes started from there inherit the block. In this process, either the waiting thread receives the signal, or a
    thread that a library started earlier receives it and runs the handler.
    """

    def __init__(self) -> None:
        self.is_near = False
        # This handler replaces submitit's, which would pickle the interrupted function.
        signal.signal(LIMIT_SIGNAL, lambda _number, _frame: self._announce())
        signal.pthread_sigmask(signal.SIG_BLOCK, {LIMIT_SIGNAL})
        threading.Thread(target=self._wait, name="time limit", daemon=True).start()

    def _wait(self) -> None:
        signal.sigwait({LIMIT_SIGNAL})
        self._announce()

    def _announce(self) -> None:
        if not self.is_near:
            self.is_near = True
            os.kill(os.getpid(), signal.SIGTERM)


def run(file: str, task: int) -> None:
    """Run the unfinished experiments of one task of an array, or of a single job, which is task 0.

    Raises:
        SystemExit: an experiment failed or was interrupted; this keeps Slurm from listing the job as completed.
    """
    limit = _Limit()
    job = from_json(JobFile, Path(file).read_bytes())
    use_only_granted_gpus()
    try:
        with signals_raise():
            codes = [_run(step) for step in job.tasks[task]]
    except (Interrupted, KeyboardInterrupt) as stop:
        print(stop, file=sys.stderr, flush=True)
        if limit.is_near or _is_preempted():
            _requeue(job)
        sys.exit(Interrupted.exit_code)
    if any(codes):
        sys.exit(1)


def use_only_granted_gpus(environ: Mapping[str, str] = os.environ) -> None:
    """Set CUDA_VISIBLE_DEVICES to the UUIDs of the GPUs that Slurm granted, and so hide all other GPUs.

    A job inherits the variables of the submitting shell. If no GPU was requested, Slurm does not change
    CUDA_VISIBLE_DEVICES, and without device constraints all GPUs of the node would be visible.
    """
    granted = environ.get("SLURM_STEP_GPUS") or environ.get("SLURM_JOB_GPUS", "") * ("SLURM_STEP_ID" not in environ)
    if not granted:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif gpus := host.look().gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.visible_uuid for gpu in gpus)


def _run(step: Step) -> int:
    """Run or resume one experiment; return 0 if it was completed, otherwise 1."""
    directory = ExperimentDir(Path(step.directory))
    store = Store(directory.path.parent.parent)
    state = directory.state()
    if step.is_over(state):
        return 0 if state.status in FINISHED else 1
    if state.status == "planned":  # a job that was requeued during an experiment does not pause again
        time.sleep(step.pause_s)
    print(f"{directory.id} on {os.environ.get('SLURMD_NODENAME', 'this node')}", file=sys.stderr, flush=True)
    try:
        plan = directory.plan()
        check_again(plan.experiment, host.look(), force=True, has_arrivals=bool(plan.arrivals_sha256))
        # A job never runs twice at the same time, so a claim by another node is left over from an earlier start.
        done = resume(store, directory, write_tables=False, take_over=True, leave_marked=True, report=Lines(sys.stderr))
    except (Interrupted, KeyboardInterrupt, DiskFull):
        raise
    except LemError as error:
        return _failed(store, directory, ErrorInfo(type(error).__name__, " ".join(str(error).split())))
    except Exception as error:
        traceback.print_exc()
        return _failed(store, directory, ErrorInfo(type(error).__name__, " ".join(str(error).split())))
    return 0 if done.row.status == "completed" else 1


def _failed(store: Store, directory: ExperimentDir, error: ErrorInfo) -> int:
    print(f"{directory.id}: {error.message}", file=sys.stderr, flush=True)
    fail(store, directory, error, slurm.own_job_id() or "", write_tables=False)
    return 1


def _is_preempted() -> bool:
    """Return whether SIGTERM came from a preemption with a grace period, during which Slurm lists the job as running.

    Slurm does not requeue a job that ends by itself within this period.
    """
    own = slurm.own_job_id() or ""
    try:
        seen = slurm.queue([own]).get(own)
    except slurm.Unreachable:
        return False
    return seen is not None and seen.state == "RUNNING"


def _requeue(job: JobFile) -> None:
    """Requeue the job and wait until Slurm ends this process; return only if the job is not requeued."""
    if not job.requeue or int(os.environ.get("SLURM_RESTART_COUNT", "0")) >= job.most_requeues:
        print(
            "The job is not requeued, because requeuing is not allowed or has happened too often.",
            file=sys.stderr,
            flush=True,
        )
        return
    problem = slurm.requeue_this_job()
    if problem is None:
        time.sleep(REQUEUED_S)
    print(f"The job could not be requeued: {problem or 'Slurm did not end it'}.", file=sys.stderr, flush=True)
