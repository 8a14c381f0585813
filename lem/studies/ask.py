"""Questions and messages around a run: the confirmation before it, warnings, its progress in words, and its outcome."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lem.errors import Interrupted
from lem.quantities import one_line
from lem.results.directory import ExperimentDir
from lem.results.store import Store
from lem.runner.preflight import Ready

if TYPE_CHECKING:
    from lem.config.launcher import Launcher
    from lem.runner.job import Outcome


@dataclass(frozen=True)
class RunOptions:
    """How a command runs experiments; none of these options changes what is measured."""

    yes: bool = False
    dry_run: bool = False
    force: bool = False
    write_tables: bool = True
    fresh: bool = False
    # Consent, for this command only, to things that files name: programs, models' code, keys sent to other machines.
    allow_command: bool = False
    allow_code: bool = False
    allow_key: bool = False
    # The launcher that submits the experiments to Slurm; None runs them on this machine.
    launcher: Launcher | None = None
    # Whether a campaign is one job instead of one job for each cycle.
    one_job: bool = False
    # The number of experiments that a job of a sweep or batch runs, one after another; None means 1.
    per_job: int | None = None
    # Whether the command ends as soon as the jobs are submitted.
    detach: bool = False
    # Whether no progress is shown, as for callers of the Python API.
    quiet: bool = False


def confirmed(question: str) -> bool:
    """Ask for confirmation on a terminal; without a terminal, return True.

    Raises:
        Interrupted: the user pressed Ctrl-C.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    import typer

    try:
        return typer.confirm(one_line(question), default=True, err=True)
    except typer.Abort:
        raise Interrupted("Nothing was run.") from None


def wants_to_cancel(jobs: int) -> bool:
    """After Ctrl-C, ask whether to cancel jobs; return False without a terminal, or if the answer is Ctrl-C."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    import typer

    question = (
        f"Cancel the {jobs} jobs? Otherwise, they continue" if jobs != 1 else "Cancel the job? Otherwise, it continues"
    )
    try:
        return typer.confirm(f"{question} without this command.", default=False, err=True)
    except typer.Abort:
        print(file=sys.stderr)
        return False


def catch_up_rows(results_dir: str | Path, options: RunOptions, ids: Sequence[str] = ()) -> None:
    """Write rows that earlier commands could not write, unless this command writes no rows; see `catch_up`."""
    if options.write_tables and not options.dry_run:
        from lem.results.aggregate import catch_up

        print_warnings(*catch_up(Store(results_dir), ids))


def progress_of(directory: ExperimentDir) -> str:
    """Return the progress of an experiment, in words."""
    plan = directory.plan()
    finished = directory.finished()
    total = plan.prompts.count * plan.experiment.cycles
    cycles = f" in {plan.experiment.cycles} cycles" if plan.experiment.cycles > 1 else ""
    done = sum(map(len, finished.values()))
    return f"{done} of {total} prompts{cycles} {'is' if done == 1 else 'are'} done"


def summary_of(ready: Ready) -> str:
    """Return a short description of a run that has passed preflight."""
    wanted, prompts = ready.experiment, ready.prompts
    dropped = f" (empty prompts dropped: {prompts.dropped_empty})" if prompts.dropped_empty else ""
    source = f"{len(prompts.texts)} prompt{'s' if len(prompts.texts) != 1 else ''} of {wanted.dataset.name}{dropped}"
    return f"{source} through {wanted.model} ({wanted.backend.name})"


def print_warnings(*warnings: object) -> None:
    """Print warnings on stderr, in color on a terminal."""
    if not warnings:
        return
    from lem.results import show

    for warning in warnings:
        show.console(stderr=True).print(one_line(f"Warning: {warning}"), markup=False, highlight=False, style="yellow")


def show_outcome(outcome: Outcome, *, write_tables: bool = True) -> int:
    """Print an experiment's results and where its files are; return the exit code."""
    from lem.results import show

    show.show_row(outcome.row)
    print(f"\nRaw records: {outcome.directory.path}")
    if outcome.problem:
        print(f"Error: {outcome.problem}", file=sys.stderr)
        return 1
    if write_tables:
        print(f"Table:       {outcome.store.experiments_table}")
    else:
        print(f"The row was not written to the tables. To write it, run lem aggregate {outcome.directory.id}.")
    return 0 if outcome.row.status == "completed" else 1
