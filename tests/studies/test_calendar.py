"""The table of starts: days and times of day in several time zones, daylight saving, intervals, and bad settings."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lem.errors import ConfigError
from lem.spec.schedule import WEEKDAYS, Schedule, days_of
from lem.studies.calendar import localized, machine_zone, starts

BERLIN, NEW_YORK, KATHMANDU = "Europe/Berlin", "America/New_York", "Asia/Kathmandu"
DAY = 86_400.0
# Midnight of New Year in each zone.
NEW_YEAR = {
    BERLIN: "2026-01-01T00:00+01:00", NEW_YORK: "2026-01-01T00:00-05:00", KATHMANDU: "2026-01-01T00:00+05:45",
}  # fmt: skip


def table(now, **settings):
    return [start.isoformat(timespec="minutes") for start in starts(Schedule(**settings), datetime.fromisoformat(now))]


# ------------------------------------------------------------------ tables written by hand
@pytest.mark.parametrize(
    ("now", "settings", "expected"),
    [
        # Every day at a time, over the night on which Berlin's clock is set forward; 02:30 does not exist.
        (
            "2026-03-28T00:00+01:00",
            {"at": ("02:30",), "duration_s": 3 * DAY, "time_zone": BERLIN},
            ["2026-03-28T02:30+01:00", "2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"],
        ),
        # The same time stays the same on the clock on the wall, although 23 hours have passed.
        (
            "2026-03-28T08:00+01:00",
            {"at": ("09:00",), "duration_s": 3 * DAY, "time_zone": BERLIN},
            ["2026-03-28T09:00+01:00", "2026-03-29T09:00+02:00", "2026-03-30T09:00+02:00"],
        ),
        # 02:30 comes twice when Berlin's clock is set back; the first counts.
        (
            "2026-10-24T12:00+02:00",
            {"at": ("02:30",), "duration_s": 3 * DAY, "time_zone": BERLIN},
            ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00", "2026-10-27T02:30+01:00"],
        ),
        # The second of the two has begun: the first has passed.
        (
            "2026-10-25T02:15+01:00",
            {"at": ("02:30",), "duration_s": 2 * DAY, "time_zone": BERLIN},
            ["2026-10-26T02:30+01:00"],
        ),
        # Two times that become the same one are one start.
        (
            "2026-03-29T00:00+01:00",
            {"at": ("02:15", "02:45", "03:00", "03:01"), "duration_s": DAY, "time_zone": BERLIN},
            ["2026-03-29T03:00+02:00", "2026-03-29T03:01+02:00"],
        ),
        # New York, forward and back.
        (
            "2026-03-07T12:00-05:00",
            {"at": ("02:30", "23:30"), "duration_s": 2 * DAY, "time_zone": NEW_YORK},
            [
                "2026-03-07T23:30-05:00", "2026-03-08T03:00-04:00", "2026-03-08T23:30-04:00", "2026-03-09T02:30-04:00",
            ],
        ),
        (
            "2026-10-31T12:00-04:00",
            {"at": ("01:30",), "duration_s": 2 * DAY, "time_zone": NEW_YORK},
            ["2026-11-01T01:30-04:00", "2026-11-02T01:30-05:00"],
        ),
        # Kathmandu is 5 hours and 45 minutes ahead, without daylight saving.
        (
            "2026-03-28T18:00+00:00",
            {"at": ("00:00", "12:00"), "duration_s": 1.5 * DAY, "time_zone": KATHMANDU},
            ["2026-03-29T00:00+05:45", "2026-03-29T12:00+05:45", "2026-03-30T00:00+05:45"],
        ),
        # An interval is elapsed time: on the wall, the starts move by an hour.
        (
            "2026-03-28T22:00+01:00",
            {"interval_s": 6 * 3600.0, "duration_s": DAY, "time_zone": BERLIN},
            ["2026-03-28T22:00+01:00", "2026-03-29T05:00+02:00", "2026-03-29T11:00+02:00", "2026-03-29T17:00+02:00"],
        ),
        (
            "2026-10-25T01:30+02:00",
            {"interval_s": 1800.0, "duration_s": 7200.0, "time_zone": BERLIN},
            ["2026-10-25T01:30+02:00", "2026-10-25T02:00+02:00", "2026-10-25T02:30+02:00", "2026-10-25T02:00+01:00"],
        ),
        # With both, the first run starts at the time, and the others follow at the interval until the end.
        (
            "2026-06-01T07:10+02:00",
            {"interval_s": 8 * 3600.0, "at": ("09:00",), "duration_s": DAY, "time_zone": BERLIN},
            ["2026-06-01T09:00+02:00", "2026-06-01T17:00+02:00", "2026-06-02T01:00+02:00"],
        ),
        # With days, those starts of the interval that fall on the days.
        (
            "2026-06-05T09:00+02:00",
            {"interval_s": 12 * 3600.0, "at": ("09:00",), "days": ("mon", "fri"), "duration_s": 4 * DAY,
             "time_zone": BERLIN},
            ["2026-06-05T09:00+02:00", "2026-06-05T21:00+02:00", "2026-06-08T09:00+02:00", "2026-06-08T21:00+02:00"],
        ),
        # A start at the first second counts, and one at the end does not.
        (
            "2026-06-01T09:00:00.900+02:00",
            {"at": ("09:00",), "duration_s": DAY, "time_zone": BERLIN},
            ["2026-06-01T09:00+02:00"],
        ),
    ],
)  # fmt: skip
def test_the_starts_are_those_of_the_table(now, settings, expected):
    assert table(now, **settings) == expected


@pytest.mark.parametrize(
    ("text", "names", "in_a_year"),
    [
        ("mon,wed,fri", {"mon", "wed", "fri"}, 52 + 52 + 52),
        ("weekdays", set(WEEKDAYS[:5]), 261),
        ("weekends", {"sat", "sun"}, 104),
        ("fri-mon", {"fri", "sat", "sun", "mon"}, 208),
        ("Thursday", {"thu"}, 53),
        ("mon-sun", set(WEEKDAYS), 365),
    ],
)
@pytest.mark.parametrize("zone", [BERLIN, NEW_YORK, KATHMANDU])
def test_a_year_of_days(zone, text, names, in_a_year):
    found = starts(
        Schedule(at=("02:30", "23:45"), days=days_of(text), duration_s=365 * DAY, time_zone=zone),
        datetime.fromisoformat(NEW_YEAR[zone]),
    )
    assert len(found) == 2 * in_a_year
    assert {WEEKDAYS[start.weekday()] for start in found} == names
    forward = {BERLIN: "2026-03-29", NEW_YORK: "2026-03-08", KATHMANDU: None}[zone]
    odd = {f"{start:%Y-%m-%d}": f"{start:%H:%M}" for start in found if f"{start:%H:%M}" not in ("02:30", "23:45")}
    assert odd == ({forward: "03:00"} if forward and "sun" in names else {})


@pytest.mark.parametrize("zone", [BERLIN, NEW_YORK, KATHMANDU])
@pytest.mark.parametrize("interval_s", [1800.0, 6 * 3600.0, DAY, 2.5 * DAY, 7 * DAY])
def test_a_year_of_intervals_has_equal_gaps(zone, interval_s):
    begin = datetime.fromisoformat(NEW_YEAR[zone])
    found = starts(Schedule(interval_s=interval_s, duration_s=365 * DAY, time_zone=zone), begin)
    elapsed = [(start.astimezone(UTC) - begin.astimezone(UTC)).total_seconds() for start in found]
    assert elapsed == [number * interval_s for number in range(-(-365 * 86_400 // int(interval_s)))]


@pytest.mark.parametrize("zone", [BERLIN, NEW_YORK, KATHMANDU])
def test_a_year_agrees_with_a_walk_through_its_half_hours(zone):
    """An independent reckoning: look at the clock on the wall in each half hour of the year."""
    times = ("00:00", "01:30", "02:00", "02:30", "12:30")
    begin = datetime.fromisoformat(NEW_YEAR[zone]).astimezone(UTC)
    seen, walked, before = set(), [], None
    for number in range(365 * 48):
        moment = (begin + timedelta(minutes=30 * number)).astimezone(ZoneInfo(zone))
        is_due = f"{moment:%H:%M}" in times and (moment.date(), moment.hour, moment.minute) not in seen
        was_set_forward_over_two = before is not None and (before.hour, moment.hour) == (1, 3)
        if is_due or was_set_forward_over_two:
            seen.add((moment.date(), moment.hour, moment.minute))
            walked.append(moment.isoformat())
        before = moment
    found = starts(Schedule(at=times, duration_s=365 * DAY, time_zone=zone), begin)
    assert [start.isoformat() for start in found] == walked


# ------------------------------------------------------------------ properties
ZONES = st.sampled_from(
    [BERLIN, NEW_YORK, KATHMANDU, "UTC", "Australia/Lord_Howe", "America/Santiago", "Africa/Casablanca", "Asia/Gaza"]
)
MOMENTS = st.integers(1_700_000_000, 1_900_000_000).map(lambda second: datetime.fromtimestamp(second, UTC))
TIMES = st.lists(
    st.builds(lambda hour, minute: f"{hour:02}:{minute:02}", st.integers(0, 23), st.integers(0, 59)),
    min_size=1, max_size=4, unique=True,
)  # fmt: skip
DAYS = st.lists(st.sampled_from(WEEKDAYS), unique=True).map(tuple)


@given(zone=ZONES, now=MOMENTS, at=TIMES, days=DAYS, duration_s=st.integers(7 * 86_400, 60 * 86_400))
def test_times_of_day_are_in_order_within_the_duration_and_on_the_days(zone, now, at, days, duration_s):
    found = starts(Schedule(at=tuple(at), days=days, duration_s=duration_s, time_zone=zone), now)
    elapsed = [start.timestamp() for start in found]
    assert elapsed == sorted(set(elapsed))
    assert now.timestamp() <= elapsed[0]
    assert elapsed[-1] < now.timestamp() + duration_s
    assert {WEEKDAYS[start.weekday()] for start in found} <= set(days or WEEKDAYS)
    # At most one start for each time and day, and exactly one on days that lie within the duration as a whole.
    of_days = Counter(start.date() for start in found)
    assert max(of_days.values()) <= len(at)
    for start in found:
        exact = f"{start:%H:%M}" in at
        before = start.astimezone(UTC) - timedelta(minutes=1)
        assert exact or start.utcoffset() > before.astimezone(start.tzinfo).utcoffset()


@given(zone=ZONES, now=MOMENTS, interval_s=st.integers(60, 86_400), number=st.integers(1, 200), days=DAYS)
def test_intervals_are_elapsed_time(zone, now, interval_s, number, days):
    days = days and (*days, WEEKDAYS[now.astimezone(ZoneInfo(zone)).weekday()])  # so that there is a start
    found = starts(Schedule(interval_s=interval_s, days=days, duration_s=interval_s * number, time_zone=zone), now)
    steps = [(start.timestamp() - now.timestamp()) / interval_s for start in found]
    assert all(step == int(step) and 0 <= step < number for step in steps)
    if not days:
        assert len(steps) == number


@given(zone=ZONES, naive=st.datetimes(datetime(2024, 1, 1), datetime(2030, 1, 1)))
def test_a_local_time_exists_and_is_the_same_or_the_next(zone, naive):
    found = localized(naive.replace(second=0, microsecond=0), ZoneInfo(zone))
    back = found.astimezone(UTC).astimezone(ZoneInfo(zone))
    assert (back.replace(tzinfo=None), back.fold) == (found.replace(tzinfo=None), 0)
    assert timedelta(0) <= found.replace(tzinfo=None) - naive.replace(second=0, microsecond=0) <= timedelta(hours=1)


# ------------------------------------------------------------------ what cannot be scheduled
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "needs --interval, such as --interval 6h, or --at"),
        ({"interval_s": 2 * DAY}, "--interval: 2d is longer than the duration of 1d"),
        ({"interval_s": 0.5}, "at least 1s"),
        ({"interval_s": 1.0, "duration_s": 365 * DAY}, "more than 100000 starts"),
        ({"at": ("09:00",), "duration_s": 60.0}, "the next start would be Tue 2026-06-02 09:00"),
        ({"interval_s": 60.0, "days": ("sat",), "duration_s": 3600.0}, "the next start would be Sat 2026-06-06 00:00"),
        ({"at": ("09:00",), "time_zone": "Europe/Berlln"}, "Did you mean 'Europe/Berlin'"),
        ({"at": ("09:00",), "time_zone": "../etc"}, "no time zone"),
    ],
)
def test_bad_settings_have_a_remedy(settings, problem):
    with pytest.raises(ConfigError, match=problem.replace("(", r"\(")):
        starts(Schedule(**settings), datetime.fromisoformat("2026-06-01T10:00:00+00:00"))


def test_the_machines_zone_is_found(tmp_path):
    (tmp_path / "usr" / "zoneinfo" / "Europe").mkdir(parents=True)
    (tmp_path / "usr" / "zoneinfo" / "Europe" / "Berlin").touch()
    assert machine_zone({"TZ": "Asia/Kathmandu"}, tmp_path) == KATHMANDU
    assert machine_zone({"TZ": ":/usr/share/zoneinfo/America/New_York"}, tmp_path) == NEW_YORK
    assert machine_zone({}, tmp_path) == "UTC"
    (tmp_path / "localtime").symlink_to(tmp_path / "usr" / "zoneinfo" / "Europe" / "Berlin")
    assert machine_zone({}, tmp_path) == BERLIN
    (tmp_path / "localtime").unlink()
    (tmp_path / "localtime").write_bytes(b"TZif")
    (tmp_path / "timezone").write_text("America/New_York\n")
    assert machine_zone({}, tmp_path) == NEW_YORK
    with pytest.raises(ConfigError, match="Name one, such as --time-zone Europe/Berlin"):
        machine_zone({"TZ": "CET-1CEST"}, tmp_path)
