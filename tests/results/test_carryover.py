"""What predecessors do: found where it is there, seldom where it is not, and left open where the order cannot tell."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from lem.results.carryover import Ran, carry_over
from lem.studies.orders import order

OF_CYCLE = 0.03


def campaign(structure, arms, cycles, seed, rng, *, noise=0.01, drift=0.0, left_behind=0.0, of_cycle=OF_CYCLE):
    """Return the cells of a simulated campaign, whose last arm leaves something behind; arms and positions differ."""
    places = order(structure, arms, cycles, seed)
    levels = rng.normal(0, of_cycle, cycles)
    return [
        Ran(
            place.cycle,
            place.position,
            place.arm,
            before.arm,
            levels[place.cycle - 1]
            + 0.2 * place.arm
            + 0.05 * place.position
            + left_behind * (before.arm == arms - 1)
            + math.log1p(drift * number / (len(places) - 1))
            + rng.normal(0, noise),
        )
        for number, (before, place) in enumerate(pairwise(places), start=1)
    ]


def found(structure, arms, cycles, campaigns, seed=1, **effects):
    """Return what many campaigns, each with an order of its own, say about carry-over, if they say anything."""
    rng = np.random.default_rng(seed)
    each = (carry_over(campaign(structure, arms, cycles, i, rng, **effects), arms) for i in range(campaigns))
    return [one for one in each if one is not None]


DESIGNS = [("shuffled", 2, 10), ("shuffled", 4, 6), ("latin", 3, 6), ("latin", 4, 8)]


@pytest.mark.simulations
@pytest.mark.parametrize(("structure", "arms", "cycles"), DESIGNS)
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_without_carry_over_a_false_alarm_is_as_rare_as_it_says(structure, arms, cycles, drift):
    said = found(structure, arms, cycles, 1000, drift=drift)
    assert len(said) > 900
    # 5% of 1000 has a standard error of 0.7%.
    assert sum(each.p_value < 0.05 for each in said) / len(said) < 0.07
    covered = [all(after.ci_low <= 1 <= after.ci_high for after in each.after) for each in said]
    assert np.mean(covered) > 0.935


@pytest.mark.parametrize(("structure", "arms", "cycles"), DESIGNS)
def test_carry_over_of_a_known_size_is_found_without_bias(structure, arms, cycles):
    said = found(structure, arms, cycles, 200, left_behind=0.05)
    assert np.mean([each.p_value < 0.05 for each in said]) > 0.9
    logs = [math.log(each.after[-1].ratio) for each in said]
    assert np.mean(logs) == pytest.approx(0.05, abs=4 * np.std(logs) / math.sqrt(len(logs)))
    assert [after.arm for after in said[0].after] == list(range(1, arms))
    covered = [each.after[-1].ci_low <= math.exp(0.05) <= each.after[-1].ci_high for each in said]
    assert np.mean(covered) > 0.92


def test_without_noise_it_is_recovered_exactly_whichever_arm_is_the_baseline():
    cells = campaign("latin", 4, 8, 3, np.random.default_rng(0), noise=0.0, left_behind=0.07)
    first = carry_over(cells, 4)
    assert [after.ratio for after in first.after] == pytest.approx([1, 1, math.exp(0.07)])
    assert first.p_value == 0.0
    assert [after.ratio for after in carry_over(cells, 4, baseline=3).after] == pytest.approx([math.exp(-0.07)] * 3)
    # What is left is rounding, which is no effect.
    without = campaign("latin", 4, 8, 3, np.random.default_rng(0), noise=0.0)
    assert carry_over(without, 4).p_value == 1.0


def test_its_test_is_that_of_two_nested_models():
    """Compare with the F-test written out in scipy's least squares and F distribution."""
    from scipy import linalg, stats

    cells = campaign("shuffled", 3, 8, 5, np.random.default_rng(2), left_behind=0.01)

    def rest(*factors):
        columns = [[float(of(cell) == level) for cell in cells] for of, levels in factors for level in levels]
        matrix = np.array(columns).T
        logs = np.array([cell.log for cell in cells])
        solution, _, rank, _ = linalg.lstsq(matrix, logs)
        return float(((logs - matrix @ solution) ** 2).sum()), len(cells) - rank

    factors = [
        (lambda c: c.cycle, range(1, 9)), (lambda c: c.arm, range(3)), (lambda c: c.position, range(1, 4)),
        (lambda c: c.before, range(3)),
    ]  # fmt: skip
    (larger, _), (smaller, freedom) = rest(*factors[:3]), rest(*factors)
    said = carry_over(cells, 3)
    assert said.degrees_of_freedom == freedom
    assert said.p_value == pytest.approx(stats.f.sf((larger - smaller) / 2 / (smaller / freedom), 2, freedom), rel=1e-6)


@pytest.mark.parametrize(
    ("structure", "arms", "cycles"),
    [("interleaved", 3, 20), ("interleaved", 2, 20), ("shuffled", 2, 3), ("shuffled", 4, 3), ("latin", 4, 4)],
)
def test_an_order_that_cannot_tell_says_nothing(structure, arms, cycles):
    assert found(structure, arms, cycles, 20) == []


def test_an_arm_that_never_ran_before_another_leaves_it_open():
    cells = campaign("shuffled", 3, 20, 1, np.random.default_rng(1))
    assert carry_over(cells, 3) is not None
    assert carry_over([cell for cell in cells if cell.before != 2], 3) is None
    assert carry_over([], 3) is None
    assert carry_over([replace(cell, before=0) for cell in cells], 3) is None
