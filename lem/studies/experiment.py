"""`lem experiment`: compose, check, ask, run, show; one experiment; `lem.studies.sweep` does many.

`lem.cli.hydra_app` is the same job as a plain Hydra app.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lem.config.compose import prepare
from lem.errors import ResultsError
from lem.machine import host
from lem.results import show
from lem.results.aggregate import aggregate
from lem.results.codec import to_json
from lem.results.directory import ExperimentDir
from lem.results.plan import FINISHED
from lem.results.store import Store, default_root
from lem.runner.job import Outcome, fingerprint, run_ready
from lem.runner.job import resume as resume_job
from lem.runner.preflight import Ready, check_again, preflight
from lem.studies.ask import Options, confirmed, left, words
from lem.studies.display import display


def main(
    config_file: Path | None, overrides: Sequence[str], options: Options, *, config_dir: Path | None = None
) -> int:
    """Run what the command line asks for; return the exit code: 0, or 1 when an experiment did not complete.

    Raises:
        BadInput: before anything has run.
        Interrupted: what was measured is kept.
    """
    request = prepare(config_file, overrides, config_dir=config_dir)
    ready = preflight(request.experiment(), host.look(), force=options.force)
    _warn(ready)
    if options.dry_run:
        _show_plan(ready)
        return 0
    unfinished = None if options.fresh else _unfinished(ready)
    if unfinished is not None:
        return _go_on(Store(Path(ready.experiment.io.results_dir)), unfinished, options, ready, overrides, config_file)
    if not (options.yes or confirmed(f"Run {words(ready)}?")):
        return 0
    return _finish(_run(ready, overrides, config_file, options), options)


def _run(ready: Ready, overrides: Sequence[str], config_file: Path | None, options: Options) -> Outcome:
    with display() as progress:
        return run_ready(
            ready,
            overrides=overrides,
            config_file=config_file,
            write_tables=options.write_tables,
            report=progress,
        )


def _finish(outcome: Outcome, options: Options) -> int:
    _show(outcome, options)
    return 0 if outcome.row.status == "completed" else 1


# ------------------------------------------------------------------ going on with what was left unfinished
def resume(experiment_id: str, results_dir: Path | None, options: Options) -> int:
    """Go on with an experiment; return the exit code: 0 also when there is nothing left to do.

    Raises:
        ResultsError: no such experiment, or another process runs it.
        Interrupted: stopped once more.
    """
    if not experiment_id:  # a shell's variable that is not set; all ids begin with nothing
        raise ResultsError("--resume: the id is empty. lem results list --all shows what can be gone on with.")
    store = Store(results_dir or default_root())
    directory = store.find(experiment_id)
    state, plan = directory.free_state(take_over=options.force), directory.plan()
    if state.status in FINISHED:
        if options.write_tables and not options.dry_run:
            aggregate(store, directory)  # it may have been killed just before its row was written
        print(f"{directory.id} is complete; there is nothing left to run.")
        return 0
    if options.dry_run:
        print(f"{directory.id}: {left(directory)}\n# dry run: nothing was measured")
        return 0
    # What is inadvisable was accepted when it began; the results may have been moved since.
    here = replace(plan.experiment, io=replace(plan.experiment.io, results_dir=str(store.root)))
    check_again(here, host.look(), force=True, has_arrivals=bool(plan.arrivals_sha256))
    if not (options.yes or confirmed(f"Go on with {directory.id} ({left(directory)})?")):
        return 0
    return _finish(_resume(store, directory, options), options)


def _resume(store: Store, directory: ExperimentDir, options: Options) -> Outcome:
    print(f"Going on with {directory.id}: {left(directory)}.", file=sys.stderr)
    with display() as progress:
        return resume_job(store, directory, write_tables=options.write_tables, take_over=options.force, report=progress)


def _unfinished(ready: Ready) -> ExperimentDir | None:
    """Return the newest unfinished experiment of the same configuration and prompts."""
    store = Store(Path(ready.experiment.io.results_dir))
    return next(reversed(store.unfinished(fingerprint(ready))), None)


def _go_on(
    store: Store,
    directory: ExperimentDir,
    options: Options,
    ready: Ready,
    overrides: Sequence[str],
    config_file: Path | None,
) -> int:
    """Ask whether to go on with the same experiment or to start anew; --yes goes on."""
    try:
        question = f"The same experiment was left unfinished: {directory.id} ({left(directory)}). Go on with it?"
    except ResultsError as error:
        raise ResultsError(f"The same experiment was left unfinished, and {error} --fresh starts anew.") from None
    if options.yes or confirmed(question):
        return _finish(_resume(store, directory, options), options)
    if confirmed(f"Start anew: run {words(ready)}?"):
        return _finish(_run(ready, overrides, config_file, options), options)
    return 0


# ------------------------------------------------------------------ what the user sees
def _warn(ready: Ready) -> None:
    for warning in ready.warnings:
        show.console(stderr=True).print(f"Warning: {warning}", markup=False, style="yellow")


def _show_plan(ready: Ready) -> None:
    import yaml

    config = yaml.safe_dump(json.loads(to_json(ready.experiment)), sort_keys=False, allow_unicode=True)
    print(config, end="")
    model = f"found at {ready.model.path}" if ready.model else "none is loaded"
    prompts = ready.prompts
    print(f"# model: {model}")
    print(
        f"# prompts: {len(prompts.texts)} of {prompts.available} in {prompts.source}, "
        f"column {prompts.column}; {prompts.dropped_empty} empty ones left out"
    )
    print("# dry run: nothing was measured")


def _show(outcome: Outcome, options: Options) -> None:
    show.show_row(outcome.row)
    print(f"\nRaw records: {outcome.directory.path}")
    if options.write_tables:
        print(f"Table:       {outcome.store.experiments_table}")
    else:
        print(f"Not aggregated; lem aggregate {outcome.directory.id} does it.")
