"""Starting worker processes and waiting for them asleep. Knows what a worker is told, not what it measures."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lem._version import VERSION
from lem.errors import Interrupted
from lem.plan import timestamp
from lem.progress import Event, Report
from lem.record import FORMAT_VERSION, ErrorInfo, ProcessRecord, Status
from lem.store import ExperimentDir

# How long an interrupted worker has to write its record before it is killed.
GRACE_S = 10.0
LOG_LINES_IN_ERROR = 3


def launch(directory: ExperimentDir, report: Report) -> None:
    """Run the experiment's worker to its end; afterwards every rank has a record.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; the worker has ended and what it measured is kept.
    """
    rank = 0
    reading, writing = os.pipe()
    with directory.log_file(rank).open("wb") as log, _signals_interrupt():
        # -P: a file of the user's working directory must not stand in for a library.
        command = [sys.executable, "-P", "-m", "lem.worker", str(directory.path)]
        command += ["--rank", str(rank), "--progress-fd", str(writing)]
        worker = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[writing])
        os.close(writing)
        try:
            _relay(reading, report)
            worker.wait()
        except (KeyboardInterrupt, Interrupted):
            _stop(worker)
            if _ensure_record(directory, rank, worker.returncode, "interrupted"):
                raise Interrupted("The run was interrupted; what was measured is kept.") from None
            raise Interrupted("The run was interrupted before its worker could write what it had measured.") from None
    _ensure_record(directory, rank, worker.returncode, "failed")


def _relay(descriptor: int, report: Report) -> None:
    """Pass events on until the worker closes its end; sleeps in between."""
    with os.fdopen(descriptor) as lines:
        for line in lines:
            report(Event(**json.loads(line)))


def _stop(worker: subprocess.Popen[bytes]) -> None:
    """Ask the worker to end, and end it when it does not or when the user insists."""
    worker.send_signal(signal.SIGTERM)
    try:
        worker.wait(timeout=GRACE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, Interrupted):
        worker.kill()
        worker.wait()


def _ensure_record(directory: ExperimentDir, rank: int, code: int, status: Status) -> bool:
    """Write a record in the name of a worker that ended without one; return whether it had written its own."""
    if directory.process_file(rank).exists():
        return True
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    plan = directory.plan()
    directory.write_record(
        ProcessRecord(
            format_version=FORMAT_VERSION,
            lem_version=VERSION,
            experiment_id=directory.id,
            rank=rank,
            world_size=plan.processes,
            status=status,
            started_at=timestamp(),
            hostname=socket.gethostname(),
            error=ErrorInfo("WorkerDied", f"The worker {how} and left no record.{_last_words(directory, rank)}"),
            requests_planned=plan.prompts.count,
        )
    )
    return False


def _last_words(directory: ExperimentDir, rank: int) -> str:
    lines = directory.log_file(rank).read_text(errors="replace").strip().splitlines()
    return f" Its log ends: {' | '.join(lines[-LOG_LINES_IN_ERROR:])[:500]}" if lines else ""


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Treat SIGTERM (a scheduler's) and SIGHUP (a closed terminal's) like Ctrl-C while a worker runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup asks to be left alone
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
