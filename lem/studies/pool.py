"""Several experiments at once: each a process of its own, pinned to GPUs of its own where there are some.

A child is told what to run by a file, tells how far it is through a pipe, and writes its output to a log; see
`lem.studies.child`. This module knows which GPU entries a child may see, not what runs on them.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lem.errors import LemError
from lem.machine.gpu import Gpu
from lem.results.aggregate import aggregate
from lem.results.codec import to_json
from lem.results.directory import ExperimentDir
from lem.results.files import write_atomically
from lem.results.schema import ExperimentRow
from lem.results.store import Store
from lem.runner.progress import Event, Report
from lem.runner.stopping import GRACE_S
from lem.spec.experiment import Experiment
from lem.studies.ask import Options
from lem.studies.child import Job
from lem.studies.display import BatchDisplay
from lem.studies.manifest import Books, row_of

# What a child needs to end beyond the time that it gives its worker.
STOP_S = GRACE_S + 5.0


@dataclass(frozen=True)
class Slot:
    """A place for one run at a time; `devices` is its CUDA_VISIBLE_DEVICES, None leaves that as it is."""

    gpus: tuple[Gpu, ...]
    devices: str | None = None


def slots(parallel: int, gpus: Sequence[Gpu], environ: Mapping[str, str] = os.environ) -> list[Slot]:
    """Split the visible GPUs into `parallel` disjoint sets of the same size; a remainder stays unused.

    With fewer GPUs than that the slots have none in particular. The names are the user's own entries of
    CUDA_VISIBLE_DEVICES, so that a GPU which that hides stays hidden, or else UUIDs.
    """
    each = len(gpus) // parallel
    if not each:
        return [Slot(tuple(gpus))] * parallel
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    # `gpus` are in the order of the entries, and end where those name no device.
    names = [gpu.uuid for gpu in gpus] if chosen is None else [name.strip() for name in chosen.split(",")]
    bounds = [range(i * each, (i + 1) * each) for i in range(parallel)]
    return [Slot(tuple(gpus[i] for i in those), ",".join(names[i] for i in those)) for those in bounds]


def are_disjoint(places: Sequence[Slot]) -> bool:
    """Tell whether no physical GPU is in two slots; instances of one GPU share its energy counter."""
    uuids = [uuid for place in places for uuid in {gpu.uuid for gpu in place.gpus}]
    return len(uuids) == len(set(uuids))


@dataclass
class Child:
    """A running cell: its process, and what that has told so far."""

    number: int
    slot: Slot
    process: subprocess.Popen[bytes]
    tell: Report
    results_dir: Path
    directory: ExperimentDir | None = None
    error: str | None = None
    watcher: threading.Thread | None = field(default=None, repr=False)

    def hear(self, line: bytes) -> None:
        """Take in a line from the child; one that it could not finish because it was killed counts for nothing."""
        try:
            said: dict[str, Any] = json.loads(line)
        except ValueError:
            return
        if "claimed" in said:
            self.directory = ExperimentDir(Path(said["claimed"]))
        elif "error" in said:
            self.error = str(said["error"])
        else:
            self.tell(Event(**said))


class Pool:
    """Runs cells in child processes, one in each slot; its methods are called from the main thread."""

    def __init__(
        self, books: Books, display: BatchDisplay, options: Options, places: Sequence[Slot], shared_with: Sequence[int]
    ) -> None:
        self._books, self._display, self._options = books, display, options
        self._shared_with = shared_with
        self._free = list(reversed(places))
        self._running: list[Child] = []
        self._ended: queue.Queue[Child] = queue.Queue()

    def run(self, number: int, experiment: Experiment) -> None:
        """Start a cell as soon as a slot is free."""
        while not self._free:
            self._wait_for_one()
        if self._books.is_over:
            return
        try:
            self._start(number, experiment)
        except OSError as error:
            self._books.change(number, status="failed", error=f"its process could not be started: {error}.")

    def finish(self) -> None:
        """Wait for all children."""
        while self._running:
            self._wait_for_one()

    def stop(self) -> None:
        """End all children; what they measured is kept. Those that do not end, or a second Ctrl-C, end by force."""
        for child in self._running:
            child.process.terminate()
        deadline = time.monotonic() + STOP_S
        try:
            while self._running:
                self._wait_for_one(max(0.0, deadline - time.monotonic()), stopped=True)
        except (queue.Empty, KeyboardInterrupt):
            for child in self._running:
                child.process.kill()
            while self._running:
                self._wait_for_one(stopped=True)

    # -------------------------------------------------------------- one child
    def _start(self, number: int, experiment: Experiment) -> None:
        cell, root = self._books.cells[number], self._books.directory
        job_file, log_file = root / "plan" / "jobs" / f"{_name(number)}.json", root / "logs" / f"{_name(number)}.log"
        job = Job(
            experiment=experiment,
            overrides=cell.overrides,
            config_file=str(cell.config_file) if cell.config_file else None,
            force=self._options.force,
            write_tables=self._options.write_tables,
            shared_with=self._shared_with[number],
            unfinished=str(cell.unfinished.path.resolve()) if cell.unfinished else None,
        )
        write_atomically(job_file, to_json(job))
        log_file.parent.mkdir(exist_ok=True)
        slot = self._free.pop()
        reading, writing = os.pipe()
        try:
            process = _popen(job_file, log_file, slot, writing)
        except OSError:
            os.close(reading)
            self._free.append(slot)
            raise
        finally:
            os.close(writing)
        tell = self._display.begin(number, cell.label)
        child = Child(number, slot, process, tell, Path(experiment.io.results_dir))
        self._running.append(child)
        self._books.change(number, status="running", log=log_file)
        child.watcher = threading.Thread(target=self._watch, args=(child, reading), daemon=True)
        child.watcher.start()

    def _watch(self, child: Child, descriptor: int) -> None:
        """Listen to a child until it has ended; sleeps in between."""
        with os.fdopen(descriptor, "rb") as lines:
            for line in lines:
                child.hear(line)
        child.process.wait()
        self._ended.put(child)

    def _wait_for_one(self, timeout_s: float | None = None, *, stopped: bool = False) -> None:
        """Wait until a child has ended and note how; raises `queue.Empty` after the timeout."""
        child = self._ended.get(timeout=timeout_s)
        self._running.remove(child)
        self._free.append(child.slot)
        if child.process.stdin is not None:
            child.process.stdin.close()
        entry = self._books.change(child.number, directory=child.directory, **self._outcome(child, stopped))
        self._display.end(child.number, entry.sentence, failed=entry.status == "failed")

    def _outcome(self, child: Child, stopped: bool) -> dict[str, Any]:
        code = child.process.returncode
        killed = code < 0
        row = self._orphaned_row(child) if killed else row_of(child.directory)
        if row is not None and not killed and child.error is None:
            return {"status": row.status, "row": row, "error": row.error}
        if stopped:
            return {"status": "interrupted", "row": row}
        how = f"was ended by {signal.Signals(-code).name}" if killed else f"ended with exit code {code}"
        return {"status": "failed", "row": row, "error": child.error or f"its process {how}."}

    def _orphaned_row(self, child: Child) -> ExperimentRow | None:
        """Return the row of a child that was killed: its workers follow it, and write what they had measured."""
        if child.directory is None:
            return None
        try:
            with child.directory.hold(exclusive=True):  # until none of them is left
                if self._options.write_tables:
                    return aggregate(Store(child.results_dir), child.directory, strict=False, force=True)
        except LemError:
            pass  # nothing was measured
        return row_of(child.directory)


def _name(number: int) -> str:
    return f"c{number:03d}"


def _popen(job_file: Path, log_file: Path, slot: Slot, report_to: int) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own: Ctrl-C reaches it once, through its parent."""
    # -P: a file of the user's working directory must not stand in for a library.
    command = [sys.executable, "-P", "-m", "lem.studies.child", str(job_file), "--report-fd", str(report_to)]
    pinned = {} if slot.devices is None else {"CUDA_VISIBLE_DEVICES": slot.devices}
    with log_file.open("wb") as log:
        return subprocess.Popen(
            command,
            # Never written to: its end tells the child that its parent is gone.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[report_to],
            env={**os.environ, **pinned},
            start_new_session=True,
        )
