"""The plan of an experiment, from which workers start, and the experiment's state."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from msgspec import Struct
from msgspec.structs import replace

from lem import __version__
from lem.quantities import timestamp
from lem.spec.campaign import CampaignCell
from lem.spec.experiment import Experiment
from lem.spec.schedule import ScheduleRun

if TYPE_CHECKING:
    import psutil

# History of spec.json's format:
# 1  first version
# 2  replicas, shared_with and the configuration's digest
# 3  the digest of a trace's arrivals, which are in arrivals.json
# 4  the place in a campaign, whether inadvisable options were accepted, and the files of the prompts
# 5  the run of a schedule
FORMAT_VERSION = 5


@dataclass(frozen=True)
class PromptsInfo:
    """The prompts of the experiment; their texts are in prompts.jsonl."""

    count: int
    sha256: str
    source: str
    split: str | None
    column: str | None
    available: int
    dropped_empty: int
    # The files that were read, if the source is a directory.
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The plan of an experiment: its checked configuration, its prompts, and how many processes share them.

    The prompts are divided among the `replicas`; the processes of one replica run the same prompts together (tensor
    parallelism). `shared_with` is the maximum number of other experiments on this machine that may affect it.
    `arrivals_sha256` is the digest of a trace's arrivals, which are stored in arrivals.json; it is empty without a
    trace. `campaign` is the experiment's place in a campaign, if any, and `schedule` its run in a schedule. `forced`
    means that inadvisable options were accepted with --force.
    """

    experiment_id: str
    created_at: str
    experiment: Experiment
    prompts: PromptsInfo
    config_sha256: str = ""
    processes: int = 1
    replicas: int = 1
    shared_with: int = 0
    overrides: tuple[str, ...] = ()
    config_file: str | None = None
    arrivals_sha256: str = ""
    campaign: CampaignCell | None = None
    schedule: ScheduleRun | None = None
    forced: bool = False
    lem_version: str = __version__
    format_version: int = FORMAT_VERSION

    def share(self, rank: int) -> range:
        """Return the positions of the prompts that a process runs."""
        return range(rank // (self.processes // self.replicas), self.prompts.count, self.replicas)

    def counts(self, rank: int) -> bool:
        """Return whether to count a process's requests: yes, unless a process of lower rank runs the same prompts."""
        return rank % (self.processes // self.replicas) == 0

    def unfinished_cycles(self, finished: Mapping[int, set[int]]) -> list[int]:
        """Return the unfinished cycles, given the positions of the prompts finished in each cycle."""
        cycles = range(1, self.experiment.cycles + 1)
        return [cycle for cycle in cycles if len(finished.get(cycle, ())) < self.prompts.count]

    @property
    def fingerprint(self) -> str:
        """The digest of everything that identifies the experiment: configuration, ordered prompts, and any arrivals."""
        digests = (self.config_sha256, self.prompts.sha256, self.arrivals_sha256)
        return "-".join(digest[:16] for digest in digests if digest)


StateName = Literal["planned", "running", "interrupted", "failed", "completed", "aggregated"]
# The states in which no requests are left to run.
FINISHED: frozenset[StateName] = frozenset({"completed", "aggregated"})
# The kernel reports a process's start time in hundredths of a second.
SAME_START_S = 0.02


class State(Struct, frozen=True):
    """The state of an experiment; `host`, `pid` and `process_started_s` (since boot) identify the running process."""

    status: StateName
    attempt: int
    updated_at: str
    host: str | None = None
    pid: int | None = None
    process_started_s: float | None = None
    error: str | None = None

    def now(self, status: StateName, error: str | None = None) -> State:
        """Return the next state of the experiment, with the given status and no running process."""
        return State(status, self.attempt, timestamp(), error=error)

    def believed(self) -> State:
        """Return the state, changed to interrupted if the process that was running the experiment is gone.

        A process on another host cannot be checked, so it is assumed to be running.
        """
        if self.status != "running" or self.host != socket.gethostname() or self._lives():
            return self
        gone = "The process that ran the experiment is gone: it was killed, or the machine was restarted."
        return replace(self, status="interrupted", error=self.error or gone)

    def _lives(self) -> bool:
        import psutil

        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            return self.process_started_s is None or abs(_started_s(process) - self.process_started_s) < SAME_START_S
        except psutil.Error:
            return False


def _started_s(process: psutil.Process) -> float:
    """Return a process's start time in seconds since boot; setting the clock does not change this time."""
    import psutil

    return process.create_time() - psutil.boot_time()


def running(attempt: int) -> State:
    """Return the state of an experiment that this process is running."""
    import psutil

    started_s = _started_s(psutil.Process())
    return State("running", attempt, timestamp(), socket.gethostname(), os.getpid(), started_s)
