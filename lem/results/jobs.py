"""The ledger of a study's Slurm jobs: which jobs run which cells, so that another command can continue the study.

    <study>/jobs.jsonl       the ledger: a line for each event; lines are only appended
    <study>/jobs/            a file for each Slurm array, with its experiments; logs
    <study>/.lock            held by the command that submits and collects the study's jobs
    <results>/jobs/<name>    a mark with the path of the study, removed once the study's outcome has been shown

An array is recorded before it is submitted, and the ids of its jobs after that. If the command is killed in between,
the next command asks Slurm whether the array was accepted. This module does not call Slurm.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from lem.errors import ResultsError
from lem.results.codec import from_json, to_plain
from lem.results.files import needs_space, write_atomically
from lem.results.store import Store
from lem.spec.slurm import SlurmOptions

FILE, LOCK, FOLDER = "jobs.jsonl", ".lock", "jobs"
FORMAT_VERSION = 1
# The list of a study's cells, and the statuses of those that have not ended.
CELLS, OPEN = "experiments.json", ("not run", "queued", "running")


@dataclass(frozen=True)
class Terms:
    """How a study was submitted: everything that is needed to submit more of its jobs and to collect their results.

    `cells_sha256` is a digest of the fingerprints of the cells of a sweep or batch. If the same command is given again,
    it recognizes the study by this digest. Paths are absolute.
    """

    slurm: SlurmOptions
    cells_sha256: str
    head: str
    fail_fast: bool
    write_tables: bool
    force: bool
    one_job: bool
    per_job: int | None
    results_dirs: tuple[str, ...]
    working_dir: str
    format_version: int = FORMAT_VERSION


@dataclass
class Array:
    """A submitted array of jobs, or a single job: its file in `jobs/`, and the id and the cells of each job.

    `ids` is None while it is unknown whether Slurm accepted the array, and empty if Slurm did not accept it.
    `is_refused` means that the array's cells have failed because Slurm refused the array. `is_adopted` means that the
    submission was interrupted after Slurm had accepted the array, so its jobs may have started without the files that
    they need. `at_s` is the time at which the array was to be submitted, in seconds since 1970.
    """

    file: str
    jobs: list[list[int]]
    at_s: float
    ids: list[str] | None = None
    is_refused: bool = False
    is_adopted: bool = False

    @property
    def cells(self) -> Iterator[int]:
        """The numbers of all cells in the array."""
        return (number for cells in self.jobs for number in cells)


@dataclass(frozen=True)
class InJob:
    """What Slurm reports about an experiment that has not ended; `job_id` is empty if no job has been submitted yet."""

    job_id: str
    node: str = ""
    reason: str = ""
    is_running: bool = False

    @property
    def words(self) -> str:
        """The job in words: its id and, if known, its node or the reason why it waits."""
        if not self.job_id:
            return "not submitted yet"
        place = f" on {self.node}" if self.node else ""
        why = f" ({self.reason})" if self.reason and self.reason != "None" and not self.node else ""
        return f"job {self.job_id}{place}{why}"


@dataclass
class Ledger:
    """The jobs of a study; every method that records something stores it before it returns."""

    directory: Path
    terms: Terms
    arrays: list[Array] = field(default_factory=list)
    # Whether the user has canceled the jobs; whether none is left to wait for; whether the outcome has been shown.
    is_cancelled: bool = False
    is_over: bool = False
    is_shown: bool = False

    @classmethod
    def begin(cls, directory: Path, terms: Terms) -> Ledger:
        """Start a ledger in a study's directory, and mark the study in its results directories."""
        ledger = cls(directory.resolve(), terms)
        with needs_space(directory):
            write_atomically(directory / FILE, json.dumps({"terms": to_plain(terms)}) + "\n")
        for mark in ledger._marks():
            with needs_space(mark.parent):
                write_atomically(mark, f"{ledger.directory}\n")
        return ledger

    @classmethod
    def read(cls, directory: Path) -> Ledger | None:
        """Read a study's ledger; None if the study has none. Raises `ResultsError` if the ledger is damaged."""
        file = directory / FILE
        try:
            head, *lines = file.read_text().splitlines() or [""]
            ledger = cls(directory.resolve(), from_json(Terms, json.dumps(json.loads(head)["terms"])))
            for number, line in enumerate(lines, start=1):
                try:
                    event = json.loads(line)
                except ValueError:
                    if number < len(lines):
                        raise
                    continue  # the command was killed, or the disk was full, while it wrote the last line
                ledger._apply(event)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise ResultsError(f"{file} cannot be read: {error.strerror or error}.") from None
        except (ValueError, KeyError, TypeError, IndexError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
            raise ResultsError(f"{file} is damaged and cannot be read: {what}.") from None
        return ledger

    def _apply(self, event: dict[str, Any]) -> None:
        if "submitting" in event:
            self.arrays.append(Array(**event["submitting"]))
        elif "submitted" in event:
            self.arrays[-1].ids = [str(each) for each in event["submitted"]]
            self.arrays[-1].is_adopted = "adopted" in event
        elif "refused" in event:
            self.arrays[-1].is_refused = True
        self.is_cancelled |= "cancelled" in event
        self.is_over |= "over" in event
        self.is_shown |= "shown" in event

    # -------------------------------------------------------------- recording
    def new_file(self) -> str:
        """Return the name of the file that describes the next array."""
        return f"array{len(self.arrays):04d}.json"

    def submitting(self, file: str, jobs: Sequence[Sequence[int]]) -> None:
        """Record that an array is about to be submitted."""
        self._record({"submitting": {"file": file, "jobs": [list(cells) for cells in jobs], "at_s": time.time()}})

    def submitted(self, ids: Sequence[str]) -> None:
        """Record the ids of the last array's jobs; no ids mean that Slurm has not accepted the array so far."""
        self._record({"submitted": list(ids)})

    def adopted(self, ids: Sequence[str]) -> None:
        """Record the ids of the last array's jobs, whose submission was interrupted."""
        self._record({"submitted": list(ids), "adopted": True})

    def refused(self) -> None:
        """Record that Slurm refused the last array, so that the array's cells have failed."""
        self._record({"refused": True})

    def cancel(self) -> None:
        """Record that the jobs are to be canceled, so that another command can cancel them if this one is killed."""
        self._record({"cancelled": True})

    def end(self) -> None:
        """Record that no job is left to wait for."""
        if not self.is_over:
            self._record({"over": True})

    def forget(self) -> None:
        """Record that the outcome has been shown, and remove the marks in the results directories."""
        self._record({"shown": True})
        for mark in self._marks():
            mark.unlink(missing_ok=True)

    def _record(self, event: dict[str, Any]) -> None:
        with needs_space(self.directory), (self.directory / FILE).open("ab+") as file:
            _cut_torn_line(file)
            file.write(json.dumps(event).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._apply(event)

    def _marks(self) -> list[Path]:
        digest = hashlib.sha256(os.fsencode(self.directory)).hexdigest()[:8]
        return [Path(root) / FOLDER / f"{self.directory.name}-{digest}" for root in self.terms.results_dirs]

    # -------------------------------------------------------------- what it says
    @property
    def unknown(self) -> Array | None:
        """The last array, if it is not known whether Slurm accepted it; otherwise None."""
        return self.arrays[-1] if self.arrays and self.arrays[-1].ids is None else None

    @property
    def adopted_ids(self) -> set[str]:
        """The ids of jobs whose submission was interrupted."""
        return {job_id for array in self.arrays if array.is_adopted for job_id in array.ids or ()}

    @property
    def accepted(self) -> Iterator[tuple[str, list[int]]]:
        """The id and the cells of each job that Slurm accepted, in the order in which they were submitted."""
        for array in self.arrays:
            yield from zip(array.ids or (), array.jobs, strict=False)

    def tries(self) -> Counter[int]:
        """Return how many jobs each cell has had, including those that Slurm refused for good."""
        return Counter(number for array in self.arrays if array.ids or array.is_refused for number in array.cells)


def _cut_torn_line(file: BinaryIO) -> None:
    """Remove an unfinished last line from a file; a command leaves one if it is killed while writing."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) not in (b"\n", b""):
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def cells_sha256(fingerprints: Iterable[str]) -> str:
    """Return the digest of the cells of a sweep or batch, given their fingerprints in order."""
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()


def awaited(store: Store) -> list[Ledger]:
    """Return the ledgers of this user's studies whose outcome has not been shown yet, in the order of their names.

    Studies of other users are left out, because only their owner can submit, cancel and collect their jobs. Damaged
    ledgers and marks of directories that are gone are left out as well.
    """
    folder = store.root / FOLDER
    found = []
    for mark in sorted(folder.iterdir()) if folder.is_dir() else []:
        with suppress(OSError, ResultsError, UnicodeDecodeError):
            directory = Path(mark.read_text().strip())
            if not directory.is_absolute() or (directory / FILE).stat().st_uid != os.geteuid():
                continue
            ledger = Ledger.read(directory)
            if ledger is not None and not ledger.is_shown:
                found.append(ledger)
    return found


def queued_in(store: Store) -> dict[str, str]:
    """Return the ids of the experiments that jobs have yet to run or to finish, with the names of their studies.

    Such an experiment must not be resumed elsewhere, even if its state is `interrupted` because its job was requeued.
    """
    found: dict[str, str] = {}
    for ledger in awaited(store):
        with suppress(OSError, ValueError, KeyError, TypeError):
            if not ledger.is_over:
                cells = json.loads((ledger.directory / CELLS).read_bytes())
                left = [cell["experiment_id"] for cell in cells if cell["status"] in OPEN]
                found |= dict.fromkeys(filter(None, left), ledger.directory.name)
    return found


@contextmanager
def attending(directory: Path) -> Iterator[bool]:
    """Try to take the lock of a study, and yield whether this succeeded; only one process can hold the lock.

    The kernel releases the lock when this process ends.

    Raises:
        ResultsError: the directory cannot be created or written to.
    """
    try:
        with needs_space(directory):
            directory.mkdir(parents=True, exist_ok=True)
            lock = (directory / LOCK).open("a")
    except OSError as error:
        raise ResultsError(f"The study's directory {directory} cannot be used: {error.strerror}.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
