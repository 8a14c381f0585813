"""Runs the cells of a study as Slurm jobs: plans and submits them, waits for them, and collects their records.

    cell ─> preflight for the job's machine ─> claimed and planned ─> submitted ─> queue and state.json watched ─> row

This process and a job (`lem.studies.slurm_job`) communicate only through files on a shared file system. An experiment's
own state tells whether the experiment has ended. Slurm tells only whether a job still exists and, if not, why it ended.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lem.backends import backend_class
from lem.config.launcher import Refused, submit
from lem.errors import ResultsError
from lem.machine import slurm
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.machine.slurm import Queued, Unreachable
from lem.record import ErrorInfo
from lem.results.codec import to_json
from lem.results.directory import ExperimentDir
from lem.results.files import write_atomically
from lem.results.plan import FINISHED
from lem.results.store import Store
from lem.runner.job import Outcome, collect, fail, planned
from lem.runner.preflight import Ready, preflight
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Experiment
from lem.spec.processes import gpus_needed, process_counts
from lem.spec.slurm import SlurmOptions
from lem.studies import slurm_job
from lem.studies.ask import RunOptions, print_warnings
from lem.studies.checks import RecentPrompts
from lem.studies.display import StudyDisplay
from lem.studies.manifest import Manifest, row_of
from lem.studies.slurm_job import JobFile, Step
from lem.studies.study import Runner

# The time before the first query of the queue, and the factor by which the time between two queries grows.
FIRST_PAUSE_S, SLOWER = 0.5, 1.3
# How long Slurm's controller may fail to answer before its jobs count as lost.
UNREACHABLE_S = 600.0
# How long cancelled jobs may take to save their finished requests.
STOP_S = 30.0
LOST = "SlurmJobLost"
LINES_OF_LOG = 2
# Jobs run side by side, so they are shown like the runs of a parallel batch.
AT_ONCE = 2
# More GPUs than any node has, to ask a backend whether it would use them.
MANY = 64


# ------------------------------------------------------------------ what a job needs
def gpus_of_job(experiment: Experiment, options: SlurmOptions) -> int:
    """Return the number of GPUs that an experiment's job requests: the option's value, or what the experiment needs."""
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
    """Check an experiment for the machine that its job will have; raises `BadInput` with all problems."""
    assert options.launcher is not None
    machine = machine_of_job(experiment, options.launcher.options)
    return preflight(experiment, machine, force=options.force, in_campaign=in_campaign, load=prompts, elsewhere=True)


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
    node: str = ""
    restarts: int = 0
    gone_since_s: float | None = None
    stuck_since_s: float | None = None


@dataclass
class SlurmRunner(Runner):
    """Submits each cell as a separate job and waits until all jobs have ended."""

    manifest: Manifest
    display: StudyDisplay
    options: RunOptions
    prompts: RecentPrompts
    slurm: SlurmOptions
    jobs: list[Job] = field(default_factory=list)
    steps: dict[int, Step] = field(default_factory=dict)
    experiments: dict[int, Experiment] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)
    incomplete_since_s: dict[int, float] = field(default_factory=dict)
    silent_since_s: float | None = None
    has_warned: set[str] = field(default_factory=set)

    def run(self, number: int, experiment: Experiment) -> None:
        """Plan a cell and submit its job."""
        self.plan(number, experiment)
        self.submit([number])

    def finish(self) -> None:
        """Wait until all cells have ended."""
        pause_s = FIRST_PAUSE_S
        while self.jobs:
            time.sleep(pause_s)
            pause_s = min(self.slurm.poll_s, pause_s * SLOWER)
            self._look()

    def stop(self) -> None:
        """Cancel all jobs, wait until running ones have saved their work, and record what remains to resume."""
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
        for job in self.jobs:
            for number in self._open(job):
                self._interrupted(number)
        self.jobs.clear()

    # -------------------------------------------------------------- submitting
    def plan(self, number: int, experiment: Experiment, pause_s: float = 0.0) -> None:
        """Check a cell for the machine that its job will have, and write its plan."""
        cell = self.manifest.cells[number]
        ready = preflight_for_job(experiment, self.options, self.prompts, in_campaign=cell.campaign is not None)
        attempts = cell.unfinished.state().attempt if cell.unfinished else 0
        _, directory = planned(
            ready,
            overrides=cell.overrides,
            config_file=cell.config_file,
            unfinished=cell.unfinished,
            campaign=cell.campaign,
            claimed=lambda directory: self.manifest.claim(number, directory),
        )
        self.steps[number] = Step(str(directory.path.resolve()), attempts, pause_s)
        self.experiments[number] = experiment

    def submit(self, numbers: Sequence[int]) -> None:
        """Submit one job for planned cells; if Slurm refuses the job, the cells fail."""
        folder = self.manifest.directory / "jobs"
        file = folder / f"c{numbers[0]:03d}.json"
        steps = tuple(self.steps[number] for number in numbers)
        write_atomically(file, to_json(JobFile(steps, self.slurm.requeue, self.slurm.max_num_timeout)))
        parameters = sbatch_parameters([self.experiments[number] for number in numbers], self.slurm)
        try:
            run, of_job = slurm_job.run, str(file.resolve())
            job = Job(submit(folder, run, of_job, parameters, self.slurm.python), list(numbers))
        except Refused as refusal:
            for number in numbers:
                self._fail(number, "", f"Slurm refused the job: {refusal}")
            return
        self.jobs.append(job)
        for number in numbers:
            self.manifest.change(number, status="queued", log=folder / job.id / f"{job.id}_0_log.out")

    # -------------------------------------------------------------- waiting
    def _look(self) -> None:
        """Record which cells have started or ended, and give up on jobs that Slurm has lost or cannot start."""
        try:
            known = slurm.queue([job.id for job in self.jobs])
            self.silent_since_s = None
        except Unreachable as problem:
            self._without_slurm(str(problem))
            known = None
        for job in list(self.jobs):
            for number in self._open(job):
                self._settle(number)
            if not self._open(job):
                self.jobs.remove(job)
            elif known is not None and not self._has_ended(job) and (reason := self._why_lost(job, known.get(job.id))):
                self._lose(job, reason)
        if self.manifest.is_over and known is not None:
            self._give_up_waiting(known)

    def _open(self, job: Job) -> list[int]:
        return [number for number in job.cells if self.manifest.states[number].status in ("queued", "running")]

    def _has_ended(self, job: Job) -> bool:
        """Return whether all remaining cells of a job have ended, so that only their files are still to arrive."""
        return all(number in self.incomplete_since_s for number in self._open(job))

    def _settle(self, number: int) -> None:
        """Record that a cell has started or ended, if the state of its experiment says so."""
        directory = ExperimentDir(Path(self.steps[number].directory))
        state = directory.state()
        if self.steps[number].is_over(state):
            self._collect(number, directory, is_complete=state.status in FINISHED)
        elif state.status == "running" and self.manifest.states[number].status == "queued":
            self._show(number)
            self.manifest.change(number, status="running")

    def _collect(self, number: int, directory: ExperimentDir, *, is_complete: bool) -> None:
        """Write the row of an experiment that has ended, unless some of its files are not visible here yet."""
        problem = None
        try:
            outcome = collect(Store(directory.path.parent.parent), directory, write_tables=self.options.write_tables)
            is_missing = is_complete and outcome.row.status != "completed"
        except ResultsError as error:
            problem, is_missing = str(error), True
        since_s = self.incomplete_since_s.setdefault(number, time.monotonic())
        if is_missing and time.monotonic() - since_s < self.slurm.settle_s:
            return
        if problem is None:
            self._end(number, outcome)
            return
        self._show(number)
        self.display.end(number, self.manifest.change(number, status="failed", error=problem).sentence, failed=True)

    def _why_lost(self, job: Job, seen: Queued | None) -> str | None:
        """Return why a job cannot finish its cells, or None if it still may."""
        now_s = time.monotonic()
        if seen is None or seen.is_over:
            # Its files may not have arrived yet through the shared file system.
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
        return f"it could not start and was cancelled ({seen.reason})"

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

    def _lose(self, job: Job, reason: str) -> None:
        for number in self._open(job):
            self._fail(number, job.id, f"Slurm job {job.id}: {reason.rstrip('.')}.")
        self.jobs.remove(job)

    def _give_up_waiting(self, known: Mapping[str, Queued]) -> None:
        """Cancel the jobs that have not started, because another job failed and --fail-fast was given."""
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
            self._warn_once(f"Slurm does not answer ({problem}); asking again for {UNREACHABLE_S / 60:g} minutes.")
        if now_s - self.silent_since_s > UNREACHABLE_S:
            for job in list(self.jobs):
                self._lose(job, f"Slurm has not answered for {UNREACHABLE_S / 60:g} minutes ({problem})")

    # -------------------------------------------------------------- ends
    def _fail(self, number: int, job_id: str, message: str) -> None:
        directory = ExperimentDir(Path(self.steps[number].directory))
        store = Store(directory.path.parent.parent)
        error = ErrorInfo(LOST, message)
        self._end(number, fail(store, directory, error, job_id, write_tables=self.options.write_tables))

    def _interrupted(self, number: int) -> None:
        """Record a cell that was stopped, or did not begin, so that the same command resumes it."""
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


def _end_of_log(file: Path | None) -> list[str]:
    """Return the last lines of a job's log that are not empty; none if the job wrote none."""
    try:
        lines = file.read_text(errors="replace").splitlines() if file else []
    except OSError:
        return []
    return [line.strip()[:200] for line in lines if line.strip()][-LINES_OF_LOG:]
