"""Starts worker processes and sleeps until they end. This module knows how workers start, not what they measure.

A single process is started directly. Several processes are started by accelerate's launcher on GPUs and by torch's
elastic launcher on the CPU, where accelerate would silently start only one process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from lem.backends import backend_class
from lem.errors import Interrupted
from lem.machine.host import Host
from lem.machine.processes import family_of
from lem.record import ErrorInfo, Status
from lem.results.directory import ExperimentDir
from lem.results.journal import DIED
from lem.results.plan import Plan
from lem.runner.early import WORKER, EarlyWorker, environment_of_workers
from lem.runner.progress import CombinedReport, Event, Report
from lem.runner.records import WindowId, bare_record
from lem.runner.stopping import GRACE_S, cause_of, signals_held, signals_ignored, signals_raise

log = logging.getLogger(__name__)

# How long a launcher may keep running after its workers have ended. A short time is enough, because a launcher writes
# no files.
LAUNCHER_GRACE_S = 1.0
LOG_LINES_IN_ERROR = 3
ENDED = b"ended\n"
INTERRUPTED = "The run was interrupted; finished requests are kept."
KILLED_AT_ONCE = "was killed at once, because the run was interrupted a second time."
KILLED_LATE = f"was killed, because it did not end within {GRACE_S:g} s."
# How torch's launcher reports the signal that ended the first process to fail.
KILLED = re.compile(r"Signal \d+ \((SIG\w+)\) received by PID")


def launch(
    directory: ExperimentDir, attempt: int, host: Host, report: Report, *, early: EarlyWorker | None = None
) -> None:
    """Run the experiment's workers until they end; afterwards, the attempt has at least one record.

    Args:
        directory: the experiment's directory, with its plan.
        attempt: the number of the attempt.
        host: the machine, with only the GPUs that may be used.
        report: receives the progress.
        early: a worker that was started before the experiment was checked; it is used if it suits the plan.

    Raises:
        Interrupted: the run was stopped by Ctrl-C, SIGTERM or SIGHUP; the workers have ended, and finished requests are
            kept.
    """
    plan = directory.plan()
    log_file = directory.log_file(0)
    workers: subprocess.Popen[bytes] | None = None
    killed = None
    with signals_raise():
        try:
            with log_file.open("ab") as output, _fifos(directory) as (progress, lifeline):
                log_start = output.tell()
                # A path that begins with a dash would be taken for an option.
                arguments = [os.path.join(os.curdir, directory.path), "--attempt", str(attempt)]
                arguments += ["--progress", progress.path, "--lifeline", lifeline.path]
                command = [*worker_command(plan, host, Path(progress.path).parent), *arguments]
                log.debug("worker: %s", shlex.join(command))
                environment = environment_of_workers(plan.experiment, plan.processes, host)
                # The wait is outside the next block, so that Ctrl-C does not have to wait for an import.
                suits = early if plan.processes == 1 and early is not None and early.is_ready(environment) else None
                try:
                    with signals_held():  # otherwise, a signal could leave behind a process that nobody knows of
                        workers = None if suits is None else suits.begin(arguments, log_file)
                        log.debug("the worker %s", "starts now" if workers is None else "has imported its engine")
                        if workers is None:
                            workers = subprocess.Popen(
                                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
                            )
                    progress.relay_until_end_of(workers, CombinedReport(report))
                except KeyboardInterrupt:
                    killed = _stop(workers, is_launcher=plan.processes > 1) if workers else None
                    raise
        except KeyboardInterrupt as stop:
            with signals_ignored():
                reason = f"stopped by {cause_of(stop)}"
                # The reason does not name the signal that ended the workers, because this process sent that signal.
                reason_without_record = f"{reason}. The worker {killed}" if killed else reason
                code = workers.returncode if workers else 0
                _complete_records(directory, attempt, "interrupted", code, reason_without_record)
                _record_reason(directory, attempt, reason)
            raise Interrupted(INTERRUPTED) from None
    output_text = _read_log(log_file, log_start)
    log.debug("the worker's exit code is %d; its log is %s", workers.returncode, log_file)
    if workers.returncode:
        log.debug("its log:\n%s", output_text)
    how = _describe_end(workers.returncode, output_text)
    _complete_records(directory, attempt, "failed", workers.returncode, f"The worker {how}")


def worker_command(plan: Plan, host: Host, scratch: Path) -> list[str]:
    """Return the command that starts the plan's processes, without the worker's arguments.

    `-P` keeps a user's file from shadowing a library. Without `--log_dir`, torch's launcher, which accelerate uses
    too, would leave a folder behind after each run.
    """
    if plan.processes == 1:
        return [*WORKER]
    if backend_class(plan.experiment.backend.name).wants_gpu(plan.experiment, host):
        several = ["--num_processes", str(plan.processes), "--num_machines", "1", "--mixed_precision", "no"]
        # "all" leaves CUDA_VISIBLE_DEVICES unchanged, even if accelerate's configuration file sets other GPUs.
        several += ["--dynamo_backend", "no", "--main_process_port", "0", "--gpu_ids", "all", "--log_dir", str(scratch)]
        return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *several, "-m", "lem.runner.worker"]
    local = ["--nnodes", "1", "--nproc_per_node", str(plan.processes), "--rdzv_backend", "c10d"]
    local += ["--rdzv_endpoint", "localhost:0", "--log_dir", str(scratch)]
    return [sys.executable, "-m", "torch.distributed.run", *local, "-m", "lem.runner.worker"]


# ------------------------------------------------------------------ waiting
class _Fifo:
    """A named pipe that stays open at this end; any number of processes may open the other end by name."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self.descriptor = os.open(path, os.O_RDWR)
        self._waiting: threading.Thread | None = None

    def relay_until_end_of(self, workers: subprocess.Popen[bytes], report: Report) -> None:
        """Pass the workers' events on to `report` until the workers have ended; sleep between events."""

        def write_the_end() -> None:
            workers.wait()
            os.write(self.descriptor, ENDED)

        self._waiting = threading.Thread(target=write_the_end, name="waiting", daemon=True)
        self._waiting.start()
        with os.fdopen(self.descriptor, "rb", closefd=False) as lines:
            for line in lines:
                if line == ENDED:
                    return
                try:
                    event = Event(**json.loads(line))
                except (ValueError, TypeError):
                    continue  # two processes wrote at once, or one died in the middle
                log.debug("%s %d/%d", event.phase, event.done, event.total)
                report(event)

    def close(self) -> None:
        """Close the pipe unless its thread may still write to it: the number of a closed descriptor may be reused."""
        if self._waiting is not None:
            self._waiting.join(LAUNCHER_GRACE_S)
        if self._waiting is None or not self._waiting.is_alive():
            os.close(self.descriptor)


@contextmanager
def _fifos(directory: ExperimentDir) -> Iterator[tuple[_Fifo, _Fifo]]:
    """Make two named pipes: one for progress, and one whose closing tells the workers that the parent is gone."""
    prefix = f"lem-{hashlib.sha256(str(directory.path.resolve()).encode()).hexdigest()[:16]}-"
    for left_by_a_killed_one in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        shutil.rmtree(left_by_a_killed_one, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        pair = _Fifo(Path(folder) / "progress"), _Fifo(Path(folder) / "lifeline")
        try:
            yield pair
        finally:
            for fifo in pair:
                fifo.close()


# ------------------------------------------------------------------ stopping
def _stop(workers: subprocess.Popen[bytes], *, is_launcher: bool) -> str | None:
    """Ask the workers and any launcher to end; kill them if they take too long or the user interrupts again.

    Returns:
        Why they were killed; None if they ended by themselves.
    """
    import psutil

    family: list[Any] = []
    killed = None
    try:
        family = family_of([workers.pid])
        # The workers get the signal first, because their launcher might give them too little time.
        _signal(reversed(family), signal.SIGTERM)
        _, alive = psutil.wait_procs(family[1:] if is_launcher else family, timeout=GRACE_S)
        killed = KILLED_LATE if alive else None
        if is_launcher and not alive:
            psutil.wait_procs(family[:1], timeout=LAUNCHER_GRACE_S)
    except KeyboardInterrupt:
        killed = KILLED_AT_ONCE
    with signals_ignored():
        _signal([*family, *family_of([workers.pid])], signal.SIGKILL)
        workers.wait()
    return killed


def _signal(processes: Any, number: signal.Signals) -> None:
    import psutil

    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(number)


# ------------------------------------------------------------------ records of workers that wrote none
def _complete_records(directory: ExperimentDir, attempt: int, status: Status, code: int, message: str) -> None:
    """Write the records of killed workers; make sure that some record says why the attempt ended.

    If a killed worker left a journal, its record is made from the journal, with this status and message. A record
    without measurements is added if the attempt has no record, or if a worker failed without leaving one and no other
    record explains the failure. `code` is the exit code of the worker, or of the launcher of several workers, and
    `message` says why it ended.
    """
    plan = directory.plan()
    mine = [record for record in directory.records() if record.attempt == attempt]
    error = ErrorInfo(DIED, message)
    for record in mine:
        if record.error is not None and record.error.type == DIED:
            directory.write_record(replace(record, status=status, error=replace(error, phase=record.error.phase)))
    cycle = next(iter(plan.unfinished_cycles(directory.finished())), plan.experiment.cycles)
    without = set(range(plan.processes)) - {record.rank for record in mine if record.cycle == cycle}
    # When one process fails, the others are interrupted, so their records do not explain the failure.
    unexplained = {DIED, Interrupted.__name__} if status == "failed" else {DIED}
    is_explained = any(record.error is not None and record.error.type not in unexplained for record in mine)
    if not mine or (code and without and not is_explained):
        window = WindowId(directory.id, min(without, default=0), cycle, attempt)
        directory.write_record(bare_record(plan, window, status, error))


def record_interruption(directory: ExperimentDir, attempt: int, reason: str) -> None:
    """Write a record of an attempt that was interrupted before its workers started, so that a record says why."""
    if not any(record.attempt == attempt for record in directory.records()):
        _complete_records(directory, attempt, "interrupted", 0, reason)


def record_loss(
    directory: ExperimentDir, attempt: int, error: ErrorInfo, slurm_job_id: str | None, hostname: str | None
) -> None:
    """Mark an attempt as failed: its interrupted and killed processes get the status `failed` and the given error.

    If the attempt has no records, or only those of completed cycles, a record without measurements is added.
    `slurm_job_id` is the job that ran the attempt, and `hostname` the machine on which the attempt began (None if it
    did not begin).
    """
    plan = directory.plan()
    cut = [r for r in directory.records() if r.attempt == attempt and r.status != "completed"]
    for record in cut:
        if record.status == "interrupted" or (record.error is not None and record.error.type == DIED):
            found = replace(error, phase=record.error.phase if record.error else None)
            directory.write_record(
                replace(record, status="failed", error=found, slurm_job_id=record.slurm_job_id or slurm_job_id)
            )
    if not cut:
        cycle = next(iter(plan.unfinished_cycles(directory.finished())), plan.experiment.cycles)
        record = bare_record(plan, WindowId(directory.id, 0, cycle, attempt), "failed", error)
        # Unless this process belongs to that job, its host and its node are not those on which the attempt began.
        if record.slurm_job_id is None or record.slurm_job_id != slurm_job_id:
            record = replace(record, slurm_job_id=slurm_job_id, hostname=hostname, slurm_node=None)
        directory.write_record(record)


def _record_reason(directory: ExperimentDir, attempt: int, reason: str) -> None:
    """Put the reason for an interruption into the attempt's records; the workers knew only the signals they got."""
    for record in directory.records():
        if record.attempt == attempt and record.error is not None and record.error.type == Interrupted.__name__:
            error = replace(record.error, message=reason)
            if error != record.error:
                directory.write_record(replace(record, error=error))


def _describe_end(code: int, output: str) -> str:
    """Describe how a worker, or the launcher of several, ended: the signal, or the exit code and the end of the log."""
    of_several = KILLED.search(output)
    if code < 0 or of_several:
        name = signal.Signals(-code).name if code < 0 else of_several and of_several[1]
        memory = "; the kernel kills processes this way when memory runs out" if name == "SIGKILL" else ""
        return f"was ended by {name}{memory}."
    lines = output.strip().splitlines()
    last = f" Its log ends: {' | '.join(lines[-LOG_LINES_IN_ERROR:])[:500]}" if lines else ""
    return f"ended with exit code {code}.{last}"


def _read_log(file: Path, start: int) -> str:
    """Return the part of the log that this attempt has added."""
    with file.open("rb") as output:
        output.seek(start)
        return output.read().decode(errors="replace")
