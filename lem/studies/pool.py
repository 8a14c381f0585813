"""Runs several experiments at once, each in a child process with its own GPUs if there are enough.

A child reads its job from a file, reports its progress through a pipe, and writes its output to a log; see
`lem.studies.child`. This module knows which GPUs a child may see, but not what runs on them.
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
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lem.config.multirun import cell_name
from lem.errors import LemError
from lem.machine.gpu import Gpu
from lem.results.aggregate import aggregate
from lem.results.codec import to_json
from lem.results.directory import ExperimentDir
from lem.results.files import FULL, NO_SPACE, DiskFull, needs_space, write_atomically
from lem.results.schema import ExperimentRow
from lem.results.store import Store
from lem.runner.progress import Event, Report
from lem.runner.stopping import GRACE_S
from lem.spec.experiment import Experiment
from lem.studies.ask import RunOptions
from lem.studies.child import Job
from lem.studies.display import StudyDisplay
from lem.studies.manifest import Manifest, row_of
from lem.studies.study import Runner

# How long a child may take to end: the grace period that it gives its worker, plus some time for itself.
STOP_S = GRACE_S + 5.0


@dataclass(frozen=True)
class Slot:
    """A share of the GPUs, for one run at a time. `devices` becomes CUDA_VISIBLE_DEVICES; None leaves it unchanged."""

    gpus: tuple[Gpu, ...]
    devices: str | None = None


def slots(parallel: int, gpus: Sequence[Gpu], environ: Mapping[str, str] = os.environ) -> list[Slot]:
    """Split the visible GPUs into `parallel` disjoint sets of the same size; any remainder stays unused.

    With fewer GPUs than `parallel`, every slot has all of them. Devices are named as in the user's
    CUDA_VISIBLE_DEVICES, so that a hidden GPU stays hidden; if the variable is unset, devices are
    named by UUID.
    """
    each = len(gpus) // parallel
    if not each:
        return [Slot(tuple(gpus))] * parallel
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    # `gpus` is in the order of the variable's entries, and stops at the first entry that names no device.
    names = [gpu.uuid for gpu in gpus] if chosen is None else [name.strip() for name in chosen.split(",")]
    bounds = [range(i * each, (i + 1) * each) for i in range(parallel)]
    return [Slot(tuple(gpus[i] for i in those), ",".join(names[i] for i in those)) for those in bounds]


def are_disjoint(shares: Sequence[Slot]) -> bool:
    """Return whether no two slots share a physical GPU; MIG instances of one GPU share its energy counter."""
    uuids = [uuid for share in shares for uuid in {gpu.uuid for gpu in share.gpus}]
    return len(uuids) == len(set(uuids))


@dataclass
class Child:
    """A running cell: its process, and everything the process has reported so far."""

    number: int
    slot: Slot
    process: subprocess.Popen[bytes]
    report: Report
    results_dir: str
    directory: ExperimentDir | None = None
    error: str | None = None
    full: DiskFull | None = None
    watcher: threading.Thread | None = field(default=None, repr=False)

    def receive(self, line: bytes) -> None:
        """Handle a line from the child; ignore a line that was cut off because the child was killed."""
        try:
            message: dict[str, Any] = json.loads(line)
        except ValueError:
            return
        if "claimed" in message:
            self.directory = ExperimentDir(Path(message["claimed"]))
        elif "full" in message:
            self.full = DiskFull(Path(message["full"]))
        elif "error" in message:
            self.error = str(message["error"])
        else:
            self.report(Event(**message))


@dataclass
class Pool(Runner):
    """Runs cells in child processes, one in each free slot. Its methods must be called from the main thread.

    `shared_with` gives, for each cell, the number of other runs that may affect its numbers.
    """

    manifest: Manifest
    display: StudyDisplay
    options: RunOptions
    free: list[Slot]
    shared_with: Sequence[int]
    running: list[Child] = field(default_factory=list)
    ended: queue.Queue[Child] = field(default_factory=queue.Queue)

    def run(self, number: int, experiment: Experiment) -> None:
        """Wait for a free slot, then start a cell; do nothing if the study has stopped starting cells by then."""
        while not self.free:
            self._wait_for_one()
        if self.manifest.is_over:
            return
        try:
            with needs_space(self.manifest.directory):
                self._start(number, experiment)
        except OSError as error:
            self.manifest.change(
                number, status="failed", error=f"the process could not be started: {error.strerror or error}."
            )

    def finish(self) -> None:
        """Wait for all children to end."""
        while self.running:
            self._wait_for_one()

    def stop(self) -> None:
        """Terminate all children, so that they save finished requests; kill them after STOP_S or on a second Ctrl-C."""
        for child in self.running:
            child.process.terminate()
        deadline = time.monotonic() + STOP_S
        try:
            while self.running:
                self._wait_for_one(max(0.0, deadline - time.monotonic()), stopped=True)
        except (queue.Empty, KeyboardInterrupt):
            for child in self.running:
                child.process.kill()
            while self.running:
                self._wait_for_one(stopped=True)

    def _start(self, number: int, experiment: Experiment) -> None:
        cell, root, name = self.manifest.cells[number], self.manifest.directory, cell_name(number)
        job_file, log_file = root / "plan" / "jobs" / f"{name}.json", root / "logs" / f"{name}.log"
        job = Job(
            experiment=experiment,
            overrides=cell.overrides,
            config_file=str(cell.config_file) if cell.config_file else None,
            force=self.options.force,
            write_tables=self.options.write_tables,
            shared_with=self.shared_with[number],
            unfinished=str(cell.unfinished.path.resolve()) if cell.unfinished else None,
        )
        write_atomically(job_file, to_json(job))
        log_file.parent.mkdir(exist_ok=True)
        slot = self.free.pop(0)
        reading, writing = os.pipe()
        try:
            process = _popen(job_file, log_file, slot, writing)
        except OSError:
            os.close(reading)
            self.free.append(slot)
            raise
        finally:
            os.close(writing)
        report = self.display.begin(number, cell.label)
        child = Child(number, slot, process, report, experiment.io.results_dir)
        self.running.append(child)
        child.watcher = threading.Thread(target=self._watch, args=(child, reading), daemon=True)
        child.watcher.start()
        self.manifest.change(number, status="running", log=log_file)

    def _watch(self, child: Child, descriptor: int) -> None:
        """Receive a child's lines until the child has ended."""
        with os.fdopen(descriptor, "rb") as lines:
            for line in lines:
                child.receive(line)
        child.process.wait()
        self.ended.put(child)

    def _wait_for_one(self, timeout_s: float | None = None, *, stopped: bool = False) -> None:
        """Wait until a child has ended, and record how it ended.

        Raises:
            queue.Empty: no child has ended in time.
            DiskFull: there was no space for the child's files, or for saving its outcome; not raised if `stopped` says
                that all children are being stopped.
        """
        child = self.ended.get(timeout=timeout_s)
        self.running.remove(child)
        self.free.append(child.slot)
        if child.process.stdin is not None:
            child.process.stdin.close()
        how = self._how_it_ended(child, stopped)
        with suppress(DiskFull) if stopped else nullcontext():
            state = self.manifest.change(child.number, directory=child.directory, **how)
            self.display.end(child.number, state.sentence, failed=state.status == "failed")
            if child.full:
                raise child.full

    def _how_it_ended(self, child: Child, stopped: bool) -> dict[str, Any]:
        code = child.process.returncode
        killed = code < 0
        row = self._orphaned_row(child) if killed else row_of(child.directory)
        if row is not None and (row.error or "").startswith(NO_SPACE):
            child.full = DiskFull(Path(child.results_dir))
        if row is not None and not killed and child.error is None and child.full is None:
            return {"status": row.status, "row": row, "error": row.error}
        if stopped or child.full:
            return {"status": "interrupted", "row": row}
        how = f"was ended by {signal.Signals(-code).name}" if killed else f"ended with exit code {code}"
        return {"status": "failed", "row": row, "error": child.error or f"the process {how}."}

    def _orphaned_row(self, child: Child) -> ExperimentRow | None:
        """Return the row of a killed child, after its workers have ended and recorded their finished requests."""
        if child.directory is None:
            return None
        try:
            with child.directory.hold(exclusive=True):  # wait until the workers have ended
                if self.options.write_tables:
                    return aggregate(Store(child.results_dir), child.directory, strict=False, force=True)
        except LemError:
            pass  # nothing was measured
        except OSError as error:
            if error.errno not in FULL:
                raise
            child.full = DiskFull(Path(child.results_dir))  # the next command writes the row
        return row_of(child.directory)


def _popen(job_file: Path, log_file: Path, slot: Slot, report_to: int) -> subprocess.Popen[bytes]:
    """Start a child in a new session, so that Ctrl-C reaches it only once, through its parent."""
    # -P keeps a file in the user's working directory from shadowing a library.
    command = [sys.executable, "-P", "-m", "lem.studies.child", str(job_file), "--report-fd", str(report_to)]
    pinned = {} if slot.devices is None else {"CUDA_VISIBLE_DEVICES": slot.devices}
    with log_file.open("wb") as log:
        return subprocess.Popen(
            command,
            # Nothing is written to this pipe: when it closes, the child knows that its parent is gone.
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[report_to],
            env={**os.environ, **pinned},
            start_new_session=True,
        )
