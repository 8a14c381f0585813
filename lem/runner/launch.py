"""Starting worker processes and waiting for them asleep. Knows what a worker is told, not what it measures.

One process is started as it is; several through accelerate's launcher on GPUs, and through torch's elastic one on the
CPU, where accelerate would start a single process and say nothing.
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
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from msgspec.structs import replace

from lem import __version__
from lem.backends import backend_class
from lem.errors import Interrupted
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.record import FORMAT_VERSION, ErrorInfo, ProcessRecord, Status
from lem.results.directory import ExperimentDir
from lem.results.journal import DIED
from lem.results.plan import Plan
from lem.runner.progress import Event, Report, Together
from lem.units import timestamp

log = logging.getLogger(__name__)

# How long interrupted workers have to write their records before they are killed,
GRACE_S = 8.0
# and how long the launcher of several has after them: it has nothing to write.
LAUNCHER_GRACE_S = 1.0
LOG_LINES_IN_ERROR = 3
ENDED = b"ended\n"
AT_ONCE = "was ended at once, for the run was interrupted a second time."
# What torch's launcher says of the first of several processes that failed.
KILLED = re.compile(r"Signal \d+ \((SIG\w+)\) received by PID")


def launch(directory: ExperimentDir, attempt: int, host: Host, report: Report) -> None:
    """Run the experiment's workers to their end; afterwards there is a record of the attempt, or a journal.

    Args:
        directory: the experiment, with its plan.
        attempt: number of the attempt.
        host: the GPUs that may be used.
        report: is told how far the work is.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; the workers have ended and what they finished is kept.
    """
    plan = directory.plan()
    log_file = directory.log_file(0)
    with log_file.open("ab") as output, _fifos(directory) as (progress, lifeline), signals_raise(Interrupted):
        log_start = output.tell()
        # A path that begins with a dash would be an option.
        arguments = [os.path.join(os.curdir, directory.path), "--attempt", str(attempt)]
        arguments += ["--progress", progress.path, "--lifeline", lifeline.path]
        command = [*_launcher(plan, host, Path(progress.path).parent), *arguments]
        log.debug("worker: %s", shlex.join(command))
        workers = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(plan, host),
        )
        try:
            progress.relay_until_end_of(workers, Together(report))
        except (KeyboardInterrupt, Interrupted) as stop:
            insisted = _stop(workers, is_launcher=plan.processes > 1)
            with undisturbed():
                how = _how_it_ended(workers.returncode, _read_log(log_file, log_start))
                _seal(directory, attempt, "interrupted", workers.returncode, AT_ONCE if insisted else how)
                _say_what_stopped(directory, attempt, str(stop) or "Ctrl-C")
            raise Interrupted("The run was interrupted; what was finished is kept.") from None
    said = _read_log(log_file, log_start)
    log.debug("the worker's exit code is %d; its log is %s", workers.returncode, log_file)
    if workers.returncode:
        log.debug("its log:\n%s", said)
    _seal(directory, attempt, "failed", workers.returncode, _how_it_ended(workers.returncode, said))


def _launcher(plan: Plan, host: Host, scratch: Path) -> list[str]:
    """Return the command that starts the plan's processes; -P: a user's file must not stand in for a library.

    Without `--log_dir` torch's launcher, which accelerate's is as well, would leave a folder behind with each run.
    """
    if plan.processes == 1:
        return [sys.executable, "-P", "-m", "lem.runner.worker"]
    if backend_class(plan.experiment.backend.name).wants_gpu(plan.experiment, host):
        several = ["--num_processes", str(plan.processes), "--num_machines", "1", "--mixed_precision", "no"]
        # "all" leaves CUDA_VISIBLE_DEVICES alone, whatever a configuration file of accelerate's says.
        several += ["--dynamo_backend", "no", "--main_process_port", "0", "--gpu_ids", "all", "--log_dir", str(scratch)]
        return [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", *several, "-m", "lem.runner.worker"]
    local = ["--nnodes", "1", "--nproc_per_node", str(plan.processes), "--rdzv_backend", "c10d"]
    local += ["--rdzv_endpoint", "localhost:0", "--log_dir", str(scratch)]
    return [sys.executable, "-m", "torch.distributed.run", *local, "-m", "lem.runner.worker"]


def _environment(plan: Plan, host: Host) -> dict[str, str]:
    """Return the workers' environment: the chosen GPUs, and no more threads than cores."""
    variables = dict(os.environ)
    # A library's bullet point must not end a run on a machine that knows only ASCII.
    variables["PYTHONIOENCODING"] = "utf-8:backslashreplace"
    variables["PYTHONSAFEPATH"] = "1"
    if plan.experiment.gpus is not None:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(_name(gpu) for gpu in host.gpus)
    if plan.processes > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        variables.setdefault("OMP_NUM_THREADS", str(max(1, cores // plan.processes)))
    return variables


def _name(gpu: Gpu) -> str:
    return gpu.mig_uuid or gpu.uuid


# ------------------------------------------------------------------ waiting
class _Fifo:
    """A named pipe that stays open at this end; its other ends are opened by name, by however many processes."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self.descriptor = os.open(path, os.O_RDWR)
        self._waiting: threading.Thread | None = None

    def relay_until_end_of(self, workers: subprocess.Popen[bytes], report: Report) -> None:
        """Pass events on until the workers have ended; sleeps in between."""

        def tell_the_end() -> None:
            workers.wait()
            os.write(self.descriptor, ENDED)

        self._waiting = threading.Thread(target=tell_the_end, name="waiting", daemon=True)
        self._waiting.start()
        with os.fdopen(self.descriptor, "rb", closefd=False) as lines:
            for line in lines:
                if line == ENDED:
                    return
                _relay(line, report)

    def close(self) -> None:
        """Close it, once nobody writes to it any more: its number may be that of another file then."""
        if self._waiting is not None:
            self._waiting.join(LAUNCHER_GRACE_S)
        if self._waiting is None or not self._waiting.is_alive():
            os.close(self.descriptor)


def _relay(line: bytes, report: Report) -> None:
    try:
        event = Event(**json.loads(line))
    except (ValueError, TypeError):
        return  # two processes wrote at once, or one died in the middle
    log.debug("%s %d/%d", event.phase, event.done, event.total)
    report(event)


@contextmanager
def _fifos(directory: ExperimentDir) -> Iterator[tuple[_Fifo, _Fifo]]:
    """Give two named pipes, one that takes progress, one whose end tells the workers that this process is gone."""
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
def _stop(workers: subprocess.Popen[bytes], *, is_launcher: bool) -> bool:
    """Ask all workers to end, and end them when they do not or when the user insists; return whether the user did.

    Args:
        workers: the worker, or the launcher of several.
        is_launcher: it is the latter.
    """
    import psutil

    family: list[Any] = []
    insisted = False
    try:
        family = _family(workers)
        # The workers first: their launcher would give them less time than they may need.
        _signal(reversed(family), signal.SIGTERM)
        _, alive = psutil.wait_procs(family[1:] if is_launcher else family, timeout=GRACE_S)
        if is_launcher and not alive:
            psutil.wait_procs(family[:1], timeout=LAUNCHER_GRACE_S)
    except (KeyboardInterrupt, Interrupted):
        insisted = True
    with undisturbed():
        _signal([*family, *_family(workers)], signal.SIGKILL)
        workers.wait()
    return insisted


def _family(workers: subprocess.Popen[bytes]) -> list[Any]:
    import psutil

    try:
        return [psutil.Process(workers.pid), *psutil.Process(workers.pid).children(recursive=True)]
    except psutil.Error:
        return []


def _signal(processes: Any, number: signal.Signals) -> None:
    import psutil

    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue


def _seal(directory: ExperimentDir, attempt: int, status: Status, code: int, how: str) -> None:
    """Write records in the name of workers that ended without one: from their journals, or else bare.

    Args:
        directory: the experiment.
        attempt: number of the attempt.
        status: of such a worker.
        code: exit code of the worker, or of the launcher of several.
        how: how it ended.
    """
    mine = [record for record in directory.records() if record.attempt == attempt]
    error = ErrorInfo(DIED, f"The worker {how}")
    for record in mine:
        if record.error is not None and record.error.type == DIED:
            directory.write_record(replace(record, status=status, error=replace(error, phase=record.error.phase)))
    cycle = _next_cycle(directory)
    silent = set(range(directory.plan().processes)) - {record.rank for record in mine if record.cycle == cycle}
    has_told = any(record.error is not None and _says_why(record.error, status) for record in mine)
    if not mine or (code and silent and not has_told):
        directory.write_record(_bare_record(directory, attempt, cycle, status, error, min(silent, default=0)))


def _says_why(error: ErrorInfo, status: Status) -> bool:
    """Tell whether a worker's own error says why the run ended; where one failed, others were stopped for its sake."""
    return error.type != DIED and not (status == "failed" and error.type == Interrupted.__name__)


def _say_what_stopped(directory: ExperimentDir, attempt: int, what: str) -> None:
    """Put into the records of an interrupted attempt what has stopped it: of the workers each knows its signal only."""
    for record in directory.records():
        if record.attempt == attempt and record.error is not None and record.error.type == Interrupted.__name__:
            error = replace(record.error, message=f"stopped by {what}")
            if error != record.error:
                directory.write_record(replace(record, error=error))


def _next_cycle(directory: ExperimentDir) -> int:
    """Return the first cycle that is not finished, or the last one."""
    plan, finished = directory.plan(), directory.finished()
    cycles = range(1, plan.experiment.cycles + 1)
    return next((cycle for cycle in cycles if len(finished.get(cycle, ())) < plan.prompts.count), cycles[-1])


def _bare_record(
    directory: ExperimentDir, attempt: int, cycle: int, status: Status, error: ErrorInfo, rank: int
) -> ProcessRecord:
    plan = directory.plan()
    return ProcessRecord(
        format_version=FORMAT_VERSION,
        lem_version=__version__,
        experiment_id=directory.id,
        rank=rank,
        world_size=plan.processes,
        status=status,
        started_at=timestamp(),
        hostname=socket.gethostname(),
        cycle=cycle,
        attempt=attempt,
        config_sha256=plan.config_sha256,
        backend=plan.experiment.backend.name,
        error=error,
    )


def _how_it_ended(code: int, said: str) -> str:
    of_several = KILLED.search(said)
    if code < 0 or of_several:
        name = signal.Signals(-code).name if code < 0 else of_several and of_several[1]
        memory = "; the kernel does that when memory runs out" if name == "SIGKILL" else ""
        return f"was ended by {name}{memory}."
    lines = said.strip().splitlines()
    return f"ended with exit code {code}." + (
        f" Its log ends: {' | '.join(lines[-LOG_LINES_IN_ERROR:])[:500]}" if lines else ""
    )


def _read_log(file: Path, start: int) -> str:
    """Return what this attempt has added to the log."""
    with file.open("rb") as output:
        output.seek(start)
        return output.read().decode(errors="replace")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let no signal come between the end of a run and what is to be written and said about it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_raise(error: Callable[[str], BaseException]) -> Iterator[None]:
    """Treat SIGTERM (a scheduler's) and SIGHUP (a closed terminal's) like Ctrl-C: raise `error` of its name."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _frame: FrameType | None) -> None:
        raise error(signal.Signals(number).name)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup asks to be left alone
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
