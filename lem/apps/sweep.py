"""Many experiments as one Hydra multirun: checked before the first, run, and each accounted for at the end.

A sweep is a list of cells. Here they come from override values separated by commas (`lem experiment … --multirun`);
`lem.apps.batch` makes them from files. Whatever becomes of a cell stands in `experiments.json` of the sweep's
directory, and in the table that is shown. Knows nothing of how an experiment is measured.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lem import host, report
from lem.aggregate import read
from lem.apps.compose import CONFIG_MODULE, CONFIG_NAME, Request, prepare, quoted, to_experiment
from lem.apps.experiment import Options, confirmed, left, words
from lem.datasets import Prompts, load_prompts
from lem.errors import BadInput, ConfigError, Interrupted, LemError, ResultsError
from lem.job import fingerprint, run_ready
from lem.launch import signals_raise
from lem.preflight import Ready, preflight
from lem.progress import BatchDisplay, batch_display
from lem.record import ExperimentRow
from lem.report import SweepLine
from lem.spec import Dataset, Experiment
from lem.store import ExperimentDir, Store, to_json, write_atomically

SWEEP_DIR = "hydra.sweep.dir="
SWEEP_FILE = "experiments.json"
# What is said of all cells when the user has ended a sweep.
ALL_AGAIN = "The same command goes on with what is unfinished, and runs the others: those that are complete as well."
Task = Callable[[Any], None]


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


def main(
    config_file: Path | None, overrides: Sequence[str], options: Options, *, config_dir: Path | None = None
) -> int:
    """Run every combination of the overrides' values; return 0, or 1 when an experiment did not complete.

    Raises:
        BadInput: before anything has run.
        Interrupted: after the table; what was measured is kept.
    """
    request = prepare(config_file, overrides, config_dir=config_dir)
    prompts = RecentPrompts()
    cells = _checked(request, config_file, options, prompts)
    if len(cells) == 1:
        print("Nothing is varied: give several values, as in batching.batch_size=1,2,4.", file=sys.stderr)
    if options.dry_run:
        return show_cells(cells)
    if not (options.yes or confirmed(question(cells))):
        return 0
    tell_unfinished(cells)
    books = Books(sweep_dir(request.overrides), cells, "overrides")
    display = batch_display(len(cells))

    def launch(task: Task) -> None:
        hydra_multirun(f"pkg://{CONFIG_MODULE}", CONFIG_NAME, request.overrides, books.directory, task)

    return carry_out(books, display, OneByOne(books, display, options, prompts), launch)


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


# ------------------------------------------------------------------ checks
class RecentPrompts:
    """Loads prompts and remembers the last two sets: neighbouring cells mostly share theirs."""

    def __init__(self, size: int = 2) -> None:
        self._kept: OrderedDict[tuple[str, int], Prompts] = OrderedDict()
        self._size = size

    def __call__(self, dataset: Dataset, seed: int) -> Prompts:
        """Return the prompts; raises `DatasetError` when they cannot be had."""
        key = (to_json(dataset), seed)
        if key not in self._kept:
            self._kept[key] = load_prompts(dataset, seed)
        self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return self._kept[key]


class Unfinished:
    """Finds where the same experiment was left unfinished; gives each such to one cell only."""

    def __init__(self, *, fresh: bool) -> None:
        self._fresh = fresh
        self._given: set[Path] = set()

    def __call__(self, ready: Ready) -> ExperimentDir | None:
        """Return the newest one, or None where there is none, or all are to start anew."""
        if self._fresh:
            return None
        store = Store(Path(ready.experiment.io.results_dir))
        left_behind = [each for each in store.unfinished(fingerprint(ready)) if each.path not in self._given]
        if not left_behind:
            return None
        self._given.add(left_behind[-1].path)
        return left_behind[-1]


class Checks:
    """Checks the cells of a sweep and keeps what is wrong, so that all of it is told in one go."""

    def __init__(self) -> None:
        self._problems: list[tuple[str, str]] = []
        self._warnings: list[tuple[str, str]] = []

    def cell(self, label: str, check: Callable[[], Ready]) -> Ready | None:
        """Return the checked cell, or None after keeping its problems."""
        try:
            ready = check()
        except BadInput as error:
            self._problems += [(problem, label) for problem in str(error).splitlines()]
            return None
        self._warnings += [(f"Warning: {warning}", label) for warning in ready.warnings]
        return ready

    def conclude(self) -> None:
        """Raise all problems, or else show all warnings, each once with the cells that it is about."""
        if self._problems:
            raise ConfigError(*_each_once(self._problems))
        for warning in _each_once(self._warnings):
            report.console(stderr=True).print(warning, markup=False, style="yellow")


def _each_once(found: Iterable[tuple[str, str]]) -> list[str]:
    labels: dict[str, list[str]] = {}
    for text, label in found:
        labels.setdefault(text, []).append(label)
    # A problem of a file begins with the file's name.
    return [
        text if len(those) == 1 and those[0] in text else f"{text} [in {_first_of(those)}]"
        for text, those in labels.items()
    ]


def _first_of(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"


def _checked(request: Request, config_file: Path | None, options: Options, prompts: RecentPrompts) -> list[Cell]:
    """Check every cell before the first one runs; a sweep that would fail half-way is worth a sentence now."""
    expanded, here, checks = _expanded(request), host.look(), Checks()
    unfinished = Unfinished(fresh=options.fresh)
    cells = []
    for parts in expanded:
        label = " ".join(request.visible(_varied(parts, expanded))) or "nothing varied"
        ready = checks.cell(label, partial(_ready, request.cell(parts), here, options, prompts))
        # Only the words are kept: the prompts of a hundred cells would fill the memory.
        if ready is not None:
            varied = tuple(request.visible(parts))
            cells.append(Cell(label, ready.experiment, varied, config_file, words(ready), unfinished(ready)))
    checks.conclude()
    return cells


def _ready(request: Request, here: host.Host, options: Options, prompts: RecentPrompts) -> Ready:
    return preflight(request.experiment(), here, force=options.force, load=prompts)


def _expanded(request: Request) -> list[tuple[str, ...]]:
    """Expand the overrides of a sweep into those of its experiments, in the order in which Hydra runs them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(request.overrides))
        return [tuple(cell) for cell in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]]
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None


def _varied(cell: tuple[str, ...], cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the overrides in which a cell differs from others."""
    return [part for i, part in enumerate(cell) if any(other[i] != part for other in cells)]


# ------------------------------------------------------------------ what became of each
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
        report.show_sweep([entry.line() for entry in self.entries], self.head)
        counts: dict[str, int] = {}
        for entry in self.entries:
            counts[entry.status] = counts.get(entry.status, 0) + 1
        print(f"\n{', '.join(f'{count} {status}' for status, count in counts.items())}")
        print(f"Bookkeeping: {self.directory / SWEEP_FILE}")

    def _write(self) -> None:
        text = report.as_json([entry.plain() for entry in self.entries])
        write_atomically(self.directory / SWEEP_FILE, f"{text}\n")


# ------------------------------------------------------------------ running
class Runner(Protocol):
    """Runs cells: one by one in this process, or several at once in processes of their own."""

    def run(self, number: int, experiment: Experiment) -> None:
        """Run a cell, or begin to; whatever goes wrong with it is an entry in the books, not an exception."""

    def finish(self) -> None:
        """Wait for what still runs."""

    def stop(self) -> None:
        """End what still runs, because the user wants so, and note it."""


def carry_out(books: Books, display: BatchDisplay, runner: Runner, launch: Callable[[Task], None]) -> int:
    """Run the cells by `launch`, which is Hydra's, and show what became of all; return the exit code.

    Raises:
        Interrupted: after the table.
    """

    def task(composed: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        number = int(HydraConfig.get().job.num)
        if books.is_over:
            return
        try:
            experiment = to_experiment(composed)
        except LemError as error:
            books.change(number, status="failed", error=str(error))
        else:
            runner.run(number, experiment)

    books.open()
    try:
        with display, signals_raise(_stopped):  # between cells as well
            try:
                launch(task)
                runner.finish()
            except KeyboardInterrupt as stop:
                runner.stop()
                said = str(stop) or "Interrupted; what was measured is kept."
                raise Interrupted(f"{said}\n{ALL_AGAIN}") from None
    finally:
        books.close()
        books.show()
    return 0 if books.all_completed else 1


class OneByOne:
    """Runs each cell in this process, the next when it has ended."""

    def __init__(self, books: Books, display: BatchDisplay, options: Options, prompts: RecentPrompts) -> None:
        self._books, self._display, self._options, self._prompts = books, display, options, prompts

    def run(self, number: int, experiment: Experiment) -> None:
        """Run a cell to its end."""
        tell = self._display.begin(number, self._books.cells[number].label)
        self._books.change(number, status="running")
        try:
            row = self._measured(number, experiment, tell)
            self._end(number, status=row.status, row=row, error=row.error)
        except (Interrupted, KeyboardInterrupt) as stop:
            directory = self._books.entries[number].directory
            self._end(number, status="interrupted", row=row_of(directory))
            # Hydra goes on after an Exception; only this ends the sweep.
            raise KeyboardInterrupt(str(stop)) from None
        except LemError as error:
            self._end(number, status="failed", error=" ".join(str(error).split()))
        except Exception as error:
            self._end(number, status="failed", error=f"{type(error).__name__}: {' '.join(str(error).split())}")
            if not isinstance(error, OSError):  # a fault of lem's own, and this is what to report
                import traceback

                traceback.print_exc()

    def _measured(self, number: int, experiment: Experiment, tell: Any) -> ExperimentRow:
        options, cell = self._options, self._books.cells[number]
        ready = preflight(experiment, host.look(), force=options.force, load=self._prompts)
        return run_ready(
            ready,
            overrides=cell.overrides,
            config_file=cell.config_file,
            write_tables=options.write_tables,
            unfinished=cell.unfinished,
            claimed=lambda directory: self._books.claimed(number, directory),
            report=tell,
        ).row

    def _end(self, number: int, **values: Any) -> None:
        entry = self._books.change(number, **values)
        self._display.end(number, entry.sentence, failed=entry.status == "failed")

    def finish(self) -> None:
        """Do nothing: nothing runs any more."""

    def stop(self) -> None:
        """Do nothing: the interrupt has ended the cell that ran."""


def row_of(directory: ExperimentDir | None) -> ExperimentRow | None:
    """Return the row of an experiment as far as it got, or None where there is nothing to make one of."""
    try:
        return read(directory, strict=False).row if directory else None
    except LemError:
        return None


def _stopped(signal_name: str) -> KeyboardInterrupt:
    return KeyboardInterrupt(f"Stopped by {signal_name}; what was measured is kept.")


# ------------------------------------------------------------------ Hydra
def sweep_dir(overrides: Iterable[str]) -> Path:
    """Return the directory of a sweep: the one that hydra.sweep.dir names, else one called by the time."""
    from hydra.core.utils import setup_globals
    from omegaconf import OmegaConf

    given = [text.removeprefix(SWEEP_DIR).strip("'\"") for text in overrides if text.startswith(SWEEP_DIR)]
    if not given:
        return Path("multirun") / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    setup_globals()  # ${now:…}
    return Path(str(OmegaConf.create({"dir": given[-1]})["dir"]))


def hydra_multirun(search_path: str, config_name: str, overrides: Sequence[str], directory: Path, task: Task) -> None:
    """Let Hydra compose and run each combination of the overrides; raises `ConfigError` for what it refuses."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    hydra = Hydra.create_main_hydra2(task_name="experiment", config_search_path=create_config_search_path(search_path))
    try:
        hydra.multirun(config_name, task, [*overrides, f"{SWEEP_DIR}{quoted(str(directory))}"])
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    finally:
        GlobalHydra.instance().clear()
