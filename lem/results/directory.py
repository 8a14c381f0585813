"""One experiment's directory: its plan, prompts, state, journals and records."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import msgspec

from lem.errors import ResultsError
from lem.quantities import timestamp
from lem.record import ProcessRecord, RequestRecord
from lem.results import journal
from lem.results.codec import PlanExcerpt, arrivals_sha256, check_numbers, from_json, read_excerpt, to_json
from lem.results.files import content_of, open_to_read, remove_if_abandoned, write_atomically
from lem.results.merging import together
from lem.results.plan import Plan, State, running
from lem.workload.prompts import sha256_of

T = TypeVar("T")

AGGREGATED = "aggregated.json"
JOURNAL = re.compile(r"journal_(\d+)_a(\d+)\.jsonl")
RECORD = re.compile(r"process_(\d+)_c(\d+)_a(\d+)\.json")
# How long a new attempt waits for the processes of an attempt that is just ending.
HANDOVER_S = 15.0


class _Prompt(msgspec.Struct, gc=False):
    text: str


_PROMPTS = msgspec.json.Decoder(_Prompt)


@dataclass(frozen=True)
class Part:
    """One process's part in one cycle of one attempt: its record, and the rows of its finished requests."""

    record: ProcessRecord
    requests: list[RequestRecord]


@dataclass(frozen=True)
class Earlier:
    """The earlier attempts at one cycle, each with the parts of its processes."""

    attempts: Sequence[Sequence[Part]]

    @property
    def _lengths_s(self) -> list[float]:
        """The length of each attempt's window, in seconds."""
        ended = [together([part.record for part in parts]) for parts in self.attempts]
        windows = [next(filter(None, (record.phase("measured") for record in records)), None) for records in ended]
        return [window.duration_s if window else 0.0 for window in windows]

    @property
    def measured_s(self) -> float:
        """The total length of the windows, in seconds."""
        return sum(self._lengths_s)

    def ends_s(self, rank: int) -> list[float]:
        """Return the end times of a process's requests, as if the windows had followed each other without a gap."""
        opened_s = accumulate(self._lengths_s, initial=0.0)
        return [
            from_s + row.end_s
            for from_s, parts in zip(opened_s, self.attempts, strict=False)
            for part in parts
            if part.record.rank == rank
            for row in part.requests
        ]


def _measurements(read: Callable[[bytes], T], content: bytes) -> T:
    """Read a record or a journal; if that fails because of an impossible number, the error names the number."""
    try:
        return read(content)
    except ValueError:
        check_numbers(content)
        raise


class ExperimentDir:
    """The raw files of one experiment."""

    def __init__(self, path: Path | str) -> None:
        self._folder = str(path)
        # The experiment's id is the directory's name.
        self.id = self._folder.rpartition("/")[-1]

    @cached_property
    def path(self) -> Path:
        """The directory as a Path object, made on first use, because there may be tens of thousands of experiments."""
        return Path(self._folder)

    def record_file(self, rank: int, cycle: int, attempt: int) -> Path:
        """Return the path of a process's record of a cycle."""
        return self.path / f"process_{rank}_c{cycle}_a{attempt}.json"

    def journal_file(self, rank: int, attempt: int) -> Path:
        """Return the path of a process's journal."""
        return self.path / f"journal_{rank}_a{attempt}.jsonl"

    def power_file(self, rank: int, cycle: int, attempt: int) -> Path:
        """Return the path of a process's power trace of a cycle."""
        return self.path / f"power_{rank}_c{cycle}_a{attempt}.parquet"

    def log_file(self, rank: int) -> Path:
        """Return the path of a process's output log, shared by all attempts."""
        return self.path / f"worker_{rank}.log"

    # -------------------------------------------------------------- the plan
    def write_plan(self, plan: Plan, texts: Sequence[str], arrivals_s: Sequence[float] | None = None) -> None:
        """Write the prompts, any arrivals and, last, the plan, so that a directory with a plan is complete."""
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_atomically(self.path / "prompts.jsonl", lines)
        if arrivals_s is not None:
            write_atomically(self.path / "arrivals.json", json.dumps(list(arrivals_s)))
        write_atomically(self.path / "spec.json", to_json(plan))

    def share(self, others: int) -> None:
        """Record in the plan that up to `others` other experiments shared the machine."""
        plan = self.plan()
        if others > plan.shared_with:
            write_atomically(self.path / "spec.json", to_json(replace(plan, shared_with=others)))

    def plan(self) -> Plan:
        """Read the plan; raises `ResultsError` if it is missing or damaged."""
        return self._read("spec.json", partial(from_json, Plan))

    def plan_excerpt(self) -> PlanExcerpt:
        """Read the part of the plan needed to compute rows; raises `ResultsError` if the plan is missing or damaged."""
        return self._read("spec.json", read_excerpt)

    def prompts(self) -> list[str]:
        """Read the prompts' texts in order; raises `ResultsError` if they are damaged or do not match the plan."""
        texts = self._read("prompts.jsonl", lambda lines: [prompt.text for prompt in _PROMPTS.decode_lines(lines)])
        wanted = self.plan().prompts.sha256
        if wanted and sha256_of(texts) != wanted:
            raise ResultsError(f"{self.path / 'prompts.jsonl'} does not contain the prompts that spec.json describes.")
        return texts

    def arrivals_s(self) -> list[float]:
        """Read the arrival times of a trace; raises `ResultsError` if they are damaged or do not match the plan."""
        times_s = self._read("arrivals.json", partial(from_json, list[float]))
        if arrivals_sha256(times_s) != self.plan().arrivals_sha256:
            raise ResultsError(f"{self.path / 'arrivals.json'} does not contain the arrivals that spec.json describes.")
        return times_s

    def check_inputs(self) -> None:
        """Check that the prompts and arrivals match the plan; raises `ResultsError` if they do not."""
        self.prompts()
        if self.plan().arrivals_sha256:
            self.arrivals_s()

    # -------------------------------------------------------------- state
    def state(self) -> State:
        """Return the experiment's state, inferred from its other files if state.json cannot be read.

        If the process that was running the experiment is gone, the state is `interrupted`.
        """
        try:
            state = from_json(State, self._content("state.json")).believed()
        except (OSError, ValueError):
            attempt = self._last_attempt()
            state = State("interrupted" if attempt else "planned", attempt, timestamp())
            return self._aggregated(attempt) or state
        return (self._aggregated(state.attempt) or state) if state.status == "completed" else state

    def _aggregated(self, attempt: int) -> State | None:
        """Return the state `aggregated` if rows were written after `attempt`, the last attempt, else None."""
        if not os.path.isfile(f"{self._folder}/{AGGREGATED}"):
            return None
        try:
            found = from_json(State, self._content(AGGREGATED))
        except (OSError, ValueError):  # the rows will simply be written again
            return None
        return found if (found.status, found.attempt) == ("aggregated", attempt) else None

    def _last_attempt(self) -> int:
        names = os.listdir(self.path) if self.path.is_dir() else []
        found = [RECORD.fullmatch(name) or JOURNAL.fullmatch(name) for name in names]
        return max((int(match.groups()[-1]) for match in found if match), default=0)

    def write_state(self, state: State) -> None:
        """Replace the state file, completely or not at all."""
        write_atomically(self.path / "state.json", to_json(state))

    def mark_aggregated(self, state: State) -> None:
        """Record, in a file beside the state file, that the experiment's rows have been written to the tables."""
        write_atomically(self.path / AGGREGATED, to_json(state))

    def link_aggregated(self, source: Path) -> None:
        """Do the same as `mark_aggregated`, but with a hard link to a file that other experiments share.

        Making a link takes a third of the time that writing a file takes. Where links cannot be made, the file is
        copied.
        """
        try:
            os.link(source, f"{self._folder}/{AGGREGATED}")
        except OSError:  # the file system has no hard links, or an older file exists
            write_atomically(self.path / AGGREGATED, source.read_bytes())

    def is_held(self) -> bool:
        """Return whether any process of a run is still alive, even if it is about to end."""
        try:
            with os.fdopen(open_to_read(f"{self._folder}/.lock"), "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    @contextmanager
    def run(self, *, take_over: bool = False) -> Iterator[int]:
        """Lock the experiment while it runs, with its state set to running; yield the attempt's number.

        The caller writes the final state.

        Args:
            take_over: run the experiment even if its state says that another host is running it.

        Raises:
            ResultsError: another process is running the experiment.
        """
        self.free_state(take_over=take_over)  # raises at once, without waiting for the lock
        self._check_plain()
        with self.hold(exclusive=True):
            before = self.free_state(take_over=take_over)
            self.clean()
            self.write_state(running(before.attempt + 1))
        with self.hold():
            yield before.attempt + 1

    def free_state(self, *, take_over: bool = False) -> State:
        """Return the state; raises `ResultsError` if a process is running the experiment."""
        state = self.state()
        here = state.host == socket.gethostname()
        if state.status == "running" and (here or not take_over):
            remedy = "" if here else f" If that host is gone, use lem experiment --resume {self.id} --force."
            raise ResultsError(f"{self.id} is already running as process {state.pid} on {state.host}.{remedy}")
        return state

    def _check_plain(self) -> None:
        """Raise `ResultsError` if the directory contains links, pipes or devices.

        The directory may come from someone else, and if a log in it were a link, a run would append to the file that
        the link points to.
        """
        for entry in os.scandir(self.path):
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                what = f"{self.path / entry.name} is a link, a pipe or a device"
                raise ResultsError(f"{what}, and a run would write to it; replace it with a plain file.")

    def clean(self) -> None:
        """Remove the scratch files of killed processes, in this directory and in the tables."""
        root = self.path.parent.parent
        of_rows = [f"*/.{self.id}-*", f"*/.{self.id}.parquet-*"]
        for scratch in [*self.path.glob(".*-*"), *(file for pattern in of_rows for file in root.glob(pattern))]:
            remove_if_abandoned(scratch)

    @contextmanager
    def hold(self, *, exclusive: bool = False) -> Iterator[None]:
        """Hold the lock that all processes of an attempt share; with `exclusive`, no other process can hold it.

        The kernel releases the lock when the process ends, even if the process is killed.

        Raises:
            ResultsError: other processes did not release the lock within `HANDOVER_S`.
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
                        raise ResultsError(
                            f"{self.id} is still in use by another run; wait until it has ended."
                        ) from None
                    time.sleep(0.05)
            yield

    # -------------------------------------------------------------- the processes' parts
    def write_record(self, record: ProcessRecord) -> None:
        """Write a process's record of a cycle."""
        write_atomically(self.record_file(record.rank, record.cycle, record.attempt), to_json(record))

    def parts(self) -> list[Part]:
        """Return the parts of all processes, sorted by cycle, attempt and rank.

        If a process was killed before it could write its record, its journal takes the record's place.

        Raises:
            ResultsError: a file is damaged; the error names it.
        """
        try:
            names = sorted(os.listdir(self._folder))
        except OSError as error:
            raise ResultsError(f"{self.path} cannot be read: {error.strerror or error}.") from None
        found: dict[tuple[int, int, int], Part] = {}
        known: dict[tuple[str, ...], dict[int, ProcessRecord]] = {}
        for match in filter(None, map(RECORD.fullmatch, names)):
            record = self._record(match[0])
            found[record.cycle, record.attempt, record.rank] = Part(record, [])
            known.setdefault(match.group(1, 3), {})[record.cycle] = record
        for match in filter(None, map(JOURNAL.fullmatch, names)):
            of_attempt = known.get(match.groups(), {})
            for window in self._read(match[0], partial(_measurements, partial(journal.read, known=of_attempt))):
                record = window.salvaged()
                found[record.cycle, record.attempt, record.rank] = Part(record, window.rows)
        for part in found.values():
            self._check_count(part.record, len(part.requests))
        return [found[key] for key in sorted(found)]

    def _record(self, name: str) -> ProcessRecord:
        record = self._read(name, partial(_measurements, partial(from_json, ProcessRecord)))
        if f"process_{record.rank}_c{record.cycle}_a{record.attempt}.json" != name:
            held = f"process {record.rank}, cycle {record.cycle}, attempt {record.attempt}"
            raise ResultsError(f"{self.path / name} has the record of {held}: two processes claimed the same rank.")
        return record

    def _check_count(self, record: ProcessRecord, rows: int) -> None:
        ended = record.requests_completed + record.requests_failed
        if ended != rows:
            file = self.journal_file(record.rank, record.attempt)
            counts = f"has {rows} rows of cycle {record.cycle}, but the record says {ended} requests ended"
            raise ResultsError(f"{file} {counts}.")

    def records(self) -> list[ProcessRecord]:
        """Return the records of all `parts`."""
        return [part.record for part in self.parts()]

    def finished(self, before_attempt: int | None = None) -> dict[int, set[int]]:
        """Return the positions of each cycle's finished prompts, in all attempts or only before `before_attempt`."""
        done: dict[int, set[int]] = {}
        for part in self.parts():
            if before_attempt is None or part.record.attempt < before_attempt:
                done.setdefault(part.record.cycle, set()).update(row.request for row in part.requests)
        return done

    def is_fruitless(self) -> bool:
        """Return whether there is a cycle in which all requests that have ended failed."""
        ended: dict[int, bool] = {}
        for part in self.parts():
            for row in part.requests:
                ended[row.cycle] = ended.get(row.cycle, True) and row.error is not None
        return any(ended.values())

    def batches(self, rank: int, cycle: int, before_attempt: int) -> int:
        """Return how many batches of a cycle a process has run in earlier attempts."""
        rows = (
            row
            for part in self.parts()
            if (part.record.rank, part.record.cycle) == (rank, cycle) and part.record.attempt < before_attempt
            for row in part.requests
        )
        return 1 + max((row.batch for row in rows), default=-1)

    def earlier(self, cycle: int, before_attempt: int) -> Earlier:
        """Return the earlier attempts at a cycle."""
        attempts: dict[int, list[Part]] = {}
        for part in self.parts():
            if part.record.cycle == cycle and part.record.attempt < before_attempt:
                attempts.setdefault(part.record.attempt, []).append(part)
        return Earlier(list(attempts.values()))

    def _read(self, name: str, read: Callable[[bytes], T]) -> T:
        """Read a file; raises `ResultsError` if it is missing or damaged."""
        try:
            return read(self._content(name))
        except OSError as error:
            raise ResultsError(f"{self.path / name} cannot be read: {error.strerror or error}.") from None
        except (ValueError, msgspec.MsgspecError) as error:
            raise ResultsError(f"{self.path / name} cannot be read: {' '.join(str(error).split())[:200]}.") from None

    def _content(self, name: str) -> bytes:
        return content_of(f"{self._folder}/{name}")
