"""Means, spreads and intervals, compared with known values and with scipy and numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lem.results.statistics import line_through, percentile, sd_limit, summarize, t_quantile

NUMBERS = st.floats(1e-3, 1e6)


def test_a_worked_example():
    # 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653, half-width 4.302653 / sqrt(3).
    found = summarize([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd, found.cv) == (3, 2.0, 1.0, 0.5)
    assert found.ci95_low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert found.ci95_high == pytest.approx(2 + 2.484138, abs=1e-6)


@pytest.mark.parametrize(("degrees", "table"), [(1, 12.7062), (4, 2.7764), (9, 2.2622), (30, 2.0423)])
def test_quantiles_are_those_of_the_tables(degrees, table):
    assert t_quantile(0.975, degrees) == pytest.approx(table, abs=1e-4)


@pytest.mark.parametrize("degrees", range(1, 13))
def test_quantiles_are_scipys(degrees):
    assert t_quantile(0.975, degrees) == pytest.approx(float(stats.t.ppf(0.975, degrees)), rel=1e-9)


@given(st.lists(NUMBERS, min_size=2, max_size=10))
def test_the_interval_is_scipys(values):
    found = summarize(values)
    sem = stats.sem(values)
    if sem == 0:
        assert found.ci95_low == found.ci95_high == pytest.approx(found.mean)
        return
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=sem)
    assert (found.ci95_low, found.ci95_high) == (pytest.approx(low, rel=1e-6, abs=1e-6), pytest.approx(high, rel=1e-6))


def test_fewer_than_two_values_have_no_spread():
    assert summarize([]).mean is None
    one = summarize([3.0])
    assert one.mean == 3.0
    assert one.sd is one.cv is one.ci95_low is one.ci95_high is None


@given(st.lists(NUMBERS, min_size=1, max_size=50), st.sampled_from([0, 1, 50, 95, 99, 100]))
def test_percentiles_are_numpys(values, percent):
    assert percentile(sorted(values), percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-9)


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(-10, 10)), min_size=3, max_size=20))
def test_a_line_is_scipys(points):
    places, values = [float(x) for x, _ in points], [y for _, y in points]
    found = line_through(places, values)
    if len(set(places)) == 1:
        assert found is None
        return
    if len(set(values)) == 1:  # scipy's error is then not a number
        assert (found.slope, found.error) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))
        return
    expected = stats.linregress(places, values)
    assert found.slope == pytest.approx(expected.slope, rel=1e-6, abs=1e-9)
    assert found.error == pytest.approx(expected.stderr, rel=1e-4, abs=1e-6)
    if expected.stderr > 1e-6:
        assert found.p_value == pytest.approx(expected.pvalue, rel=1e-3, abs=1e-9)
        low, high = stats.t.interval(0.95, len(points) - 2, loc=expected.slope, scale=expected.stderr)
        assert (found.slope - found.half_width, found.slope + found.half_width) == pytest.approx((low, high), rel=1e-3)


def test_a_line_needs_a_degree_of_freedom_for_its_error():
    assert line_through([0.0, 1.0], [1.0, 2.0]) is None
    assert line_through([0.0, 1.0, 2.0], [1.0, 2.0, 2.0], means_taken=2) is None
    assert line_through([0.0, 1.0, 2.0], [2.0, 2.0, 2.0]).p_value == 1.0


def test_limits_of_a_standard_deviation_are_those_of_the_tables():
    # Chi-squared with 4 degrees of freedom: 0.484 and 11.143 at 2.5 and 97.5%.
    assert sd_limit(1.0, 4, 0.975) == pytest.approx((4 / 0.484) ** 0.5, rel=1e-3)
    assert sd_limit(1.0, 4, 0.025) == pytest.approx((4 / 11.143) ** 0.5, rel=1e-3)
