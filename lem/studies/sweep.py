"""Many experiments as one Hydra multirun: checked before the first, run, and each accounted for at the end.

A sweep is a list of cells. Here they come from override values separated by commas (`lem experiment … --multirun`);
`lem.studies.batch` makes them from files. Whatever becomes of a cell stands in `experiments.json` of the sweep's
directory, and in the table that is shown. Knows nothing of how an experiment is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from lem.config.compose import CONFIG_NAME, Request, prepare, to_experiment
from lem.config.hydra import Task, _expanded, hydra_multirun, sweep_dir
from lem.config.options import CONFIG_MODULE
from lem.errors import Interrupted, LemError
from lem.machine import host
from lem.runner.preflight import Ready, preflight
from lem.runner.stopping import signals_raise
from lem.spec.experiment import Experiment
from lem.studies.ask import Options, confirmed, words
from lem.studies.checks import Checks, RecentPrompts, Unfinished
from lem.studies.display import BatchDisplay, batch_display
from lem.studies.here import OneByOne
from lem.studies.manifest import Books, Cell, question, show_cells, tell_unfinished

# What is said of all cells when the user has ended a sweep.
ALL_AGAIN = "The same command goes on with what is unfinished, and runs the others: those that are complete as well."


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


# ------------------------------------------------------------------ checks


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


def _varied(cell: tuple[str, ...], cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the overrides in which a cell differs from others."""
    return [part for i, part in enumerate(cell) if any(other[i] != part for other in cells)]


# ------------------------------------------------------------------ what became of each


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


def _stopped(signal_name: str) -> KeyboardInterrupt:
    return KeyboardInterrupt(f"Stopped by {signal_name}; what was measured is kept.")


# ------------------------------------------------------------------ Hydra
