"""Turns record types into Arrow schemas, and rows into Parquet files that carry each column's unit and meaning.

Each field's metadata has its unit under `unit` and its description under `description`. This module is not tied to any
record type.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from msgspec.structs import replace

from lem.quantities import Unit
from lem.results.files import replacing


@dataclass(frozen=True)
class Column:
    """A column as declared by the record type."""

    name: str
    python_type: type[Any]
    nullable: bool
    unit: str | None
    description: str | None


def names(record_type: type[Any]) -> list[str]:
    """Return the names of a record type's columns: its fields in order, except those that the type's `AFTER` moves."""
    after: Mapping[str, str] = getattr(record_type, "AFTER", {})
    found: list[str] = []
    place = 0
    for name in record_type.__struct_fields__:
        place = found.index(after[name]) + 1 if name in after else place
        found.insert(place, name)
        place += 1
    return found


# Cached, because evaluating the annotations takes milliseconds, and every file that is read needs the columns.
_COLUMNS: dict[type[Any], tuple[Column, ...]] = {}


def columns(record_type: type[Any]) -> tuple[Column, ...]:
    """Return the columns of a record type, in order."""
    if record_type not in _COLUMNS:
        hints, marked = get_type_hints(record_type), get_type_hints(record_type, include_extras=True)
        _COLUMNS[record_type] = tuple(_column(name, hints[name], marked[name]) for name in names(record_type))
    return _COLUMNS[record_type]


def _column(name: str, annotation: Any, marked: Any) -> Column:
    marks = get_args(marked)[1:] if get_origin(marked) is Annotated else ()
    unit = next((mark.symbol for mark in marks if isinstance(mark, Unit)), None)
    description = next((mark for mark in marks if isinstance(mark, str)), None)
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    real = [member for member in members if member is not type(None)]
    return Column(name, real[0], len(real) < len(members), unit, description)


def defaults(record_type: type[Any]) -> dict[str, Any]:
    """Return the default of each field that has one, except where it is an empty list."""
    values = reversed(record_type.__struct_defaults__)
    return {
        name: value
        for name, value in zip(reversed(record_type.__struct_fields__), values, strict=False)
        if value is None or isinstance(value, str | int | float)
    }


def _fillers(record_type: type[Any]) -> dict[str, Any]:
    """Return the value that fills each column missing from an older file: its default, null or an empty value."""
    empty = {str: "", int: 0, float: 0.0, bool: False, list[str]: [], list[float]: []}
    values = {c.name: None if c.nullable else empty[c.python_type] for c in columns(record_type)}
    return values | defaults(record_type)


# Cached, because building a schema takes a millisecond.
_SCHEMAS: dict[type[Any], Any] = {}


def schema(record_type: type[Any]) -> Any:
    """Return the Arrow schema of a record type."""
    if record_type not in _SCHEMAS:
        _SCHEMAS[record_type] = _schema(record_type)
    return _SCHEMAS[record_type]


def _schema(record_type: type[Any]) -> Any:
    import pyarrow as pa

    arrow = {
        str: pa.string(),
        bool: pa.bool_(),
        int: pa.int64(),
        float: pa.float64(),
        list[str]: pa.list_(pa.string()),
        list[float]: pa.list_(pa.float64()),
    }
    return pa.schema(
        [
            pa.field(c.name, arrow[c.python_type], nullable=c.nullable, metadata=_metadata(c))
            for c in columns(record_type)
        ]
    )


def _metadata(column: Column) -> dict[str, str] | None:
    pairs = {"unit": column.unit, "description": column.description}
    return {key: value for key, value in pairs.items() if value} or None


# ------------------------------------------------------------------ records as Arrow tables
def table(record_type: type[Any], rows: Iterable[Any]) -> Any:
    """Return records as an Arrow table."""
    listed = list(rows)
    return table_of(record_type, {name: list(map(attrgetter(name), listed)) for name in names(record_type)})


def table_of(record_type: type[Any], by_column: Mapping[str, Sequence[Any]]) -> Any:
    """Return columns of a record type as an Arrow table."""
    import pyarrow as pa

    wanted = schema(record_type)
    with without_pandas():
        arrays = [_array(by_column[f.name], f.type) for f in wanted]
    return pa.Table.from_arrays(arrays, schema=wanted)


def _array(values: Sequence[Any], arrow_type: Any) -> Any:
    import pyarrow as pa

    # Columns without any value, usually half of them, take a shortcut.
    if len(values) and values[0] is None and values.count(None) == len(values):
        return pa.nulls(len(values), arrow_type)
    return pa.array(values, arrow_type)


@contextmanager
def without_pandas() -> Iterator[None]:
    """Keep pyarrow from importing pandas, which pyarrow would otherwise do when it creates its first array.

    The import would cost every `lem experiment` and `lem aggregate` 0.25 s and 40 MB: a quarter of the time to
    aggregate 6,000 records. If a DataFrame is needed later, pyarrow still imports pandas.
    """
    sys.meta_path.insert(0, _NoPandas)
    try:
        yield
    finally:
        sys.meta_path.remove(_NoPandas)


class _NoPandas:
    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name=name)


def aligned(found: Any, record_type: type[Any], wanted_names: Sequence[str] | None = None) -> Any:
    """Return a table with this version's columns: missing ones are filled, and unknown ones are dropped.

    With `wanted_names`, only these columns are returned.
    """
    import pyarrow as pa

    wanted, fillers, there = schema(record_type), _fillers(record_type), set(found.column_names)
    if wanted_names is not None:
        wanted = pa.schema([wanted.field(name) for name in wanted_names])
    with without_pandas():
        arrays = [
            _cast(found[f.name], f.type) if f.name in there else _array([fillers[f.name]] * len(found), f.type)
            for f in wanted
        ]
    return pa.Table.from_arrays(arrays, schema=wanted)


def _cast(column: Any, arrow_type: Any) -> Any:
    # A cast makes pyarrow import its compute functions, even if the type is the same.
    return column if column.type == arrow_type else column.cast(arrow_type)


def together(tables: Iterable[Any], record_type: type[Any]) -> Any:
    """Combine tables of records, written by any version, into one with this version's columns."""
    import pyarrow as pa

    return pa.concat_tables([schema(record_type).empty_table(), *(aligned(each, record_type) for each in tables)])


def records(found: Any, record_type: type[Any], wanted_names: Sequence[str] | None = None) -> list[Any]:
    """Return an Arrow table as records; missing columns get their fill values."""
    read = wanted_names or names(record_type)
    empty = record_type(**_fillers(record_type))
    rows = zip(*(column.to_pylist() for column in aligned(found, record_type, read).columns), strict=True)
    return [replace(empty, **dict(zip(read, values, strict=True))) for values in rows]


# ------------------------------------------------------------------ Parquet files
def write_rows(path: Path, record_type: type[Any], rows: Iterable[Any]) -> None:
    """Write records as one Parquet file, completely or not at all."""
    write_table(path, table(record_type, rows))


def write_table(path: Path, rows: Any) -> None:
    """Write an Arrow table as one Parquet file, completely or not at all."""
    import pyarrow.parquet as pq

    # Numbers rarely repeat, so dictionary encoding would cost time and make the file larger.
    repeating = [f.name for f in rows.schema if f.type == "string"]
    with replacing(path) as scratch:
        pq.write_table(rows, scratch, compression="zstd", use_dictionary=repeating)


def read_table(path: Path, wanted_names: Sequence[str] | None = None) -> Any:
    """Read a Parquet file; with `wanted_names`, read only the columns in this list that the file has.

    Raises:
        ValueError, OSError: the file is damaged or cannot be read.
    """
    import pyarrow.parquet as pq

    with _opened(path) as file:
        return pq.ParquetFile(file).read(wanted_names)


def check(path: Path) -> None:
    """Check that a Parquet file's metadata can be read; raises ValueError or OSError if the file is damaged."""
    import pyarrow.parquet as pq

    with _opened(path) as file:
        pq.ParquetFile(file)


def _opened(path: Path) -> Any:
    """Open a file as one of Arrow's own.

    Arrow's threads would need the interpreter to release what they read from a file of Python's. If the interpreter is
    already exiting then, the process is aborted. A path cannot be passed instead, because pyarrow could mistake it for
    a URI.
    """
    import pyarrow as pa

    with path.open("rb"):  # raises Python's errors, which name the file; Arrow's do not
        return pa.OSFile(str(path), "rb")
