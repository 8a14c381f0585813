"""Comparisons of arms: published examples, coverage in simulation, and cases without an interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.campaigns import simulate
from lem.results.compare import Effect, contrasts, cycles_needed, holm, is_within
from lem.results.statistics import t_quantile
from lem.studies.orders import order

# Hours of sleep gained by ten patients with each of two drugs (Cushny and Peebles 1905, analysed by Student 1908).
FIRST = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
SECOND = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def test_students_example_is_reproduced():
    (_, found) = contrasts([[math.exp(a), math.exp(b)] for a, b in zip(FIRST, SECOND, strict=True)])
    # Student's mean difference, and the values that R's manual prints: t = 4.0621, 9 degrees of freedom, p = 0.002833.
    assert math.log(found.ratio) == pytest.approx(1.58, abs=1e-12)
    assert (math.log(found.ci_low), math.log(found.ci_high)) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    assert found.p_value == pytest.approx(0.002833, abs=5e-7)
    assert (found.verdict, found.cycles, found.confidence) == ("more", 10, pytest.approx(0.95))


def test_holms_adjustment_is_reproduced():
    # The worked example of Holm's method in common textbooks, sorted: 0.005, 0.01, 0.03, 0.04.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_adjusted_p_values_keep_their_order_and_are_no_smaller(p_values):
    found = holm(p_values)
    assert all(one >= other for one, other in zip(found, p_values, strict=True))
    assert max(found) <= 1
    ordered = [value for _, value in sorted(zip(p_values, found, strict=True))]
    assert ordered == sorted(ordered)


def test_two_one_sided_tests_agree_with_each_test_by_itself():
    from scipy import stats

    for mean in (-0.03, -0.01, 0.0, 0.012, 0.019):
        effect, margin = Effect(mean, 0.004, 9), 0.02
        below = stats.t.sf((mean - math.log(1 - margin)) / 0.004, 9)
        above = stats.t.cdf((mean - math.log(1 + margin)) / 0.004, 9)
        assert is_within(effect, margin) == (max(below, above) < 0.05)


def test_one_cycle_has_no_interval():
    (_, found) = contrasts([[2.0, 3.0]])
    assert found.ratio == pytest.approx(1.5)
    assert (found.ci_low, found.p_value, found.verdict) == (None, None, "cannot tell")


@pytest.mark.parametrize("lost", [None, 0.0])
def test_a_missing_or_zero_cell_is_left_out_with_its_pair(lost):
    whole = [[10.0, 20.0], [11.0, 22.5], [9.0, 17.5]]
    (_, found), (_, expected) = contrasts([*whole, [10.0, lost]]), contrasts(whole)
    assert found == expected
    assert contrasts([[1.0, lost]])[1].ratio is None


def test_more_arms_widen_the_intervals_and_adjust_the_p_values():
    rows = [[10.0, 12.0, 10.1, 10.2], [10.2, 12.1, 10.0, 10.5], [9.9, 11.8, 10.2, 10.1]]
    alone, together = contrasts([row[:2] for row in rows])[1], contrasts(rows)[1]
    assert together.confidence == pytest.approx(1 - 0.05 / 3)
    assert together.ci_low < alone.ci_low
    assert together.ci_high > alone.ci_high
    assert together.p_value == pytest.approx(alone.p_value)
    assert together.p_adjusted == pytest.approx(3 * alone.p_value)


def test_the_same_is_said_only_within_a_margin():
    rows = [[10.0, 10.01], [10.1, 10.1], [9.9, 9.91], [10.0, 9.99]]
    assert contrasts(rows)[1].verdict == "cannot tell"
    assert contrasts(rows, margin=0.02)[1].verdict == "the same"
    assert contrasts([[10.0, 10.5], [10.1, 9.7], [9.9, 10.3]], margin=0.02)[1].verdict == "cannot tell"


@given(st.lists(st.tuples(*[st.floats(0.1, 1e4)] * 3), min_size=2, max_size=6), st.floats(1e-3, 1e3))
def test_a_common_factor_of_a_cycle_or_a_unit_changes_nothing(rows, factor):
    # Each cycle has its own factor: a drift that all arms of a cycle share.
    scaled = [[value * factor ** (i % 3 - 1) for value in row] for i, row in enumerate(rows)]
    for one, other in zip(contrasts(rows)[1:], contrasts(scaled)[1:], strict=True):
        assert one.ratio == pytest.approx(other.ratio, rel=1e-9)


def test_cycles_needed_find_the_difference_as_often_as_they_say():
    needed = cycles_needed(0.02, 0.03)
    rng = np.random.default_rng(5)
    differences = rng.normal(0.02, 0.03, (20_000, needed))
    t = differences.mean(1) / (differences.std(1, ddof=1) / math.sqrt(needed))
    found = (np.abs(t) > t_quantile(0.975, needed - 1)).mean()
    assert found == pytest.approx(0.8, abs=0.03)
    assert cycles_needed(0.0, 0.03) is None


@pytest.mark.parametrize("structure", ["shuffled", "latin"])
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_intervals_cover_as_often_as_they_say_even_if_the_machine_drifts(structure, drift):
    found = simulate(structure, 4, 5, drift)
    assert found.coverage > 0.935
    # A shuffled campaign counts a drift as noise, so its intervals then cover more often.
    assert found.coverage < 0.965 or (structure == "shuffled" and drift)
    assert found.false_alarms < 0.06


def test_a_fixed_order_takes_a_drift_for_a_difference():
    assert simulate("interleaved", 2, 5, 0.1).coverage < 0.9
    assert simulate("grouped", 2, 5, 0.1).coverage < 0.2


def test_a_latin_design_with_a_missing_cell_still_has_an_interval():
    places = order("latin", 4, 4, 1)
    positions = [[0] * 4 for _ in range(4)]
    for place in places:
        positions[place.cycle - 1][place.arm] = place.position
    values = [[(1.0 + 0.1 * p) * (2 if arm == 2 else 1) for arm, p in enumerate(row)] for row in positions]
    values[1][3] = None
    found = contrasts(values, positions=positions)
    assert found[2].ratio == pytest.approx(2.0, rel=1e-6)
    assert found[2].verdict == "more"
    assert found[3].cycles == 3
