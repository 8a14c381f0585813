"""Runs the checked cells of a study (a sweep, batch or campaign) as a Hydra multirun, and keeps the manifest.

`lem.studies.sweep` creates cells from override values, `lem.studies.batch` from config files, and
`lem.studies.campaign` from arms. The outcome of each cell is recorded in `experiments.json` in the study's directory
and in the table at the end. This module does not know how an experiment is measured.
"""

from __future__ import annotations

import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lem.config.compose import to_experiment
from lem.config.launcher import Launcher
from lem.config.multirun import run_plan, submit_plan, sweep_dir
from lem.config.overrides import is_hydra_setting
from lem.errors import Interrupted, LemError, ResultsError
from lem.machine import host
from lem.results.files import NO_SPACE, DiskFull, needs_space
from lem.results.jobs import Ledger, attending
from lem.results.schema import ExperimentRow
from lem.runner.early import early_worker
from lem.runner.job import run_ready
from lem.runner.preflight import preflight
from lem.runner.progress import Report
from lem.runner.stopping import Stopped, signals_raise
from lem.spec.experiment import Experiment
from lem.studies.ask import RunOptions, catch_up_rows, confirmed, print_warnings, progress_of
from lem.studies.checks import RecentPrompts
from lem.studies.display import Quiet, StudyDisplay, study_display
from lem.studies.manifest import Cell, Manifest, experiment_of, row_of

AGAIN = "The same command resumes unfinished experiments and runs all others again, even completed ones."


class Left(Exception):
    """The command ends before the jobs of its cells do; the text says how to return to them."""

    def __init__(self, text: str, exit_code: int = 0) -> None:
        """Store the text and the exit code, which is 0 if the user asked not to wait."""
        self.exit_code = exit_code
        super().__init__(text)

    def show(self) -> int:
        """Print the text, and return the exit code."""
        print(self, file=sys.stderr if self.exit_code else sys.stdout)
        return self.exit_code


class Runner(ABC):
    """Runs cells, one after another in this process, several at once in child processes, or as jobs of a cluster."""

    # Whether cells continue to run when this process ends, so that the user can choose to leave them running.
    outlives_command: ClassVar[bool] = False

    @abstractmethod
    def run(self, number: int, experiment: Experiment) -> None:
        """Run or start a cell; an error is recorded as the cell's state in the manifest and not raised."""

    def finish(self) -> None:
        """Wait for the cells that are still running."""

    def stop(self) -> None:
        """Stop the cells that are still running, and record how they ended."""

    def interrupted(self, by_signal: str) -> None:
        """Stop the cells after a signal, or leave them running; called when the display is already gone.

        `by_signal` is a sentence about the signal; it is empty for Ctrl-C.

        Raises:
            Left: the cells continue without this command.
        """
        self.stop()


def run_study(
    cells: Sequence[Cell],
    options: RunOptions,
    overrides: Sequence[str],
    make_runner: Callable[[Manifest, StudyDisplay], Runner],
    *,
    head: str,
    at_once: int = 1,
    fail_fast: bool = False,
) -> int:
    """Run checked cells, or list them in a dry run; return 0, or 1 if any experiment did not complete.

    Args:
        cells: the checked cells.
        options: the command line's options.
        overrides: the command line's overrides; overrides of Hydra's own settings apply to the multirun.
        make_runner: creates the runner of the cells.
        head: the header of the table's label column.
        at_once: the number of cells that run at the same time.
        fail_fast: start no more cells after one has failed.

    Raises:
        Interrupted: raised after the table is printed; finished requests are kept.
    """
    if options.dry_run:
        for number, cell in enumerate(cells, start=1):
            resumed = f", resuming {_resumed(cell)}" if cell.unfinished else ""
            print(f"[{number}/{len(cells)}] {cell.label}: {cell.words}{resumed}")
        return 0
    if not (options.yes or confirmed(_question(cells, at_once, options))):
        return 0
    for results_dir in dict.fromkeys(experiment_of(cell).io.results_dir for cell in cells):
        catch_up_rows(results_dir, options)
    for cell in cells:
        if cell.unfinished:
            print(f"{cell.label}: resuming {_resumed(cell)}.", file=sys.stderr)
    settings = [text for text in overrides if is_hydra_setting(text)]
    manifest = Manifest(sweep_dir(settings), cells, head, fail_fast)
    with alone_with_jobs(manifest.directory) if options.launcher else nullcontext():
        try:
            run_cells(manifest, make_runner, settings, at_once=at_once, launcher=options.launcher)
        except Left as left:
            return left.show()
        except BaseException:
            manifest.show()
            forget_jobs(manifest.directory)
            raise
        manifest.show()
        forget_jobs(manifest.directory)
    return 0 if manifest.all_completed else 1


@contextmanager
def alone_with_jobs(directory: Path) -> Iterator[None]:
    """Hold the lock of a new study whose cells run as jobs.

    Raises:
        ResultsError: the directory belongs to a study whose jobs have not been collected.
    """
    name = directory.resolve().name
    with attending(directory) as is_alone:
        ledger = Ledger.read(directory)
        if not is_alone or (ledger is not None and not ledger.is_over):
            raise ResultsError(
                f"{directory} has jobs of another study in the queue. Choose another directory (hydra.sweep.dir), or "
                f"first follow those jobs to their end (lem jobs {name}) or cancel them (lem jobs cancel {name})."
            )
        yield


def forget_jobs(directory: Path) -> None:
    """Record that the outcome of a study has been shown, if its cells were jobs and all of these have ended."""
    ledger = Ledger.read(directory)
    if ledger is not None and ledger.is_over and not ledger.is_shown:
        ledger.forget()


def run_cells(
    manifest: Manifest,
    make_runner: Callable[[Manifest, StudyDisplay], Runner],
    settings: Sequence[str],
    *,
    at_once: int = 1,
    again: str = AGAIN,
    launcher: Launcher | None = None,
    quiet: bool = False,
) -> None:
    """Run, in order, the cells of a manifest that are needed and not completed, and keep the manifest up to date.

    Args:
        manifest: the state of each cell.
        make_runner: creates the runner of the cells.
        settings: overrides of Hydra's own settings.
        at_once: the number of cells that run at the same time.
        again: how to continue after an interruption or a full disk, as a sentence for the user.
        launcher: the launcher, if the runner submits the cells to Slurm.
        quiet: show no progress.

    Raises:
        Interrupted: the study was interrupted; finished requests are kept.
        DiskFull: a disk is full; finished requests are kept.
    """

    def start(runner: Runner) -> None:
        _start(manifest, runner, settings, launcher)

    settled = [number for number, state in enumerate(manifest.states) if state.is_settled]
    attend(manifest, make_runner, start, at_once=at_once, settled=settled, again=again, quiet=quiet)


def attend(
    manifest: Manifest,
    make_runner: Callable[[Manifest, StudyDisplay], Runner],
    work: Callable[[Runner], None],
    *,
    at_once: int,
    settled: Sequence[int],
    again: str,
    quiet: bool = False,
) -> None:
    """Let a runner work on the cells of a manifest, show the progress, and handle interruptions.

    Args:
        manifest: the state of each cell.
        make_runner: creates the runner of the cells.
        work: called with the runner; returns when all cells have ended.
        at_once: the number of cells that run at the same time.
        settled: the numbers of the cells that count as ended from the start.
        again: how to continue after an interruption or a full disk, as a sentence for the user.
        quiet: show no progress.

    Raises:
        Left: the cells continue without this command.
        Interrupted: the study was interrupted; finished requests are kept.
        DiskFull: a disk is full; finished requests are kept.
    """
    runner: Runner | None = None
    try:
        manifest.open()
        shown: AbstractContextManager[StudyDisplay] = (
            nullcontext(Quiet()) if quiet else study_display(len(manifest.cells), at_once=at_once, settled=settled)
        )
        try:
            # Between cells, too, a signal must raise an exception.
            with shown as display, signals_raise():
                runner = make_runner(manifest, display)
                _work(manifest, runner, work)
        except KeyboardInterrupt as stop:
            if runner is not None and runner.outlives_command:
                runner.interrupted(_reason(stop) if isinstance(stop, Stopped) else "")
            raise Interrupted(_reason(stop)) from None
    except Left:  # the manifest stays open
        raise
    except BaseException as end:
        manifest.close()
        if isinstance(end, Interrupted):
            raise Interrupted(f"{end.reason}\n{again}") from None
        if isinstance(end, DiskFull):
            raise DiskFull(end.folder, f"Free some space. {again}") from None
        raise
    manifest.close()


def _work(manifest: Manifest, runner: Runner, work: Callable[[Runner], None]) -> None:
    try:
        with needs_space(manifest.directory):
            work(runner)
    except (_NoSpace, DiskFull) as end:
        runner.stop()
        raise (end.full if isinstance(end, _NoSpace) else end) from None
    except KeyboardInterrupt:
        if not runner.outlives_command:
            runner.stop()
        raise


def _start(manifest: Manifest, runner: Runner, settings: Sequence[str], launcher: Launcher | None) -> None:
    """Give all cells to a runner, through Hydra, and wait for them."""

    def run(number: int, composed: Any) -> None:
        if manifest.is_over or manifest.states[number].is_settled:
            return
        try:
            runner.run(number, composed if isinstance(composed, Experiment) else to_experiment(composed))
        except DiskFull as full:
            raise _NoSpace(full) from None
        except LemError as error:
            manifest.change(number, status="failed", error=str(error))

    def submit_all() -> None:
        with manifest.together():
            for number, cell in enumerate(manifest.cells):
                run(number, experiment_of(cell))

    if launcher is None:
        cells = [(cell.label, experiment_of(cell)) for cell in manifest.cells]
        run_plan(manifest.directory, cells, settings, run)
    else:
        submit_plan(manifest.directory, settings, submit_all, launcher)
    runner.finish()


class _NoSpace(KeyboardInterrupt):
    """Ends the multirun because a disk is full; Hydra would continue after an Exception."""

    def __init__(self, full: DiskFull) -> None:
        self.full = full


def _reason(stop: KeyboardInterrupt) -> str:
    if isinstance(stop, Stopped):
        return f"Stopped by {stop.signal_name}; finished requests are kept."
    return str(stop) or "Interrupted; finished requests are kept."


def _question(cells: Sequence[Cell], at_once: int, options: RunOptions) -> str:
    is_one = len(cells) == 1
    together = f", {at_once} at a time" if at_once > 1 else ""
    if options.launcher:
        together = " as a Slurm job" if is_one else " as Slurm jobs"
    begun = sum(cell.unfinished is not None for cell in cells)
    which = "it" if is_one else f"{begun} of them"
    resumed = f" ({which} will be resumed; use --fresh to start over)" if begun else ""
    return f"Run {'1 experiment' if is_one else f'{len(cells)} experiments'}{together}{resumed}?"


def _resumed(cell: Cell) -> str:
    assert cell.unfinished is not None
    return f"{cell.unfinished.id}: {progress_of(cell.unfinished)}"


@dataclass
class OneByOne(Runner):
    """Runs each cell in this process until the cell ends or is interrupted."""

    manifest: Manifest
    display: StudyDisplay
    options: RunOptions
    prompts: RecentPrompts

    def run(self, number: int, experiment: Experiment) -> None:
        """Run a cell to its end."""
        report = self.display.begin(number, self.manifest.cells[number].label)
        self.wait_before(number, report)
        self.manifest.change(number, status="running")
        try:
            row = self._measured(number, experiment, report)
            if (row.error or "").startswith(NO_SPACE):
                raise DiskFull(Path(experiment.io.results_dir))
            self._end(number, status=row.status, row=row, error=row.error)
        except (Interrupted, KeyboardInterrupt) as stop:
            self._end(number, status="interrupted", row=row_of(self.manifest.states[number].directory))
            # Hydra would continue after an Exception, but KeyboardInterrupt ends the multirun. The study adds its own
            # command for resuming.
            raise KeyboardInterrupt(stop.reason if isinstance(stop, Interrupted) else _reason(stop)) from None
        except DiskFull:
            raise  # ends the study; closing the manifest marks the cell as interrupted
        except LemError as error:
            self._end(number, status="failed", error=" ".join(str(error).split()))
        except Exception as error:
            self._end(number, status="failed", error=f"{type(error).__name__}: {' '.join(str(error).split())}")
            if not isinstance(error, OSError):  # a bug in lem, to be reported with its traceback
                traceback.print_exc()

    def wait_before(self, number: int, report: Report) -> None:
        """Wait until the cell should begin; return at once unless a subclass overrides this."""

    def _measured(self, number: int, experiment: Experiment, report: Report) -> ExperimentRow:
        cell = self.manifest.cells[number]
        force, in_campaign, machine = self.options.force, cell.campaign is not None, host.look()
        with early_worker(experiment, machine) as early:
            ready = preflight(experiment, machine, force=force, in_campaign=in_campaign, load=self.prompts)
            outcome = run_ready(
                ready,
                overrides=cell.overrides,
                config_file=cell.config_file,
                write_tables=self.options.write_tables,
                unfinished=cell.unfinished,
                campaign=cell.campaign,
                schedule=cell.schedule,
                claimed=lambda directory: self.manifest.claim(number, directory),
                early=early,
                report=report,
            )
        if outcome.problem:
            print_warnings(outcome.problem)
        return outcome.row

    def _end(self, number: int, **values: Any) -> None:
        state = self.manifest.change(number, **values)
        self.display.end(number, state.sentence, failed=state.status == "failed")
