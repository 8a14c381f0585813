"""Runs or resumes one experiment, from its checked configuration to its row in the tables.

The command line, the cells of studies and callers of the Python API all run experiments through this module. It knows
nothing about Hydra or about how results are shown.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from msgspec import structs

from lem.errors import Interrupted, ResultsError
from lem.machine import host
from lem.quantities import timestamp
from lem.record import ErrorInfo
from lem.results.aggregate import aggregate, aggregate_together, read
from lem.results.codec import arrivals_sha256, config_sha256
from lem.results.directory import ExperimentDir
from lem.results.files import FULL, needs_space
from lem.results.plan import FINISHED, Plan, PromptsInfo, State, StateName
from lem.results.schema import ExperimentRow
from lem.results.store import Store, resume_command
from lem.runner.early import EarlyWorker, early_worker
from lem.runner.launch import INTERRUPTED, launch, record_interruption, record_loss
from lem.runner.preflight import Ready, preflight, validated
from lem.runner.progress import Report, silent
from lem.runner.stopping import cause_of, signals_ignored
from lem.spec.campaign import CampaignCell
from lem.spec.experiment import Experiment
from lem.spec.processes import process_counts
from lem.spec.schedule import ScheduleRun

log = logging.getLogger(__name__)

# Runs an attempt at an experiment on a host's GPUs, as lem.runner.launch.launch does.
Launcher = Callable[[ExperimentDir, int, host.Host, Report], None]


@dataclass(frozen=True)
class Outcome:
    """How an experiment ended, and where its files are.

    `problem` is the reason why writing the row to the tables failed; None if the row was written or was not to be
    written.
    """

    row: ExperimentRow
    directory: ExperimentDir
    store: Store
    problem: str | None = None


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
        force: run the experiment even if it is inadvisable.
        report: called with events as the run proceeds.

    Returns:
        How the run ended: `row` is the experiment's row, whose attributes are the columns of the table `experiments`,
        with their units in their names; `directory` has the raw files, and `store` is the results directory. A run that
        fails is returned as well; its row has the status `failed` and, under `error`, the reason.

    Raises:
        ConfigError: the experiment cannot run, because values are wrong, contradict each other, or do not suit this
            machine or its files; the error lists all problems.
        ResultsError: the results directory cannot be used.
        RunError: the disk is full.
        Interrupted: the run was stopped from outside; the finished requests are kept.
    """
    experiment, machine = validated(experiment), host.look()
    with early_worker(experiment, machine) as early:
        ready = preflight(experiment, machine, force=force)
        return run_ready(ready, early=early, report=report)


def run_ready(
    ready: Ready,
    *,
    overrides: Sequence[str] = (),
    config_file: Path | None = None,
    write_tables: bool = True,
    shared_with: int = 0,
    unfinished: ExperimentDir | None = None,
    campaign: CampaignCell | None = None,
    schedule: ScheduleRun | None = None,
    claimed: Callable[[ExperimentDir], None] | None = None,
    early: EarlyWorker | None = None,
    report: Report = silent,
    launcher: Launcher = launch,
) -> Outcome:
    """Run one experiment that has passed preflight.

    If the model or the engine fails, no exception is raised; the row has the status and the error.

    Args:
        ready: the result of preflight.
        overrides: the command line's overrides, for the plan.
        config_file: the user's config file, for the plan.
        write_tables: write the row to the tables, not only the raw records.
        shared_with: the maximum number of other experiments on this machine that may affect the measurement.
        unfinished: an earlier, unfinished run of the same experiment, to resume instead of starting a new one.
        campaign: the experiment's place in a campaign, for the plan.
        schedule: the run of a schedule to which the experiment belongs, for the plan.
        claimed: called with the experiment's directory before the run starts, and therefore even if the run fails.
        early: a worker that has been importing the engine; `lem.runner.launch.launch` then runs the experiment on it.
        report: receives the progress.
        launcher: runs the workers until they end; not used with `early`.

    Raises:
        Interrupted: the run was stopped from outside; finished requests are kept and the row is written.
    """
    store, directory = planned(
        ready,
        overrides=overrides,
        config_file=config_file,
        shared_with=shared_with,
        unfinished=unfinished,
        campaign=campaign,
        schedule=schedule,
        claimed=claimed,
    )
    return _execute(store, directory, write_tables, report, _on(early, launcher))


def planned(
    ready: Ready,
    *,
    overrides: Sequence[str] = (),
    config_file: Path | None = None,
    shared_with: int = 0,
    unfinished: ExperimentDir | None = None,
    campaign: CampaignCell | None = None,
    schedule: ScheduleRun | None = None,
    claimed: Callable[[ExperimentDir], None] | None = None,
) -> tuple[Store, ExperimentDir]:
    """Claim an id and write the plan, or check the inputs of an unfinished run; return where the files are.

    Nothing is run yet. The arguments are those of `run_ready`.
    """
    store = Store(ready.experiment.io.results_dir)
    directory = unfinished or store.claim()
    if claimed is not None:
        claimed(directory)
    with _full_disk(store, directory):
        if unfinished:
            directory.check_inputs()  # the files may have been damaged in the meantime
            directory.share(shared_with)
        else:
            plan = _plan(directory.id, ready, overrides, config_file)
            plan = replace(plan, shared_with=shared_with, campaign=campaign, schedule=schedule)
            directory.write_plan(plan, ready.prompts.texts, ready.arrivals_s)
    return store, directory


def fingerprint(ready: Ready) -> str:
    """Return the experiment's fingerprint, which is the same for all runs of the same experiment."""
    return _plan("", ready, (), None).fingerprint


def resume(
    store: Store,
    directory: ExperimentDir,
    *,
    write_tables: bool = True,
    take_over: bool = False,
    leave_marked: bool = False,
    early: EarlyWorker | None = None,
    report: Report = silent,
    launcher: Launcher = launch,
) -> Outcome:
    """Resume an experiment: run only the unfinished part, with the same configuration and prompts.

    Args:
        store: the results directory.
        directory: the experiment's directory.
        write_tables: write the row to the tables, not only the raw records.
        take_over: resume even if another host is marked as running the experiment.
        leave_marked: leave the experiment marked as unfinished, because another process writes its row.
        early: as in `run_ready`.
        report: receives the progress.
        launcher: as in `run_ready`.

    Raises:
        ResultsError: the experiment has nothing left to run, another process is running it, or its files are damaged.
        Interrupted: the run was stopped from outside again.
    """
    if directory.state().status in FINISHED:
        raise ResultsError(f"{directory.id} is complete; there is nothing left to run.")
    if directory.is_fruitless() and not directory.plan().unfinished_cycles(directory.finished()):
        raise ResultsError(
            f"In at least one cycle of {directory.id}, every request failed, and resuming does not repeat failed "
            "requests. Use --fresh to run the experiment again."
        )
    directory.check_inputs()  # the files may have been damaged in the meantime
    launcher = _on(early, launcher)
    return _execute(store, directory, write_tables, report, launcher, take_over=take_over, leave_marked=leave_marked)


def _on(early: EarlyWorker | None, launcher: Launcher) -> Launcher:
    return launcher if early is None else partial(launch, early=early)


def fail(store: Store, directory: ExperimentDir, error: ErrorInfo, slurm_job_id: str, *, write_tables: bool) -> Outcome:
    """Record the failure of an experiment whose processes are gone or were never started, and write its row.

    Args:
        store: the results directory.
        directory: the experiment's directory, with its plan.
        error: why the experiment failed.
        slurm_job_id: the job that was to run the experiment; empty if there was none.
        write_tables: write the row to the tables, not only the raw records.
    """
    with suppress(ResultsError), directory.hold(exclusive=True):  # wait for processes that are just ending
        pass
    state = directory.state()
    record_loss(directory, max(1, state.attempt), error, slurm_job_id or None, state.host)
    directory.write_state(State("failed", max(1, state.attempt), timestamp(), error=error.message))
    store.mark_unfinished(directory.id, directory.plan().fingerprint)
    row, problem = _row(store, directory, write_tables)
    return Outcome(row, directory, store, problem)


def collect(store: Store, directory: ExperimentDir, *, write_tables: bool) -> Outcome:
    """Write the row of an experiment that another process, such as a job on another host, has run to its end."""
    row, problem = _row(store, directory, write_tables)
    if problem is None and row.status == "completed":
        store.mark_finished(directory.id)
    return Outcome(row, directory, store, problem)


def collect_together(store: Store, directories: Sequence[ExperimentDir]) -> list[Outcome]:
    """Write the rows of experiments that have ended, many rows to one file, and return the experiments' outcomes.

    Experiments whose rows cannot be written in this way are left out. For each of these, call `collect`, which writes
    the row or returns the reason why it cannot.
    """
    try:
        rows = aggregate_together(store, directories)
    except (ResultsError, OSError):
        return []
    by_id = {directory.id: directory for directory in directories}
    for name, row in rows.items():
        if row.status == "completed":
            store.mark_finished(name)
    return [Outcome(row, by_id[name], store) for name, row in rows.items()]


def _execute(
    store: Store,
    directory: ExperimentDir,
    write_tables: bool,
    report: Report,
    launcher: Launcher,
    *,
    take_over: bool = False,
    leave_marked: bool = False,
) -> Outcome:
    """Run the unfinished part, write the outcome to the state file, and write the row."""
    plan = directory.plan()
    machine = host.look().only(plan.experiment.gpus)
    with _full_disk(store, directory), directory.run(take_over=take_over) as attempt:
        # Marked only while the lock is held, so that another run of the same configuration does not resume this
        # experiment.
        store.mark_unfinished(directory.id, plan.fingerprint)
        log.debug("experiment %s, attempt %d, in %s", directory.id, attempt, directory.path)
        try:
            began_s = time.monotonic()
            if plan.unfinished_cycles(directory.finished()):
                launcher(directory, attempt, machine, report)
                log.debug("the workers took %.2f s", time.monotonic() - began_s)
                _log_times(directory, attempt)
        except (Interrupted, KeyboardInterrupt) as stop:
            with signals_ignored():
                reason = str(stop)
                if isinstance(stop, KeyboardInterrupt):  # just before the launcher took care of signals
                    reason = INTERRUPTED
                    record_interruption(directory, attempt, f"stopped by {cause_of(stop)}")
                directory.write_state(directory.state().now("interrupted", reason))
                _, problem = _row(store, directory, write_tables)
            text = " ".join(filter(None, [reason, problem]))
            raise Interrupted(text, f"To resume: {resume_command(store, directory)}") from None
        status, error = _how_it_ended(directory, plan)
        directory.write_state(directory.state().now(status, error))
        began_s = time.monotonic()
        row, problem = _row(store, directory, write_tables)
        log.debug("computing and writing the rows took %.2f s", time.monotonic() - began_s)
        # This comes last, so that `catch_up` finds an experiment whose process was killed before the rows were written.
        if problem is None and not leave_marked and not plan.unfinished_cycles(directory.finished()):
            store.mark_finished(directory.id)
        return Outcome(row, directory, store, problem)


def _log_times(directory: ExperimentDir, attempt: int) -> None:
    """Log where the time of an attempt's processes went; the times are in their records."""
    if not log.isEnabledFor(logging.DEBUG):
        return
    for record in directory.records():
        if record.attempt != attempt:
            continue
        own = {} if record.own_time is None else structs.asdict(record.own_time)
        times_s = {name.removesuffix("_s"): seconds for name, seconds in own.items()}
        recording_s = times_s.pop("recording", None)
        times_s |= {phase.name: phase.duration_s for phase in record.phases}
        parts = [f"{name} {seconds:.2f}" for name, seconds in times_s.items() if seconds is not None]
        parts += [] if recording_s is None else [f"of the window, recording {recording_s:.3f}"]
        log.debug("seconds of process %d in cycle %d: %s", record.rank, record.cycle, ", ".join(parts))


def _how_it_ended(directory: ExperimentDir, plan: Plan) -> tuple[StateName, str | None]:
    has_all = not plan.unfinished_cycles(directory.finished())
    if has_all and not directory.is_fruitless():  # even if a process failed after its last request
        return "completed", None
    records = directory.records()
    attempt = max(record.attempt for record in records)
    last = [record for record in records if record.attempt == attempt]
    statuses = {record.status for record in last}
    # When one process fails, the others are interrupted, so failures come first.
    errors = sorted((r for r in last if r.error), key=lambda r: r.status != "failed")
    message = next((r.error.message for r in errors if r.error), None)
    return ("interrupted" if "interrupted" in statuses and "failed" not in statuses else "failed"), message


def _full_disk(store: Store, directory: ExperimentDir) -> AbstractContextManager[None]:
    """If the disk becomes full within the block, raise a one-line error with a remedy."""
    return needs_space(store.root, f"Free some space, then run {resume_command(store, directory)}")


def _row(store: Store, directory: ExperimentDir, write_tables: bool) -> tuple[ExperimentRow, str | None]:
    """Write an experiment's row to the tables if `write_tables`; return the row, and the reason if writing failed.

    The row is returned even if the tables are damaged, so that the results can be shown.
    """
    problem = None
    if write_tables:
        try:
            return aggregate(store, directory, strict=False, force=True), None
        except ResultsError as error:
            problem = str(error)
        except OSError as error:
            if error.errno in FULL:
                raise
            problem = f"cannot write to {error.filename or store.root}: {error.strerror or error}."
        problem = f"The row is not in the tables: {problem} Fix that, then run lem aggregate {directory.id} --force."
    return read(directory, strict=False).row, problem


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
            files=prompts.files,
        ),
        config_sha256=config_sha256(ready.experiment),
        arrivals_sha256="" if ready.arrivals_s is None else arrivals_sha256(ready.arrivals_s),
        processes=processes,
        replicas=replicas,
        forced=ready.forced,
        overrides=tuple(overrides),
        config_file=str(config_file) if config_file else None,
    )
