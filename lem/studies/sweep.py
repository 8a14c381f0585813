"""`lem experiment … --multirun`: runs a cell for each combination of override values."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from lem.config.compose import Composition, prepare
from lem.config.trust import asked_by
from lem.machine import host
from lem.runner.preflight import Ready, preflight
from lem.studies.ask import RunOptions
from lem.studies.checks import Candidate, RecentPrompts, checked
from lem.studies.consent import Consents
from lem.studies.continuing import run_as_jobs
from lem.studies.slurm import preflight_for_job
from lem.studies.study import OneByOne, run_study


def main(
    config_file: Path | None, overrides: Sequence[str], options: RunOptions, *, config_dir: Path | None = None
) -> int:
    """Run every combination of the overrides' values; return 0, or 1 if any experiment did not complete.

    Raises:
        BadInput: raised before anything runs.
        Interrupted: raised after the table is printed; finished requests are kept.
    """
    compositions = prepare(config_file, overrides, config_dir=config_dir).cells()
    prompts, consents, launcher = RecentPrompts(), Consents(options), options.launcher
    machine = None if launcher else host.look()

    def check(composition: Composition) -> Ready:
        experiment = composition.experiment() if composition is compositions[0] else composition.quickly()
        consents.require(asked_by(experiment, composition.sources))
        if machine is None:
            return preflight_for_job(experiment, options, prompts)
        return preflight(experiment, machine, force=options.force, load=prompts)

    labels = [str(config_file or "experiment")] if launcher and len(compositions) == 1 else _labels(compositions)
    candidates = (
        Candidate(label, tuple(override.shown for override in each.given), config_file, partial(check, each))
        for each, label in zip(compositions, labels, strict=True)
    )
    cells = checked(candidates, fresh=options.fresh)
    if len(cells) == 1 and not launcher:
        print("No value is varied: give several values, as in batching.batch_size=1,2,4.", file=sys.stderr)
    if launcher:
        return run_as_jobs(cells, options, overrides, prompts, head="overrides")
    runner = partial(OneByOne, options=options, prompts=prompts)
    return run_study(cells, options, overrides, runner, head="overrides")


def _labels(compositions: Sequence[Composition]) -> Iterator[str]:
    """Yield, for each cell, the overrides in which it differs from other cells."""
    columns = zip(*(each.given for each in compositions), strict=True)
    varied = [len({override.text for override in column}) > 1 for column in columns]
    for each in compositions:
        shown = (override.shown for override, differs in zip(each.given, varied, strict=True) if differs)
        yield " ".join(shown) or "nothing varied"
