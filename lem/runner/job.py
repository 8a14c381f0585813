"""One experiment from a checked configuration to its row: preflight, claim an id, launch, aggregate; and again.

The same job for the command line, for a sweep's cell and for a library user; knows nothing of Hydra or of how
results are shown.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lem.errors import Interrupted, ResultsError, RunError
from lem.machine import host
from lem.results.aggregate import aggregate, read
from lem.results.codec import arrivals_sha256, config_sha256
from lem.results.directory import ExperimentDir
from lem.results.plan import FINISHED, Plan, PromptsInfo, StateName
from lem.results.schema import ExperimentRow
from lem.results.store import Store, resume_command
from lem.runner.launch import launch, undisturbed
from lem.runner.preflight import Ready, preflight
from lem.runner.progress import Report, silent
from lem.spec.experiment import Experiment
from lem.spec.processes import process_counts
from lem.units import timestamp

log = logging.getLogger(__name__)

# Runs an attempt at an experiment on the GPUs of a host, as lem.runner.launch.launch does.
Launcher = Callable[[ExperimentDir, int, host.Host, Report], None]


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended and where its files are."""

    row: ExperimentRow
    directory: ExperimentDir
    store: Store


def run(experiment: Experiment, *, force: bool = False, report: Report = silent) -> Outcome:
    """Check and run one experiment, as `lem experiment` does.

    >>> import lem
    >>> from lem.spec.engines import SimulatedBackend
    >>> from lem.spec.experiment import Dataset, Energy
    >>> experiment = lem.Experiment(
    ...     model="any",
    ...     backend=SimulatedBackend(),
    ...     dataset=Dataset(path="builtin:sample", sample_size=4),
    ...     energy=Energy(name="none"),
    ... )
    >>> outcome = lem.run(experiment)
    >>> outcome.row.status, outcome.row.requests_completed, str(outcome.store.root)
    ('completed', 4, 'results')

    Args:
        experiment: the configuration; `experiment.io.results_dir` is where the results go.
        force: run it even if it is inadvisable.
        report: called with events as the run proceeds.

    Raises:
        ConfigError: the experiment cannot run.
        RunError: it began and failed.
        Interrupted: it was stopped from outside.
    """
    return run_ready(preflight(experiment, host.look(), force=force), report=report)


def run_ready(
    ready: Ready,
    *,
    overrides: Sequence[str] = (),
    config_file: Path | None = None,
    write_tables: bool = True,
    shared_with: int = 0,
    unfinished: ExperimentDir | None = None,
    claimed: Callable[[ExperimentDir], None] | None = None,
    report: Report = silent,
    launcher: Launcher = launch,
) -> Outcome:
    """Run one experiment that has passed preflight.

    A failure of the model or the engine is not an exception: the row's status and error say it.

    Args:
        ready: what preflight returned.
        overrides: those of the command line, for the record.
        config_file: the user's, for the record.
        write_tables: write the row to the tables, not the raw records alone.
        shared_with: other experiments that run on this machine at the same time, at most.
        unfinished: the same experiment where it was left unfinished, to go on with instead of a new one.
        claimed: told the experiment's directory before the run, whatever then becomes of it.
        report: told how far it is.
        launcher: runs the workers to their end.

    Raises:
        Interrupted: stopped from outside; what was measured is kept, and its row written.
    """
    store = Store(Path(ready.experiment.io.results_dir))
    directory = unfinished or store.claim()
    if claimed is not None:
        claimed(directory)
    with _full_disk(store, directory):
        if unfinished:
            directory.check_inputs()  # they may have been damaged since
            directory.share(shared_with)
        else:
            plan = replace(_plan(directory.id, ready, overrides, config_file), shared_with=shared_with)
            directory.write_plan(plan, ready.prompts.texts, ready.arrivals_s)
    return _execute(store, directory, write_tables, report, launcher)


def fingerprint(ready: Ready) -> str:
    """Return what makes an experiment the same as another one."""
    return _plan("", ready, (), None).fingerprint


def resume(
    store: Store,
    directory: ExperimentDir,
    *,
    write_tables: bool = True,
    take_over: bool = False,
    report: Report = silent,
    launcher: Launcher = launch,
) -> Outcome:
    """Go on with an experiment: the same configuration and prompts, only what is not finished.

    Args:
        store: the results directory.
        directory: the experiment.
        write_tables: write the row to the tables, not the raw records alone.
        take_over: also where another host says that it runs it.
        report: told how far it is.
        launcher: runs the workers to their end.

    Raises:
        ResultsError: it is completed already, another process runs it, or its files are damaged.
        Interrupted: stopped from outside once more.
    """
    if directory.state().status in FINISHED:
        raise ResultsError(f"{directory.id} is complete; there is nothing left to run.")
    directory.check_inputs()  # they may have been damaged since
    return _execute(store, directory, write_tables, report, launcher, take_over=take_over)


def _execute(
    store: Store,
    directory: ExperimentDir,
    write_tables: bool,
    report: Report,
    launcher: Launcher,
    *,
    take_over: bool = False,
) -> Outcome:
    """Run what is not finished, say how it went in the state, and write the row."""
    plan = directory.plan()
    with _full_disk(store, directory), directory.run(take_over=take_over) as attempt:
        # Only now, while it is running: others with the same configuration must not take it for one left behind.
        store.mark_unfinished(directory.id, plan.fingerprint)
        log.debug("experiment %s, attempt %d, in %s", directory.id, attempt, directory.path)
        try:
            if not _is_complete(directory, plan):
                launcher(directory, attempt, host.look().only(plan.experiment.gpus), report)
        except Interrupted as stop:
            with undisturbed():
                directory.write_state(directory.state().now("interrupted", str(stop)))
                _row(store, directory, write_tables)
            raise Interrupted(f"{stop} To go on: {resume_command(store, directory)}") from None
        status, error = _how_it_went(directory, plan)
        directory.write_state(directory.state().now(status, error))
        if status == "completed":
            store.mark_finished(directory.id)
        return Outcome(_row(store, directory, write_tables), directory, store)


def _is_complete(directory: ExperimentDir, plan: Plan) -> bool:
    """Tell whether every prompt of every cycle is done: then nothing is to be run, however the processes ended."""
    finished = directory.finished()
    return all(len(finished.get(cycle, ())) == plan.prompts.count for cycle in range(1, plan.experiment.cycles + 1))


def _how_it_went(directory: ExperimentDir, plan: Plan) -> tuple[StateName, str | None]:
    if _is_complete(directory, plan):
        return "completed", None
    records = directory.records()
    last = max(record.attempt for record in records)
    # Where one failed, the others were stopped for its sake.
    told = sorted((r for r in records if r.attempt == last and r.error), key=lambda r: r.status != "failed")
    error = next((r.error.message for r in told if r.error), None)
    interrupted = any(r.attempt == last and r.status == "interrupted" for r in records)
    failed = any(r.attempt == last and r.status == "failed" for r in records)
    return ("interrupted" if interrupted and not failed else "failed"), error


@contextmanager
def _full_disk(store: Store, directory: ExperimentDir) -> Iterator[None]:
    """Say in a sentence that there is no space, and what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(
            f"There is no space left in {store.root}; what was written is kept. Free some, then "
            f"{resume_command(store, directory)}"
        ) from None


def _row(store: Store, directory: ExperimentDir, write_tables: bool) -> ExperimentRow:
    return aggregate(store, directory, strict=False, force=True) if write_tables else read(directory, strict=False).row


def _plan(experiment_id: str, ready: Ready, overrides: Sequence[str], config_file: Path | None) -> Plan:
    prompts = ready.prompts
    processes, replicas = process_counts(ready.experiment)
    return Plan(
        experiment_id=experiment_id,
        created_at=timestamp(),
        experiment=ready.experiment,
        prompts=PromptsInfo(
            count=len(prompts.texts),
            sha256=prompts.sha256,
            source=prompts.source,
            split=prompts.split,
            column=prompts.column,
            available=prompts.available,
            dropped_empty=prompts.dropped_empty,
        ),
        config_sha256=config_sha256(ready.experiment),
        arrivals_sha256="" if ready.arrivals_s is None else arrivals_sha256(ready.arrivals_s),
        processes=processes,
        replicas=replicas,
        overrides=tuple(overrides),
        config_file=str(config_file) if config_file else None,
    )
