"""The settings of a schedule, how they are written on the command line, and a run's place in its schedule.

This module is the single source of the descriptions of these settings. It knows nothing about calendars;
`lem.studies.calendar` computes the starts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import time
from typing import Annotated

from pydantic import Field

from lem.errors import ConfigError, did_you_mean

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
DEFAULT_DURATION_S = 86_400.0
LONGEST_DURATION_S = 3_660 * 86_400.0
WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
GROUPS_OF_DAYS = {"weekdays": WEEKDAYS[:5], "weekends": WEEKDAYS[5:]}
FULL_NAMES = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")


@dataclass(frozen=True)
class Schedule:
    """When the runs of a schedule start, and how long the schedule lasts."""

    interval_s: Annotated[
        float | None, Field(gt=0, description="Time between two starts, such as 6h, 30m or 1d (always 24 hours).")
    ] = None
    at: Annotated[
        tuple[str, ...],
        Field(description="Times of day at which runs start, such as 09:00 or 09:00,14:30; with an interval, only the "
              "first run starts at one of these times."),
    ] = ()  # fmt: skip
    days: Annotated[
        tuple[str, ...],
        Field(description="Days on which runs start: a list (mon,wed,fri), a range (mon-fri), weekdays or weekends; "
              "all days if not given."),
    ] = ()  # fmt: skip
    duration_s: Annotated[
        float,
        Field(
            gt=0,
            description="How long to keep starting runs, such as 24h or 7d (a day is 24 hours); a run that has started "
            "is allowed to finish.",
        ),
    ] = DEFAULT_DURATION_S
    time_zone: Annotated[str, Field(description="Time zone of the times of day and of the days.")] = "UTC"
    carbon_trace: Annotated[
        str | None, Field(description="CSV file with the carbon intensity over time, in gCO2e/kWh.")
    ] = None


@dataclass(frozen=True)
class ScheduleRun:
    """An experiment's place in a schedule: the schedule's name, the number of the start (from 1), and its times.

    The times are ISO 8601 with the UTC offset of `time_zone`, which is the IANA name of the schedule's time zone.
    """

    schedule: str
    number: int
    planned_at: str
    started_at: str
    time_zone: str


# ------------------------------------------------------------------ settings as text
def seconds_of(text: str, flag: str) -> float:
    """Convert a length of time such as 30m, 6h, 1d or 1h30m to seconds; raises `ConfigError`, naming the flag."""
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ConfigError(
            f"{flag}: '{text}' is not a length of time. Use a number followed by s, m, h or d, such as 30m."
        )
    seconds = sum(float(number) * SECONDS[unit] for number, unit in parts)
    if seconds == 0:
        raise ConfigError(f"{flag}: must be longer than 0 seconds, not '{text}'. Use a length of time such as 30m.")
    if seconds > LONGEST_DURATION_S:
        longest = f"{LONGEST_DURATION_S / SECONDS['d']:.0f}d"
        raise ConfigError(f"{flag}: '{text}' is longer than ten years. Use a length of time of at most {longest}.")
    return seconds


def times_of(text: str) -> tuple[str, ...]:
    """Return the times of day in a list such as 09:00,14:30, in order; raises `ConfigError` for anything else."""
    return tuple(sorted({_time_of(part.strip()) for part in text.split(",")}))


def _time_of(text: str) -> str:
    match = re.fullmatch(r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?", text)
    try:
        if match is None:
            raise ValueError
        found = time(int(match[1]), int(match[2]), int(match[3] or 0))
    except ValueError:
        raise ConfigError(
            f"--at: '{text}' is not a time of day. Use times from 00:00 to 23:59, such as 09:00 or 09:00,14:30."
        ) from None
    return found.isoformat("seconds" if found.second else "minutes")


def days_of(text: str) -> tuple[str, ...]:
    """Return the days in a list such as mon,wed-fri or weekends, in order; raises `ConfigError` for anything else."""
    chosen = {day for part in text.lower().split(",") for day in _days_of_part(part.strip())}
    return tuple(day for day in WEEKDAYS if day in chosen)


def _days_of_part(text: str) -> tuple[str, ...]:
    if text in GROUPS_OF_DAYS:
        return GROUPS_OF_DAYS[text]
    first, dash, last = text.partition("-")
    begin = _day_of(first.strip(), text)
    end = _day_of(last.strip(), text) if dash else begin
    return tuple(WEEKDAYS[(begin + i) % 7] for i in range((end - begin) % 7 + 1))  # fri-mon goes over the weekend


def _day_of(name: str, text: str) -> int:
    for names in (WEEKDAYS, FULL_NAMES):
        if name in names:
            return names.index(name)
    hint = did_you_mean(name, [*WEEKDAYS, *FULL_NAMES, *GROUPS_OF_DAYS])
    raise ConfigError(
        f"--days: '{text}' is not a day.{hint} Use mon to sun, ranges such as mon-fri, weekdays or weekends."
    )


def length_of(seconds: float) -> str:
    """Return a length of time as text, in at most two units: 1d 6h, 30m or 5s."""
    left, parts = round(seconds), list[str]()
    for unit in ("d", "h", "m", "s"):
        number, left = divmod(left, int(SECONDS[unit]))
        if number or (unit == "s" and not parts):
            parts.append(f"{number}{unit}")
    return " ".join(parts[:2])
