"""The tables of a results directory as pandas DataFrames, and the units of their columns.

This module does not know how the tables are written.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lem.errors import ResultsError
from lem.record import PowerRecord
from lem.results import parquet
from lem.results.store import Store
from lem.results.tables import KINDS, Tables, read_file
from lem.spec.paths import expanded

if TYPE_CHECKING:
    import pandas as pd

# The key under which a DataFrame's `attrs` holds the units of its columns.
UNITS = "units"
# The pandas aggregations whose results have the unit of the values, by the names that pandas gives to their columns.
KEEPS_UNIT = re.compile(r"mean|median|min|max|sum|std|sem|first|last|nth|quantile|\d+(\.\d+)?%")
# What a merge appends, by default, to the names of columns that both sides have.
MERGED = re.compile(r"(.+)_[xy]")


@dataclass(frozen=True)
class Frames:
    """The tables of a results directory; each is read on first use. `lem.units` returns the units of their columns."""

    root: Path

    @cached_property
    def experiments(self) -> pd.DataFrame:
        """A row for each experiment."""
        return self._table("experiments")

    @cached_property
    def cycles(self) -> pd.DataFrame:
        """A row for each cycle."""
        return self._table("cycles")

    @cached_property
    def requests(self) -> pd.DataFrame:
        """A row for each request."""
        return self._table("requests")

    @cached_property
    def power(self) -> pd.DataFrame:
        """A row for each sample of the power traces of all experiments."""
        files = sorted(self.root.glob("raw/*/power_*.parquet"))
        return _frame(parquet.together([read_file(file) for file in files], PowerRecord))

    def _table(self, name: str) -> pd.DataFrame:
        return _frame(Tables(Store(self.root)).whole(name))


def load(results_dir: str | Path = "results") -> Frames:
    """Return the tables of a results directory as pandas DataFrames.

    This continues the example of `lem.run`:

    >>> import lem
    >>> frames = lem.load("results")
    >>> frames.experiments[["model", "requests_completed", "output_tokens"]]
      model  requests_completed  output_tokens
    0   any                   4            271
    >>> len(frames.requests), lem.units(frames.requests)["latency_s"]
    (4, 's')

    Each table has all the columns of this version, in the order of the reference page on results. The values of columns
    that an older version did not write are missing (NaN or None) or, in columns that cannot have missing values, 0,
    False or empty.

    Args:
        results_dir: the directory, as given to --results-dir.

    Returns:
        An object with the tables `experiments`, `cycles` and `requests`, each with one row for each experiment, cycle
        or request, and `power`, with one row for each sample of each device.

    Raises:
        BadInput: the path begins with `~` and the name of a user who does not exist.
        ResultsError: the directory has no tables or, on first use of a table, one of its files is damaged.
    """
    root = expanded(results_dir)
    if not Tables(Store(root)).files():
        raise ResultsError(f"{root} has no tables; run lem aggregate --all -o {root} to build them.")
    return Frames(root)


def frame_of(record_type: type[Any], rows: Iterable[Any]) -> pd.DataFrame:
    """Return records as a DataFrame."""
    return _frame(parquet.table(record_type, rows))


def _frame(table: Any) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas()
    metadata = {f.name: f.metadata or {} for f in table.schema}
    frame.attrs[UNITS] = {name: known[b"unit"].decode() for name, known in metadata.items() if b"unit" in known}
    return frame


# ------------------------------------------------------------------ units
def units(frame: pd.DataFrame | pd.Series[Any]) -> dict[Hashable, str]:
    """Return the unit of each column that has one, for a DataFrame that was derived from `lem`'s tables.

    This continues the example of `lem.load`:

    >>> import lem
    >>> both = frames.requests.groupby("experiment_id")[["latency_s", "output_tokens"]].agg(["median", "count"])
    >>> lem.units(both)
    {('latency_s', 'median'): 's', ('output_tokens', 'median'): 'token'}

    A column's unit follows from its name, so it survives every operation that keeps the name: selecting, filtering,
    sorting, merging, concatenating, grouping, copying, pickling, and writing to a file and reading it back, even if the
    file was read without `lem`. Columns that a merge has given the suffix `_x` or `_y` keep their units. Columns with
    several levels keep their units after an aggregation whose results have the unit of the values (mean, median, min,
    max, sum, std, sem, first, last, quantiles), in a pivot table, and under the keys of a concatenation.

    A renamed column has no unit, unless the new name is that of another column in `lem`'s tables. To give a column a
    unit, add it to `frame.attrs["units"]`, which takes precedence over the names. pandas copies `attrs` in most
    operations, but not in all of them.

    A column has no unit if its values cannot be the quantity: truth values, or whole numbers where the quantity has
    fractions, as after `groupby(…).count()`. In other cases, `lem` cannot notice that a column now holds another
    quantity under its old name, such as a variance, or counts in a column of tokens; rename such a column.

    Args:
        frame: a DataFrame, or a single column as a Series.

    Returns:
        The units by column label. Columns without a unit are left out; the unit of a ratio is `1`.
    """
    import pandas as pd

    table = frame.to_frame() if isinstance(frame, pd.Series) else frame
    added = table.attrs.get(UNITS)
    given: Mapping[Hashable, str] = added if isinstance(added, Mapping) else {}
    found: dict[Hashable, str] = {}
    for label, kind in zip(table.columns, table.dtypes.tolist(), strict=True):
        name = _name_in(label, table.columns.names)
        unit = given.get(label) or given.get(name) or _known().get(str(name), (None, None))[0]
        if unit is not None and _can_be(name, kind):
            found[label] = unit
    return found


@cache
def _known() -> dict[str, tuple[str, type[Any]]]:
    """Return the unit and the type of each column that has a unit; a name has the same unit in all tables."""
    kinds: list[type[Any]] = [*KINDS.values(), PowerRecord]
    columns = [column for kind in kinds for column in parquet.columns(kind)]
    return {column.name: (column.unit, column.python_type) for column in columns if column.unit is not None}


def _can_be(name: Hashable, kind: Any) -> bool:
    """Return whether a column of the given pandas dtype can hold the quantity with the given name."""
    declared = _known().get(str(name))
    is_count = kind.kind in "iu" and declared is not None and declared[1] is not int
    return kind.kind != "b" and not is_count


def _name_in(label: Hashable, levels: Iterable[Any]) -> Hashable:
    """Return the name of the quantity in a column: its label, a level of it, or the label without a merge's suffix."""
    if isinstance(label, tuple):
        return next(_names_of(label, list(levels)), None)
    merged = MERGED.fullmatch(label) if isinstance(label, str) and label not in _known() else None
    return merged[1] if merged else label


def _names_of(label: tuple[Hashable, ...], levels: list[Any]) -> Iterator[Hashable]:
    for place, part in enumerate(label):
        # Unnamed levels below the quantity's name hold aggregations; the levels of a pivot table have names.
        below = [
            str(each) for each, level in zip(label[place + 1 :], levels[place + 1 :], strict=True) if level is None
        ]
        if part in _known() and all(each == "" or KEEPS_UNIT.fullmatch(each) for each in below):
            yield part
