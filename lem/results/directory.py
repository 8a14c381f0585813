"""One experiment's directory: its plan, prompts, state, journals and records."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from lem.errors import ResultsError
from lem.record import ProcessRecord, RequestRecord
from lem.results import journal
from lem.results.codec import BriefPlan, arrivals_sha256, from_json, read_plan, to_json
from lem.results.files import _remove_if_abandoned, write_atomically
from lem.results.plan import Plan, State, running
from lem.units import timestamp
from lem.workload.prompts import sha256_of

T = TypeVar("T")


AGGREGATED = "aggregated.json"


JOURNAL = re.compile(r"journal_(\d+)_a(\d+)\.jsonl")


RECORD = re.compile(r"process_(\d+)_c(\d+)_a(\d+)\.json")


# How long to wait for the processes of a run that is just ending before another may continue it.
HANDOVER_S = 15.0


# Most files are shorter.
READ_AT_ONCE_BYTES = 1 << 14


@dataclass(frozen=True)
class Part:
    """What one process did for one cycle in one attempt: its record, and the rows of the requests it finished."""

    record: ProcessRecord
    requests: list[RequestRecord]


class ExperimentDir:
    """The raw files of one experiment."""

    def __init__(self, path: Path | str) -> None:
        self._folder = str(path)
        # The experiment's id is the directory's name.
        self.id = self._folder.rpartition("/")[-1]
        self._ahead_names: list[str] | None = None
        self._ahead: dict[str, bytes] = {}

    @cached_property
    def path(self) -> Path:
        """The directory; made when it is asked for, as there are tens of thousands of experiments."""
        return Path(self._folder)

    def record_file(self, rank: int, cycle: int, attempt: int) -> Path:
        """Return where a process's record of a cycle lies."""
        return self.path / f"process_{rank}_c{cycle}_a{attempt}.json"

    def journal_file(self, rank: int, attempt: int) -> Path:
        """Return where a process writes the rows of what it has finished."""
        return self.path / f"journal_{rank}_a{attempt}.jsonl"

    def power_file(self, rank: int, cycle: int, attempt: int) -> Path:
        """Return where a process's power trace of a cycle lies."""
        return self.path / f"power_{rank}_c{cycle}_a{attempt}.parquet"

    def log_file(self, rank: int) -> Path:
        """Return where a process's output goes, that of all attempts."""
        return self.path / f"worker_{rank}.log"

    # -------------------------------------------------------------- what is to be run
    def write_plan(self, plan: Plan, texts: Sequence[str], arrivals_s: Sequence[float] | None = None) -> None:
        """Write the prompts and a trace's arrivals, then the plan: a directory with a plan is complete."""
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_atomically(self.path / "prompts.jsonl", lines)
        if arrivals_s is not None:
            write_atomically(self.path / "arrivals.json", json.dumps(list(arrivals_s)))
        write_atomically(self.path / "spec.json", to_json(plan))

    def share(self, others: int) -> None:
        """Write down in the plan with how many others the machine is shared, if there were fewer before."""
        plan = self.plan()
        if others > plan.shared_with:
            write_atomically(self.path / "spec.json", to_json(replace(plan, shared_with=others)))

    def plan(self) -> Plan:
        """Read the plan; raises `ResultsError` when there is none or it is damaged."""
        return self._plan(partial(from_json, Plan))

    def brief_plan(self) -> BriefPlan:
        """Read what rows need of the plan; raises `ResultsError` when there is none or it is damaged."""
        return self._plan(read_plan)

    def _plan(self, read: Callable[[bytes], T]) -> T:
        try:
            return read(self._content("spec.json"))
        except (OSError, ValueError) as error:
            raise self._unreadable("spec.json", error) from None

    def prompts(self) -> list[str]:
        """Read the prompts' texts in order; raises `ResultsError` when they are damaged, or others than the plan's."""
        try:
            with (self.path / "prompts.jsonl").open(encoding="utf-8") as file:
                texts = [json.loads(line)["text"] for line in file]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self._unreadable("prompts.jsonl", error) from None
        wanted = self.plan().prompts.sha256
        if wanted and sha256_of(texts) != wanted:
            raise ResultsError(f"{self.path / 'prompts.jsonl'} does not hold the prompts that spec.json speaks of.")
        return texts

    def arrivals_s(self) -> list[float]:
        """Read when the requests of a trace arrive; raises `ResultsError` as for the prompts."""
        try:
            times_s = from_json(list[float], (self.path / "arrivals.json").read_bytes())
        except (OSError, ValueError) as error:
            raise self._unreadable("arrivals.json", error) from None
        if arrivals_sha256(times_s) != self.plan().arrivals_sha256:
            raise ResultsError(f"{self.path / 'arrivals.json'} does not hold the arrivals that spec.json speaks of.")
        return times_s

    def check_inputs(self) -> None:
        """See whether what is to be run is there as it was planned; raises `ResultsError` when it is not."""
        self.prompts()
        if self.plan().arrivals_sha256:
            self.arrivals_s()

    # -------------------------------------------------------------- where it stands
    def state(self) -> State:
        """Return the state, as far as it can be believed; without a readable one what the files tell."""
        try:
            state = from_json(State, self._content("state.json")).believed()
        except (OSError, ValueError):
            attempt = self._last_attempt()
            state = State("interrupted" if attempt else "planned", attempt, timestamp())
            return self._aggregated(attempt) or state
        return (self._aggregated(state.attempt) or state) if state.status == "completed" else state

    def _aggregated(self, attempt: int) -> State | None:
        """Return the state by which a completed attempt has its rows; None where nothing says so."""
        if not os.path.isfile(f"{self._folder}/{AGGREGATED}"):
            return None
        try:
            found = from_json(State, self._content(AGGREGATED))
        except (OSError, ValueError):  # the rows are made anew
            return None
        return found if (found.status, found.attempt) == ("aggregated", attempt) else None

    def _last_attempt(self) -> int:
        names = os.listdir(self.path) if self.path.is_dir() else []
        found = [RECORD.fullmatch(name) or JOURNAL.fullmatch(name) for name in names]
        return max((int(match.groups()[-1]) for match in found if match), default=0)

    def write_state(self, state: State) -> None:
        """Change the state, at once."""
        write_atomically(self.path / "state.json", to_json(state))

    def mark_aggregated(self, state: State) -> None:
        """Say that the experiment, which is completed, has its rows: in a file of its own, at once."""
        write_atomically(self.path / AGGREGATED, to_json(state))

    def link_aggregated(self, source: Path) -> None:
        """Say the same, by a file on the disk that says it of other experiments as well.

        That is why it is not said in state.json: to put another file in its place takes three times as long.
        """
        try:
            os.link(source, f"{self._folder}/{AGGREGATED}")
        except OSError:  # the file system has no links, or there is one of former rows
            write_atomically(self.path / AGGREGATED, source.read_bytes())

    def is_held(self) -> bool:
        """Tell whether processes of a run are still there, were it only to end."""
        try:
            with (self.path / ".lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def run(self, *, take_over: bool = False) -> Iterator[int]:
        """Hold the experiment while it runs; gives the number of the attempt.

        Whoever holds it says so in its state; at the end it is for the caller to say how it went.

        Args:
            take_over: do not believe another host that says it runs it.

        Raises:
            ResultsError: another process runs it.
        """
        self.free_state(take_over=take_over)  # at once, without waiting for its lock
        with self.hold(exclusive=True):
            before = self.free_state(take_over=take_over)
            self.clean()
            self.write_state(running(before.attempt + 1))
        with self.hold():
            yield before.attempt + 1

    def free_state(self, *, take_over: bool = False) -> State:
        """Return the state of an experiment that nobody runs; raises `ResultsError` when somebody does."""
        state = self.state()
        here = state.host == socket.gethostname()
        if state.status == "running" and (here or not take_over):
            remedy = "" if here else f" If that host is gone: lem experiment --resume {self.id} --force takes it over."
            raise ResultsError(f"{self.id} runs already, as process {state.pid} on {state.host}.{remedy}")
        return state

    def clean(self) -> None:
        """Remove what killed processes were writing: scratch files in this directory, and those of its rows."""
        root = self.path.parent.parent
        of_rows = [f"*/.{self.id}-*", f"*/.{self.id}.parquet-*"]
        for scratch in [*self.path.glob(".*-*"), *(file for pattern in of_rows for file in root.glob(pattern))]:
            _remove_if_abandoned(scratch)

    @contextmanager
    def hold(self, *, exclusive: bool = False) -> Iterator[None]:
        """Share the experiment with the other processes of its run, or wait until none of a former run is left.

        The kernel lets go of it when the process ends, however it ends.
        """
        with (self.path / ".lock").open("a") as lock:
            mode = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            until_s = time.monotonic() + HANDOVER_S
            while True:
                try:
                    fcntl.flock(lock, mode | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until_s:
                        raise ResultsError(f"{self.id} is still held by processes of another run.") from None
                    time.sleep(0.05)
            yield

    # -------------------------------------------------------------- what has been done
    def write_record(self, record: ProcessRecord) -> None:
        """Write a process's record of a cycle."""
        write_atomically(self.record_file(record.rank, record.cycle, record.attempt), to_json(record))

    def parts(self) -> list[Part]:
        """Return what all processes did, by cycle, attempt and rank, however they ended.

        Where a process was killed before it could write its record, its journal stands in.

        Raises:
            ResultsError: a damaged file, named.
        """
        names = self._names()
        found: dict[tuple[int, int, int], Part] = {}
        known: dict[tuple[str, ...], dict[int, ProcessRecord]] = {}
        for match in [match for name in names if name[0] == "p" and (match := RECORD.fullmatch(name))]:
            record = self._record(match)
            found[record.cycle, record.attempt, record.rank] = Part(record, [])
            known.setdefault(match.group(1, 3), {})[record.cycle] = record
        for match in [match for name in names if name[0] == "j" and (match := JOURNAL.fullmatch(name))]:
            for window in self._windows(match[0], known.get(match.groups(), {})):
                record = window.record if window.closed else window.salvaged()
                self._check_count(match[0], record, window.rows)
                found[record.cycle, record.attempt, record.rank] = Part(record, window.rows)
        self._check_rows(list(found.values()))
        return [found[key] for key in sorted(found)]

    def _check_count(self, name: str, record: ProcessRecord, rows: Sequence[RequestRecord]) -> None:
        if record.requests_completed != len(rows):
            counts = f"has {len(rows)} rows, its process's record counts {record.requests_completed}."
            raise ResultsError(f"{self.path / name} {counts}")

    def _names(self) -> list[str]:
        names, self._ahead_names = self._ahead_names, None
        return self._listed() if names is None else names

    def _listed(self) -> list[str]:
        try:
            return sorted(os.listdir(self._folder))
        except OSError as error:
            raise ResultsError(f"{self.path} cannot be read: {error.strerror}.") from None

    def _check_rows(self, parts: Sequence[Part]) -> None:
        for part in parts:
            if part.record.requests_completed != len(part.requests):
                journal_file = self.journal_file(part.record.rank, part.record.attempt)
                raise ResultsError(f"{journal_file} lacks rows that its process's record counts.")

    def records(self) -> list[ProcessRecord]:
        """Return the records of `parts`."""
        return [part.record for part in self.parts()]

    def finished(self, before_attempt: int | None = None) -> dict[int, set[int]]:
        """Return for each cycle the positions of the prompts that all attempts, or those before one, have finished."""
        done: dict[int, set[int]] = {}
        for part in self.parts():
            if before_attempt is None or part.record.attempt < before_attempt:
                done.setdefault(part.record.cycle, set()).update(row.request for row in part.requests)
        return done

    def batches(self, rank: int, cycle: int, before_attempt: int) -> int:
        """Return how many batches of a cycle a process has run in earlier attempts."""
        rows = (
            row
            for part in self.parts()
            if (part.record.rank, part.record.cycle) == (rank, cycle) and part.record.attempt < before_attempt
            for row in part.requests
        )
        return 1 + max((row.batch for row in rows), default=-1)

    def _windows(self, name: str, known: Mapping[int, ProcessRecord]) -> list[journal.Window]:
        try:
            return journal.read(self._content(name), known)
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from None

    def _record(self, match: re.Match[str]) -> ProcessRecord:
        try:
            record = from_json(ProcessRecord, self._content(match[0]))
        except (OSError, ValueError) as error:
            raise self._unreadable(match[0], error) from None
        if f"process_{record.rank}_c{record.cycle}_a{record.attempt}.json" != match[0]:
            held = f"process {record.rank}, cycle {record.cycle}, attempt {record.attempt}"
            where = self.path / match[0]
            raise ResultsError(f"{where} holds the record of {held}: two processes took themselves for the same one.")
        return record

    def _unreadable(self, name: str, error: Exception) -> ResultsError:
        return ResultsError(f"{self.path / name} cannot be read: {' '.join(str(error).split())[:200]}.")

    def read_ahead(self) -> None:
        """Read the files that rows are made of; each is handed out once, when it is asked for.

        To read some dozens of experiments and to make rows of them afterwards takes a tenth less time than to do both
        for each in turn: the processor's caches hold the code of one thing at a time.
        """
        with suppress(OSError, ResultsError):  # whoever asks for the file is told
            self._ahead_names = self._listed()
            for name in self._ahead_names:
                if name.startswith(("spec.json", "process_", "journal_")):
                    self._ahead[name] = self._read(name)

    def _content(self, name: str) -> bytes:
        content = self._ahead.pop(name, None)
        return self._read(name) if content is None else content

    def _read(self, name: str) -> bytes:
        """Read a file, in a third of the time that Path takes: `lem aggregate --all` reads tens of thousands."""
        descriptor = os.open(f"{self._folder}/{name}", os.O_RDONLY)
        try:
            content = os.read(descriptor, READ_AT_ONCE_BYTES)
            if len(content) == READ_AT_ONCE_BYTES:
                with open(descriptor, "rb", buffering=0, closefd=False) as rest:
                    content += rest.readall()
        finally:
            os.close(descriptor)
        return content
