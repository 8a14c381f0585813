"""The tables of a results directory as pandas DataFrames. This module does not know how they are written."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lem.errors import ResultsError
from lem.record import PowerRecord
from lem.results import parquet
from lem.results.store import Store
from lem.results.tables import Tables, read_file
from lem.spec.paths import expanded

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Frames:
    """The tables of a results directory; each is read on first use.

    The attribute `attrs["units"]` of a DataFrame maps each column that has a unit to its unit, such as J or s.
    """

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
    >>> len(frames.requests), frames.requests.attrs["units"]["latency_s"]
    (4, 's')

    Args:
        results_dir: the directory, as given to --results-dir.

    Raises:
        BadInput: the path begins with `~` and the name of a user who does not exist.
        ResultsError: the directory has no tables or, on first use of a table, one of its files is damaged.
    """
    root = expanded(results_dir)
    if not Tables(Store(root)).files():
        raise ResultsError(f"{root} has no tables; run lem aggregate --all -o {root} to build them.")
    return Frames(root)


def _frame(table: Any) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas()
    metadata = {f.name: f.metadata or {} for f in table.schema}
    frame.attrs["units"] = {name: known[b"unit"].decode() for name, known in metadata.items() if b"unit" in known}
    return frame
