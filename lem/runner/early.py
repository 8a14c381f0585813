"""Starts a worker before its experiment has passed the checks, so that it imports its engine in the meantime.

Importing an engine takes seconds and does not depend on the experiment's options. Once the engine is imported, the
worker waits for the arguments that every worker gets (`lem.runner.worker`). If its parent refuses the experiment or is
gone, it exits. A parent that gets no early worker, or whose early worker has died, starts a worker as usual.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lem.backends import backend_class
from lem.machine.host import Host
from lem.machine.processes import without_launchers
from lem.quantities import NS_PER_S
from lem.spec.experiment import Experiment
from lem.spec.processes import process_counts

WORKER = (sys.executable, "-P", "-m", "lem.runner.worker")
READY = b"ready"


def environment_of_workers(experiment: Experiment, processes: int, host: Host) -> dict[str, str]:
    """Return the workers' environment, which names the chosen GPUs and divides the cores among several processes.

    `host` has only the GPUs that may be used.
    """
    variables = without_launchers(os.environ)
    # Otherwise, a bullet point printed by a library would end a run on a machine with ASCII encoding.
    variables["PYTHONIOENCODING"] = "utf-8:backslashreplace"
    variables["PYTHONSAFEPATH"] = "1"
    if experiment.gpus is not None:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.visible_uuid for gpu in host.gpus)
    if processes > 1:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        variables.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    return variables


# ------------------------------------------------------------------ in the parent
class EarlyWorker:
    """A worker that imports its engine and then waits for an experiment."""

    def __init__(self, backend: str, environment: Mapping[str, str]) -> None:
        self._environment = dict(environment)
        self._ready, ready = os.pipe()
        try:
            # What the libraries print while they are imported belongs in the log, which does not exist yet.
            with tempfile.TemporaryFile() as output:
                self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                    [*WORKER, "--early", backend, "--ready", str(ready)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    env=self._environment,
                    pass_fds=(ready,),
                )
        finally:
            os.close(ready)

    def is_ready(self, environment: Mapping[str, str]) -> bool:
        """Wait until the engine is imported; return whether the worker can run an experiment in this environment."""
        if self._process is None or environment != self._environment:
            return False
        return os.read(self._ready, len(READY)) == READY

    def begin(self, arguments: Sequence[str], log: Path) -> subprocess.Popen[bytes] | None:
        """Let the worker run an experiment; return its process, or None if it has died.

        Args:
            arguments: the worker's arguments.
            log: the file to which the worker appends its output from now on.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([*arguments, "--log", str(log.absolute())]).encode() + b"\n")
            process.stdin.close()
        except OSError:
            return None
        self._process = None  # from now on, it is the caller's
        return process

    def close(self) -> None:
        """Kill the worker unless it has been given an experiment."""
        os.close(self._ready)
        if (process := self._process) is not None:
            self._process = None
            process.kill()
            process.wait()
            assert process.stdin is not None
            with suppress(OSError):  # nobody reads any more what may still be buffered
                process.stdin.close()


@contextmanager
def early_worker(experiment: Experiment, host: Host) -> Iterator[EarlyWorker | None]:
    """Within the block, let a worker import the experiment's engine; yield None if that is impossible or not worth it.

    The experiment has not been checked yet, so this must not fail on wrong options.
    """
    processes, _ = process_counts(experiment)
    backend = experiment.backend.name
    if processes > 1 or not backend_class(backend).imports_early:
        yield None
        return
    try:
        worker = EarlyWorker(backend, environment_of_workers(experiment, processes, host.only(experiment.gpus)))
    except OSError:  # for example, too many processes; starting the worker as usual reports this
        yield None
        return
    try:
        yield worker
    finally:
        worker.close()


# ------------------------------------------------------------------ in the worker
def wait_for_arguments(backend: str, ready: int) -> tuple[list[str], float]:
    """Import an engine, tell the parent through the descriptor `ready`, and wait for its message.

    If the parent ends without sending one, this process ends as well.

    Returns:
        The worker's arguments, and how long the import took in seconds.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(messages,), name="arguments", daemon=True).start()
    began_ns = time.perf_counter_ns()
    backend_class(backend).import_engine()
    import_s = (time.perf_counter_ns() - began_ns) / NS_PER_S
    with suppress(BrokenPipeError):
        os.write(ready, READY)
    os.close(ready)
    arguments: list[str] = json.loads(messages.get())
    return arguments, import_s


def _listen(messages: queue.SimpleQueue[bytes]) -> None:
    """Receive the parent's message; end this process at once if the parent is gone, even in the middle of an import."""
    message = b""
    while not message.endswith(b"\n"):
        part = os.read(0, 2**16)
        if not part:
            os._exit(0)
        message += part
    messages.put(message)


def log_to(file: Path) -> None:
    """Append the output of this process to a file from now on, preceded by what it has printed so far."""
    sys.stdout.flush()
    sys.stderr.flush()
    with file.open("ab") as log, os.fdopen(os.dup(sys.stdout.fileno()), "rb") as so_far:
        so_far.seek(0)
        log.write(so_far.read())
        log.flush()
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
