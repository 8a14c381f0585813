"""Where an experiment stands: planned, running, interrupted, failed, completed, aggregated.

"Running" is a claim that is believed only while the process that made it lives. Knows no file.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from lem.plan import timestamp

if TYPE_CHECKING:
    import psutil

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
