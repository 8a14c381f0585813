"""Record types as Arrow schemas, and rows as Parquet files: the unit and the meaning of each column go along.

Units are in the field's metadata under `unit`, descriptions under `description`. Knows no record in particular.
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

from lem.results.files import replacing
from lem.units import Unit


@dataclass(frozen=True)
class Column:
    """A column as the record's type declares it."""

    name: str
    python_type: type[Any]
    nullable: bool
    unit: str | None
    description: str | None


def columns(record_type: type[Any]) -> Iterator[Column]:
    """Yield the columns of a record type, in order."""
    hints = get_type_hints(record_type, include_extras=True)
    for name in record_type.__struct_fields__:
        annotation, unit, description = hints[name], None, None
        if get_origin(annotation) is Annotated:
            annotation, *marks = get_args(annotation)
            unit = next((mark.symbol for mark in marks if isinstance(mark, Unit)), None)
            description = next((mark for mark in marks if isinstance(mark, str)), None)
        members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        real = [member for member in members if member is not type(None)]
        yield Column(name, real[0], len(real) < len(members), unit, description)


# Building one takes a millisecond.
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


def write_rows(path: Path, record_type: type[Any], rows: Iterable[Any]) -> None:
    """Write records as one Parquet file, whole or not at all."""
    write_table(path, table(record_type, rows))


def table(record_type: type[Any], rows: Iterable[Any]) -> Any:
    """Return records as an Arrow table."""
    names = schema(record_type).names
    values = list(map(attrgetter(*names), rows))
    return table_of(
        record_type, dict(zip(names, zip(*values, strict=True) if values else [[]] * len(names), strict=True))
    )


def table_of(record_type: type[Any], by_column: Mapping[str, Sequence[Any]]) -> Any:
    """Return a record type's columns as an Arrow table."""
    import pyarrow as pa

    wanted = schema(record_type)
    with _pandas_left_out():
        arrays = [_array(by_column[f.name], f.type) for f in wanted]
    return pa.Table.from_arrays(arrays, schema=wanted)


def _array(values: Sequence[Any], arrow_type: Any) -> Any:
    import pyarrow as pa

    # Half of the columns are empty mostly.
    if len(values) and values[0] is None and values.count(None) == len(values):
        return pa.nulls(len(values), arrow_type)
    return pa.array(values, arrow_type)


@contextmanager
def _pandas_left_out() -> Iterator[None]:
    """Keep pyarrow from importing pandas to see whether a list is a Series: that takes longer than a table does.

    It looks once for all; where it is told later to make a DataFrame it imports pandas all the same.
    """
    sys.meta_path.insert(0, _NoPandas)
    try:
        yield
    finally:
        sys.meta_path.remove(_NoPandas)


class _NoPandas:
    """Finds no pandas; for `sys.meta_path`."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        """Raise ImportError for pandas, and leave all else to the other finders."""
        if name == "pandas":
            raise ModuleNotFoundError("pandas is left out here", name=name)


def aligned(found: Any, record_type: type[Any], names: Sequence[str] | None = None) -> Any:
    """Return a table as this version's schema has it: columns that it does not know go, missing ones take defaults."""
    import pyarrow as pa

    wanted, defaults, there = schema(record_type), _defaults(record_type), set(found.column_names)
    if names is not None:
        wanted = pa.schema([wanted.field(name) for name in names])
    arrays = [
        found[f.name].cast(f.type) if f.name in there else pa.array([defaults[f.name]] * len(found), f.type)
        for f in wanted
    ]
    return pa.Table.from_arrays(arrays, schema=wanted)


def _defaults(record_type: type[Any]) -> dict[str, Any]:
    """Return for each column what stands where an older version wrote none."""
    empty = {str: "", int: 0, float: 0.0, bool: False, list[str]: [], list[float]: []}
    values = {c.name: None if c.nullable else empty[c.python_type] for c in columns(record_type)}
    return values | defaults(record_type)


def defaults(record_type: type[Any]) -> dict[str, Any]:
    """Return the default of each field that has one, apart from empty lists."""
    values = reversed(record_type.__struct_defaults__)
    return {
        name: value
        for name, value in zip(reversed(record_type.__struct_fields__), values, strict=False)
        if value is None or isinstance(value, str | int | float)
    }


def write_table(path: Path, rows: Any) -> None:
    """Write an Arrow table as one Parquet file, whole or not at all."""
    import pyarrow.parquet as pq

    # Numbers hardly ever repeat: a dictionary of them costs time, and the file becomes larger.
    repeating = [f.name for f in rows.schema if f.type == "string"]
    with replacing(path) as scratch:
        pq.write_table(rows, scratch, compression="zstd", use_dictionary=repeating)


def read_table(path: Path, names: Sequence[str] | None = None) -> Any:
    """Read a Parquet file, or of some columns those that it has.

    Raises:
        ValueError, OSError: it is damaged, or cannot be read.
    """
    import pyarrow.parquet as pq

    # As an open file: a path's text could be taken for a URI.
    with path.open("rb") as file:
        return pq.ParquetFile(file).read(names)


def check(path: Path) -> None:
    """Read what a Parquet file says of itself; raises ValueError or OSError when it is damaged."""
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        pq.ParquetFile(file)


def records(found: Any, record_type: type[Any], names: Sequence[str] | None = None) -> list[Any]:
    """Return an Arrow table as records; with `names` only these columns are read, and the others have defaults."""
    names = names or record_type.__struct_fields__
    others = _defaults(record_type)
    rows = zip(*(column.to_pylist() for column in aligned(found, record_type, names).columns), strict=True)
    return [record_type(**(others | dict(zip(names, values, strict=True)))) for values in rows]
