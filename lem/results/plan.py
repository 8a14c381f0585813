"""The plan of one experiment: what its directory is there to hold. The worker starts from it alone."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from lem import __version__
from lem.spec.experiment import Experiment
from lem.units import timestamp

if TYPE_CHECKING:
    import psutil

# History of spec.json's format:
# 1  first version
# 2  replicas, shared_with and the configuration's digest
# 3  the digest of a trace's arrivals, which lie in arrivals.json
FORMAT_VERSION = 3


@dataclass(frozen=True)
class PromptsInfo:
    """The prompts of the experiment, without their texts, which lie in prompts.jsonl."""

    count: int
    sha256: str
    source: str
    split: str | None
    column: str | None
    available: int
    dropped_empty: int


@dataclass(frozen=True)
class Plan:
    """What is to be run: the checked configuration, the prompts, and how many processes share them.

    `replicas` is the number of shares of the prompts: the processes of one replica run the same prompts together
    (tensor parallelism). `shared_with` counts the other runs that were meant to be on this machine at the same time.
    `arrivals_sha256` is the digest of a trace's arrivals, as arrivals.json holds them; empty without such a file.
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
    lem_version: str = __version__
    format_version: int = field(default=FORMAT_VERSION)

    def share(self, rank: int) -> range:
        """Return the positions of the prompts that a process runs."""
        return range(rank // (self.processes // self.replicas), self.prompts.count, self.replicas)

    def counts(self, rank: int) -> bool:
        """Tell whether the process counts its prompts: of those that run the same ones, the first does."""
        return rank % (self.processes // self.replicas) == 0

    def unfinished_cycles(self, finished: Mapping[int, set[int]]) -> list[int]:
        """Return the cycles that lack prompts, by the positions of those that are finished in each cycle."""
        cycles = range(1, self.experiment.cycles + 1)
        return [cycle for cycle in cycles if len(finished.get(cycle, ())) < self.prompts.count]

    @property
    def fingerprint(self) -> str:
        """Return what makes two experiments the same: configuration, prompts in order, arrivals of a trace."""
        digests = (self.config_sha256, self.prompts.sha256, self.arrivals_sha256)
        return "-".join(digest[:16] for digest in digests if digest)


StateName = Literal["planned", "running", "interrupted", "failed", "completed", "aggregated"]


# Nothing more is to be run in these.
FINISHED: frozenset[StateName] = frozenset({"completed", "aggregated"})


# The kernel tells the start in hundredths of a second.
SAME_START_S = 0.02


@dataclass(frozen=True)
class State:
    """The state of an experiment; `host`, `pid` and `process_started_s` (after the boot) say who runs it."""

    status: StateName
    attempt: int
    updated_at: str
    host: str | None = None
    pid: int | None = None
    process_started_s: float | None = None
    error: str | None = None

    def now(self, status: StateName, error: str | None = None) -> State:
        """Return the state that follows, with nobody running it."""
        return State(status, self.attempt, timestamp(), error=error)

    def believed(self) -> State:
        """Return the state as far as it can be believed: who is said to run and is gone was interrupted.

        On another host nobody can look; there the claim stands.
        """
        if self.status != "running" or self.host != socket.gethostname() or self._lives():
            return self
        gone = "The process that ran it is gone: it was killed, or the machine was restarted."
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
    """Return when a process started, in seconds after the boot: setting the clock does not change that."""
    import psutil

    return process.create_time() - psutil.boot_time()


def running(attempt: int) -> State:
    """Return the state of an experiment that this process runs from now on."""
    import psutil

    started_s = _started_s(psutil.Process())
    return State("running", attempt, timestamp(), socket.gethostname(), os.getpid(), started_s)
