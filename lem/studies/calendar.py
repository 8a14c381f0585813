"""The table of a schedule's starts, computed in advance from its settings, the current time and the time zone.

Days and times of day are local, and intervals are elapsed time. A local time that does not exist, because the clock is
set forward, becomes the next minute that exists. A local time that occurs twice, because the clock is set back, means
the first of the two. This module has no state and does not read the clock.
"""

from __future__ import annotations

import math
import os
import zoneinfo
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

from lem.errors import ConfigError, did_you_mean
from lem.spec.schedule import WEEKDAYS, Schedule, length_of

# The maximum number of starts. The table of starts is rewritten after each run, so it must stay small.
MOST_STARTS = 100_000
# Any combination of days and times of day that occurs at all occurs within this time.
NEXT_ONE = timedelta(days=9)
NEITHER = (
    "A schedule needs --interval, such as --interval 6h, or --at, such as --at 09:00; with both, the first run starts "
    "at that time and the others follow at the interval."
)


def starts(settings: Schedule, now: datetime) -> list[datetime]:
    """Return the start of each run, in the schedule's time zone, from `now` until the schedule's duration has elapsed.

    Args:
        settings: the settings of the schedule.
        now: the current time, with a time zone; fractions of a second are dropped.

    Raises:
        ConfigError: the settings contradict each other, or nothing would start.
    """
    _check(settings)
    zone = zone_of(settings.time_zone)
    begin = now.replace(microsecond=0).astimezone(UTC)
    end = begin + timedelta(seconds=settings.duration_s)
    found = list(_starts(settings, zone, begin, end))
    if not found:
        raise ConfigError(_nothing(settings, zone, begin))
    return found


def _check(settings: Schedule) -> None:
    interval_s, duration_s = settings.interval_s, settings.duration_s
    if interval_s is None and not settings.at:
        raise ConfigError(NEITHER)
    if interval_s is None:
        return
    if interval_s < 1:
        raise ConfigError("--interval: must be at least 1s. Use a longer interval, such as 30m.")
    if interval_s > duration_s:
        raise ConfigError(
            f"--interval: {length_of(interval_s)} is longer than the duration of {length_of(duration_s)}. Use a "
            "shorter interval or a longer --duration."
        )
    if duration_s / interval_s > MOST_STARTS:
        raise ConfigError(
            f"--interval: {length_of(interval_s)} for {length_of(duration_s)} gives more than {MOST_STARTS} starts. "
            "Use a longer interval or a shorter --duration."
        )


def _starts(settings: Schedule, zone: ZoneInfo, begin: datetime, end: datetime) -> Iterator[datetime]:
    if settings.interval_s is None:
        yield from _at_times(settings, zone, begin, end)
        return
    first = next(_at_times(settings, zone, begin, end), None) if settings.at else begin.astimezone(zone)
    if first is None:
        return
    days = {WEEKDAYS.index(day) for day in settings.days or WEEKDAYS}
    for number in range(math.ceil((end - first).total_seconds() / settings.interval_s)):
        # Arithmetic with local times would count hours on the clock, not elapsed time.
        start = (first.astimezone(UTC) + timedelta(seconds=number * settings.interval_s)).astimezone(zone)
        if start.weekday() in days:
            yield start


def _at_times(settings: Schedule, zone: ZoneInfo, begin: datetime, end: datetime) -> Iterator[datetime]:
    """Yield the starts in [begin, end) at the chosen times and days, in order and without duplicates."""
    from dateutil.rrule import DAILY, rrule, rruleset

    days = [WEEKDAYS.index(day) for day in settings.days or WEEKDAYS]
    # One more day on either side, because a time that does not exist is moved, possibly past midnight.
    since = begin.astimezone(zone).date() - timedelta(days=1)
    until = end.astimezone(zone).replace(tzinfo=None) + timedelta(days=1)
    rules = rruleset()
    for text in settings.at:
        rules.rrule(rrule(DAILY, datetime.combine(since, time.fromisoformat(text)), byweekday=days, until=until))
    before = None
    for local in rules:
        start = localized(local, zone)
        if begin <= start < end and start != before:
            before = start
            yield start


def localized(local: datetime, zone: ZoneInfo) -> datetime:
    """Return a local time with its UTC offset.

    If the local time occurs twice, the first of the two is returned. If it does not exist, the next minute that exists
    is returned.
    """
    aware = local.replace(tzinfo=zone, fold=0)
    if _exists(aware):
        return aware
    minute = local.replace(second=0, microsecond=0)
    while not _exists(minute.replace(tzinfo=zone)):
        minute += timedelta(minutes=1)
    return minute.replace(tzinfo=zone)


def _exists(aware: datetime) -> bool:
    return aware.astimezone(UTC).astimezone(aware.tzinfo).replace(tzinfo=None) == aware.replace(tzinfo=None)


def _nothing(settings: Schedule, zone: ZoneInfo, begin: datetime) -> str:
    """Return the error message for a schedule without starts; it names the next possible start, if there is one."""
    longer = replace(settings, interval_s=None) if settings.at else settings
    following = next(_starts(longer, zone, begin, begin + NEXT_ONE), None)
    duration = length_of(settings.duration_s)
    if following is None:
        return f"--days: no run would start on {', '.join(settings.days)} within {duration}. Use other days."
    return (
        f"--duration: no run would start within {duration}; the next start would be {following:%a %Y-%m-%d %H:%M}. "
        "Use a longer --duration."
    )


# ------------------------------------------------------------------ time zones
def zone_of(name: str) -> ZoneInfo:
    """Return a time zone by its IANA name; raises `ConfigError` if there is none."""
    try:
        return ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        hint = did_you_mean(name, zoneinfo.available_timezones())
        raise ConfigError(
            f"--time-zone: there is no time zone '{name}'.{hint} Use a name such as Europe/Berlin or UTC."
        ) from None


def machine_zone(environ: os._Environ[str] | dict[str, str] = os.environ, etc: Path = Path("/etc")) -> str:
    """Return the IANA name of this machine's time zone, from TZ or, if unset, /etc; raises `ConfigError` if unknown."""
    if wanted := environ.get("TZ", "").removeprefix(":"):
        candidates = [wanted.partition("/zoneinfo/")[2] or wanted]
    else:
        file = etc / "timezone"
        candidates = [os.path.realpath(etc / "localtime").partition("/zoneinfo/")[2]]
        candidates += [file.read_text().strip()] if file.is_file() else []
        if not (etc / "localtime").exists():
            candidates.append("UTC")  # as the C library does
    known = zoneinfo.available_timezones()
    for name in candidates:
        if name in known:
            return name
    raise ConfigError(
        f"--time-zone: this machine's time zone is unknown ({' or '.join(filter(None, candidates)) or 'no TZ'}). "
        "Name one, such as --time-zone Europe/Berlin."
    )
