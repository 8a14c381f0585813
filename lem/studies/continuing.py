"""Continues studies whose jobs an earlier command submitted: follows the jobs, or looks at them once.

    jobs.jsonl, experiments.json ─> ledger, manifest ─> runner with the same jobs ─> collects, submits more ─> outcome

Only one command at a time collects and submits a study's jobs: the one that holds the study's lock. This module
defines how a sweep or batch is continued; `lem.studies.campaign` defines this for campaigns.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lem.errors import ResultsError
from lem.results.codec import from_json
from lem.results.directory import ExperimentDir
from lem.results.jobs import FILE, OPEN, InJob, Ledger, attending, awaited, cells_sha256
from lem.results.store import Store, results_flag
from lem.results.tables import Tables
from lem.studies.ask import RunOptions, print_warnings
from lem.studies.checks import RecentPrompts
from lem.studies.display import Quiet, StudyDisplay
from lem.studies.manifest import Cell, Manifest, experiment_of, read_manifest
from lem.studies.slurm import AT_ONCE, SlurmRunner
from lem.studies.slurm_job import JobFile
from lem.studies.study import Left, Runner, attend, run_study

# How often to look whether another command still holds the lock of a study, in seconds.
BUSY_S = 2.0


@dataclass(frozen=True)
class Submitted:
    """A study whose jobs were submitted: its directory, and the functions with which it is continued and shown.

    `read` returns the manifest, `runner` makes a runner, and `present` shows the outcome and returns the exit code.
    """

    directory: Path
    read: Callable[[Ledger], Manifest]
    runner: Callable[[Manifest, StudyDisplay, RunOptions, Ledger], SlurmRunner]
    present: Callable[[Manifest], int]


@dataclass(frozen=True)
class Seen:
    """What a look at a study found: the states of its cells, and Slurm's report about the cells that have not ended."""

    ledger: Ledger
    manifest: Manifest
    in_jobs: Mapping[Path, InJob]


# ------------------------------------------------------------------ sweeps and batches
def run_as_jobs(
    cells: Sequence[Cell],
    options: RunOptions,
    overrides: Sequence[str],
    prompts: RecentPrompts,
    *,
    head: str,
    fail_fast: bool = False,
) -> int:
    """Run the checked cells of a sweep or batch as jobs or, if the cells have already been submitted, follow the jobs.

    The arguments and the exit code are those of `run_study`.
    """
    assert options.launcher is not None
    if not options.fresh and (directory := _submitted_before(cells)) is not None:
        if not options.dry_run:
            return follow(sweep_at(directory), options)
        print(f"Already submitted ({directory}); without --dry-run, this command would follow the jobs.")
    runner = partial(SlurmRunner, options=options, prompts=prompts, slurm=options.launcher.options)
    return run_study(cells, options, overrides, runner, head=head, at_once=AT_ONCE, fail_fast=fail_fast)


def _submitted_before(cells: Sequence[Cell]) -> Path | None:
    """Return the directory of the newest study with the same cells whose outcome has not been shown, or None."""
    wanted = cells_sha256(cell.fingerprint for cell in cells)
    roots = dict.fromkeys(experiment_of(cell).io.results_dir for cell in cells)
    found = [ledger for root in roots for ledger in awaited(Store(root))]
    same = [ledger.directory for ledger in found if ledger.terms.cells_sha256 == wanted]
    return same[-1] if same else None


def sweep_at(directory: Path) -> Submitted:
    """Return the sweep or batch in a directory as a study whose jobs can be followed."""

    def read(ledger: Ledger) -> Manifest:
        return read_manifest(ledger.directory, ledger.terms.head, fail_fast=ledger.terms.fail_fast)

    def runner(manifest: Manifest, display: StudyDisplay, options: RunOptions, ledger: Ledger) -> SlurmRunner:
        return SlurmRunner(manifest, display, options, RecentPrompts(), ledger.terms.slurm)

    return Submitted(directory.resolve(), read, runner, _present)


def _present(manifest: Manifest) -> int:
    """Print the summary of a sweep or batch, reading its rows from the results tables; return the exit code."""
    directories = [state.directory for state in manifest.states if state.directory is not None]
    roots = dict.fromkeys(directory.path.parent.parent for directory in directories)
    rows = {row.experiment_id: row for root in roots for row in Tables(Store(root)).rows()[0]}
    for number, state in enumerate(manifest.states):
        if state.row is None and state.directory is not None:
            manifest.states[number] = replace(state, row=rows.get(state.directory.id))
    manifest.show()
    return 0 if manifest.all_completed else 1


# ------------------------------------------------------------------ following
def follow(study: Submitted, options: RunOptions) -> int:
    """Follow the jobs of a study until they end, submit more if necessary, and show the outcome; return the exit code.

    With `options.detach`, the jobs are looked at only once.
    """
    with _alone(study.directory):
        ledger = ledger_of(study.directory)
        print(f"Following the jobs of {study.directory}.", file=sys.stderr)
        with working_in(ledger.terms.working_dir):
            manifest = study.read(ledger)
            if not ledger.is_over:
                try:
                    _continue(study, manifest, ledger, _with_terms(options, ledger))
                except Left as left:
                    return left.show()
            code = study.present(manifest)
        if not ledger.is_shown:
            ledger.forget()
    return code


def _continue(study: Submitted, manifest: Manifest, ledger: Ledger, options: RunOptions) -> None:
    def work(runner: Runner) -> None:
        assert isinstance(runner, SlurmRunner)
        if ledger.is_cancelled:
            runner.stop()
        elif options.detach:
            runner.look_once(submits=True)
            if not runner.is_over:
                raise Left(runner.how_to_return())
        else:
            runner.look()
            runner.wait()

    def restored(manifest: Manifest, display: StudyDisplay) -> SlurmRunner:
        return _restored(study, manifest, display, options, ledger)

    ended = [number for number, state in enumerate(manifest.states) if state.status not in OPEN]
    again = f"To continue: lem jobs {name_of(ledger)}"
    attend(manifest, restored, work, at_once=AT_ONCE, settled=ended, again=again)


def look_at(study: Submitted, *, submits: bool) -> Seen:
    """Look once at the jobs of a study: collect those that have ended and, if `submits`, submit more.

    If another command holds the study's lock, nothing is changed.
    """
    with attending(study.directory) as is_alone:
        ledger = ledger_of(study.directory)
        with working_in(ledger.terms.working_dir):
            manifest = study.read(ledger)
            runner = _restored(study, manifest, Quiet(), _with_terms(RunOptions(yes=True), ledger), ledger)
            if is_alone and ledger.is_cancelled and not ledger.is_over:
                runner.stop()
            elif is_alone and not ledger.is_over:
                runner.look_once(submits=submits)
            else:
                runner.peek()
            return Seen(ledger, manifest, runner.in_jobs())


def cancel(study: Submitted) -> Seen | None:
    """Cancel the jobs of a study and record what remains to be resumed.

    If another command holds the study's lock, this function only cancels the jobs and returns None; the other command
    records their end.
    """
    with attending(study.directory) as is_alone:
        ledger = ledger_of(study.directory)
        with working_in(ledger.terms.working_dir):
            manifest = study.read(ledger)
            runner = _restored(study, manifest, Quiet(), _with_terms(RunOptions(yes=True), ledger), ledger)
            if not is_alone:
                runner.cancel_jobs()
                return None
            if not ledger.is_over:
                runner.look_once(submits=False)
                runner.stop()
            ledger.forget()
            return Seen(ledger, manifest, {})


def ledger_of(directory: Path) -> Ledger:
    """Read the ledger of a study; raises `ResultsError` if it is missing or damaged."""
    ledger = Ledger.read(directory)
    if ledger is None:
        raise ResultsError(
            f"{directory} holds no study with Slurm jobs: {FILE} is missing. To list the studies: lem jobs"
        )
    return ledger


def name_of(ledger: Ledger) -> str:
    """Return the name by which `lem jobs` finds a study, with the flag for its results directory if that is needed."""
    return f"{ledger.directory.name}{results_flag(Store(ledger.terms.results_dirs[0]))}"


def _with_terms(options: RunOptions, ledger: Ledger) -> RunOptions:
    """Return the options; each option that is also in the ledger gets the value that it had at submission."""
    terms = ledger.terms
    return replace(
        options,
        force=terms.force,
        write_tables=terms.write_tables,
        one_job=terms.one_job,
        per_job=terms.per_job,
        launcher=None,
    )


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the lock of a study; wait for it if another command holds it."""
    has_said_so = False
    while True:
        with attending(directory) as is_alone:
            if is_alone:
                yield
                return
        if not has_said_so:
            print_warnings("Another command is following these jobs; this command continues when that one has ended.")
            has_said_so = True
        time.sleep(BUSY_S)


@contextmanager
def working_in(directory: str) -> Iterator[None]:
    """Within the block, make the directory in which a study was started the working directory.

    Relative paths in the study's experiments refer to that directory.
    """
    before = os.getcwd()
    try:
        os.chdir(directory)
    except OSError as error:
        print_warnings(
            f"The directory in which the study was started cannot be used ({directory}: {error.strerror}); relative "
            "paths in its experiments are looked up in the current directory."
        )
    try:
        yield
    finally:
        os.chdir(before)


# ------------------------------------------------------------------ restoring a runner
def _restored(
    study: Submitted, manifest: Manifest, display: StudyDisplay, options: RunOptions, ledger: Ledger
) -> SlurmRunner:
    """Return a runner that knows the jobs in the ledger.

    If the manifest and the ledger disagree, the ledger is right, because it is stored before anything is submitted,
    whereas the manifest is stored only now and then.
    """
    runner = study.runner(manifest, display, options, ledger)
    runner.ledger = ledger
    last_job = _last_jobs(runner, ledger)
    cells_of: dict[str, list[int]] = {}
    for number, state in enumerate(manifest.states):
        if number not in last_job:
            if state.status == "not run" and state.directory is not None:
                runner.adopt_plan(number, state.directory)
            continue
        job_id, step = last_job[number], runner.steps[number]
        is_outdated = state.directory is None or str(state.directory.path) != step.directory
        if is_outdated or state.status in OPEN:
            status, log = ("queued", runner.log_of(job_id)) if job_id else ("not run", None)
            directory = ExperimentDir(step.directory)
            manifest.states[number] = replace(state, status=status, directory=directory, row=None, error=None, log=log)
            cells_of.setdefault(job_id, []).append(number)
    cells_of.pop("", None)
    runner.restore_jobs(cells_of)
    return runner


def _last_jobs(runner: SlurmRunner, ledger: Ledger) -> dict[int, str]:
    """Give the runner the steps of all submitted cells; return the last job of each cell.

    The job is an empty string if it is not known yet whether Slurm accepted it.
    """
    found: dict[int, str] = {}
    for array in ledger.arrays:
        if array.ids == []:
            continue
        job_file = _job_file(runner.folder / array.file)
        for task, cells in enumerate(array.jobs):
            for number, step in zip(cells, job_file.tasks[task], strict=True):
                runner.steps[number] = step
                found[number] = array.ids[task] if array.ids else ""
    return found


def _job_file(file: Path) -> JobFile:
    try:
        return from_json(JobFile, file.read_bytes())
    except (OSError, ValueError) as error:
        raise ResultsError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}.") from None
