"""The three tables of a results directory: finds the file with an experiment's rows, and changes rows safely.

A table is a folder of Parquet files. A file contains the rows of one experiment, `<id>.parquet`, or of several that
were aggregated together, `<first>-<last>-<digest>.parquet`; files with the same name in requests/, cycles/ and
experiments/ contain the same experiments. The three files are written in this order, each atomically. A file without a
counterpart in experiments/ does not count, and the next writer removes it, so no row is lost or duplicated, no matter
when a writer is killed. This module knows rows, but not how they are computed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.errors import ResultsError
from lem.record import RequestRecord, Status
from lem.results import parquet
from lem.results.rows import Measured, tabulate
from lem.results.schema import CycleRow, ExperimentRow
from lem.results.store import ID, Store

SHARED_FILE = re.compile(rf"{ID.pattern}-{ID.pattern}-[0-9a-f]{{8}}")
SCRATCH = re.compile(r"\..*\.parquet-\w+")
# The tables by their folders, in the order in which they are written.
KINDS: dict[str, type[Any]] = {"requests": RequestRecord, "cycles": CycleRow, "experiments": ExperimentRow}


@dataclass(frozen=True)
class RowLocation:
    """The file with an experiment's row; `resumed` and `status` come from the row (None if the row was not read)."""

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
        """Hold the write lock; the kernel releases it when the process ends, even if the process is killed."""
        self._store.root.mkdir(parents=True, exist_ok=True)
        with (self._store.root / ".tables.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    # -------------------------------------------------------------- locations
    def location(self, experiment_id: str) -> RowLocation | None:
        """Return the location of an experiment's row, or None if it has none."""
        if (self._folder / f"{experiment_id}.parquet").is_file():
            return RowLocation(f"{experiment_id}.parquet")
        return self.locations(alone=False).get(experiment_id)

    def locations(self, *, alone: bool = True) -> dict[str, RowLocation]:
        """Return the locations of all experiments' rows or, if `alone` is false, only of rows in shared files.

        Raises:
            ResultsError: a file with the rows of several experiments cannot be read.
        """
        found = {}
        for file in self.files():
            if ID.fullmatch(file.stem):
                if alone:
                    found[file.stem] = RowLocation(file.name)
                continue
            some = read_file(file, ["experiment_id", "resumed", "status"])
            for name, resumed, status in zip(*(column.to_pylist() for column in some.columns), strict=True):
                if ID.fullmatch(name):  # so that a crafted name cannot point elsewhere
                    found[name] = RowLocation(file.name, resumed, status)
        return found

    def lacking(self) -> dict[str, str | None]:
        """Return the files whose counterpart in another table is missing or damaged.

        The value of each file is a message about the damage, or None if the counterpart is missing. Files of single
        experiments are not checked for damage, because there may be thousands of them.
        """
        files = self.files()
        found: dict[str, str | None] = {}
        for folder in (self._store.requests_table, self._store.cycles_table):
            there = set(os.listdir(folder)) if folder.is_dir() else set()
            for file in files:
                if file.name not in there:
                    found.setdefault(file.name, None)
                elif SHARED_FILE.fullmatch(file.stem):
                    try:
                        parquet.check(folder / file.name)
                    except (OSError, ValueError) as error:
                        found[file.name] = _damage(folder / file.name, error)
        return found

    def files(self) -> list[Path]:
        """Return the files of the experiments table; the other tables' files have the same names."""
        return [file for file in _parquet_files(self._folder) if _is_ours(file)]

    def strangers(self) -> list[str]:
        """Return a message about each Parquet file in the tables' folders that does not belong there."""
        folders = [self._store.root / name for name in KINDS]
        return [
            f"{file} is not part of this table, but pandas and DuckDB would read it too; move it elsewhere."
            for folder in folders
            for file in _parquet_files(folder)
            if not _is_ours(file)
        ]

    # -------------------------------------------------------------- reading
    def row(self, experiment_id: str, at: RowLocation) -> ExperimentRow:
        """Return an experiment's row; raises `ResultsError` if its file is missing or damaged."""
        rows: list[ExperimentRow] = self._of("experiments", experiment_id, at)
        if not rows:
            raise ResultsError(f"{self._folder / at.file} is empty; {_remedy(Path(at.file))}")
        return rows[0]

    def cycles(self, experiment_id: str, at: RowLocation) -> list[CycleRow]:
        """Return the rows of an experiment's cycles; raises `ResultsError` if their file is missing or damaged."""
        return self._of("cycles", experiment_id, at)

    def _of(self, name: str, experiment_id: str, at: RowLocation) -> list[Any]:
        found = read_file(self._store.root / name / at.file)
        ids = found["experiment_id"].to_pylist()
        if experiment_id not in ids:
            return []
        # Not a filter: importing pyarrow's compute functions takes longer than reading a thousand rows.
        first, last = ids.index(experiment_id), len(ids) - ids[::-1].index(experiment_id)
        rows = parquet.records(found.slice(first, last - first), KINDS[name])
        return [row for row in rows if row.experiment_id == experiment_id]

    def rows(self, names: Sequence[str] | None = None) -> tuple[list[ExperimentRow], list[str]]:
        """Return the rows of all experiments, and a message about each damaged file.

        Args:
            names: the columns to read; None reads all.
        """
        rows: list[ExperimentRow] = []
        damaged = []
        for file in self.files():
            try:
                found = parquet.records(read_file(file, names), ExperimentRow, names)
                _check_ids(file, found)
            except ResultsError as error:
                damaged.append(str(error))
                continue
            rows += found
            if not found and ID.fullmatch(file.stem):
                damaged.append(f"{file} is empty; {_remedy(file)}")
        return rows, damaged

    def whole(self, name: str) -> Any:
        """Return a whole table as an Arrow table; raises `ResultsError` if one of its files is missing or damaged."""
        return parquet.together([read_file(self._store.root / name / f.name) for f in self.files()], KINDS[name])

    # -------------------------------------------------------------- writing
    def write(self, new: NewRows) -> None:
        """Write rows; the caller must hold the lock (see `locked`)."""
        self._sweep()
        for file, together in new.by_file().items():
            ids = [experiment_id for each in together for experiment_id in _ids(each)]
            for name, record_type in KINDS.items():
                _replace(self._store.root / name / file, record_type, ids, [each[name] for each in together])

    def add(self, file: str, rows: ArrowTables) -> None:
        """Write rows of experiments that have no rows yet, to a new file; the caller must hold the lock."""
        self._sweep()
        for name in KINDS:
            parquet.write_table(self._store.root / name / file, rows[name])

    def remove(self, ids: Sequence[str]) -> None:
        """Remove the rows of experiments; the caller must hold the lock (see `locked`).

        An experiment's rows count only if the table `experiments` has a row for it. If all rows of a file are to be
        removed, the file in `experiments` is therefore removed first. Otherwise, the file in `experiments` is rewritten
        last, so that after an interruption, the next call still finds the rows to remove.
        """
        self._sweep()
        locations = self.locations()
        by_file: dict[str, list[str]] = {}
        for experiment_id in ids:
            if at := locations.get(experiment_id):
                by_file.setdefault(at.file, []).append(experiment_id)
        in_file = Counter(at.file for at in locations.values())
        for file, some in by_file.items():
            if len(some) == in_file[file]:
                for name in reversed(KINDS):
                    (self._store.root / name / file).unlink(missing_ok=True)
                continue
            for name, record_type in KINDS.items():
                if (self._store.root / name / file).is_file():
                    _replace(self._store.root / name / file, record_type, some, [])

    def _sweep(self) -> None:
        """Remove files left behind by a killed writer."""
        valid = {file.name for file in self.files()}
        for folder in (self._store.root / name for name in KINDS):
            for file in folder.iterdir() if folder.is_dir() else ():
                ours = ID.fullmatch(file.stem) or SHARED_FILE.fullmatch(file.stem)
                if SCRATCH.fullmatch(file.name) or (ours and file.suffix == ".parquet" and file.name not in valid):
                    file.unlink()


def _parquet_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    entries = (e for e in os.scandir(folder) if e.name.endswith(".parquet") and not e.name.startswith("."))
    # A pipe would block the read.
    return sorted(folder / entry.name for entry in entries if entry.is_file())


def _is_ours(file: Path) -> bool:
    return bool(ID.fullmatch(file.stem) or SHARED_FILE.fullmatch(file.stem))


# The rows of some experiments as Arrow tables, keyed by the names of the tables.
ArrowTables = dict[str, Any]


class NewRows:
    """Rows waiting to be written, as Arrow tables, which take a tenth of the memory of the original data.

    Args:
        locations: the locations of the experiments' previous rows, which the new rows replace; the rows of experiments
            without a location go into one new file.
    """

    def __init__(self, locations: Mapping[str, RowLocation]) -> None:
        self._locations = locations
        self._held: dict[str | None, list[ArrowTables]] = {}

    def add(self, measured: Sequence[Measured]) -> list[Status]:
        """Add the rows of experiments, and return their statuses.

        Raises:
            OverflowError: a number is too large for its column; none of the rows are added.
        """
        statuses: dict[str, Status] = {}
        by_file: dict[str | None, list[Measured]] = {}
        for one in measured:
            at = self._locations.get(one.plan.experiment_id)
            by_file.setdefault(at.file if at else None, []).append(one)
        made = {file: _arrow_tables(together) for file, together in by_file.items()}
        for file, tables in made.items():  # add all rows or none
            self._held.setdefault(file, []).append(tables)
            statuses |= zip(_ids(tables), tables["experiments"]["status"].to_pylist(), strict=True)
        return [statuses[one.plan.experiment_id] for one in measured]

    def by_file(self) -> dict[str, list[ArrowTables]]:
        """Return the rows, keyed by the names of their files."""
        new = file_name([name for tables in self._held.get(None, ()) for name in _ids(tables)])
        return {file or new: tables for file, tables in self._held.items()}


def _arrow_tables(measured: Sequence[Measured]) -> ArrowTables:
    rows = tabulate(measured)
    return {
        "requests": parquet.table(RequestRecord, rows.requests),
        "cycles": parquet.table_of(CycleRow, rows.cycles),
        "experiments": parquet.table_of(ExperimentRow, rows.experiments),
    }


def _ids(tables: ArrowTables) -> list[str]:
    ids: list[str] = tables["experiments"]["experiment_id"].to_pylist()
    return ids


def file_name(ids: Sequence[str]) -> str:
    """Return the name of a file with the rows of these experiments."""
    if len(ids) < 2:
        return f"{''.join(ids)}.parquet"
    return f"{ids[0]}-{ids[-1]}-{hashlib.sha256(' '.join(ids).encode()).hexdigest()[:8]}.parquet"


def _replace(file: Path, record_type: type[Any], ids: Sequence[str], rows: Sequence[Any]) -> None:
    """Replace the rows of some experiments in a file; keep the file's other rows."""
    import pyarrow as pa

    if SHARED_FILE.fullmatch(file.stem) and file.is_file():
        import pyarrow.compute as pc

        before = read_file(file)
        with parquet.without_pandas():
            others = before.filter(pc.invert(pc.is_in(before["experiment_id"], pa.array(ids))))
        rows = [parquet.aligned(others, record_type), *rows]
    parquet.write_table(file, pa.concat_tables(rows).combine_chunks())


def read_file(file: Path, names: Sequence[str] | None = None) -> Any:
    """Read a Parquet file as an Arrow table; raises `ResultsError` if it is missing or damaged."""
    try:
        return parquet.read_table(file, names)
    except FileNotFoundError:
        raise ResultsError(f"{file} is missing; run lem aggregate --all to rebuild it.") from None
    except (OSError, ValueError) as error:
        raise ResultsError(_damage(file, error)) from None


def _check_ids(file: Path, rows: Sequence[ExperimentRow]) -> None:
    for row in rows:
        if not ID.fullmatch(row.experiment_id):
            what = f"{file} has a row for {row.experiment_id!r}, which is not a valid experiment id"
            raise ResultsError(f"{what}; {_remedy(file)}")


def _damage(file: Path, error: Exception) -> str:
    return f"{file} cannot be read ({' '.join(str(error).split())[:200]}); {_remedy(file)}"


def _remedy(file: Path) -> str:
    if ID.fullmatch(file.stem):
        return f"run lem aggregate {file.stem} --force to rebuild it."
    return "remove the file, then run lem aggregate --all to rebuild its rows."
