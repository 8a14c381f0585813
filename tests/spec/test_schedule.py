"""Lengths of time, times of day and days as they are written on the command line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lem.errors import ConfigError
from lem.spec.schedule import WEEKDAYS, days_of, length_of, seconds_of, times_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("6h", 21_600), ("1d", 86_400), ("7d", 604_800), ("1h30m", 5400), ("1.5h", 5400)],
)
def test_a_length_of_time(text, seconds):
    assert seconds_of(text, "--interval") == seconds


@pytest.mark.parametrize("text", ["", "6", "h", "-5m", "6 h", "6w", "0", "0s", "1h-5m", "inf", "1e3s", "٣h", "4000d"])
def test_what_is_no_length_of_time(text):
    with pytest.raises(ConfigError, match=r"^--duration: "):
        seconds_of(text, "--duration")


@given(st.integers(1, 3660 * 86_400))
def test_a_length_is_shown_in_its_largest_units(seconds):
    shown = length_of(seconds)
    back = seconds_of(shown.replace(" ", ""), "--interval")
    assert back <= seconds
    assert seconds - back < {"d": 3600, "h": 60, "m": 1, "s": 1}[shown.split()[0][-1]]


@pytest.mark.parametrize(
    ("text", "times"),
    [("09:00", ("09:00",)), ("14:30, 9:05", ("09:05", "14:30")), ("00:00,00:00,23:59:30", ("00:00", "23:59:30"))],
)
def test_times_of_day(text, times):
    assert times_of(text) == times


@pytest.mark.parametrize("text", ["25:00", "24:00", "09:60", "9", "", "09:00,", "9am", "09:00+01:00", "-1:00"])
def test_what_is_no_time_of_day(text):
    with pytest.raises(ConfigError, match=r"^--at: '.*' is not a time of day"):
        times_of(text)


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("mon,wed,fri", "mon wed fri"), ("fri,mon", "mon fri"), ("mon-fri", "mon tue wed thu fri"),
        ("weekdays", "mon tue wed thu fri"), ("Weekends", "sat sun"), ("sat-mon", "mon sat sun"),
        ("Monday, wed-thu", "mon wed thu"), ("mon-mon", "mon"), ("weekdays,sun", "mon tue wed thu fri sun"),
    ],
)  # fmt: skip
def test_days(text, days):
    assert days_of(text) == tuple(days.split())


@pytest.mark.parametrize("text", ["foo", "mon-fri,foo", "mon-", "-fri", "", "mon,", "mon-wed-fri", "monfri"])
def test_what_is_no_day(text):
    with pytest.raises(ConfigError, match=r"^--days: '.*' is not a day"):
        days_of(text)


@given(st.sampled_from(WEEKDAYS), st.sampled_from(WEEKDAYS))
def test_a_range_of_days_and_the_rest_of_the_week(first, last):
    rest = (WEEKDAYS.index(last) + 1) % 7, (WEEKDAYS.index(first) - 1) % 7
    inside = days_of(f"{first}-{last}")
    if len(inside) < 7:
        outside = days_of(f"{WEEKDAYS[rest[0]]}-{WEEKDAYS[rest[1]]}")
        assert set(inside) | set(outside) == set(WEEKDAYS)
        assert not set(inside) & set(outside)
