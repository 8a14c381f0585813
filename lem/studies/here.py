"""Cells run one after another, in this process."""

from __future__ import annotations

from typing import Any

from lem.errors import Interrupted, LemError
from lem.machine import host
from lem.results.schema import ExperimentRow
from lem.runner.job import run_ready
from lem.runner.preflight import preflight
from lem.spec.experiment import Experiment
from lem.studies.ask import Options
from lem.studies.checks import RecentPrompts
from lem.studies.display import BatchDisplay
from lem.studies.manifest import Books, row_of


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
