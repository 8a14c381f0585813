"""The tests of variation over time: published examples, properties, and how often the verdict is right."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bench.schedules import Design, share_right
from lem.results.variation import FTest, Point, detectable_difference, f_test, judged, slot_names, variations

# Wire resistances: NIST/SEMATECH e-Handbook of Statistical Methods, 7.4.3.3.
RESISTANCES = [[6.9, 5.4, 5.8, 4.6, 4.0], [8.3, 6.8, 7.8, 9.2, 6.5], [8.0, 10.5, 8.1, 6.9, 9.3]]
# Vascular grafts: D. C. Montgomery, Design and Analysis of Experiments, 6th ed. (2005), table 4-3; batches are blocks.
GRAFTS = [
    [90.3, 89.2, 98.2, 93.9, 87.4, 97.9],
    [92.5, 89.5, 90.6, 94.7, 87.0, 95.8],
    [85.5, 90.8, 89.6, 86.2, 88.0, 93.4],
    [82.5, 89.5, 85.6, 87.4, 78.9, 90.7],
]
# Catalysts: the same book, table 4-22; an incomplete block design.
CATALYSTS = [[73, 74, None, 71], [None, 75, 67, 72], [73, 75, 68, None], [75, None, 72, 75]]
# Purity of three batches from each of three suppliers: the same book, table 14-3 (coded); batches within suppliers.
PURITY = {
    1: {1: [1, -1, 0], 2: [-2, -3, -4], 3: [-2, 0, 1], 4: [1, 4, 0]},
    2: {5: [1, -2, -3], 6: [0, 4, 2], 7: [-1, 0, -2], 8: [0, 3, 2]},
    3: {9: [2, 4, 0], 10: [-2, 0, 2], 11: [1, -1, 2], 12: [3, 2, 1]},
}


def flat(table):
    """Return the values of a table that are present, with their rows and columns."""
    found = [(v, i, j) for i, row in enumerate(table) for j, v in enumerate(row) if v is not None]
    return [list(column) for column in zip(*found, strict=True)]


def test_one_way_as_published():
    values, rows, _ = flat(RESISTANCES)
    found = f_test(values, without=(), factor=rows)
    assert (found.numerator, found.denominator) == (2, 12)
    assert round(found.statistic, 2) == 9.59
    assert found.p_value == pytest.approx(stats.f_oneway(*RESISTANCES).pvalue)


def test_complete_blocks_as_published():
    values, rows, columns = flat(GRAFTS)
    found = f_test(values, without=(columns,), factor=rows)
    assert (found.numerator, found.denominator, round(found.statistic, 2)) == (3, 15, 8.11)
    assert (round(found.p_value, 4), round(found.error_sd**2, 2)) == (0.0019, 7.33)


def test_incomplete_blocks_as_published():
    values, rows, columns = flat(CATALYSTS)
    found = f_test(values, without=(columns,), factor=rows)
    assert (found.numerator, found.denominator, round(found.statistic, 2)) == (3, 5, 11.67)
    assert round(found.error_sd**2, 2) == 0.65


def test_nested_as_published():
    rows = [(v, supplier, batch) for supplier, of in PURITY.items() for batch, vs in of.items() for v in vs]
    values, suppliers, batches = (list(column) for column in zip(*rows, strict=True))
    found = f_test(values, without=(), factor=suppliers, error=batches)
    assert (found.numerator, found.denominator) == (2, 9)
    assert (round(found.statistic, 2), round(found.error_sd**2, 2)) == (0.97, 7.77)


def test_without_error_nothing_is_tested():
    assert f_test([1.0, 1.0, 2.0, 2.0], without=(), factor=[1, 1, 2, 2]) is None
    assert f_test([1.0, 2.0, 3.0], without=(), factor=[1, 2, 3]) is None
    assert f_test([1.0, 2.0, 3.0], without=(), factor=[1, 1, 1]) is None


# ------------------------------------------------------------------ slots, days and weekdays
MONDAY = datetime(2026, 3, 2)


def points(times, values=None):
    rng = np.random.default_rng(7)
    values = np.exp(rng.normal(0, 0.02, len(times))) if values is None else values
    return [Point(at, float(value)) for at, value in zip(times, values, strict=True)]


def every(hours, days):
    return [MONDAY + timedelta(hours=i * hours) for i in range(int(days * 24 / hours))]


def verdicts(found):
    return [(one.verdict, one.reason) for one in judged(found)]


def test_one_day_cannot_tell():
    found = verdicts(variations(points(every(6, 1))))
    assert found == [("cannot tell", "fewer than two days"), ("cannot tell", "fewer than two weeks")]
    assert verdicts(variations([]))[0] == ("cannot tell", "fewer than two days")


def test_without_repeats_it_cannot_tell():
    at = [MONDAY + timedelta(days=i, hours=i) for i in range(5)]
    assert verdicts(variations(points(at)))[0] == ("cannot tell", "no slot has repeats")


def test_one_time_of_day_has_nothing_to_compare_but_weekdays():
    found = variations(points([MONDAY + timedelta(days=i, hours=9) for i in range(21)]))
    by_time, by_weekday = judged(found)
    assert by_time.reason == "only one time of day"
    assert by_weekday.verdict in ("varies", "no variation found")
    assert (by_weekday.result.numerator, by_weekday.result.denominator) == (6, 14)


def test_one_week_says_nothing_about_weekdays():
    by_time, by_weekday = judged(variations(points(every(6, 7))))
    assert (by_weekday.reason, by_weekday.p_adjusted) == ("fewer than two weeks", None)
    from_noon = [at + timedelta(hours=12) for at in every(6, 7)]
    assert variations(points(from_noon))[1].reason == "fewer than two weeks", "although there are two Mondays"
    assert by_time.p_adjusted == by_time.result.p_value, "a single test is not adjusted"
    assert "blocks" in by_time.test


def test_two_weeks_give_two_tests_adjusted_by_holm():
    values = [1.05 if 8 <= at.hour < 20 else 1.0 + 0.01 * (at.day % 3) for at in every(6, 14)]
    found = judged(variations(points(every(6, 14), values)))
    smaller, larger = sorted(one.result.p_value for one in found)
    assert sorted(one.p_adjusted for one in found) == pytest.approx([2 * smaller, larger])
    assert {one.factor: one.verdict for one in found} == {"time of day": "varies", "weekday": "no variation found"}


def test_with_one_run_a_day_the_drift_is_part_of_the_error():
    at = [MONDAY + timedelta(hours=36 * i) for i in range(14)]
    by_time, _ = judged(variations(points(at)))
    assert (by_time.test, by_time.result.denominator) == ("F-test of slots, one-way analysis of variance", 12)


def test_runs_of_one_slot_on_one_day_are_one_repeat():
    at = every(0.5, 3)
    by_time, _ = variations(points(at))
    assert len(by_time.levels) == 24
    assert {(level.name, level.runs, level.days) for level in by_time.levels} >= {("00:00–00:59", 6, 3)}
    assert (by_time.result.numerator, by_time.result.denominator) == (23, 46)


def test_up_to_24_times_are_slots_of_their_own():
    assert set(slot_names(every(1, 2)).values()) == {f"{hour:02}:00" for hour in range(24)}
    assert slot_names([datetime(2026, 1, 1, 9, 30, 15)]).popitem()[1] == "09:30:15"


def test_a_day_with_its_own_times_after_the_change_of_the_clocks_is_no_contrast():
    """An elapsed interval moves by an hour in local time, so the slots before and after have no day in common."""
    begin = datetime(2026, 3, 25, 3, tzinfo=ZoneInfo("Europe/Berlin")).timestamp()
    at = [
        datetime.fromtimestamp(begin + i * 6 * 3600, ZoneInfo("Europe/Berlin")).replace(tzinfo=None) for i in range(36)
    ]
    by_time, _ = judged(variations(points(at)))
    assert {level.name for level in by_time.levels} == {f"{hour:02}:00" for hour in (3, 9, 15, 21, 4, 10, 16, 22)}
    assert by_time.result.numerator == 6, "8 slots in two groups of days"


def test_means_are_geometric_and_have_an_interval_only_with_two_days():
    at = [MONDAY + timedelta(hours=9), MONDAY + timedelta(days=1, hours=9), MONDAY + timedelta(hours=21)]
    by_time, _ = variations(points(at, [2.0, 8.0, 3.0]))
    morning, night = by_time.levels
    assert (morning.mean, night.mean) == (pytest.approx(4.0), pytest.approx(3.0))
    half = stats.t.ppf(0.975, 1) * math.log(2)  # the standard error of two values whose logarithms differ by ln 4
    assert (morning.ci95_low, morning.ci95_high) == pytest.approx((4 * math.exp(-half), 4 * math.exp(half)))
    assert (night.days, night.ci95_low, night.ci95_high) == (1, None, None)


@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 23), st.floats(0.01, 1e3)), max_size=40), st.floats(0.01, 100)
)
def test_the_unit_does_not_matter_and_every_value_counts_once(rows, unit):
    at = [MONDAY + timedelta(days=day, hours=hour) for day, hour, _ in rows]
    values = [value for *_, value in rows]
    one, other = (judged(variations(points(at, [value * by for value in values]))) for by in (1.0, unit))
    for mine, theirs in zip(one, other, strict=True):
        assert (mine.reason, mine.test) == (theirs.reason, theirs.test)
        assert sum(level.runs for level in mine.levels) == len(rows)
        assert [level.mean * unit for level in mine.levels] == pytest.approx([level.mean for level in theirs.levels])
        assert (mine.verdict == "cannot tell") is (mine.result is None) is (mine.reason is not None)
        if mine.result:
            assert 0 <= mine.p_adjusted <= 1
            assert mine.p_adjusted == pytest.approx(theirs.p_adjusted, rel=1e-3, abs=1e-6)
        for level in mine.levels:
            assert (level.ci95_low is None) is (level.days < 2)


# ------------------------------------------------------------------ how often the verdict is right
@pytest.mark.parametrize("design", [Design("6h", 7), Design("6h", 7, lost=0.1)])
@pytest.mark.parametrize("difference", [0.0, 0.05])
def test_the_verdict_is_right(design, difference):
    """The benchmark shows this with 10,000 repetitions; 300 have a standard error of about 1%."""
    assert share_right(design, noise=0.02, of_day=0.03, difference=difference, times=300) > 0.925


def test_the_detectable_difference_is_detected_as_often_as_it_says():
    unit = FTest(1.0, 3, 18, 0.5, error_sd=0.01, values=28)  # as in a week of runs every six hours
    difference = math.expm1(detectable_difference(unit))
    right = share_right(Design("6h", 7), noise=0.01, of_day=0.03, difference=difference, times=400)
    assert right == pytest.approx(0.95, abs=0.04)
