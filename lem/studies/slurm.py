"""Runs the cells of a study as Slurm jobs: plans and submits them, waits for them, and collects their records.

    cell ─> preflight for the job's machine ─> claimed and planned ─> submitted ─> queue and state.json watched ─> row

This process and a job (`lem.studies.slurm_job`) communicate only through files on a shared file system. An experiment's
own state tells whether the experiment has ended. Slurm, which knows only jobs, tells whether a job waits, runs or has
ended, and for what reason.

Everything that is submitted is in a ledger (`lem.results.jobs`), so that this process may end before the jobs do; from
the ledger, `lem.studies.continuing` then creates a runner that continues where this process stopped.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from lem.backends import backend_class
from lem.config.launcher import Refused, complete, submit
from lem.errors import Interrupted, ResultsError
from lem.machine import slurm
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.machine.slurm import Queued, Unreachable
from lem.record import ErrorInfo
from lem.results.codec import to_json
from lem.results.directory import ExperimentDir
from lem.results.files import sync, synced_later, write_atomically
from lem.results.jobs import FOLDER, OPEN, InJob, Ledger, Terms, cells_sha256
from lem.results.plan import FINISHED
from lem.results.store import Store, results_flag
from lem.runner.job import Outcome, collect, collect_together, fail, planned
from lem.runner.preflight import Ready, preflight
from lem.runner.stopping import signals_blocked, signals_raise
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Experiment
from lem.spec.processes import gpus_needed, process_counts
from lem.spec.slurm import SlurmOptions
from lem.studies import slurm_job
from lem.studies.ask import RunOptions, print_warnings, wants_to_cancel
from lem.studies.checks import RecentPrompts
from lem.studies.display import StudyDisplay
from lem.studies.manifest import Manifest, row_of
from lem.studies.slurm_job import JobFile, Step
from lem.studies.study import Left, Runner
from lem.workload.traffic import recorded_times_s

# The time before the first query of the queue, and the factor by which the time between two queries grows.
FIRST_PAUSE_S, SLOWER = 0.5, 1.3
# How long Slurm's controller may fail to answer before its jobs count as lost.
UNREACHABLE_S = 600.0
# How long canceled jobs may take to save their finished requests.
STOP_S = 30.0
# How long sbatch may still take to submit an array after the command that called it was killed.
SUBMITTING_S = 30.0
LOST = "SlurmJobLost"
LINES_OF_LOG = 2
# Jobs run side by side, so they are shown like the runs of a parallel batch.
AT_ONCE = 2
# More GPUs than any node has; used to ask a backend whether it would run on GPUs at all.
MANY = 64
# What Slurm says if a user, account, QOS or cluster has as many jobs as are allowed. More are accepted as jobs end.
TOO_MANY_JOBS = re.compile(r"(Max|Grp)Submit|temporarily unable|temporarily unavailable")
# How many tasks of an array may run at once if the user sets no limit; submitit's default is 256.
UNLIMITED = 1_000_000


# ------------------------------------------------------------------ what a job needs
def gpus_of_job(experiment: Experiment, options: SlurmOptions) -> int:
    """Return how many GPUs an experiment's job requests.

    This is `gpus_per_node` or, if that is not set, the number of GPUs that the experiment needs.
    """
    if options.gpus_per_node is not None:
        return options.gpus_per_node
    if not backend_class(experiment.backend.name).wants_gpu(experiment, _machine(MANY)):
        return 0
    named = len(experiment.gpus or ())
    if isinstance(experiment.backend, SimulatedBackend):
        return max(named, experiment.backend.gpus)
    return max(named, gpus_needed(experiment))


def machine_of_job(experiment: Experiment, options: SlurmOptions) -> Host:
    """Return the machine that the job will have; before the job starts, only the number of its GPUs is known."""
    return _machine(gpus_of_job(experiment, options))


def preflight_for_job(
    experiment: Experiment, options: RunOptions, prompts: RecentPrompts, *, in_campaign: bool = False
) -> Ready:
    """Check an experiment against the hardware that its job will get; raises `BadInput` with all problems."""
    assert options.launcher is not None
    machine = machine_of_job(experiment, options.launcher.options)
    return preflight(experiment, machine, force=options.force, in_campaign=in_campaign, load=prompts, elsewhere=True)


@cache
def _machine(gpus: int) -> Host:
    return Host(tuple(Gpu(i, f"granted by Slurm, {i}", "GPU of the job", None) for i in range(gpus)))


def sbatch_parameters(experiments: Sequence[Experiment], options: SlurmOptions) -> dict[str, Any]:
    """Return submitit's parameters for a job that runs these experiments one after another.

    A parameter without a value is left out, so that the cluster's default applies.
    """
    gpus = max(gpus_of_job(each, options) for each in experiments)
    processes = max(process_counts(each)[0] for each in experiments)
    cores = options.cpus_per_task or (None if options.exclusive else processes)
    # 0 requests all memory of the node, which an exclusive job does not get by default.
    memory = f"{round(options.mem_gb * 1024)}MB" if options.mem_gb else "0" if options.exclusive else None
    container = [] if options.container is None else [f"--container-image={options.container}"]
    wanted = {
        "job_name": "lem",
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "comment": options.comment,
        "constraint": options.constraint,
        "nodelist": options.nodelist,
        "exclude": options.exclude,
        "exclusive": options.exclusive or None,
        "time": options.timeout_min,
        "signal_delay_s": options.signal_delay_s,
        "nodes": 1,
        "ntasks_per_node": 1,
        "cpus_per_task": cores,
        "mem": memory,
        "gpus_per_node": None if not gpus else f"{options.gpu_type}:{gpus}" if options.gpu_type else gpus,
        "setup": list(options.setup) or None,
        "array_parallelism": options.array_parallelism or UNLIMITED,
        "srun_args": [*container, *options.srun_args],
        "stderr_to_stdout": True,
        "additional_parameters": {
            "requeue" if options.requeue else "no-requeue": True,
            **options.additional_parameters,
        },
    }
    # submitit has a default for this parameter, which must be overridden even if the value is None.
    return {name: value for name, value in wanted.items() if value is not None} | {"wckey": options.wckey}


# ------------------------------------------------------------------ jobs
@dataclass
class Job:
    """A submitted job, the cells that it runs in order, and its last known state; times are from `time.monotonic`."""

    id: str
    cells: list[int]
    # The number of the job's other cells, which ended before this command began or were given to a later job.
    others: int = 0
    node: str = ""
    restarts: int = 0
    gone_since_s: float | None = None
    stuck_since_s: float | None = None


@dataclass(frozen=True)
class _Ended:
    """A cell that has ended, and the directory of its experiment; `is_complete` is read from the experiment's state."""

    number: int
    directory: ExperimentDir
    is_complete: bool


@dataclass
class SlurmRunner(Runner):
    """Plans all cells, submits them as job arrays, and waits until all jobs have ended.

    Cells that request the same resources share an array. A job runs one cell, or `options.per_job` of them one after
    another.
    """

    outlives_command: ClassVar[bool] = True
    # Whether the cells that a lost job had not begun are submitted again.
    resubmits: ClassVar[bool] = True

    manifest: Manifest
    display: StudyDisplay
    options: RunOptions
    prompts: RecentPrompts
    slurm: SlurmOptions
    # What has been submitted; None before the first job.
    ledger: Ledger | None = None
    jobs: list[Job] = field(default_factory=list)
    # What Slurm said about the jobs when it was last asked.
    seen: Mapping[str, Queued] = field(default_factory=dict)
    # Planned cells that have not been submitted yet.
    unsubmitted: list[int] = field(default_factory=list)
    # Jobs, as lists of their cells, that are submitted later, when Slurm accepts more jobs.
    deferred: list[list[int]] = field(default_factory=list)
    # The number of jobs that have ended since deferred jobs were last submitted.
    ended_since: int = 0
    # Results directories with files that a crash of the machine might still lose.
    to_sync: set[Path] = field(default_factory=set)
    steps: dict[int, Step] = field(default_factory=dict)
    experiments: dict[int, Experiment] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)
    incomplete_since_s: dict[int, float] = field(default_factory=dict)
    silent_since_s: float | None = None
    # Whether the command looks at the jobs only once. If Slurm does not answer, the warning then promises no retry.
    looks_once: bool = False
    has_warned: set[str] = field(default_factory=set)

    def run(self, number: int, experiment: Experiment) -> None:
        """Plan a cell; `finish` submits all planned cells together."""
        self.plan(number, experiment)
        self.unsubmitted.append(number)

    def finish(self) -> None:
        """Submit the planned cells, and wait until all cells have ended, unless the user does not want to wait."""
        self.submit_more()
        if self.options.detach and not self.is_over:
            raise Left(self.how_to_return())
        self.wait()

    def wait(self) -> None:
        """Wait until all cells have ended; submit more of them as jobs end."""
        pause_s = FIRST_PAUSE_S
        while not self.is_over:
            time.sleep(pause_s)
            pause_s = min(self.slurm.poll_s, pause_s * SLOWER)
            self.look()
        if self.ledger is not None:
            self.ledger.end()

    @property
    def is_over(self) -> bool:
        """Whether no job is left to wait for or to submit."""
        is_unknown = self.ledger is not None and self.ledger.unknown is not None
        return not (self.jobs or self.unsubmitted or self.deferred or is_unknown)

    def look(self, *, submits: bool = True) -> None:
        """Record which cells have started or ended and, if `submits`, submit more of them."""
        self._settle_unknown()
        if self.jobs:
            self._look()
        if submits and self.deferred:
            self._submit_deferred()
        if submits and not (self.jobs or self.deferred or self._is_unknown):
            self.submit_more()

    def look_once(self, *, submits: bool) -> None:
        """Look at the jobs, again and again until it is clear what became of each job that is gone or lacks files."""
        self.looks_once = True
        self.look(submits=submits)
        while any(job.gone_since_s is not None or self._has_missing_files(job) for job in self.jobs):
            time.sleep(FIRST_PAUSE_S)
            self.look(submits=submits)
        if self.is_over and self.ledger is not None and (submits or not self.has_more()):
            self.ledger.end()

    def submit_more(self) -> None:
        """Submit what is left to submit; called at the start, and whenever no job is left."""
        self.submit_planned()

    def has_more(self) -> bool:
        """Return whether `submit_more` would submit cells that are not planned yet."""
        return False

    def interrupted(self, by_signal: str) -> None:
        """Leave the jobs in the queue or, if the user says so after Ctrl-C, cancel them.

        Raises:
            Left: the jobs continue without this command.
        """
        count = len(self.jobs)
        if self.ledger is not None and not self.is_over:
            if by_signal or self.options.yes or not wants_to_cancel(count):
                raise Left(f"{by_signal}\n{self.how_to_return()}".strip(), Interrupted.exit_code)
            print(f"Canceling {count} job{'s' * (count != 1)}.", file=sys.stderr)
        with signals_raise():
            self.stop()

    def how_to_return(self) -> str:
        """Return sentences about the remaining jobs, and about the commands that follow or cancel them."""
        assert self.ledger is not None
        study = f"{self.ledger.directory.name}{results_flag(Store(self.ledger.terms.results_dirs[0]))}"
        left = [n for n, state in enumerate(self.manifest.states) if state.status in OPEN]
        waiting = len(left) - sum(len(self._open(job)) for job in self.jobs)
        lines = [f"{_count(len(left) - waiting, 'experiment')} in {_count(len(self.jobs), 'Slurm job')}{self._ids()}."]
        if waiting:
            have = "have" if waiting != 1 else "has"
            lines.append(
                f"{_count(waiting, 'experiment')} {have} not been submitted yet; lem jobs {study} submits more."
            )
        lines.append(f"To follow them and write their rows: lem jobs {study}")
        lines.append(f"To cancel them: lem jobs cancel {study}")
        return "\n".join(lines)

    def _ids(self) -> str:
        ids = [job.id for job in self.jobs]
        return f" ({ids[0]}{f' to {ids[-1]}' if len(ids) > 1 else ''})" if ids else ""

    def stop(self) -> None:
        """Cancel all jobs, wait until running jobs have saved their work, and record what remains to be resumed."""
        if self.ledger is not None:
            self.ledger.cancel()
            self._settle_unknown(at_once=True)
        slurm.cancel([job.id for job in self.jobs])
        deadline_s = time.monotonic() + STOP_S
        while self.jobs and time.monotonic() < deadline_s:
            try:
                known = slurm.queue([job.id for job in self.jobs])
            except Unreachable:
                break
            if all(job.id not in known or known[job.id].is_over for job in self.jobs):
                break
            time.sleep(FIRST_PAUSE_S)
        with self.manifest.together(), synced_later():
            for number in [*(n for job in self.jobs for n in self._open(job)), *self._not_submitted()]:
                self._interrupted(number)
        self._sync()
        self.jobs.clear()
        self.unsubmitted.clear()
        self.deferred.clear()
        if self.ledger is not None:
            self.ledger.end()

    # -------------------------------------------------------------- continuing after an earlier command
    def restore_jobs(self, cells: Mapping[str, list[int]]) -> None:
        """Continue with jobs that have been submitted; `cells` gives the unfinished cells of each job id."""
        assert self.ledger is not None
        self.jobs = [Job(job_id, all_cells) for job_id, all_cells in self.ledger.accepted if job_id in cells]
        for job in self.jobs:
            # The other cells have ended, or a later job runs them.
            job.others = len(job.cells) - len(cells[job.id])
            job.cells = cells[job.id]

    def adopt_plan(self, number: int, directory: ExperimentDir) -> None:
        """Add a cell that was planned, but not submitted, to those that are to be submitted."""
        self.steps[number] = Step(str(directory.path), directory.state().attempt)
        self.unsubmitted.append(number)

    def peek(self) -> None:
        """Look at the jobs and note which cells are running; another command saves the states of the cells."""
        with suppress(Unreachable):
            self.seen = slurm.queue([job.id for job in self.jobs])
        for job in self.jobs:
            if (seen := self.seen.get(job.id)) is None or seen.is_waiting:
                continue
            for number in self._open(job):
                if ExperimentDir(self.steps[number].directory).state().status == "running":
                    self.manifest.states[number] = replace(self.manifest.states[number], status="running")

    def cancel_jobs(self) -> None:
        """Cancel the jobs; the command that follows the jobs will record their end."""
        slurm.cancel([job.id for job in self.jobs])

    def in_jobs(self) -> dict[Path, InJob]:
        """Return, by directory, what Slurm says about the experiments that have not ended."""
        found = {Path(self.steps[number].directory): InJob("") for number in self._not_submitted()}
        if self.ledger is not None and self.ledger.unknown is not None:
            found |= {Path(self.steps[number].directory): InJob("") for number in self.ledger.unknown.cells}
        for job in self.jobs:
            seen = self.seen.get(job.id)
            node, reason = ("", "") if seen is None else (seen.node, seen.reason)
            for number in self._open(job):
                is_running = self.manifest.states[number].status == "running"
                found[Path(self.steps[number].directory)] = InJob(job.id, node, reason, is_running)
        return found

    # -------------------------------------------------------------- submitting
    def plan(self, number: int, experiment: Experiment, pause_s: float = 0.0) -> None:
        """Write the plan of a cell; the cell was checked before the study began, and its job checks it again."""
        cell = self.manifest.cells[number]
        prompts = self.prompts(experiment.dataset, experiment.seed)
        arrivals_s = recorded_times_s(experiment.traffic, len(prompts.texts))
        ready = Ready(experiment, None, prompts, (), arrivals_s, forced=self.options.force)
        attempts = cell.unfinished.state().attempt if cell.unfinished else 0
        with synced_later():
            store, directory = planned(
                ready,
                overrides=cell.overrides,
                config_file=cell.config_file,
                unfinished=cell.unfinished,
                campaign=cell.campaign,
                claimed=lambda directory: self.manifest.claim(number, directory),
            )
        self.to_sync.add(store.root)
        self.steps[number] = Step(str(directory.path.resolve()), attempts, pause_s)
        self.experiments[number] = experiment

    def submit(self, numbers: Sequence[int]) -> None:
        """Submit one job for planned cells; `_submit_array` says what happens if Slurm refuses it."""
        self._submit_array([list(numbers)])

    def submit_planned(self) -> None:
        """Submit all planned cells, as arrays no larger than the cluster allows."""
        if self.unsubmitted:
            size, per_job = slurm.max_array_size(), self.options.per_job or 1
            for alike in self._by_resources(self.unsubmitted):
                jobs = [alike[start : start + per_job] for start in range(0, len(alike), per_job)]
                for start in range(0, len(jobs), size):
                    self._submit_array(jobs[start : start + size])
            self.unsubmitted.clear()

    def _by_resources(self, numbers: Sequence[int]) -> Iterator[list[int]]:
        """Yield groups of cells whose jobs request the same resources from Slurm."""
        groups: dict[str, list[int]] = {}
        for number in numbers:
            parameters = sbatch_parameters([self._experiment(number)], self.slurm)
            groups.setdefault(json.dumps(parameters, sort_keys=True), []).append(number)
        yield from groups.values()

    def _submit_array(self, jobs: Sequence[list[int]]) -> None:
        """Submit jobs, each with the numbers of its cells, as an array.

        If Slurm allows the user fewer jobs at once, only some of the jobs are submitted; the remaining ones wait until
        submitted jobs have ended. If Slurm refuses an array for another reason, its cells fail.
        """
        while jobs:
            size = len(jobs)
            while (refusal := self._try(jobs[:size])) and size > 1 and TOO_MANY_JOBS.search(refusal):
                size //= 2
            if refusal and self.jobs and TOO_MANY_JOBS.search(refusal):
                self.deferred += jobs
                self._warn_once(f"Slurm accepts no more jobs now ({refusal}); remaining jobs will be submitted later.")
                return
            if refusal:
                self._opened_ledger().refused()
                self._fail([(n, "", f"Slurm refused the job: {refusal}") for cells in jobs[:size] for n in cells])
            jobs = jobs[size:]

    def _try(self, jobs: Sequence[list[int]]) -> str | None:
        """Submit an array, or a single job; return why Slurm refuses it, or None if Slurm accepts it."""
        ledger, folder = self._opened_ledger(), self.folder
        file = folder / ledger.new_file()
        tasks = tuple(tuple(self.steps[number] for number in cells) for cells in jobs)
        write_atomically(file, to_json(JobFile(tasks, self.slurm.requeue, self.slurm.max_num_timeout)))
        numbers = [number for cells in jobs for number in cells]
        parameters = sbatch_parameters([self._experiment(number) for number in numbers], self.options_of(numbers))
        parameters = self._after_others(parameters, len(jobs))
        self._sync()
        ledger.submitting(file.name, jobs)
        with signals_blocked():
            try:
                ids = submit(folder, slurm_job.run, _calls(file, len(jobs)), parameters, self.slurm.python)
            except Refused as refusal:
                ledger.submitted([])
                file.unlink()
                return str(refusal)
            ledger.submitted(ids)
        self._accepted(ids, jobs)
        return None

    @property
    def folder(self) -> Path:
        """The directory for the files of jobs."""
        return self.manifest.directory / FOLDER

    def _opened_ledger(self) -> Ledger:
        if self.ledger is None:
            # A command that continues after this one must know the plans of all cells.
            self.manifest.save()
            roots = dict.fromkeys(Path(step.directory).parent.parent for step in self.steps.values())
            self.ledger = Ledger.begin(
                self.manifest.directory,
                Terms(
                    slurm=self.slurm,
                    cells_sha256=cells_sha256(cell.fingerprint for cell in self.manifest.cells),
                    head=self.manifest.head,
                    fail_fast=self.manifest.fail_fast,
                    write_tables=self.options.write_tables,
                    force=self.options.force,
                    one_job=self.options.one_job,
                    per_job=self.options.per_job,
                    results_dirs=tuple(map(str, roots)),
                    working_dir=os.getcwd(),
                ),
            )
        return self.ledger

    def _experiment(self, number: int) -> Experiment:
        if number not in self.experiments:  # planned by an earlier command
            self.experiments[number] = ExperimentDir(self.steps[number].directory).plan().experiment
        return self.experiments[number]

    def _accepted(self, ids: Sequence[str], jobs: Sequence[Sequence[int]]) -> None:
        """Add jobs that Slurm has accepted, and record their cells as queued."""
        self.jobs += [Job(job_id, list(cells)) for job_id, cells in zip(ids, jobs, strict=True)]
        with self.manifest.together():
            for job_id, cells in zip(ids, jobs, strict=True):
                for number in cells:
                    self.manifest.change(number, status="queued", log=self.log_of(job_id))

    def log_of(self, job_id: str) -> Path:
        """Return the file to which a job writes its output."""
        return self.folder / job_id / f"{job_id}_0_log.out"

    @property
    def _is_unknown(self) -> bool:
        return self.ledger is not None and self.ledger.unknown is not None

    def _settle_unknown(self, *, at_once: bool = False) -> None:
        """Find out whether Slurm accepted the array whose submission was interrupted.

        If it did, this runner takes over the array's jobs. If not, the array's cells are still to be submitted. Because
        sbatch may still be running, an array counts as not accepted only after a while, unless `at_once` is set.
        """
        ledger = self.ledger
        if ledger is None or ledger.unknown is None:
            return
        array = ledger.unknown
        known = {job_id.partition("_")[0] for job_id, _ in ledger.accepted}
        try:
            found = [job_id for job_id in slurm.submitted_from(self.folder) if job_id not in known]
        except Unreachable as problem:
            self._without_slurm(str(problem))
            return
        if found:
            job_id, count = found[-1], len(array.jobs)
            ids = [job_id] if count == 1 else [f"{job_id}_{task}" for task in range(count)]
            complete(self.folder, slurm_job.run, _calls(self.folder / array.file, count), ids)
            ledger.adopted(ids)
            self._accepted(ids, array.jobs)
        elif at_once or time.time() - array.at_s > SUBMITTING_S:
            ledger.submitted([])
            self.unsubmitted += array.cells

    def _after_others(self, parameters: dict[str, Any], count: int) -> dict[str, Any]:
        """Return the parameters of `count` new jobs, which wait for earlier jobs if the user limits simultaneous jobs.

        Slurm applies the limit to each array separately, so several arrays side by side would exceed it.
        """
        limit, earlier = self.slurm.array_parallelism, [job.id for job in self.jobs[-1:]]
        if not (limit and earlier):
            return parameters
        if count == 1 and "_" not in earlier[0]:  # single jobs
            earlier = [job.id for job in self.jobs[-limit:][:1] if len(self.jobs) >= limit]
        given = parameters["additional_parameters"]
        after = [f"afterany:{job_id.partition('_')[0]}" for job_id in earlier]
        dependency = ",".join(filter(None, (given.get("dependency"), *after)))
        further = {"dependency": dependency} if dependency else {}
        return {**parameters, "additional_parameters": {**given, **further}}

    def _sync(self) -> None:
        for root in self.to_sync:
            sync(root)
        self.to_sync.clear()

    def _submit_deferred(self) -> None:
        """Submit deferred jobs: one per job that has ended since the last call, or all if no submitted job is open."""
        count = self.ended_since if self.jobs else len(self.deferred)
        some, self.deferred = self.deferred[:count], self.deferred[count:]
        self.ended_since = 0
        self._submit_array(some)

    def _not_submitted(self) -> list[int]:
        """Return the planned cells that have no job, even if a signal arrived while some were being submitted."""
        # A cell that is being submitted may still be listed as unsubmitted.
        planned = [*self.unsubmitted, *(number for cells in self.deferred for number in cells)]
        return [number for number in planned if self.manifest.states[number].status == "not run"]

    def options_of(self, numbers: Sequence[int]) -> SlurmOptions:
        """Return the options of the job that runs these cells."""
        return self.slurm

    # -------------------------------------------------------------- waiting
    def _look(self) -> None:
        """Record which cells have started or ended, and give up on jobs that Slurm has lost or cannot start."""
        try:
            self.seen = known = slurm.queue([job.id for job in self.jobs])
            self.silent_since_s = None
        except Unreachable as problem:
            self._without_slurm(str(problem))
            known = None
        with self.manifest.together():
            self._collect([each for job in self.jobs for each in self._ended(job, known)])
            before, self.jobs = len(self.jobs), [job for job in self.jobs if self._open(job)]
            if known is not None:
                self._lose_lost(known)
                if self.manifest.is_over:
                    self._give_up_waiting(known)
            self.ended_since += before - len(self.jobs)

    def _lose_lost(self, known: Mapping[str, Queued]) -> None:
        """Give up on the jobs that cannot finish their cells."""
        open_jobs = [job for job in self.jobs if not self._has_ended(job)]
        self._lose([(job, reason) for job in open_jobs if (reason := self._why_lost(job, known.get(job.id)))])

    def _open(self, job: Job) -> list[int]:
        return [number for number in job.cells if self.manifest.states[number].status in ("queued", "running")]

    def _has_ended(self, job: Job) -> bool:
        """Return whether all remaining cells of a job have ended, so that only their files are still to arrive."""
        return all(number in self.incomplete_since_s for number in self._open(job))

    def _has_missing_files(self, job: Job) -> bool:
        return any(number in self.incomplete_since_s for number in self._open(job))

    def _ended(self, job: Job, known: Mapping[str, Queued] | None) -> Iterator[_Ended]:
        """Yield the cells of a job that have ended; if another cell has started, record that it is running.

        A study may have thousands of jobs, most of which are waiting or have ended. Therefore, only states that may
        have changed are read: a job runs its cells in order, and a waiting job runs none.
        """
        seen = None if known is None else known.get(job.id)
        if seen is not None and seen.is_waiting and not seen.restarts:
            return
        for number in self._open(job):
            directory = ExperimentDir(Path(self.steps[number].directory))
            state = directory.state()
            if self.steps[number].is_over(state):
                yield _Ended(number, directory, is_complete=state.status in FINISHED)
                continue
            if state.status == "running" and self.manifest.states[number].status == "queued":
                self._show(number)
                self.manifest.change(number, status="running")
            if seen is not None and not seen.is_over:
                return

    def _collect(self, ended: Sequence[_Ended]) -> None:
        """Write the rows of experiments that have ended, many rows to one file."""
        written = self._rows([each.directory for each in ended])
        for each in ended:
            self._collect_one(each, written.get(each.directory.path))

    def _rows(self, directories: Sequence[ExperimentDir]) -> dict[Path, Outcome]:
        """Write the rows of several experiments together; return the outcomes of those whose rows have been written."""
        written: dict[Path, Outcome] = {}
        if len(directories) > 1 and self.options.write_tables:
            roots = dict.fromkeys(directory.path.parent.parent for directory in directories)
            for root in roots:
                own = [directory for directory in directories if directory.path.parent.parent == root]
                written |= {each.directory.path: each for each in collect_together(Store(root), own)}
        return written

    def _collect_one(self, ended: _Ended, outcome: Outcome | None) -> None:
        """Record an experiment that has ended, unless some of its files are not visible here yet.

        `outcome` is given if the experiment's row has already been written.
        """
        number, directory, problem = ended.number, ended.directory, None
        try:
            store = Store(directory.path.parent.parent)
            outcome = outcome or collect(store, directory, write_tables=self.options.write_tables)
            is_missing = ended.is_complete and outcome.row.status != "completed"
        except ResultsError as error:
            problem, is_missing = str(error), True
        since_s = self.incomplete_since_s.setdefault(number, time.monotonic())
        if is_missing and time.monotonic() - since_s < self.slurm.settle_s:
            return
        if outcome is not None:
            self._end(number, outcome)
            return
        self._show(number)
        self.display.end(number, self.manifest.change(number, status="failed", error=problem).sentence, failed=True)

    def _why_lost(self, job: Job, seen: Queued | None) -> str | None:
        """Return why a job cannot finish its cells, or None if it may still finish them."""
        now_s = time.monotonic()
        if seen is None or seen.is_over:
            # The job's files may not have arrived yet through the shared file system.
            job.gone_since_s = job.gone_since_s or now_s
            return self._reason(job) if now_s - job.gone_since_s >= self.slurm.settle_s else None
        job.gone_since_s = None
        if seen.restarts > job.restarts and job.node and (failure := slurm.node_failure(job.id, job.node)):
            slurm.cancel([job.id])
            return f"NODE_FAIL, {failure}"
        job.restarts, job.node = seen.restarts, seen.node or job.node
        if not seen.cannot_start:
            job.stuck_since_s = None
            return None
        job.stuck_since_s = job.stuck_since_s or now_s
        if now_s - job.stuck_since_s < self.slurm.never_starts_s:
            return None
        slurm.cancel([job.id])
        return f"it could not start and was canceled ({seen.reason})"

    def _reason(self, job: Job) -> str:
        """Return Slurm's reason for the end of a job, with the end of the job's log if the reason explains little."""
        found = slurm.ended(job.id)
        if found is None:
            if not slurm.has_accounting():
                self._warn_once("Slurm has forgotten why jobs ended, and there is no accounting (sacct) to ask.")
            return "it is gone, and Slurm does not say why"
        is_explained = found.state.startswith(("CANCELLED", "NODE_FAIL", "PREEMPTED"))
        log = [] if is_explained else _end_of_log(self.manifest.states[job.cells[0]].log)
        return found.sentence + (f"; its log ends: {' | '.join(log)}" if log else "")

    def _lose(self, lost: Sequence[tuple[Job, str]]) -> None:
        """Record lost jobs: their cells fail for the given reasons, except those that will be submitted again."""
        failures = []
        adopted = self.ledger.adopted_ids if self.ledger else set()
        for job, reason in lost:
            is_again = not reason.startswith("CANCELLED")
            again = self._to_submit_again(job, is_adopted=job.id in adopted) if is_again else []
            if again:
                which = "experiment" if len(again) == 1 else _count(len(again), "experiment")
                print_warnings(
                    f"Slurm job {job.id}: {reason.rstrip('.')}. The {which} that it had not begun will be submitted "
                    "again."
                )
                self.deferred.append(again)
                for number in again:
                    self.manifest.change(number, status="not run")
            message = f"Slurm job {job.id}: {reason.rstrip('.')}."
            failures += [(number, job.id, message) for number in self._open(job)]
        self._fail(failures)
        gone = {job.id for job, _ in lost}
        self.jobs = [job for job in self.jobs if job.id not in gone]

    def _to_submit_again(self, job: Job, *, is_adopted: bool) -> list[int]:
        """Return the cells that a lost job had not begun.

        If the job had begun no cell, none is returned, because another job would probably be lost in the same way. If
        `resubmits` is False, none is returned either. Neither rule applies to a job whose submission was interrupted
        (`is_adopted`).
        """
        left = self._open(job)
        attempts = {number: ExperimentDir(self.steps[number].directory).state().attempt for number in left}
        untouched = [number for number in left if attempts[number] <= self.steps[number].attempts]
        has_begun = len(untouched) < len(job.cells) + job.others
        return untouched if is_adopted or (self.resubmits and has_begun) else []

    def _give_up_waiting(self, known: Mapping[str, Queued]) -> None:
        """Cancel the jobs that have not started, and submit no more, because a job failed and --fail-fast was given."""
        for number in self._not_submitted():
            self._interrupted(number)
        self.deferred.clear()
        self.unsubmitted.clear()
        waiting = [job for job in self.jobs if job.id in known and known[job.id].is_waiting and not job.restarts]
        slurm.cancel([job.id for job in waiting])
        for job in waiting:
            for number in self._open(job):
                self._interrupted(number)
            self.jobs.remove(job)

    def _without_slurm(self, problem: str) -> None:
        now_s = time.monotonic()
        if self.silent_since_s is None:
            self.silent_since_s = now_s
            later = (
                "the jobs' states are unknown"
                if self.looks_once
                else f"asking again for {UNREACHABLE_S / 60:g} minutes"
            )
            self._warn_once(f"Slurm does not answer ({problem}); {later}.")
        if now_s - self.silent_since_s > UNREACHABLE_S:
            reason = f"Slurm has not answered for {UNREACHABLE_S / 60:g} minutes ({problem})"
            self._lose([(job, reason) for job in self.jobs])

    # -------------------------------------------------------------- ends
    def _fail(self, failures: Sequence[tuple[int, str, str]]) -> None:
        """Record cells as failed and write their rows.

        `failures` holds each cell's number, its job's id (empty if there is no job) and a message.
        """
        outcomes: dict[int, Outcome] = {}
        with synced_later():
            for number, job_id, message in failures:
                directory = ExperimentDir(Path(self.steps[number].directory))
                store = Store(directory.path.parent.parent)
                outcomes[number] = fail(store, directory, ErrorInfo(LOST, message), job_id, write_tables=False)
                self.to_sync.add(store.root)
        self._sync()
        written = self._rows([outcome.directory for outcome in outcomes.values()])
        with self.manifest.together():
            for number, outcome in outcomes.items():
                directory = outcome.directory
                if self.options.write_tables and directory.path not in written:
                    outcome = collect(outcome.store, directory, write_tables=True)
                self._end(number, written.get(directory.path, outcome))

    def _interrupted(self, number: int) -> None:
        """Record that a cell was stopped or did not begin, so that repeating the study's command resumes it."""
        directory = ExperimentDir(Path(self.steps[number].directory))
        Store(directory.path.parent.parent).mark_unfinished(directory.id, directory.plan().fingerprint)
        if directory.state().attempt <= self.steps[number].attempts:
            self.manifest.change(number, status="not run")
            return
        row = row_of(directory)
        with suppress(ResultsError):
            row = collect(Store(directory.path.parent.parent), directory, write_tables=self.options.write_tables).row
        self.manifest.change(number, status="interrupted", row=row)

    def _end(self, number: int, outcome: Outcome) -> None:
        self._show(number)
        log = self.manifest.states[number].log
        found = {"log": log if log and log.is_file() else None, "row": outcome.row, "error": outcome.row.error}
        state = self.manifest.change(number, status=outcome.row.status, **found)
        self.display.end(number, state.sentence, failed=state.status == "failed")
        if outcome.problem:
            print_warnings(outcome.problem)

    def _show(self, number: int) -> None:
        if number not in self.shown:
            self.shown.add(number)
            self.display.begin(number, self.manifest.cells[number].label)

    def _warn_once(self, text: str) -> None:
        if text not in self.has_warned:
            self.has_warned.add(text)
            print_warnings(text)


def _calls(file: Path, jobs: int) -> list[tuple[str, int]]:
    """Return the arguments of `slurm_job.run` in each job of an array."""
    return [(str(file.resolve()), task) for task in range(jobs)]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _end_of_log(file: Path | None) -> list[str]:
    """Return the last non-empty lines of a job's log; an empty list if there is no log."""
    try:
        lines = file.read_text(errors="replace").splitlines() if file else []
    except OSError:
        return []
    return [line.strip()[:200] for line in lines if line.strip()][-LINES_OF_LOG:]
