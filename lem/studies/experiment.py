"""`lem experiment`: composes, checks, confirms, runs and shows one experiment; `lem.studies.sweep` handles several.

`lem.cli.hydra_app` also uses this module to run one experiment as a plain Hydra app. Modules that only a run needs are
imported when the run begins, so that a dry run stays fast.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lem.config.compose import prepare
from lem.config.problem import Location
from lem.config.trust import all_asked, asked_by
from lem.errors import ResultsError
from lem.machine import host
from lem.machine.collector import paused_collector
from lem.results.codec import to_json
from lem.results.directory import ExperimentDir
from lem.results.plan import FINISHED
from lem.results.store import Store, default_root, results_flag
from lem.runner.preflight import Ready, check_again, preflight
from lem.spec.experiment import Experiment
from lem.studies import preview
from lem.studies.ask import RunOptions, catch_up_rows, confirmed, print_warnings, progress_of, show_outcome, summary_of
from lem.studies.consent import Consents

if TYPE_CHECKING:
    from lem.runner.early import EarlyWorker


def main(
    config_file: Path | None, overrides: Sequence[str], options: RunOptions, *, config_dir: Path | None = None
) -> int:
    """Run one experiment; return the exit code: 1 if the experiment did not complete, otherwise 0.

    Raises:
        BadInput: raised before anything runs.
        Interrupted: the run was interrupted; finished requests are kept.
    """
    experiment = _consented(config_file, overrides, options, config_dir)
    if options.dry_run:
        ready = _checked(experiment, options)
        print_warnings(*ready.warnings)
        _show_plan(ready)
        return 0
    from lem.runner.early import early_worker

    with early_worker(experiment, host.look()) as early:
        return _run_or_resume(_checked(experiment, options), options, overrides, config_file, early)


@paused_collector()
def _consented(
    config_file: Path | None, overrides: Sequence[str], options: RunOptions, config_dir: Path | None
) -> Experiment:
    """Compose the experiment, and obtain the user's consent to what it starts."""
    composition = prepare(config_file, overrides, config_dir=config_dir)
    experiment = composition.experiment()
    Consents(options).require(asked_by(experiment, composition.sources))
    return experiment


@paused_collector()
def _checked(experiment: Experiment, options: RunOptions) -> Ready:
    return preflight(experiment, host.look(), force=options.force)


def _run_or_resume(
    ready: Ready,
    options: RunOptions,
    overrides: Sequence[str],
    config_file: Path | None,
    early: EarlyWorker | None,
) -> int:
    """Run a checked experiment, or an identical one that was left unfinished, if the user agrees."""
    print_warnings(*ready.warnings)
    from lem.results.jobs import queued_in
    from lem.runner.job import fingerprint

    store = Store(ready.experiment.io.results_dir)
    queued = queued_in(store)
    unfinished = [] if options.fresh else [d for d in store.unfinished(fingerprint(ready)) if d.id not in queued]
    question = f"Run {summary_of(ready)}?"
    if unfinished:
        resumes = _resume_question(unfinished[-1])
        if options.yes or confirmed(resumes):
            return _resume(store, unfinished[-1], options, early)
        question = f"Start over: run {summary_of(ready)}?"
    if not (options.yes or confirmed(question)):
        return 0
    return run(ready, options, overrides, config_file, early)


def run(
    ready: Ready,
    options: RunOptions,
    overrides: Sequence[str],
    config_file: Path | None = None,
    early: EarlyWorker | None = None,
) -> int:
    """Run a checked experiment, showing its progress and results; return the exit code."""
    from lem.runner.job import run_ready
    from lem.studies.display import display

    catch_up_rows(ready.experiment.io.results_dir, options)
    print(f"Prompts: {preview.counts(ready)}.", file=sys.stderr)
    with display() as report:
        outcome = run_ready(
            ready,
            overrides=overrides,
            config_file=config_file,
            write_tables=options.write_tables,
            early=early,
            report=report,
        )
    return show_outcome(outcome, write_tables=options.write_tables)


def resume(experiment_id: str, results_dir: Path | None, options: RunOptions) -> int:
    """Resume an experiment; return the exit code: 1 if it was run and did not complete, otherwise 0.

    Raises:
        ResultsError: the experiment does not exist, another process is running it, or a Slurm job is to run it.
        Interrupted: the run was interrupted again.
    """
    from lem.results.jobs import queued_in

    if not experiment_id:  # for example from an unset shell variable; an empty prefix would match every id
        raise ResultsError("--resume: the id is empty. Choose one from lem results list --all.")
    store = Store(results_dir or default_root())
    directory = store.find(experiment_id)
    if (study := queued_in(store).get(directory.id)) is not None:
        raise ResultsError(
            f"{directory.id} is to be run or finished by a job on a Slurm cluster. Follow it with lem jobs {study}"
            f"{results_flag(store)}, or cancel it first with lem jobs cancel {study}{results_flag(store)}"
        )
    state, plan = directory.free_state(take_over=options.force), directory.plan()
    if state.status in FINISHED:
        if options.write_tables and not options.dry_run:
            from lem.results.aggregate import aggregate

            aggregate(store, directory)  # the run may have been killed just before its row was written
        print(f"{directory.id} is complete; there is nothing left to run.")
        return 0
    if options.dry_run:
        print(f"{directory.id}: {progress_of(directory)}\n# dry run: nothing was measured")
        return 0
    # Someone else may have written the plan, so nothing in it counts as coming from the command line.
    spec = Location(directory.path / "spec.json")
    Consents(options).require(replace(each, where=spec) for each in all_asked(plan.experiment))
    # Inadvisable options were accepted when the experiment began; the results may have been moved since then.
    experiment = replace(plan.experiment, io=replace(plan.experiment.io, results_dir=str(store.root)))
    check_again(
        experiment,
        host.look(),
        force=True,
        has_arrivals=bool(plan.arrivals_sha256),
        in_campaign=plan.campaign is not None,
    )
    if not (options.yes or confirmed(f"Resume {directory.id} ({progress_of(directory)})?")):
        return 0
    return _resume(store, directory, options)


def _resume(store: Store, directory: ExperimentDir, options: RunOptions, early: EarlyWorker | None = None) -> int:
    from lem.runner.job import resume as resume_job
    from lem.studies.display import display

    catch_up_rows(store.root, options)
    print(f"Resuming {directory.id}: {progress_of(directory)}.", file=sys.stderr)
    with display() as report:
        outcome = resume_job(
            store,
            directory,
            write_tables=options.write_tables,
            take_over=options.force,
            early=early,
            report=report,
        )
    return show_outcome(outcome, write_tables=options.write_tables)


def _resume_question(directory: ExperimentDir) -> str:
    try:
        return f"An identical experiment is unfinished: {directory.id} ({progress_of(directory)}). Resume it?"
    except ResultsError as error:
        raise ResultsError(f"An identical experiment is unfinished, and {error} Use --fresh to start over.") from None


@paused_collector()
def _show_plan(ready: Ready) -> None:
    config = yaml.safe_dump(json.loads(to_json(ready.experiment)), sort_keys=False, allow_unicode=True)
    print(config, end="")
    model = f"found at {ready.model.path}" if ready.model else "none needed"
    print(f"# model: {model}")
    for line in preview.lines(ready):
        print(f"# {line}")
    print("# dry run: nothing was measured")
