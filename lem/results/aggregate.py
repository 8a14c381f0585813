"""From raw files to the tables: what must be there and fit together, and which experiments have to be read.

Idempotent: an experiment whose row is as new as its state is left alone. Knows the store and the tables; what the
numbers mean is for lem/rows.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from lem.errors import ResultsError
from lem.record import CodedWarning, ProcessRecord
from lem.results.codec import BriefPlan, to_json
from lem.results.directory import ExperimentDir, Part
from lem.results.files import write_atomically
from lem.results.journal import DIED
from lem.results.merging import merged
from lem.results.plan import State
from lem.results.rows import Cycle, Measured, Rows, rows_of
from lem.results.schema import ExperimentRow
from lem.results.store import Store
from lem.results.tables import TOGETHER as OF_SEVERAL
from lem.results.tables import Batch, Place, Tables
from lem.units import timestamp
from lem.warning_codes import warning

# How many experiments are read ahead: what they hold is to stay in the processor's cache until rows are made of it.
READ_AHEAD = 32
# How many cycles are read before rows are made of them, and how many experiments are written together, at most; and how
# many rows of requests.
READ_TOGETHER = 200
TOGETHER = 2_000
REQUESTS_TOGETHER = 100_000


# ------------------------------------------------------------------ one experiment
def read(directory: ExperimentDir, *, strict: bool = True, mixed: bool = False, state: State | None = None) -> Rows:
    """Read an experiment's raw files and return its rows, writing nothing; see `measured`."""
    return rows_of(measured(directory, strict=strict, mixed=mixed, state=state))


def measured(
    directory: ExperimentDir, *, strict: bool = True, mixed: bool = False, state: State | None = None
) -> Measured:
    """Read an experiment's raw files and put together what belongs together.

    Args:
        directory: the experiment.
        strict: refuse it when anything is missing that its plan expects, or when processes did not run together.
        mixed: take records of different backends.
        state: its state, if that has been read.

    Raises:
        ResultsError: no record, a damaged one, records that do not belong together, or what `strict` refuses.
    """
    state = state or directory.state()
    plan, parts = directory.brief_plan(), directory.parts()
    if not parts:
        raise ResultsError(f"{directory.id} has no records yet.")
    cycles = by_cycle(parts)
    _check_same(directory, plan, cycles, mixed)
    notes = {cycle: _check_together(directory, cycle, cycles[cycle], strict) for cycle in cycles}
    if strict:
        _check_complete(directory, plan, cycles)
    attempts = max(state.attempt, *[part.record.attempt for part in parts])
    return put_together(plan, cycles, attempts, notes)


def put_together(
    plan: BriefPlan,
    parts: Mapping[int, Sequence[Part]],
    attempts: int,
    notes: Mapping[int, Sequence[CodedWarning]] = MappingProxyType({}),
) -> Measured:
    """Return what an experiment measured, from what its processes did.

    Args:
        plan: what was to be run.
        parts: those of each cycle, at least one, by attempt and rank.
        attempts: how often the experiment was begun.
        notes: what else there is to doubt, by cycle.
    """
    cycles = [_cycle(plan, cycle, of_cycle, notes.get(cycle, ())) for cycle, of_cycle in parts.items()]
    return Measured(plan, cycles, attempts - 1)


def by_cycle(parts: Sequence[Part]) -> dict[int, list[Part]]:
    """Return the parts of each cycle."""
    found: dict[int, list[Part]] = {}
    for part in parts:
        found.setdefault(part.record.cycle, []).append(part)
    return found


def _cycle(plan: BriefPlan, number: int, parts: Sequence[Part], notes: Sequence[CodedWarning]) -> Cycle:
    if len(parts) == 1:
        return Cycle(plan, number, 1, [parts[0].record], parts[0].requests, notes)
    by_rank: dict[int, list[ProcessRecord]] = {}
    for part in parts:
        by_rank.setdefault(part.record.rank, []).append(part.record)
    records = [merged(by_rank[rank]) for rank in sorted(by_rank)]
    attempts = len({part.record.attempt for part in parts if part.record.phase("measured")})
    return Cycle(plan, number, max(attempts, 1), records, [r for part in parts for r in part.requests], notes)


# ------------------------------------------------------------------ does it fit together?
def _check_same(directory: ExperimentDir, plan: BriefPlan, by_cycle: Mapping[int, list[Part]], mixed: bool) -> None:
    """Raise when records belong to different experiments, or a prompt was counted twice."""
    if plan.experiment_id != directory.id:
        raise ResultsError(f"{directory.path} holds {plan.experiment_id}: give the directory its name back.")
    records = [part.record for of_cycle in by_cycle.values() for part in of_cycle]
    backends = sorted({record.backend for record in records if record.backend})
    if len(backends) > 1 and not mixed:
        raise ResultsError(
            f"{directory.id} has records of different backends, {' and '.join(backends)}: their numbers do not belong "
            "together. --allow-mixed-backends takes them all the same, and says so in the row."
        )
    for record in records:
        foreign = len(backends) > 1 and record.backend != plan.experiment.backend.name
        if (why := _unfit(record, plan, foreign)) is not None:
            raise ResultsError(f"{_file(directory, record)} {why}.")
    for cycle, of_cycle in by_cycle.items():
        rows = [row.request for part in of_cycle for row in part.requests]
        if len(rows) != len(set(rows)):
            raise ResultsError(
                f"{directory.id} has prompt {max(rows, key=rows.count)} of cycle {cycle} more than once."
            )


def _unfit(record: ProcessRecord, plan: BriefPlan, foreign: bool) -> str | None:
    """Return why a record cannot be one of the plan's, or None; `foreign`: it may be of another backend."""
    if record.experiment_id != plan.experiment_id:
        return f"is of another experiment, {record.experiment_id}"
    if plan.config_sha256 and not foreign and record.config_sha256 not in ("", plan.config_sha256):
        return "was measured with another configuration than spec.json's"
    if record.world_size != plan.processes:
        return f"is of one among {record.world_size} processes; the plan has {plan.processes}"
    for phase in record.phases:
        if not 0 <= phase.duration_s < math.inf:
            return f"has the phase {phase.name} as {phase.duration_s:g} s long: it was changed, or is damaged"
    return None


def _file(directory: ExperimentDir, record: ProcessRecord) -> Path:
    return directory.record_file(record.rank, record.cycle, record.attempt)


def _check_complete(directory: ExperimentDir, plan: BriefPlan, by_cycle: Mapping[int, Sequence[Part]]) -> None:
    """Raise when a process or a prompt of a cycle is missing; says which."""
    missing = []
    for cycle in range(1, plan.experiment.cycles + 1):
        ranks = set(range(plan.processes)) - {part.record.rank for part in by_cycle.get(cycle, ())}
        left = plan.prompts.count - sum(len(part.requests) for part in by_cycle.get(cycle, ()))
        if ranks:
            names = ", ".join(map(str, sorted(ranks)))
            missing.append(f"no record of process {names} of {plan.processes} in cycle {cycle}")
        elif left:
            missing.append(f"{left} of {plan.prompts.count} prompts in cycle {cycle}")
    if missing:
        raise ResultsError(f"{directory.id} is incomplete: {'; '.join(missing)}. --no-strict takes what there is.")


def _check_together(directory: ExperimentDir, cycle: int, parts: Sequence[Part], strict: bool) -> list[CodedWarning]:
    """Return notes about the records of one cycle; raise, when strict, if processes did not run at the same time."""
    if len(parts) == 1:
        return []
    notes = []
    backends = sorted({part.record.backend for part in parts if part.record.backend})
    if len(backends) > 1:
        notes.append(warning("mixed_backends", f"its processes ran on {' and '.join(backends)}."))
    for attempt in sorted({part.record.attempt for part in parts}):
        apart = _apart([part.record for part in parts if part.record.attempt == attempt])
        if apart is None:
            continue
        text = f"the windows of processes {apart[0]} and {apart[1]} in cycle {cycle} do not overlap in time"
        if strict:
            raise ResultsError(f"{directory.id}: {text}. --no-strict takes them all the same, with a warning.")
        notes.append(warning("ranks_apart", f"{text}."))
    return notes


def _apart(records: Sequence[ProcessRecord]) -> tuple[int, int] | None:
    """Return two processes whose windows do not overlap, or None.

    Where a process was killed, its journal tells when it came to the window, not when all did: that says nothing.
    """
    windows = [
        (record.window_opened_unix_s, window.duration_s, record.rank)
        for record in records
        if (window := record.phase("measured"))
        and record.window_opened_unix_s is not None
        and (record.error is None or record.error.type != DIED)
    ]
    if len(windows) < 2:
        return None
    first_end_s, ended = min((opened_s + duration_s, rank) for opened_s, duration_s, rank in windows)
    last_start_s, begun = max((opened_s, rank) for opened_s, _, rank in windows)
    return None if last_start_s <= first_end_s else (ended, begun)


# ------------------------------------------------------------------ into the tables
@dataclass(frozen=True)
class Outcome:
    """What became of an experiment that was to be aggregated, and a sentence that says it."""

    kind: Literal["written", "fresh", "skipped", "failed"]
    text: str


def aggregate(store: Store, directory: ExperimentDir, *, strict: bool = True, force: bool = False) -> ExperimentRow:
    """Write an experiment's rows to the tables, once; return the experiment's.

    An experiment whose row is as new as its state is left alone unless `force`.
    """
    tables, state = Tables(store), directory.state()
    with tables.locked():
        place = tables.place(directory.id)
        if place and OF_SEVERAL.fullmatch(Path(place.file).stem) and place.file in (lacking := tables.lacking()):
            raise ResultsError(lacking[place.file] or _gone(store, place))
        if place and not force and is_fresh(tables, directory.id, place, state):
            return tables.row(directory.id, place)
        found = measured(directory, strict=strict, state=state)
        batch = Batch({directory.id: place} if place else {})
        try:
            batch.add([found])
        except OverflowError as error:
            raise ResultsError(_beyond(directory, error)) from None
        tables.write(batch)
    row = rows_of(found).row
    if state.status == row.status == "completed":
        directory.mark_aggregated(state.now("aggregated"))
    return row


def _gone(store: Store, place: Place) -> str:
    return f"Of {store.experiments_table / place.file} other rows are gone; lem aggregate --all makes them anew."


def aggregate_all(
    store: Store, ids: Sequence[str], *, strict: bool = True, force: bool = False, mixed: bool = False
) -> Iterator[Outcome]:
    """Write the rows of experiments that have none, or older ones than their state; yields what became of each.

    What cannot be aggregated stops nothing else. An experiment that runs is left alone.

    Args:
        store: the results directory.
        ids: experiments in it.
        strict: refuse an experiment when anything is missing.
        force: make the rows anew of those that have them, too.
        mixed: take records of different backends.
    """
    tables = Tables(store)
    with tables.locked():
        places, lacking = tables.places(), tables.lacking()
        damaged = {file: text for file, text in lacking.items() if text is not None}
        yield from [Outcome("failed", damaged[file]) for file in sorted(_files_of(ids, places) & damaged.keys())]
        ids = _with_neighbours(store, ids, places, lacking.keys() - damaged.keys())
        writer = _Writer(store, places)
        for begin in range(0, len(ids), READ_AHEAD):
            pending = []
            for name in ids[begin : begin + READ_AHEAD]:
                place = places.get(name)
                if place and place.file in damaged:
                    continue
                directory = store.directory(name)
                state = directory.state()
                is_new = force or place is None or place.file in lacking
                skipped = _reason_to_skip(tables, directory, state, None if is_new else place)
                if skipped:
                    yield skipped
                else:
                    pending.append((directory, state))
            for directory, _ in pending:
                directory.read_ahead()
            for directory, state in pending:
                try:
                    one = measured(directory, strict=strict, mixed=mixed, state=state)
                except ResultsError as error:
                    yield Outcome("failed", str(error))
                else:
                    yield from writer.add(directory, state, one)
        yield from writer.write()


def _files_of(ids: Sequence[str], places: Mapping[str, Place]) -> set[str]:
    return {places[name].file for name in ids if name in places}


def _with_neighbours(store: Store, ids: Sequence[str], places: Mapping[str, Place], gone: Set[str]) -> Sequence[str]:
    """Return ids, and those whose rows lie in one file with theirs of which a part is gone: all are made anew."""
    wanted = _files_of(ids, places) & gone
    if not wanted:
        return ids
    there = set(store.ids())
    known = set(ids)
    return [*ids, *(name for name, at in places.items() if at.file in wanted and name in there and name not in known)]


class _Writer:
    """Writes the rows of several experiments, then says in their states that they have them.

    Records become Arrow tables in small groups, so that they do not leave the processor's cache, and few files are
    written, as each costs some milliseconds.
    """

    def __init__(self, store: Store, places: Mapping[str, Place]) -> None:
        self._store, self._places = store, places
        self._read: list[tuple[ExperimentDir, State, Measured]] = []
        self._made: list[tuple[ExperimentDir, State, str]] = []
        self._failed: list[Outcome] = []
        self._batch = Batch(places)
        self._requests = self._cycles = 0

    def add(self, directory: ExperimentDir, state: State, one: Measured) -> list[Outcome]:
        """Add an experiment; returns what became of all that have been written meanwhile."""
        self._read.append((directory, state, one))
        self._requests += sum([len(cycle.requests) for cycle in one.cycles])
        self._cycles += len(one.cycles)
        if self._cycles >= READ_TOGETHER or self._requests >= REQUESTS_TOGETHER:
            self._make()
        return self.write() if len(self._made) >= TOGETHER or self._requests >= REQUESTS_TOGETHER else []

    def _make(self) -> None:
        """Make rows of what has been read."""
        try:
            self._add_rows(self._read)
        except OverflowError:  # a number that no column holds, as of a file that was changed by hand
            for one in self._read:  # the others are not to suffer from one of them
                try:
                    self._add_rows([one])
                except OverflowError as error:
                    self._failed.append(Outcome("failed", _beyond(one[0], error)))
        self._read, self._cycles = [], 0

    def _add_rows(self, read: Sequence[tuple[ExperimentDir, State, Measured]]) -> None:
        statuses = self._batch.add([one for *_, one in read])
        self._made += [(directory, state, text) for (directory, state, _), text in zip(read, statuses, strict=True)]

    def write(self) -> list[Outcome]:
        """Write what has been added, and return what became of it."""
        self._make()
        failed, self._failed = self._failed, []
        if not self._made:
            return failed
        Tables(self._store).write(self._batch)
        complete = [(at, state) for at, state, status in self._made if state.status == status == "completed"]
        _mark_aggregated(self._store, complete)
        written = [Outcome("written", f"{directory.id}: {status}") for directory, _, status in self._made]
        self._batch, self._made, self._requests = Batch(self._places), [], 0
        return [*failed, *written]


def _beyond(directory: ExperimentDir, error: OverflowError) -> str:
    """Return what is to be said of a number that no column holds."""
    return f"{directory.path} holds a number that no table takes: {error}."


def _reason_to_skip(tables: Tables, directory: ExperimentDir, state: State, place: Place | None) -> Outcome | None:
    """Return why an experiment is left alone, or None."""
    if state.status == "running":
        return Outcome("skipped", f"{directory.id} is running, as process {state.pid} on {state.host}: left alone.")
    if state.pid is not None and directory.is_held():
        return Outcome("skipped", f"{directory.id}: processes of it are still ending: left alone.")
    if not state.attempt and not place:
        return Outcome("skipped", f"{directory.id} has not been run: left alone.")
    if place and is_fresh(tables, directory.id, place, state):
        if state.status == "completed":
            directory.mark_aggregated(state.now("aggregated"))
        return Outcome("fresh", f"{directory.id} has its row already.")
    return None


def is_fresh(tables: Tables, experiment_id: str, place: Place, state: State) -> bool:
    """Tell whether an experiment's row holds its last attempt; nothing is run any more once it is aggregated.

    The row of a completed experiment that is not complete was made while files of it were missing.
    """
    if state.status == "aggregated" or not state.attempt:
        return True
    if place.resumed is None:
        row = tables.row(experiment_id, place)
        place = Place(place.file, row.resumed, row.status)
    return place.resumed == state.attempt - 1 and not (state.status == "completed" and place.status != "completed")


def _mark_aggregated(store: Store, completed: Sequence[tuple[ExperimentDir, State]]) -> None:
    """Say of completed experiments that they have their rows.

    Of many that is one file, linked into each directory: it says the same in all of them, and writing each to the disk
    would take longer than all the rest.
    """
    for attempt in sorted({state.attempt for _, state in completed}):
        source = store.root / "raw" / f".aggregated_a{attempt}"
        write_atomically(source, to_json(State("aggregated", attempt, timestamp())))
        for directory, state in completed:
            if state.attempt == attempt:
                directory.link_aggregated(source)
        source.unlink()
