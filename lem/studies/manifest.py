"""The cells of a study and their outcomes: `experiments.json`, and the table printed at the end."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lem.errors import LemError, ResultsError
from lem.results import show
from lem.results.aggregate import read
from lem.results.campaign import NOT_NEEDED
from lem.results.codec import from_json
from lem.results.directory import ExperimentDir
from lem.results.files import DiskFull, needs_space, write_atomically
from lem.results.schema import ExperimentRow
from lem.results.show import SweepLine
from lem.spec.campaign import CampaignCell
from lem.spec.experiment import Experiment
from lem.spec.schedule import ScheduleRun

FILE = "experiments.json"
# While many changes are made together, saving them takes at most this share of the time.
SAVING_SHARE = 0.05


@dataclass(frozen=True)
class Cell:
    """One checked experiment of a study; `label` distinguishes it from other cells, and `words` describe it.

    `experiment` is None in a cell that was read from the manifest; the plan in the cell's directory contains it.
    """

    label: str
    experiment: Experiment | None
    overrides: tuple[str, ...]
    config_file: Path | None
    words: str
    unfinished: ExperimentDir | None = None
    campaign: CampaignCell | None = None
    schedule: ScheduleRun | None = None
    fingerprint: str = ""


@dataclass(frozen=True)
class CellState:
    """The state of a cell: how its experiment ended, if it has run, and where its files are."""

    cell: Cell
    status: str = "not run"
    directory: ExperimentDir | None = None
    row: ExperimentRow | None = None
    error: str | None = None
    log: Path | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the cell does not have to run, because it is completed or no longer needed."""
        return self.status in ("completed", NOT_NEEDED)

    @property
    def sentence(self) -> str:
        """How the cell ended, in one line."""
        name = f" {self.directory.id}" if self.directory else ""
        return f"{self.status}{name}" + (f": {self.error}" if self.error else "")

    def line(self) -> SweepLine:
        """Return the cell's line in the table."""
        error = f"{self.error} (log: {self.log})" if self.status == "failed" and self.log else self.error
        return SweepLine(self.cell.label, self.status, self.directory.id if self.directory else None, self.row, error)

    def plain(self) -> dict[str, Any]:
        """Return the cell's entry in `experiments.json`."""
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
            **({"campaign": asdict(cell.campaign)} if cell.campaign else {}),
        }


@dataclass
class Manifest:
    """The study's directory and the state of each cell; `experiments.json` is kept up to date throughout."""

    directory: Path
    cells: Sequence[Cell]
    # The header of the table's label column.
    head: str
    fail_fast: bool = False
    states: list[CellState] = field(init=False)
    _is_saved: bool = field(default=True, init=False)
    _is_together: bool = field(default=False, init=False)
    _last_saved_s: float = field(default=0.0, init=False)
    _saving_took_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.states = [CellState(cell) for cell in self.cells]

    def open(self) -> None:
        """Create the directory and write the list of cells.

        Raises:
            ResultsError: the directory cannot be used.
            DiskFull: there is no space left.
        """
        try:
            with needs_space(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                self._write()
        except OSError as error:
            raise ResultsError(f"The study's directory {self.directory} cannot be used: {error.strerror}.") from None

    def change(self, number: int, **values: Any) -> CellState:
        """Change a cell's state and save it (inside `together`, perhaps later); raises `DiskFull` if saving fails."""
        self.states[number] = replace(self.states[number], **values)
        self._is_saved = False
        pause_s = self._saving_took_s / SAVING_SHARE
        if not self._is_together or time.monotonic() - self._last_saved_s >= pause_s:
            self.save()
        return self.states[number]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside this block, save changes only now and then; at its end, save the rest.

        Raises `DiskFull` if saving fails.

        The file is always written as a whole, so saving each change of ten thousand cells would take hours.
        """
        if self._is_together:
            yield
            return
        self._is_together = True
        try:
            yield
        finally:
            self._is_together = False
            if not self._is_saved:
                self.save()

    def leave_out(self, numbers: Iterable[int]) -> None:
        """Record that cells are no longer needed."""
        for number in numbers:
            self.states[number] = replace(self.states[number], status=NOT_NEEDED)
        self.save()

    def claim(self, number: int, directory: ExperimentDir) -> None:
        """Record where a cell's files are."""
        self.change(number, directory=directory)

    @property
    def is_over(self) -> bool:
        """Whether no further cells should start: one has failed and --fail-fast was given."""
        return self.fail_fast and any(state.status == "failed" for state in self.states)

    @property
    def all_completed(self) -> bool:
        """Whether every cell that is needed is completed."""
        return all(state.is_settled for state in self.states)

    def close(self) -> None:
        """Mark as interrupted all cells still listed as running: an interruption came before their end was recorded."""
        for number, state in enumerate(self.states):
            if state.status == "running":
                with suppress(DiskFull):  # an earlier error has already reported the full disk
                    self.change(number, status="interrupted", row=row_of(state.directory))

    def show(self) -> None:
        """Print the table and the number of cells with each status."""
        show.show_sweep([state.line() for state in self.states], self.head)
        counts = Counter(state.status for state in self.states)
        print(f"\n{', '.join(f'{count} {status}' for status, count in counts.items())}")
        print(f"List of experiments: {self.directory / FILE}")

    def save(self) -> None:
        """Save all states now; raises `DiskFull` if that fails."""
        began_s = time.monotonic()
        with needs_space(self.directory):
            self._write()
        self._is_saved, self._last_saved_s = True, time.monotonic()
        self._saving_took_s = self._last_saved_s - began_s

    def _write(self) -> None:
        text = show.as_json([state.plain() for state in self.states])
        write_atomically(self.directory / FILE, f"{text}\n")


def experiment_of(cell: Cell) -> Experiment:
    """Return the experiment of a cell that this command has checked."""
    assert cell.experiment is not None
    return cell.experiment


def read_manifest(directory: Path, head: str, *, fail_fast: bool = False) -> Manifest:
    """Return the manifest of a study that an earlier command began, with the states that it recorded last.

    Raises:
        ResultsError: the manifest is missing or damaged.
    """
    try:
        states = [_read_state(entry) for entry in json.loads((directory / FILE).read_bytes())]
    except KeyError as error:
        raise ResultsError(f"{directory / FILE} is damaged: an entry has no {error}.") from None
    except OSError as error:
        raise ResultsError(f"{directory / FILE} cannot be read: {error.strerror or error}.") from None
    except (ValueError, TypeError) as error:
        raise ResultsError(f"{directory / FILE} cannot be read: {' '.join(str(error).split())[:200]}.") from None
    manifest = Manifest(directory, [state.cell for state in states], head, fail_fast)
    manifest.states = states
    return manifest


def _read_state(entry: Mapping[str, Any]) -> CellState:
    file, path, log = (Path(entry[key]) if entry[key] else None for key in ("config_file", "directory", "log"))
    directory = None if path is None else ExperimentDir(path)
    campaign = from_json(CampaignCell, json.dumps(entry["campaign"])) if "campaign" in entry else None
    cell = Cell(entry["label"], None, tuple(entry["overrides"]), file, words="", campaign=campaign)
    return CellState(cell, entry["status"], directory, None, entry["error"], log)


def row_of(directory: ExperimentDir | None) -> ExperimentRow | None:
    """Return an experiment's row, even if the experiment is unfinished; None if there are no usable records."""
    try:
        return read(directory, strict=False).row if directory else None
    except LemError:
        return None
