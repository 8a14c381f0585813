"""Comparisons of arms: published examples, coverage in simulation, and cases without an interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.campaigns import effects, simulate
from lem.results.campaign import detectable_ratio
from lem.results.compare import (
    Effect,
    contrasts,
    cycles_needed,
    expected_degrees_of_freedom,
    holm,
    is_within,
    paired_effects,
    position_effects,
)
from lem.results.statistics import detectable_errors, t_quantile
from lem.results.stopping import ANALYSES
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


def test_students_t_is_reproduced():
    logs = np.array([list(zip(FIRST, SECOND, strict=True))])
    means, errors, degrees_of_freedom = paired_effects(logs)
    assert (f"{-means[0, 1] / errors[0, 1]:.4f}", degrees_of_freedom) == ("-4.0621", 9)


# Raw p-values of the SAS/STAT User's Guide, The MULTTEST Procedure, example "Inputting Raw p-Values". The first twelve
# of its 24 rows are compared, of which the eleventh is the smallest p-value and the only one below 1 after adjustment.
RAW = (
    0.28282, 0.30688, 0.71022, 0.77175, 0.78180, 0.88581, 0.54685, 0.84978, 0.24228, 0.58977, 0.03498, 0.41607, 0.31631,
    0.05254, 0.45061, 0.75758, 0.12496, 0.49485, 0.21572, 0.50505, 0.94372, 0.81260, 0.77596, 0.36889,
)  # fmt: skip


def test_holms_adjustment_is_reproduced():
    found = [f"{value:.4f}" for value in holm(RAW)[:12]]
    assert found == ["1.0000"] * 10 + ["0.8395", "1.0000"]
    # An example of several textbooks; of its adjusted values, the third is raised to that of the second step.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


# The area under the concentration curve of two drugs in twelve subjects, test and reference: the SAS/STAT User's Guide,
# The TTEST Procedure, example "Equivalence Testing with Lognormal Data", after Wellek, Testing Statistical Hypotheses
# of Equivalence (2003), p. 212. It prints a geometric mean ratio of 0.9412 with 90% limits of 0.8634 and 1.0260, and
# finds the drugs equivalent within 0.8 and 1.25.
TEST_AUC = (103.4, 59.92, 68.17, 94.54, 69.48, 72.17, 74.37, 84.44, 96.74, 94.26, 48.52, 95.68)
REFERENCE_AUC = (90.11, 77.71, 77.71, 97.51, 58.21, 101.3, 79.84, 96.06, 89.30, 97.22, 61.62, 85.80)


def test_an_example_of_two_one_sided_tests_is_reproduced():
    rows = list(zip(REFERENCE_AUC, TEST_AUC, strict=True))
    (_, found) = contrasts(rows, confidence=0.9)
    assert [f"{value:.4f}" for value in (found.ratio, found.ci_low, found.ci_high)] == ["0.9412", "0.8634", "1.0260"]
    assert contrasts(rows)[1].verdict == "cannot tell"
    # The 90% limits decide: 0.8634 is 1 less 0.1366.
    assert [contrasts(rows, margin=margin)[1].verdict for margin in (0.2, 0.137, 0.136)] == [
        "the same", "the same", "cannot tell",
    ]  # fmt: skip


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


@pytest.mark.parametrize("confidence", [0.95, 0.975, 0.999])
def test_fewer_cycles_than_needed_are_too_few(confidence):
    for sd in (0.001, 0.01, 0.03, 0.1, 0.3):
        needed = cycles_needed(0.02, sd, confidence)
        enough = [0.02 / sd * math.sqrt(n) >= detectable_errors(confidence, 0.8, n - 1) for n in range(2, needed + 20)]
        assert enough == [n >= needed for n in range(2, needed + 20)]
    assert cycles_needed(0.0001, 0.3, confidence) is None


@pytest.mark.parametrize(("cycles", "pairs"), [(3, 1), (4, 1), (10, 1), (4, 3)])
def test_a_detectable_ratio_is_found_as_often_as_it_says(cycles, pairs):
    sd = 0.01
    mean = math.log(detectable_ratio(sd, cycles, cycles - 1, pairs))
    differences = np.random.default_rng(6).normal(mean, math.sqrt(2) * sd, (40_000, cycles))
    t = differences.mean(1) / (differences.std(1, ddof=1) / math.sqrt(cycles))
    assert (t > t_quantile(1 - 0.025 / pairs, cycles - 1)).mean() == pytest.approx(0.8, abs=0.008)


@pytest.mark.simulations
@pytest.mark.parametrize("structure", ["shuffled", "latin"])
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_intervals_cover_as_often_as_they_say_even_if_the_machine_drifts(structure, drift):
    found = simulate(structure, 4, 5, drift, noise=0.01)
    assert 0.935 < found.coverage < 0.965
    assert found.false_alarms < 0.06


def test_a_shuffled_campaign_too_short_for_a_line_counts_a_drift_as_noise():
    assert simulate("shuffled", 2, 3, 0.1, noise=0.01).coverage > 0.97
    assert 0.945 < simulate("shuffled", 2, 3, 0.1, noise=0.03).coverage < 0.965


@pytest.mark.parametrize("cycles", [5, 8])
def test_a_line_in_the_positions_is_that_of_least_squares(cycles):
    rng = np.random.default_rng(2)
    offsets, differences = rng.choice([-2.0, -1.0, 1.0, 3.0], cycles), rng.normal(0.3, 0.1, cycles)
    mean, error, freedom = position_effects(differences, offsets)
    design = np.column_stack([np.ones(cycles), offsets])
    found, rest, *_ = np.linalg.lstsq(design, differences, rcond=None)
    assert mean == pytest.approx(found[0])
    assert error == pytest.approx(math.sqrt(rest[0] / (cycles - 2) * np.linalg.inv(design.T @ design)[0, 0]))
    assert freedom == cycles - 2
    # An even drift, however strong, adds nothing.
    shifted = position_effects(differences + 5 * offsets, offsets)
    assert shifted[:2] == (pytest.approx(mean), pytest.approx(error))


@pytest.mark.parametrize(("structure", "arms", "cycles"), [("shuffled", 2, 4), ("shuffled", 3, 7), ("latin", 3, 6),
                                                            ("latin", 4, 8), ("interleaved", 3, 5)])  # fmt: skip
def test_the_degrees_of_freedom_expected_are_those_of_the_analysis(structure, arms, cycles):
    positions = np.zeros((cycles, arms), int)
    for place in order(structure, arms, cycles, 3):
        positions[place.cycle - 1, place.arm] = place.position
    logs = np.random.default_rng(1).normal(size=(1, cycles, arms))
    *_, found = effects(ANALYSES[structure], logs, positions)
    assert expected_degrees_of_freedom(ANALYSES[structure], cycles, arms) == found


@pytest.mark.parametrize("offsets", [[1.0, -1, 1, -1], [1.0] * 6])
def test_few_pairs_and_equal_positions_are_compared_without_a_line(offsets):
    differences = np.random.default_rng(4).normal(size=len(offsets))
    mean, error, freedom = position_effects(differences, np.array(offsets))
    assert mean == pytest.approx(differences.mean())
    assert error == pytest.approx(differences.std(ddof=1) / math.sqrt(len(offsets)))
    assert freedom == len(offsets) - 1


def test_a_pair_loses_the_positions_of_its_missing_cells():
    positions = [[1, 2], [2, 1], [1, 2], [2, 1], [2, 1], [1, 2]]
    drift = 0.05
    values = [[math.exp(drift * a), 2 * math.exp(drift * b)] for a, b in positions]
    values[5][1] = None
    (_, found) = contrasts(values, analysis="position", positions=positions)
    assert (found.cycles, found.ratio) == (5, pytest.approx(2.0))
    assert found.ci_high - found.ci_low < 1e-6
    (_, paired) = contrasts(values)
    assert paired.ratio != pytest.approx(2.0, rel=1e-3)


def test_a_fixed_order_takes_a_drift_for_a_difference():
    assert simulate("interleaved", 2, 5, 0.1, noise=0.01).coverage < 0.9
    assert simulate("grouped", 2, 5, 0.1, noise=0.01).coverage < 0.2


def test_a_latin_design_with_a_missing_cell_still_has_an_interval():
    places = order("latin", 4, 4, 1)
    positions = [[0] * 4 for _ in range(4)]
    for place in places:
        positions[place.cycle - 1][place.arm] = place.position
    values = [[(1.0 + 0.1 * p) * (2 if arm == 2 else 1) for arm, p in enumerate(row)] for row in positions]
    values[1][3] = None
    found = contrasts(values, analysis="latin", positions=positions)
    assert found[2].ratio == pytest.approx(2.0, rel=1e-6)
    assert found[2].verdict == "more"
    assert found[3].cycles == 3
