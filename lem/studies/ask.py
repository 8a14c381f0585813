"""What a command asks before it runs, and how it words it."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from lem.errors import Interrupted
from lem.results.directory import ExperimentDir
from lem.runner.preflight import Ready


@dataclass(frozen=True)
class Options:
    """How to go about it, apart from what is measured."""

    yes: bool = False
    dry_run: bool = False
    force: bool = False
    write_tables: bool = True
    fresh: bool = False


def left(directory: ExperimentDir) -> str:
    """Say how much of an experiment is done, and by that what is left."""
    plan = directory.plan()
    finished = directory.finished()
    total = plan.prompts.count * plan.experiment.cycles
    cycles = f" in {plan.experiment.cycles} cycles" if plan.experiment.cycles > 1 else ""
    return f"{sum(map(len, finished.values()))} of {total} prompts{cycles} are done"


def words(ready: Ready) -> str:
    """Say what would run."""
    wanted = ready.experiment
    return f"{len(ready.prompts.texts)} prompts of {wanted.dataset.name} through {wanted.model} ({wanted.backend.name})"


def confirmed(question: str) -> bool:
    """Ask on a terminal; without one there is nobody to ask, and the answer is yes.

    Raises:
        Interrupted: the answer is Ctrl-C.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    import typer

    try:
        return typer.confirm(question, default=True, err=True)
    except typer.Abort:
        raise Interrupted("Nothing was run.") from None
