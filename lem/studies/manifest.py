"""The cells of a sweep, and what became of each: `experiments.json` and the table at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lem.errors import LemError, ResultsError
from lem.results import show
from lem.results.aggregate import read
from lem.results.directory import ExperimentDir
from lem.results.files import write_atomically
from lem.results.schema import ExperimentRow
from lem.results.show import SweepLine
from lem.spec.experiment import Experiment
from lem.studies.ask import left

SWEEP_FILE = "experiments.json"


@dataclass(frozen=True)
class Cell:
    """One experiment of a sweep, checked; `label` is what tells it from the others."""

    label: str
    experiment: Experiment
    overrides: tuple[str, ...]
    config_file: Path | None
    words: str
    unfinished: ExperimentDir | None = None

    @property
    def plan(self) -> str:
        """Say what would run."""
        going_on = f", going on with {self.unfinished.id}: {left(self.unfinished)}" if self.unfinished else ""
        return f"{self.words}{going_on}"


def question(cells: Sequence[Cell], how: str = "") -> str:
    """Ask whether to run the cells; `how` follows their number."""
    begun = sum(cell.unfinished is not None for cell in cells)
    going_on = f" ({begun} left unfinished before; --fresh starts them anew)" if begun else ""
    return f"Run {len(cells)} experiments{how}{going_on}?"


def tell_unfinished(cells: Sequence[Cell]) -> None:
    """Say which cells go on with what."""
    for cell in cells:
        if cell.unfinished:
            print(f"{cell.label}: going on with {cell.unfinished.id}: {left(cell.unfinished)}.", file=sys.stderr)


def show_cells(cells: Sequence[Cell]) -> int:
    """Print what each cell would run."""
    for number, cell in enumerate(cells, start=1):
        print(f"[{number}/{len(cells)}] {cell.label}: {cell.plan}")
    return 0


@dataclass(frozen=True)
class Entry:
    """What became of a cell."""

    cell: Cell
    status: str = "not run"
    directory: ExperimentDir | None = None
    row: ExperimentRow | None = None
    error: str | None = None
    log: Path | None = None

    @property
    def sentence(self) -> str:
        """Say how it ended, in a line."""
        name = f" {self.directory.id}" if self.directory else ""
        return f"{self.status}{name}" + (f": {self.error}" if self.error else "")

    def line(self) -> SweepLine:
        """Return the line of the table."""
        error = f"{self.error} (log: {self.log})" if self.status == "failed" and self.log else self.error
        return SweepLine(self.cell.label, self.status, self.directory.id if self.directory else None, self.row, error)

    def plain(self) -> dict[str, Any]:
        """Return it for programs to read."""
        directory, cell = self.directory, self.cell
        return {
            "label": cell.label,
            "config_file": str(cell.config_file) if cell.config_file else None,
            "overrides": list(cell.overrides),
            "experiment_id": directory.id if directory else None,
            "status": self.status,
            "directory": str(directory.path.resolve()) if directory else None,
            "error": self.error,
            "log": str(self.log.resolve()) if self.log else None,
        }


@dataclass
class Books:
    """The sweep's directory and what has become of each cell so far; `experiments.json` holds it at any moment."""

    directory: Path
    cells: Sequence[Cell]
    head: str
    fail_fast: bool = False
    entries: list[Entry] = field(init=False)

    def __post_init__(self) -> None:
        self.entries = [Entry(cell) for cell in self.cells]

    def open(self) -> None:
        """Make the directory; raises `ResultsError` when it cannot be written to."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            raise ResultsError(f"The sweep's directory {self.directory} cannot be used: {error.strerror}.") from None

    def change(self, number: int, **values: Any) -> Entry:
        """Note something about a cell."""
        self.entries[number] = replace(self.entries[number], **values)
        self._write()
        return self.entries[number]

    def claimed(self, number: int, directory: ExperimentDir) -> None:
        """Note where a cell's files lie."""
        self.change(number, directory=directory)

    @property
    def is_over(self) -> bool:
        """Tell whether no further cell is to begin: one has failed and that was asked to end the sweep."""
        return self.fail_fast and any(entry.status == "failed" for entry in self.entries)

    @property
    def all_completed(self) -> bool:
        """Tell whether every cell ran to its end."""
        return all(entry.status == "completed" for entry in self.entries)

    def close(self) -> None:
        """Let no cell stay "running": one that an interrupt caught between its end and its entry was interrupted."""
        for number, entry in enumerate(self.entries):
            if entry.status == "running":
                self.change(number, status="interrupted", row=row_of(entry.directory))

    def show(self) -> None:
        """Print the table, and how many ended how."""
        show.show_sweep([entry.line() for entry in self.entries], self.head)
        counts: dict[str, int] = {}
        for entry in self.entries:
            counts[entry.status] = counts.get(entry.status, 0) + 1
        print(f"\n{', '.join(f'{count} {status}' for status, count in counts.items())}")
        print(f"Bookkeeping: {self.directory / SWEEP_FILE}")

    def _write(self) -> None:
        text = show.as_json([entry.plain() for entry in self.entries])
        write_atomically(self.directory / SWEEP_FILE, f"{text}\n")


def row_of(directory: ExperimentDir | None) -> ExperimentRow | None:
    """Return the row of an experiment as far as it got, or None where there is nothing to make one of."""
    try:
        return read(directory, strict=False).row if directory else None
    except LemError:
        return None
