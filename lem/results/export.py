"""`lem results export`: the tables as CSV, JSON or Parquet, with units.

CSV cannot hold units or lists, so the units are written to a separate file, `FILE.units.json`, and a list is written as
JSON. A null becomes an empty field, and an empty string becomes `""`. In JSON, numbers that are not finite become the
strings "NaN", "Infinity" and "-Infinity". The rows are exported as they are in the tables; this module does not compute
any number. `lem.results.foreign` converts rows to the formats of other projects.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

from lem import __version__
from lem.errors import ResultsError, did_you_mean
from lem.quantities import one_line, printable
from lem.results import foreign, parquet
from lem.results.aggregate import catch_up
from lem.results.browse import Listed, Selection
from lem.results.files import needs_space, replacing, write_atomically
from lem.results.schema import ExperimentRow
from lem.results.show import console
from lem.results.store import ID, Store, age, one_of
from lem.results.tables import KINDS, Tables, read_file

FORMATS = ("csv", "json", "parquet", *foreign.SHAPES)
# Formats that can be written only to a file, because their readers need random access.
FILE_ONLY = ("parquet", "mlenergy")
FORMAT_VERSION = 1
# The number of rows that are converted at a time.
BATCH = 1_000


# ------------------------------------------------------------------ which rows
def chosen_ids(store: Store, selection: Selection, texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the ids of the selected experiments in order, and a message for each file that could not be read.

    Args:
        store: the results directory.
        selection: the filters and the order.
        texts: ids or beginnings of ids; if there are none, the selection is made from all experiments.

    Raises:
        ResultsError: no experiment has a row, or a text names no experiment that has a row.
    """
    more = [*([selection.sort] if selection.sort else []), "campaign"]
    names = dict.fromkeys(("experiment_id", "status", "model", "backend", "dataset", *more))
    rows, damaged = Tables(store).rows(list(names))
    if not rows and not damaged:
        raise ResultsError(f"No experiment in {store.root} has a row; lem aggregate --all writes the rows.")
    ids = [row.experiment_id for row in rows]
    wanted = {_with_row(store, text, ids) for text in texts} or set(ids)
    listed = [_listed(row) for row in sorted(rows, key=lambda row: age(row.experiment_id))]
    found = selection.of(one for one in listed if one.experiment_id in wanted)
    return [one.experiment_id for one in found], damaged


def _with_row(store: Store, text: str, ids: Sequence[str]) -> str:
    try:
        return one_of(text, ids, store.root)
    except ResultsError:
        if text and any(name.startswith(text) for name in store.ids()):
            name = store.find(text).id
            raise ResultsError(f"{name} has no row to export; lem aggregate {name} writes it.") from None
        raise


def _listed(row: ExperimentRow) -> Listed:
    return Listed(row.experiment_id, row.status, row.model, row.backend, row.dataset, row)


def tables_of(store: Store, table: str, ids: Sequence[str], damaged: list[str]) -> Iterator[Any]:
    """Yield the rows of experiments as Arrow tables with this version's columns.

    Rows of experiments and cycles are in the order of the ids. Rows of requests may be too many to be sorted in memory,
    so they are yielded file by file. Files that cannot be read are left out, and messages about them are added to
    `damaged`.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = pa.array(ids, pa.string())
    readable = _readable(store, table, wanted, damaged)
    if table == "requests":
        yield from readable
        return
    # In one piece, because Arrow would otherwise join the pieces for each batch.
    found = pa.concat_tables([parquet.schema(KINDS[table]).empty_table(), *readable]).combine_chunks()
    order = pc.array_sort_indices(pc.index_in(found["experiment_id"], wanted))  # keeps the order of cycles
    for start in range(0, len(order), BATCH):
        yield found.take(order[start : start + BATCH])


def _readable(store: Store, table: str, wanted: Any, damaged: list[str]) -> Iterator[Any]:
    import pyarrow.compute as pc

    ids = set(wanted.to_pylist())
    for file in Tables(store).files():
        if ID.fullmatch(file.stem) and file.stem not in ids:
            continue
        try:
            found = read_file(store.root / table / file.name)
        except ResultsError as error:
            if str(error) not in damaged:
                damaged.append(str(error))
            continue
        yield parquet.aligned(found.filter(pc.is_in(found["experiment_id"], wanted)), KINDS[table])


# ------------------------------------------------------------------ the command
def export(
    store: Store, selection: Selection, texts: Sequence[str], *, kind: str, table: str, output: Path | None, force: bool
) -> int:
    """Export the selected rows to a file or to stdout; return 1 if a file of the tables could not be read, else 0.

    Raises:
        ResultsError: an option is invalid, no experiment has a row, or the file cannot be written.
    """
    for flag, value, known in (("--format", kind, FORMATS), ("--table", table, (*reversed(KINDS),))):
        if value not in known:
            raise ResultsError(f"{flag}: '{value}' is not one of {', '.join(known)}.{did_you_mean(value, known)}")
    if table != "experiments" and kind in foreign.SHAPES:
        raise ResultsError(f"--table {table}: the format {kind} has one row for each experiment; leave --table out.")
    if output is None and kind in FILE_ONLY:
        raise ResultsError(f"--format {kind} needs a file: add --output FILE.")
    sidecar = output.with_name(f"{output.name}.units.json") if output and kind == "csv" else None
    for file in filter(None, (output, sidecar)):
        check_output(file, force=force)
    late = catch_up(store)
    ids, damaged = chosen_ids(store, selection, texts)
    with _sink(output) as sink:
        count = _write(sink, kind, table, tables_of(store, table, ids, damaged))
    if sidecar:
        write_atomically(sidecar, json.dumps(envelope(table), indent=2, ensure_ascii=False) + "\n")
    _report(late, damaged, len(ids), count, kind, output)
    return 1 if damaged else 0


def check_output(file: Path, *, force: bool) -> None:
    """Raise `ResultsError` if a path exists and is not a plain file, or is a plain file and `force` is not set."""
    if file.is_dir():
        raise ResultsError(f"--output: {file} is a directory; give the name of a file.")
    if file.exists() and not file.is_file():
        raise ResultsError(f"--output: {file} is not a plain file; leave --output out to write to standard output.")
    if file.exists() and not force:
        raise ResultsError(f"{file} already exists; use --force to replace it.")


def _report(late: Sequence[str], damaged: Sequence[str], ids: int, count: int, kind: str, output: Path | None) -> None:
    error = console(stderr=True)
    for text in damaged:
        error.print(one_line(text), markup=False, style="red")
    for text in late:
        error.print(f"Warning: {one_line(text)}", markup=False, style="yellow")
    if not ids:
        error.print("Warning: no experiment matches, so the export has no rows.", markup=False, style="yellow")
    if kind in foreign.SHAPES and count:
        error.print(f"Warning: {foreign.LABEL}", markup=False, style="yellow")
    if output:
        print(one_line(f"{output}: {count} row{'' if count == 1 else 's'} of {ids} experiment{'s' * (ids != 1)}"))


class _Terminal:
    """Prints bytes as text; control characters are escaped, because a terminal would obey them."""

    def write(self, data: Any) -> int:
        sys.stdout.write(printable(bytes(data).decode()))
        return len(data)

    def flush(self) -> None:
        sys.stdout.flush()

    closed = False


@contextmanager
def _sink(output: Path | None) -> Iterator[IO[bytes]]:
    """Yield a binary stream to a file, which appears only when it is complete, or to stdout."""
    if output is None:
        sys.stdout.flush()
        stream: Any = _Terminal() if sys.stdout.isatty() else sys.stdout.buffer
        yield stream
        stream.flush()
        return
    try:
        with needs_space(output.parent), replacing(output) as scratch, scratch.open("wb") as file:
            yield file
    except OSError as error:
        raise ResultsError(f"{output} cannot be written: {error.strerror or error}.") from None


def _write(sink: IO[bytes], kind: str, table: str, tables: Iterator[Any]) -> int:
    """Write Arrow tables in the given format; return the number of rows."""
    writer: Writer
    if kind == "csv":
        writer = _Csv(sink, table)
    elif kind == "json":
        writer = _Json(sink, table)
    elif kind == "parquet":
        writer = _Parquet(sink, table)
    else:
        writer = foreign.writer(kind, sink)
    count = 0
    for each in tables:
        count += len(each)
        for start in range(0, len(each), BATCH):
            writer.write(each.slice(start, BATCH))
    writer.close()
    return count


# ------------------------------------------------------------------ the formats
class Writer(Protocol):
    """Writes Arrow tables to a stream in one format."""

    def write(self, rows: Any) -> None:
        """Write the rows of an Arrow table."""

    def close(self) -> None:
        """Write what the format requires at the end; the stream stays open."""


class _Csv:
    """Writes CSV with Arrow: strings are always quoted, numbers keep all their digits, and a null is an empty field."""

    def __init__(self, sink: IO[bytes], table: str) -> None:
        import pyarrow as pa
        from pyarrow import csv

        self._schema = pa.schema(
            [pa.field(f.name, pa.string() if pa.types.is_list(f.type) else f.type) for f in _schema(table)]
        )
        self._writer = csv.CSVWriter(pa.PythonFile(sink, "w"), self._schema)

    def write(self, rows: Any) -> None:
        import pyarrow as pa

        arrays = [
            _as_texts(column) if pa.types.is_list(column.type) else column.combine_chunks() for column in rows.columns
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _as_texts(column: Any) -> Any:
    """Return a column of lists as a column of strings, each a list in JSON."""
    import pyarrow as pa

    return pa.array([None if value is None else as_json(value) for value in column.to_pylist()], pa.string())


class _Json:
    """Writes a JSON object that describes the columns and has, under `rows`, each row as an object on its own line."""

    def __init__(self, sink: IO[bytes], table: str) -> None:
        self._sink = sink
        head = json.dumps(envelope(table), indent=2, ensure_ascii=False)
        sink.write(f'{head.removesuffix("}").rstrip()},\n  "rows": ['.encode())
        self._separator = "\n    "

    def write(self, rows: Any) -> None:
        for row in rows.to_pylist():
            self._sink.write(f"{self._separator}{as_json(row)}".encode())
            self._separator = ",\n    "

    def close(self) -> None:
        self._sink.write(b"\n  ]\n}\n")


class _Parquet:
    """Writes one Parquet file with each column's unit and description in the field's metadata, as in the tables."""

    def __init__(self, sink: IO[bytes], table: str) -> None:
        import pyarrow.parquet as pq

        self._writer = pq.ParquetWriter(sink, _schema(table), compression="zstd")

    def write(self, rows: Any) -> None:
        self._writer.write_table(rows)

    def close(self) -> None:
        self._writer.close()


def _schema(table: str) -> Any:
    return parquet.schema(KINDS[table])


def envelope(table: str) -> dict[str, Any]:
    """Return an export's description of itself: its table, and the type, unit and meaning of each column."""
    columns = {
        column.name: {"type": str(field.type), "unit": column.unit, "description": column.description}
        for column, field in zip(parquet.columns(KINDS[table]), _schema(table), strict=True)
    }
    about = {"format": "lem-export", "format_version": FORMAT_VERSION, "lem_version": __version__, "table": table}
    return about | {"columns": columns}


def as_json(value: Any) -> str:
    """Return plain data as JSON on one line; numbers that are not finite become strings."""
    with suppress(ValueError):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return json.dumps(_with_texts(value), ensure_ascii=False)


def _with_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_texts(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_texts(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
