"""`lem experiment`: compose, check, ask, run, show; one experiment; `lem.apps.sweep` does many.

`python -m lem.apps.experiment key=value …` is the same job as a plain Hydra app.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lem import host, report
from lem.aggregate import aggregate
from lem.apps.compose import CONFIG_MODULE, CONFIG_NAME, prepare, to_experiment
from lem.errors import ConfigError, Interrupted, LemError, ResultsError
from lem.job import Outcome, fingerprint, run_ready
from lem.job import resume as resume_job
from lem.preflight import Ready, check_again, preflight
from lem.progress import display
from lem.spec import Experiment
from lem.state import FINISHED
from lem.store import ExperimentDir, Store, default_root, to_json


@dataclass(frozen=True)
class Options:
    """How to go about it, apart from what is measured."""

    yes: bool = False
    dry_run: bool = False
    force: bool = False
    write_tables: bool = True
    fresh: bool = False


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


def left(directory: ExperimentDir) -> str:
    """Say how much of an experiment is done, and by that what is left."""
    plan = directory.plan()
    finished = directory.finished()
    total = plan.prompts.count * plan.experiment.cycles
    cycles = f" in {plan.experiment.cycles} cycles" if plan.experiment.cycles > 1 else ""
    return f"{sum(map(len, finished.values()))} of {total} prompts{cycles} are done"


# ------------------------------------------------------------------ what the user sees
def _warn(ready: Ready) -> None:
    for warning in ready.warnings:
        report.console(stderr=True).print(f"Warning: {warning}", markup=False, style="yellow")


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
    report.show_row(outcome.row)
    print(f"\nRaw records: {outcome.directory.path}")
    if options.write_tables:
        print(f"Table:       {outcome.store.experiments_table}")
    else:
        print(f"Not aggregated; lem aggregate {outcome.directory.id} does it.")


# ------------------------------------------------------------------ as a plain Hydra app
def hydra_app(argv: Sequence[str] | None = None) -> int:
    """Run as `python -m lem.apps.experiment`: overrides and Hydra's own flags, nothing else."""
    import hydra
    from hydra._internal.utils import get_args_parser

    arguments = list(sys.argv[1:] if argv is None else argv)
    # Overrides first, wherever they stood: --info would take one that follows it as its own value.
    given = [text for text in arguments if "=" in text and not text.startswith("-")]
    flags = [text for text in arguments if text not in given]
    asked = get_args_parser().parse_args([*given, *flags])
    codes: list[int] = []

    def task(composed: Any) -> None:
        codes.append(_run_composed(to_experiment, composed))

    try:
        if sum(map(bool, (asked.run, asked.multirun, asked.cfg, asked.info, asked.shell_completion))) > 1:
            raise ConfigError("--run, --multirun, --cfg, --info and --shell-completion exclude each other.")
        if asked.multirun and len(flags) == 1:
            from lem.apps import sweep

            return sweep.main(None, asked.overrides, Options(yes=True))
        sys.argv[1:] = [*_for_hydra(asked), *flags]
        hydra.main(version_base="1.3", config_path=f"pkg://{CONFIG_MODULE}", config_name=CONFIG_NAME)(task)()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except LemError as error:
        return _failed(error)
    return max(codes, default=0)


def _for_hydra(asked: Any) -> Sequence[str]:
    """Return the overrides in Hydra's form; its help takes none, and its completion a word of its own."""
    if asked.hydra_help:
        return []
    if asked.shell_completion:
        return list(asked.overrides)
    given = None if asked.config_dir is None else Path(asked.config_dir)
    return prepare(None, asked.overrides, groups_in=given).overrides


def _run_composed(convert: Any, composed: Any) -> int:
    """Run one composed config; errors are told here, since Hydra would show them as its own."""
    from hydra.core.hydra_config import HydraConfig

    options = Options(yes=True)
    try:
        experiment: Experiment = convert(composed)
        ready = preflight(experiment, host.look())
        _warn(ready)
        outcome = _run(ready, list(HydraConfig.get().overrides.task), None, options)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except LemError as error:
        return _failed(error)
    _show(outcome, options)
    return 0 if outcome.row.status == "completed" else 1


def _failed(error: LemError) -> int:
    print(f"Error: {error}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    sys.exit(hydra_app())
