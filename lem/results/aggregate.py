"""Turns raw files into tables: decides which experiments to read, and whether their files belong together.

Aggregating is idempotent: an experiment is skipped if its row is as new as its state. This module decides what to read
and write; `lem.results.rows` computes the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from lem.errors import ResultsError
from lem.quantities import timestamp
from lem.record import CodedWarning, ProcessRecord
from lem.results.codec import PlanExcerpt, to_json
from lem.results.directory import ExperimentDir, Part
from lem.results.files import write_atomically
from lem.results.journal import DIED
from lem.results.merging import merged, together
from lem.results.plan import FINISHED, State
from lem.results.rows import Cycle, Measured, Rows, rows_of
from lem.results.schema import ExperimentRow
from lem.results.store import Store
from lem.results.tables import SHARED_FILE, NewRows, RowLocation, Tables
from lem.warning_codes import warning

# The maximum number of cycles that are read before their rows are computed, and the maximum numbers of experiments and
# of request rows that are written together.
READ_TOGETHER = 200
WRITTEN_TOGETHER = 2_000
REQUESTS_TOGETHER = 100_000


# ------------------------------------------------------------------ one experiment
def read(directory: ExperimentDir, *, strict: bool = True, mixed: bool = False, state: State | None = None) -> Rows:
    """Read an experiment's raw files and return its rows without writing them; for the arguments, see `measured`."""
    return rows_of(measured(directory, strict=strict, mixed=mixed, state=state))


def measured(
    directory: ExperimentDir, *, strict: bool = True, mixed: bool = False, state: State | None = None
) -> Measured:
    """Read an experiment's raw files and merge those that belong together.

    Args:
        directory: the experiment's directory.
        strict: raise if anything that the plan expects is missing, or if processes did not run at the same time.
        mixed: accept records from different backends.
        state: the experiment's state, if it has already been read.

    Raises:
        ResultsError: no record exists, a record is damaged, records do not belong together or, with `strict`, something
            is missing or processes did not run at the same time.
    """
    state = state or directory.state()
    plan, parts = directory.plan_excerpt(), directory.parts()
    if not parts:
        raise ResultsError(f"{directory.id} has no records yet.")
    cycles = by_cycle(parts)
    _check_same(directory, plan, cycles, mixed)
    warnings = {cycle: _check_together(directory, cycle, cycles[cycle], strict) for cycle in cycles}
    if strict:
        _check_complete(directory, plan, cycles)
    attempts = max(state.attempt, *[part.record.attempt for part in parts])
    return put_together(plan, cycles, attempts, warnings)


def put_together(
    plan: PlanExcerpt,
    parts: Mapping[int, Sequence[Part]],
    attempts: int,
    warnings: Mapping[int, Sequence[CodedWarning]] = MappingProxyType({}),
) -> Measured:
    """Combine the records and requests of an experiment's processes, and return the experiment's measurements.

    Args:
        plan: the experiment's plan.
        parts: the record and the requests of each process in each attempt, by cycle; at least one per cycle, sorted by
            attempt and rank.
        attempts: the number of attempts that the experiment has had.
        warnings: warnings that are not in any record, by cycle.
    """
    cycles = [_cycle(plan, cycle, of_cycle, warnings.get(cycle, ())) for cycle, of_cycle in parts.items()]
    return Measured(plan, cycles, attempts - 1)


def by_cycle(parts: Sequence[Part]) -> dict[int, list[Part]]:
    """Return the parts grouped by cycle."""
    found: dict[int, list[Part]] = {}
    for part in parts:
        found.setdefault(part.record.cycle, []).append(part)
    return found


def _cycle(plan: PlanExcerpt, number: int, parts: Sequence[Part], warnings: Sequence[CodedWarning]) -> Cycle:
    if len(parts) == 1:
        return Cycle(plan, number, 1, [parts[0].record], parts[0].requests, warnings)
    by_attempt: dict[int, list[ProcessRecord]] = {}
    for part in parts:
        by_attempt.setdefault(part.record.attempt, []).append(part.record)
    by_rank: dict[int, list[ProcessRecord]] = {}
    opened_s: dict[int, float | None] = {}
    for attempt, records in by_attempt.items():
        for record in together(records):
            by_rank.setdefault(record.rank, []).append(record)
            if record.phase("measured"):
                opened_s[attempt] = record.arrivals_from_s if opened_s.keys() - {attempt} else 0.0
    return Cycle(
        plan,
        number,
        max(len(opened_s), 1),
        [merged(by_rank[rank]) for rank in sorted(by_rank)],
        [r for part in parts for r in part.requests],
        warnings,
        opened_s,
    )


# ------------------------------------------------------------------ do the files belong together?
def _check_same(directory: ExperimentDir, plan: PlanExcerpt, by_cycle: Mapping[int, list[Part]], mixed: bool) -> None:
    """Raise `ResultsError` if an experiment's files do not belong together.

    They do not if the plan's id differs from the directory's, if a record does not fit the plan, if a prompt was
    counted twice, or if the records are from different backends and `mixed` is not set.
    """
    if plan.experiment_id != directory.id:
        raise ResultsError(
            f"{directory.path} contains experiment {plan.experiment_id}; rename the directory to that id."
        )
    records = [part.record for of_cycle in by_cycle.values() for part in of_cycle]
    backends = sorted({record.backend for record in records if record.backend})
    if len(backends) > 1 and not mixed:
        raise ResultsError(
            f"{directory.id} mixes the backends {' and '.join(backends)}, whose numbers are not comparable. "
            "Use --allow-mixed-backends to combine them anyway, with a warning in the row."
        )
    for record in records:
        foreign = len(backends) > 1 and record.backend != plan.experiment.backend.name
        if (why := _unfit(record, plan, foreign)) is not None:
            file = directory.record_file(record.rank, record.cycle, record.attempt)
            raise ResultsError(f"{file} {why}.")
    for cycle, of_cycle in by_cycle.items():
        rows = [row.request for part in of_cycle for row in part.requests]
        if len(rows) != len(set(rows)):
            raise ResultsError(
                f"{directory.id} contains prompt {max(rows, key=rows.count)} of cycle {cycle} more than once."
            )


def _unfit(record: ProcessRecord, plan: PlanExcerpt, foreign: bool) -> str | None:
    """Return why a record cannot belong to the plan, or None if it can; a `foreign` one may differ in configuration."""
    if record.experiment_id != plan.experiment_id:
        return f"belongs to another experiment, {record.experiment_id}"
    if plan.config_sha256 and not foreign and record.config_sha256 not in ("", plan.config_sha256):
        return "was measured with a configuration other than the one in spec.json"
    if record.world_size != plan.processes:
        return f"was written by one of {record.world_size} processes, but the plan has {plan.processes}"
    for phase in record.phases:
        if not 0 <= phase.duration_s < math.inf:
            return f"says that the phase {phase.name} lasted {phase.duration_s:g} s: the file was edited or is damaged"
    return None


def _check_complete(directory: ExperimentDir, plan: PlanExcerpt, by_cycle: Mapping[int, Sequence[Part]]) -> None:
    """If processes or prompts are missing in any cycle, raise an error that lists them."""
    missing = []
    for cycle in range(1, plan.experiment.cycles + 1):
        ranks = set(range(plan.processes)) - {part.record.rank for part in by_cycle.get(cycle, ())}
        left = plan.prompts.count - sum(len(part.requests) for part in by_cycle.get(cycle, ()))
        if ranks:
            names = ", ".join(map(str, sorted(ranks)))
            lacking = f"rank {names}" if len(ranks) == 1 else f"ranks {names}"
            missing.append(f"no record from {lacking} (of {plan.processes} processes) in cycle {cycle}")
        elif left:
            verb = "has" if left == 1 else "have"
            missing.append(f"{left} of {plan.prompts.count} prompts in cycle {cycle} {verb} no result")
    if missing:
        raise ResultsError(
            f"{directory.id} is incomplete: {'; '.join(missing)}. Use --no-strict to aggregate what is there."
        )


def _check_together(directory: ExperimentDir, cycle: int, parts: Sequence[Part], strict: bool) -> list[CodedWarning]:
    """Return warnings about processes of a cycle that used different backends or did not run at the same time.

    With `strict`, raise `ResultsError` if processes did not run at the same time.
    """
    if len(parts) == 1:
        return []
    warnings = []
    backends = sorted({part.record.backend for part in parts if part.record.backend})
    if len(backends) > 1:
        warnings.append(warning("mixed_backends", f"the processes used the backends {' and '.join(backends)}."))
    for attempt in sorted({part.record.attempt for part in parts}):
        apart = _apart([part.record for part in parts if part.record.attempt == attempt])
        if apart is None:
            continue
        text = f"the windows of processes {apart[0]} and {apart[1]} in cycle {cycle} do not overlap in time"
        if strict:
            raise ResultsError(f"{directory.id}: {text}. Use --no-strict to accept the records, with a warning.")
        warnings.append(warning("ranks_apart", f"{text}."))
    return warnings


def _apart(records: Sequence[ProcessRecord]) -> tuple[int, int] | None:
    """Return the ranks of two processes whose windows do not overlap, or None if all windows overlap.

    An interrupted process was in its window until the interruption, even if its window was cut back to its last batch.
    Processes that were killed are ignored: their journals state when each of them reached its window, not when the
    windows of all processes opened.
    """
    windows = [
        (record.window_opened_unix_s, window.duration_s + ((record.cut and record.cut.lost_s) or 0.0), record.rank)
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
class Aggregated:
    """The outcome of aggregating an experiment, and a message for the user."""

    kind: Literal["written", "fresh", "skipped", "failed"]
    text: str


def aggregate(store: Store, directory: ExperimentDir, *, strict: bool = True, force: bool = False) -> ExperimentRow:
    """Write an experiment's rows to the tables, and return its row in the table `experiments`.

    Nothing is written if the row is already as new as the experiment's state, unless `force` is set.
    """
    tables, state = Tables(store), directory.state()
    with tables.locked():
        at = tables.location(directory.id)
        if at and SHARED_FILE.fullmatch(Path(at.file).stem) and at.file in (lacking := tables.lacking()):
            gone = f"{store.experiments_table / at.file} has rows that other tables lack; run lem aggregate --all."
            raise ResultsError(lacking[at.file] or gone)
        if at and not force and is_fresh(tables, directory.id, at, state):
            return tables.row(directory.id, at)
        found = measured(directory, strict=strict, state=state)
        new = NewRows({directory.id: at} if at else {})
        try:
            new.add([found])
        except OverflowError as error:
            raise ResultsError(_beyond(directory, error)) from None
        tables.write(new)
    row = rows_of(found).row
    if state.status == row.status == "completed":
        directory.mark_aggregated(state.now("aggregated"))
    return row


def aggregate_together(store: Store, directories: Sequence[ExperimentDir]) -> dict[str, ExperimentRow]:
    """Write the rows of experiments that have none yet, many experiments to a file; return the written rows by id.

    An experiment that already has a row, or whose files cannot be read, is left out.

    Raises:
        ResultsError: a file with the rows of several experiments cannot be read.
    """
    tables, rows = Tables(store), dict[str, ExperimentRow]()
    with tables.locked():
        locations = tables.locations()
        writer, outcomes = _Writer(store, locations), list[Aggregated]()
        for directory in directories:
            if directory.id in locations:
                continue
            state = directory.state()
            try:
                one = measured(directory, strict=False, state=state)
                rows[directory.id] = rows_of(one).row
            except (ResultsError, OverflowError):
                rows.pop(directory.id, None)
                continue
            outcomes += writer.add(directory, state, one)
        outcomes += writer.write()
    written = {each.text.partition(":")[0] for each in outcomes if each.kind == "written"}
    return {name: row for name, row in rows.items() if name in written}


def aggregate_all(
    store: Store, ids: Sequence[str], *, strict: bool = True, force: bool = False, mixed: bool = False
) -> Iterator[Aggregated]:
    """Write rows that are missing or older than their experiment's state, and yield the outcome of each experiment.

    An experiment that cannot be aggregated does not stop the others. Running experiments are skipped.

    Args:
        store: the results directory.
        ids: the experiments to aggregate.
        strict: report an experiment as failed if anything is missing, or if processes did not run at the same time.
        force: also rebuild rows that already exist.
        mixed: accept records from different backends.
    """
    tables = Tables(store)
    with tables.locked():
        locations, lacking = tables.locations(), tables.lacking()
        damaged = {file: text for file, text in lacking.items() if text is not None}
        files = {locations[name].file for name in ids if name in locations}
        yield from [Aggregated("failed", damaged[file]) for file in sorted(files & damaged.keys())]
        writer = _Writer(store, locations)
        for name in _with_neighbors(store, ids, locations, files & (lacking.keys() - damaged.keys())):
            at = locations.get(name)
            if at and at.file in damaged:
                continue
            directory = store.directory(name)
            state = directory.state()
            is_new = force or at is None or at.file in lacking
            if skipped := _reason_to_skip(tables, directory, state, None if is_new else at):
                yield skipped
                continue
            try:
                one = measured(directory, strict=strict, mixed=mixed, state=state)
            except ResultsError as error:
                yield Aggregated("failed", str(error))
            else:
                yield from writer.add(directory, state, one)
        yield from writer.write()


def catch_up(store: Store, ids: Sequence[str] = ()) -> list[str]:
    """Write rows that a run did not write after its measurements because it was killed or the disk was full.

    This is cheap even if many experiments exist: it looks only at `ids` and at experiments marked as unfinished.

    Args:
        store: the results directory.
        ids: completed experiments that should have rows, even if they are not marked as unfinished.

    Returns:
        A message for each failure to write rows.
    """
    ended = {name: state.status for name in store.marked() if (state := _ended(store.directory(name)))}
    if not ended and not ids:
        return []
    tables = Tables(store)
    try:
        there = tables.locations()
        # A failed experiment stays marked, to be resumed; its row, if there is one, is left as it is.
        lacking = [name for name, status in ended.items() if status != "failed" or name not in there]
        wanted = dict.fromkeys([*ids, *lacking])
        found = list(aggregate_all(store, list(wanted), strict=False)) if wanted else []
        there = tables.locations()
        for name in lacking:
            directory = store.directory(name)
            if name in there and not directory.plan().unfinished_cycles(directory.finished()):
                store.mark_finished(name)
    except OSError as error:
        reason = error.strerror or error
        return [f"The tables in {store.root} lack rows of some experiments, but cannot be written ({reason})."]
    except ResultsError as error:
        return [str(error)]
    return [one.text for one in found if one.kind == "failed"]


def _ended(directory: ExperimentDir) -> State | None:
    """Return the state of an experiment that has completed or failed; None otherwise, or while a process holds it."""
    state = directory.state()
    return state if state.status in (*FINISHED, "failed") and not directory.is_held() else None


def _with_neighbors(
    store: Store, ids: Sequence[str], locations: Mapping[str, RowLocation], lacking: Set[str]
) -> Sequence[str]:
    """Return the ids, plus the ids of all experiments whose rows are in one of the files in `lacking`."""
    if not lacking:
        return ids
    there, known = set(store.ids()), set(ids)
    return [*ids, *(name for name, at in locations.items() if at.file in lacking and name in there - known)]


class _Writer:
    """Writes the rows of several experiments, then marks their directories as aggregated.

    Records are converted to Arrow tables in small groups, so that each group fits in the processor's cache. Many
    experiments share a file, because writing a file takes a few milliseconds.
    """

    def __init__(self, store: Store, locations: Mapping[str, RowLocation]) -> None:
        self._store, self._locations = store, locations
        self._read: list[tuple[ExperimentDir, State, Measured]] = []
        self._made: list[tuple[ExperimentDir, State, str]] = []
        self._failed: list[Aggregated] = []
        self._new = NewRows(locations)
        self._requests = self._cycles = 0

    def add(self, directory: ExperimentDir, state: State, one: Measured) -> list[Aggregated]:
        """Add an experiment; once there are enough to fill a file, write them and return their outcomes."""
        self._read.append((directory, state, one))
        self._requests += sum([len(cycle.requests) for cycle in one.cycles])
        self._cycles += len(one.cycles)
        if self._cycles >= READ_TOGETHER or self._requests >= REQUESTS_TOGETHER:
            self._make()
        return self.write() if len(self._made) >= WRITTEN_TOGETHER or self._requests >= REQUESTS_TOGETHER else []

    def _make(self) -> None:
        """Compute the rows of the experiments read so far."""
        try:
            self._add_rows(self._read)
        except OverflowError:  # a number is too large for its column, for example in a hand-edited file
            for one in self._read:  # one at a time, so that only the faulty experiment fails
                try:
                    self._add_rows([one])
                except OverflowError as error:
                    self._failed.append(Aggregated("failed", _beyond(one[0], error)))
        self._read, self._cycles = [], 0

    def _add_rows(self, read: Sequence[tuple[ExperimentDir, State, Measured]]) -> None:
        statuses = self._new.add([one for *_, one in read])
        self._made += [(directory, state, text) for (directory, state, _), text in zip(read, statuses, strict=True)]

    def write(self) -> list[Aggregated]:
        """Write the experiments added so far, and return the outcome of each."""
        self._make()
        failed, self._failed = self._failed, []
        if not self._made:
            return failed
        Tables(self._store).write(self._new)
        complete = [(at, state) for at, state, status in self._made if state.status == status == "completed"]
        _mark_aggregated(self._store, complete)
        written = [Aggregated("written", f"{directory.id}: {status}") for directory, _, status in self._made]
        self._new, self._made, self._requests = NewRows(self._locations), [], 0
        return [*failed, *written]


def _beyond(directory: ExperimentDir, error: OverflowError) -> str:
    return f"{directory.path} contains a number that is too large for the tables: {error}."


def _reason_to_skip(
    tables: Tables, directory: ExperimentDir, state: State, at: RowLocation | None
) -> Aggregated | None:
    """Return the outcome of an experiment that is skipped or has an up-to-date row; None if it is to be aggregated."""
    if state.status == "running":
        return Aggregated(
            "skipped", f"{directory.id} was skipped: it is running (process {state.pid} on {state.host})."
        )
    if state.pid is not None and directory.is_held():
        return Aggregated("skipped", f"{directory.id} was skipped: its processes have not exited yet.")
    if not state.attempt and not at:
        return Aggregated("skipped", f"{directory.id} was skipped: it has not been run.")
    if at and is_fresh(tables, directory.id, at, state):
        if state.status == "completed":
            directory.mark_aggregated(state.now("aggregated"))
        return Aggregated("fresh", f"{directory.id} already has an up-to-date row.")
    return None


def is_fresh(tables: Tables, experiment_id: str, at: RowLocation, state: State) -> bool:
    """Return whether an experiment's row covers its last attempt.

    A row that calls a completed experiment incomplete is outdated, because files were missing when the row was
    computed.
    """
    if state.status == "aggregated" or not state.attempt:
        return True
    if at.resumed is None:
        try:
            row = tables.row(experiment_id, at)
        except ResultsError:
            return False  # damaged or empty, so the row is computed from the records
        at = RowLocation(at.file, row.resumed, row.status)
    return at.resumed == state.attempt - 1 and not (state.status == "completed" and at.status != "completed")


def _mark_aggregated(store: Store, completed: Sequence[tuple[ExperimentDir, State]]) -> None:
    """Record that completed experiments have their rows.

    A single file is written and hard-linked into each experiment's directory, because writing thousands of files would
    take longer than the rest of the aggregation.
    """
    for attempt in sorted({state.attempt for _, state in completed}):
        source = store.root / "raw" / f".aggregated_a{attempt}"
        write_atomically(source, to_json(State("aggregated", attempt, timestamp())))
        for directory, state in completed:
            if state.attempt == attempt:
                directory.link_aggregated(source)
        source.unlink()
