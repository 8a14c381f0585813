"""A schedule's files: the table of its starts with their outcomes, and the lock of the process that runs the schedule.

    <results>/schedules/<name>/   schedule.json: the settings and the table of starts, kept up to date
                                  what.json: the experiment or the campaign's arms that each run measures
                                  runs/<number>.json: the experiment or campaign of a run, and how it ended
                                  runs/<number>.log: the output of a run
                                  schedule.log: a line for each event

This module imports no heavy libraries, because `lem.studies.daemon` keeps it in memory while waiting for the next
start. It knows neither what a run measures nor when a run starts.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from lem import __version__
from lem.errors import ResultsError, did_you_mean
from lem.results.files import needs_space, open_to_read, write_atomically
from lem.results.store import Store, results_flag
from lem.spec.schedule import Schedule, ScheduleRun

FOLDER, TABLE, WHAT, LOG = "schedules", "schedule.json", "what.json", "schedule.log"
FORMAT_VERSION = 1

Status = Literal["planned", "running", "done", "failed", "skipped", "missed", "interrupted"]
# The statuses of runs that have been cut off and are resumed when the schedule continues.
CUT: tuple[Status, ...] = ("running", "interrupted")
# The word for each status in phrases that count starts, in the order in which the words appear.
WORDS: dict[Status, str] = {
    "done": "done", "failed": "failed", "skipped": "skipped", "missed": "missed", "interrupted": "interrupted",
    "running": "running", "planned": "not started",
}  # fmt: skip


class Start(Struct, omit_defaults=True):
    """A planned start and its outcome.

    Times are ISO 8601 with the UTC offset of the schedule's time zone. `late_s` is how many seconds after the planned
    time the run started. `error` is the reason why a run failed or was interrupted, or why a start was skipped or
    missed.
    """

    number: int
    planned_at: str
    status: Status = "planned"
    started_at: str | None = None
    ended_at: str | None = None
    late_s: float | None = None
    experiment_id: str | None = None
    campaign: str | None = None
    error: str | None = None


class Config(Struct, frozen=True):
    """What each run measures, in a form for people to read; `what.json` has all values.

    `prompts_sha256` is the digest of the prompts, which must be the same in every run. `forced` means that inadvisable
    options were accepted with --force. `working_dir` is the directory in which the schedule was started; relative
    paths are resolved from it.
    """

    kind: Literal["experiment", "campaign"]
    words: str
    config_file: str | None
    overrides: tuple[str, ...]
    prompts_sha256: str
    forced: bool
    working_dir: str


class ScheduleManifest(Struct):
    """The settings of a schedule, and the table of its starts, computed when the schedule was started."""

    name: str
    id: str
    created_at: str
    ends_at: str
    time_zone: str
    settings: Schedule
    config: Config
    starts: list[Start]
    lem_version: str = __version__
    format_version: int = FORMAT_VERSION

    @property
    def has_failed(self) -> bool:
        """Whether a run has failed."""
        return any(start.status == "failed" for start in self.starts)

    def place(self, start: Start) -> ScheduleRun:
        """Return a run's place in this schedule, as it is stored in the run's records."""
        assert start.started_at is not None
        return ScheduleRun(self.name, start.number, start.planned_at, start.started_at, self.time_zone)

    def counts(self) -> str:
        """Return a phrase that states how many starts have each status."""
        found = Counter(start.status for start in self.starts)
        return ", ".join(f"{found[status]} {word}" for status, word in WORDS.items() if found[status])


class RunOutcome(Struct):
    """The experiment or campaign of a run and, once the run has ended, its outcome; written by the run's process."""

    status: Literal["running", "done", "failed", "interrupted"] = "running"
    experiment_id: str | None = None
    campaign: str | None = None
    ended_at: str | None = None
    error: str | None = None


def folder_of(store: Store, name: str) -> Path:
    """Return the directory of a schedule."""
    return store.root / FOLDER / name


def store_of(folder: Path) -> Store:
    """Return the results directory that holds a schedule's directory."""
    return Store(folder.resolve().parent.parent)


def outcome_file(folder: Path, number: int) -> Path:
    """Return the file in which a run records its experiment or campaign and how it ended."""
    return folder / "runs" / f"{number}.json"


def run_log(folder: Path, number: int) -> Path:
    """Return the file with the output of a run."""
    return folder / "runs" / f"{number}.log"


def due(start: Start) -> datetime:
    """Return a start's planned time."""
    return datetime.fromisoformat(start.planned_at)


def resume_command(folder: Path) -> str:
    """Return the command that continues a schedule."""
    return f"lem schedule --resume {folder.name}{results_flag(store_of(folder))}"


def results_hint(folder: Path) -> str:
    """Return a sentence that tells the user how to see the results of a schedule."""
    return f"To see the results: lem results show {folder.name}{results_flag(store_of(folder))}"


# ------------------------------------------------------------------ reading and writing
def names(store: Store) -> list[str]:
    """Return the names of all schedules in a results directory."""
    folder = store.root / FOLDER
    return sorted(name for name in os.listdir(folder) if (folder / name / TABLE).is_file()) if folder.is_dir() else []


def exists(store: Store, name: str) -> bool:
    """Return whether a schedule of this name has been started."""
    return (folder_of(store, name) / TABLE).is_file()


def load_schedule(store: Store, name_or_id: str) -> ScheduleManifest:
    """Return the schedule with this name or id; raises `ResultsError` if there is none or its file is damaged."""
    known = names(store)
    if name_or_id in known:
        return read_manifest(folder_of(store, name_or_id))
    for name in known:
        if (found := read_manifest(folder_of(store, name))).id == name_or_id:
            return found
    hint = did_you_mean(name_or_id, known) or (f" Existing schedules: {', '.join(known)}." if known else "")
    raise ResultsError(f"There is no schedule '{name_or_id}' in {store.root}.{hint}")


def read_manifest(folder: Path) -> ScheduleManifest:
    """Read the schedule in a directory; raises `ResultsError` if its file is missing or damaged."""
    file = folder / TABLE
    try:
        with os.fdopen(open_to_read(str(file)), "rb") as content:
            return msgspec.json.decode(content.read(), type=ScheduleManifest)
    except OSError as error:
        raise ResultsError(f"{file} cannot be read ({error.strerror}). Start the schedule again.") from None
    except msgspec.DecodeError as error:
        raise ResultsError(f"{file} is damaged ({error}). Restore the file, or use another --name.") from None


def write_manifest(folder: Path, manifest: ScheduleManifest) -> None:
    """Write a schedule's table; raises `DiskFull` if there is no space."""
    with needs_space(folder):
        write_atomically(folder / TABLE, msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n")


def read_outcome(folder: Path, number: int) -> RunOutcome | None:
    """Return what a run has recorded, or None if it has recorded nothing that can be read."""
    try:
        return msgspec.json.decode(outcome_file(folder, number).read_bytes(), type=RunOutcome)
    except (OSError, msgspec.DecodeError):
        return None


def write_outcome(folder: Path, number: int, outcome: RunOutcome) -> None:
    """Record a run's experiment or campaign and how it ended; raises `DiskFull` if there is no space."""
    with needs_space(folder):
        write_atomically(outcome_file(folder, number), msgspec.json.encode(outcome))


@contextmanager
def held(folder: Path, name: str = ".lock", *, wait: bool = False) -> Iterator[None]:
    """Hold one of a schedule's locks; the kernel releases it when this process ends, even in a crash.

    Raises:
        ResultsError: another process holds the lock and `wait` is not set, or the directory is not writable.
    """
    try:
        with needs_space(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / name).open("a")
    except OSError as error:
        raise ResultsError(f"The schedule's directory {folder} cannot be used: {error.strerror}.") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ResultsError(
                f"Another process is working through schedule '{folder.name}'. Stop that process first, or use another "
                "--name."
            ) from None
        yield
