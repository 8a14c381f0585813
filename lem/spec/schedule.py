"""An experiment's place in a schedule."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class ScheduleRun:
    """The run of a schedule to which an experiment belongs.

    `number` counts the schedule's planned starts from 1. `planned_at` and `started_at` are ISO 8601 with the UTC
    offset; `time_zone` is the IANA name of the zone in which the schedule's times of day are meant.
    """

    schedule: str
    number: int
    planned_at: str
    started_at: str
    time_zone: str

    @property
    def late_s(self) -> float:
        """How long after its planned time the run started."""
        return (datetime.fromisoformat(self.started_at) - datetime.fromisoformat(self.planned_at)).total_seconds()
