"""The three tables of a results directory: which file holds an experiment's rows, and changing them safely.

A table is a folder of Parquet files. A file holds the rows of one experiment, `<id>.parquet`, or of several that were
aggregated together, `<first>-<last>-<digest>.parquet`; files of one name in requests/, cycles/ and experiments/ hold
the same experiments. They are written in this order, each at once: what has no file in experiments/ counts for
nothing, and the next writer removes it. So no row is lost or there twice, wherever a writer is killed. Knows rows, not
how they came about.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.errors import ResultsError
from lem.record import RequestRecord, Status
from lem.results import parquet
from lem.results.rows import Measured, Tabulated, tabulate
from lem.results.schema import CycleRow, ExperimentRow
from lem.results.store import ID, Store

TOGETHER = re.compile(rf"{ID.pattern}-{ID.pattern}-[0-9a-f]{{8}}")
SCRATCH = re.compile(r"\..*\.parquet-\w+")


@dataclass(frozen=True)
class Place:
    """Where an experiment's row lies; the other two are the row's, None where the file has not been read."""

    file: str
    resumed: int | None = None
    status: str | None = None


class Tables:
    """The tables of one results directory."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.experiments_table

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only one who writes; the kernel lets go when the process ends, however it ends."""
        self._store.root.mkdir(parents=True, exist_ok=True)
        with (self._store.root / ".tables.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    # -------------------------------------------------------------- where
    def place(self, experiment_id: str) -> Place | None:
        """Return where an experiment's row lies, or None when it has none."""
        if (self._folder / f"{experiment_id}.parquet").is_file():
            return Place(f"{experiment_id}.parquet")
        return self.places(alone=False).get(experiment_id)

    def places(self, *, alone: bool = True) -> dict[str, Place]:
        """Return where the rows of all experiments lie, or `alone` left out of those that share a file.

        Raises:
            ResultsError: a file of several experiments cannot be read.
        """
        found = {}
        for file in self._files():
            if ID.fullmatch(file.stem):
                if alone:
                    found[file.stem] = Place(file.name)
                continue
            some = _read(file, ["experiment_id", "resumed", "status"])
            for name, resumed, status in zip(*(column.to_pylist() for column in some.columns), strict=True):
                found[name] = Place(file.name, resumed, status)
        return found

    def lacking(self) -> dict[str, str | None]:
        """Return the files of experiments whose other rows are gone or damaged, with a sentence about the damage.

        Of the files of single experiments it is not looked whether they are damaged: there may be thousands.
        """
        files = self._files()
        found: dict[str, str | None] = {}
        for folder in (self._store.requests_table, self._store.cycles_table):
            there = set(os.listdir(folder)) if folder.is_dir() else set()
            for file in files:
                if file.name not in there:
                    found.setdefault(file.name, None)
            for name in (f.name for f in files if f.name in there and TOGETHER.fullmatch(f.stem)):
                try:
                    parquet.check(folder / name)
                except (OSError, ValueError) as error:
                    found[name] = _damage(folder / name, error)
        return found

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[!.]*.parquet")) if self._folder.is_dir() else []

    # -------------------------------------------------------------- reading
    def row(self, experiment_id: str, place: Place) -> ExperimentRow:
        """Return an experiment's row; raises `ResultsError` when its file is damaged."""
        rows: list[ExperimentRow] = self._of(self._folder / place.file, ExperimentRow, experiment_id)
        if not rows:
            raise ResultsError(f"{self._folder / place.file} is empty; {_remedy(Path(place.file))}")
        return rows[0]

    def cycles(self, experiment_id: str, place: Place) -> list[CycleRow]:
        """Return the rows of an experiment's cycles; raises `ResultsError` when their file is damaged."""
        return self._of(self._store.cycles_table / place.file, CycleRow, experiment_id)

    def _of(self, file: Path, record_type: type[Any], experiment_id: str) -> list[Any]:
        import pyarrow.compute as pc

        found = _read(file)
        return parquet.records(found.filter(pc.equal(found["experiment_id"], experiment_id)), record_type)

    def rows(self, names: Sequence[str] | None = None) -> tuple[list[ExperimentRow], list[str]]:
        """Return the rows of all experiments; a damaged file is a sentence and hides nothing else.

        Args:
            names: the only columns that are needed; the rows have no others.
        """
        rows: list[ExperimentRow] = []
        damaged = []
        for file in self._files():
            try:
                rows += parquet.records(_read(file, names), ExperimentRow, names)
            except ResultsError as error:
                damaged.append(str(error))
        return rows, damaged

    # -------------------------------------------------------------- writing
    def write(self, batch: Batch) -> None:
        """Write a batch of rows; only for who has them `locked`."""
        self._sweep()
        for name, together in batch.by_file().items():
            ids = [experiment_id for each in together for experiment_id in each.ids]
            for folder, record_type, part in (
                (self._store.requests_table, RequestRecord, "requests"),
                (self._store.cycles_table, CycleRow, "cycles"),
                (self._folder, ExperimentRow, "experiments"),
            ):
                _replace(folder / name, record_type, ids, [getattr(each, part) for each in together])

    def _sweep(self) -> None:
        """Remove what a writer has left that was killed."""
        valid = {file.name for file in self._files()}
        for folder in (self._store.requests_table, self._store.cycles_table, self._folder):
            for file in folder.iterdir() if folder.is_dir() else ():
                ours = ID.fullmatch(file.stem) or TOGETHER.fullmatch(file.stem)
                if SCRATCH.fullmatch(file.name) or (ours and file.suffix == ".parquet" and file.name not in valid):
                    file.unlink()


class Batch:
    """Rows on their way into the tables, as Arrow tables: these take a tenth of the memory of what they are made from.

    Args:
        places: where the former rows of experiments lie, which are replaced; the others share a new file.
    """

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = places
        self._held: dict[str | None, list[_Made]] = {}

    def add(self, measured: Sequence[Measured]) -> list[Status]:
        """Add the rows of experiments, and return their statuses.

        Raises:
            OverflowError: a number that no column holds; then none of them is added.
        """
        statuses: dict[str, Status] = {}
        by_file: dict[str | None, list[Measured]] = {}
        for one in measured:
            place = self._places.get(one.plan.experiment_id)
            by_file.setdefault(place.file if place else None, []).append(one)
        made = {name: _tables_of(tabulate(together)) for name, together in by_file.items()}
        for name, tables in made.items():  # all of them or none
            self._held.setdefault(name, []).append(tables)
            statuses |= zip(tables.ids, tables.experiments["status"].to_pylist(), strict=True)
        return [statuses[one.plan.experiment_id] for one in measured]

    def by_file(self) -> dict[str, list[_Made]]:
        """Return the rows by the name of the files that they belong into."""
        new = _name([name for made in self._held.get(None, ()) for name in made.ids])
        return {name or new: made for name, made in self._held.items()}


@dataclass(frozen=True)
class _Made:
    """The rows of some experiments, as Arrow tables."""

    ids: Sequence[str]
    experiments: Any
    cycles: Any
    requests: Any


def _tables_of(rows: Tabulated) -> _Made:
    return _Made(
        rows.experiments["experiment_id"],
        parquet.table_of(ExperimentRow, rows.experiments),
        parquet.table_of(CycleRow, rows.cycles),
        parquet.table_of(RequestRecord, rows.requests),
    )


def _name(ids: Sequence[str]) -> str:
    if len(ids) < 2:
        return f"{''.join(ids)}.parquet"
    return f"{ids[0]}-{ids[-1]}-{hashlib.sha256(' '.join(ids).encode()).hexdigest()[:8]}.parquet"


def _replace(file: Path, record_type: type[Any], ids: Sequence[str], rows: Sequence[Any]) -> None:
    """Put rows in the place of those of the same experiments; what else the file holds stays."""
    import pyarrow as pa

    if TOGETHER.fullmatch(file.stem) and file.is_file():
        import pyarrow.compute as pc

        before = _read(file)
        others = before.filter(pc.invert(pc.is_in(before["experiment_id"], pa.array(ids))))
        rows = [parquet.aligned(others, record_type), *rows]
    parquet.write_table(file, pa.concat_tables(rows).combine_chunks())


def _read(file: Path, names: Sequence[str] | None = None) -> Any:
    try:
        return parquet.read_table(file, names)
    except FileNotFoundError:
        raise ResultsError(f"{file} is missing; lem aggregate --all makes it anew.") from None
    except (OSError, ValueError) as error:
        raise ResultsError(_damage(file, error)) from None


def _damage(file: Path, error: Exception) -> str:
    return f"{file} cannot be read ({' '.join(str(error).split())[:200]}); {_remedy(file)}"


def _remedy(file: Path) -> str:
    if ID.fullmatch(file.stem):
        return f"lem aggregate {file.stem} --force makes it anew."
    return "remove it, and lem aggregate --all makes its rows anew."
