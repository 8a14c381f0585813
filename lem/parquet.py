"""Record types as Arrow schemas, and rows as Parquet files: the unit and the meaning of each column go along.

Units are in the field's metadata under `unit`, descriptions under `description`. Knows no record in particular.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from lem.store import replacing
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
    for f in fields(record_type):
        annotation, unit, description = hints[f.name], None, None
        if get_origin(annotation) is Annotated:
            annotation, *marks = get_args(annotation)
            unit = next((mark.symbol for mark in marks if isinstance(mark, Unit)), None)
            description = next((mark for mark in marks if isinstance(mark, str)), None)
        members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
        real = [member for member in members if member is not type(None)]
        yield Column(f.name, real[0], len(real) < len(members), unit, description)


def schema(record_type: type[Any]) -> Any:
    """Return the Arrow schema of a record type."""
    import pyarrow as pa

    arrow = {
        str: pa.string(),
        bool: pa.bool_(),
        int: pa.int64(),
        float: pa.float64(),
        list[str]: pa.list_(pa.string()),
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
    import pyarrow as pa

    write_table(path, pa.Table.from_pylist([asdict(row) for row in rows], schema=schema(record_type)))


def write_table(path: Path, table: Any) -> None:
    """Write an Arrow table as one Parquet file, whole or not at all."""
    import pyarrow.parquet as pq

    with replacing(path) as scratch:
        pq.write_table(table, scratch, compression="zstd")


def read_rows(path: Path, record_type: type[Any]) -> list[Any]:
    """Read records back; columns that this version does not know are left out, missing ones take defaults."""
    import pyarrow.parquet as pq

    known = {c.name for c in columns(record_type)}
    # As an open file: a path's text could be taken for a URI.
    with path.open("rb") as file:
        rows = pq.ParquetFile(file).read().to_pylist()
    return [record_type(**{k: v for k, v in row.items() if k in known}) for row in rows]
