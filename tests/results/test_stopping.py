"""Adaptive campaigns: the calibrated levels, the rule, and the decision after a cycle."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from bench import calibrate
from lem.errors import ConfigError
from lem.results.campaign import NOT_NEEDED, Arm, CellEntry, Definition, Machine, answer, half_width, is_enough
from lem.results.campaign_show import sentences
from lem.results.compare import contrasts
from lem.results.stopping import is_narrow, level_for, levels, rule_of
from lem.spec.campaign import FEWEST_ADAPTIVE_CYCLES, MOST_ADAPTIVE_CYCLES, Campaign
from lem.studies.orders import order

# For pairs with n - 1 degrees of freedom, from an earlier, independent simulation.
EXPECTED = {(3, 10): 0.9754, (3, 20): 0.9784, (5, 10): 0.9670, (5, 30): 0.9703, (8, 30): 0.9642}


# ------------------------------------------------------------------ the table
def test_the_table_says_what_it_depends_on():
    table = json.loads(calibrate.FILE.read_text())
    assert table["seed"] == calibrate.SEED
    assert table["repetitions"] == calibrate.REPETITIONS >= 10_000
    assert tuple(table["noises"]) == calibrate.NOISES
    found = {(each.analysis, each.least, each.most) for each in levels()}
    assert found == {(name, *limits) for name, each in calibrate.LIMITS.items() for limits in each}


@pytest.mark.parametrize("limits", EXPECTED)
def test_levels_of_plain_pairs_are_those_expected(limits):
    (level,) = [each.level for each in levels() if (each.analysis, each.least, each.most) == ("paired", *limits)]
    assert level == pytest.approx(EXPECTED[limits], abs=0.0015)


@pytest.mark.simulations
@pytest.mark.parametrize("analysis", ["paired", "position"])
def test_a_quick_simulation_with_other_numbers_agrees_with_the_table(analysis):
    repetitions = 10_000
    everything = calibrate.looks(analysis, 5, 20, repetitions, seed=7)
    # Four standard errors of a coverage of 95%.
    error = 4 * math.sqrt(0.95 * 0.05 / repetitions)
    for each in levels():
        if each.analysis == analysis and each.least >= 5 and each.most <= 20:
            found = everything.within(each.least, each.most)
            covers, _ = calibrate.stopped(found, each.level, each.worst_noise)
            assert covers.mean() == pytest.approx(each.coverage, abs=error)
            assert each.coverage >= 0.95
            plain, _ = calibrate.stopped(found, 0.95, each.worst_noise)
            assert plain.mean() < 0.94
            again = calibrate.calibrated(found, analysis)
            assert again.level == pytest.approx(each.level, abs=error)


@pytest.mark.simulations
@pytest.mark.parametrize("limits", [(6, 9), (6, 20), (5, 25), (7, 30), (9, 20), (20, 30)])
def test_limits_within_calibrated_ones_cover_at_their_level(limits):
    found = calibrate.looks("position", limits[0], limits[1], 10_000, seed=8).within(*limits)
    level = level_for("position", *limits)
    assert level > 0.95
    for noise in calibrate.NOISES:
        assert calibrate.stopped(found, level, noise)[0].mean() > 0.94


def test_limits_that_may_be_given_have_a_level_and_others_are_refused_with_a_list():
    for analysis in ("paired", "position"):
        assert level_for(analysis, 5, 30) == level_for(analysis, 5, 29) > level_for(analysis, 8, 30)
        assert level_for(analysis, FEWEST_ADAPTIVE_CYCLES, MOST_ADAPTIVE_CYCLES) > 0.95
    with pytest.raises(
        ConfigError,
        match=r"5 to 101 cycles; choose cycles and max_cycles within one of these ranges: 5 to 10, 5 to 20, 5 to 30",
    ):
        level_for("position", 5, 101)


def test_the_simulation_stops_at_the_first_look_that_is_narrow_enough():
    found = calibrate.Looks(
        (5, 6, 7), np.array([[0.0, 9.0, 0.0]] * 3), np.array([[1.0, 1, 1], [9, 1, 1], [9, 9, 9]]), (4, 5, 6)
    )
    covers, cycles = calibrate.stopped(found, 0.95, 0.35)
    assert cycles.tolist() == [5, 6, 7]
    assert covers.tolist() == [True, False, True]


# ------------------------------------------------------------------ the rule
def test_a_shuffled_campaign_may_stop_after_any_cycle_and_a_latin_one_after_whole_squares():
    assert rule_of(Campaign(cycles=5), 2) is None
    rule = rule_of(Campaign(cycles=5, until_ci=0.02, max_cycles=8), 2)
    assert (rule.looks, rule.half_width) == ((5, 6, 7, 8), 0.02)
    latin = Campaign(cycles=5, until_ci=0.02, max_cycles=30, structure="latin")
    assert rule_of(latin, 4).looks == (8, 12, 16, 20, 24, 28)
    assert rule_of(latin, 3).looks == (6, 12, 18, 24, 30)
    with pytest.raises(ConfigError, match=r"whole squares of 18 cycles, .* give at least 36, or choose"):
        rule_of(latin, 9)


def test_an_interval_that_is_missing_is_not_narrow():
    assert is_narrow([], 0.02)
    assert is_narrow([0.02, 0.01], 0.02)
    assert not is_narrow([0.021, 0.01], 0.02)
    assert not is_narrow([0.01, None], 0.02)


# ------------------------------------------------------------------ the decision
def campaign(names=("a", "b"), **settings):
    settings = {"cycles": 5, "until_ci": 0.02, "max_cycles": 10, **settings}
    machine = Machine("here", None, (), {}, None)
    of = Campaign(name="one", **settings)
    level = rule_of(of, len(names)).level
    return Definition(of, tuple(Arm(name, None) for name in names), (), machine, nominal_level=level)


def measured(definition, values, status=NOT_NEEDED):
    """Return the cells of a campaign, in order, with the values of its first cycles; None for a cell that failed."""
    of = definition.campaign
    cells = []
    for place in order(of.structure, len(definition.arms), definition.rule.most, of.seed):
        name = definition.arms[place.arm].name
        if place.cycle > len(values):
            cells.append(CellEntry(name, place.cycle, place.position, None, status))
            continue
        value = values[place.cycle - 1][place.arm]
        row = None
        if value is not None:
            row = SimpleNamespace(
                energy_per_output_token_j=value, energy_per_request_j=None, output_tokens_per_s=None,
                latency_mean_s=None, ttft_mean_s=None, average_power_w=None, energy_source="counter", hostname="here",
                device="gpu", energy_scope="gpu", energy_components="gpu", prompts_sha256="0", output_tokens=8,
                started_at=f"{place.cycle:03}{place.position:03}", warnings=(), status="completed", backend="simulated",
                engine_version=None, slurm_node=None, slurm_job_id=None,
            )  # fmt: skip
        cells.append(CellEntry(name, place.cycle, place.position, None, "completed" if row else "failed", row))
    return cells


def noisy(cycles, arms=2, noise=0.01, seed=1):
    return np.exp(np.random.default_rng(seed).normal(0, noise, (cycles, arms))).tolist()


def test_the_decision_is_that_of_the_intervals_that_are_reported():
    definition = campaign(("a", "b", "c"))
    for seed in range(8):
        values = noisy(7, 3, 0.015, seed)
        cells = measured(definition, values)
        pairs = [pair for pair in answer(definition, cells).pairs if pair.is_primary]
        each = 1 - (1 - definition.nominal_level) / 2
        assert [pair.confidence for pair in pairs] == [pytest.approx(each)] * 2
        assert all(pair.p_value is pair.p_adjusted is None for pair in pairs)
        assert is_enough(definition, cells, 7, ()) == all(half_width(pair) <= 0.02 for pair in pairs)


def test_the_decision_depends_on_the_cycles_so_far_alone():
    definition = campaign()
    values = noisy(10)
    for cycle in range(1, 11):
        whole, part = (measured(definition, values[:end], "not run") for end in (10, cycle))
        assert is_enough(definition, whole, cycle, ()) == is_enough(definition, part, cycle, ())
    assert is_enough(definition, measured(definition, noisy(5, noise=0.001)), 5, ())
    assert not is_enough(definition, measured(definition, noisy(4, noise=0.001)), 4, ())


def test_half_widths_are_relative_to_the_ratio():
    definition = campaign()
    once, twice = (answer(definition, measured(definition, [[a, b * f] for a, b in noisy(6)])) for f in (1.0, 2.0))
    (one,), (other,) = ([pair for pair in each.pairs if pair.is_primary] for each in (once, twice))
    assert other.ratio == pytest.approx(2 * one.ratio)
    assert half_width(one) == pytest.approx(half_width(other))
    assert half_width(one) == pytest.approx(math.sinh(math.log(one.ci_high / one.ratio)))


def test_an_arm_that_was_given_up_does_not_block_and_a_failed_cell_does_not_count():
    definition = campaign(("a", "b", "c"))
    values = [[a, b, None] for a, b in noisy(5, noise=0.001)]
    cells = measured(definition, values)
    assert not is_enough(definition, cells, 5, ())
    assert is_enough(definition, cells, 5, ["c"])
    # Without a baseline no ratio can get narrower.
    assert is_enough(definition, measured(definition, [[None, b, c] for b, c, _ in values]), 5, ["a"])
    failed = [[a, b] for a, b, _ in values]
    failed[2][1] = None
    assert is_enough(campaign(), measured(campaign(), failed), 5, ())
    assert not is_enough(campaign(), measured(campaign(), [[a, None] for a, _ in failed]), 5, ())


def test_it_says_how_it_ended():
    definition = campaign()
    stopped = answer(definition, measured(definition, noisy(6)))
    assert stopped.cycles == 6
    assert len(stopped.cells) == 12
    assert not stopped.warnings
    said = " ".join(sentences(stopped))
    assert (
        "stopped after 6 cycles (5 to 10 were allowed), because the half-width of each interval is at most 2%" in said
    )
    assert f"nominal level of {100 * definition.nominal_level:.4g}%, so that they contain the true ratio in 95%" in said
    at_limit = answer(definition, measured(definition, noisy(10, noise=0.2)))
    (note,) = [note for note in at_limit.warnings if note.code == "campaign_limit_reached"]
    assert "the limit of 10 cycles was reached, but not every interval is as narrow as ±2%: b ±" in note.text
    assert "reached its limit of 10 cycles before the half-width of each interval was at most 2%" in " ".join(
        sentences(at_limit)
    )
    under_way = answer(definition, measured(definition, noisy(6), "not run"))
    assert "not over: 6 cycles have begun (minimum 5, maximum 10)." in " ".join(sentences(under_way))
    assert not under_way.ended


def test_the_level_is_the_one_with_which_the_campaign_began():
    definition = campaign()
    assert definition.rule.level == definition.nominal_level == level_for("position", 5, 10)
    older = Definition(definition.campaign, definition.arms, (), definition.machine, nominal_level=0.99)
    (pair,) = [pair for pair in answer(older, measured(older, noisy(6))).pairs if pair.is_primary]
    assert pair.confidence == pytest.approx(0.99)
    values = noisy(6)
    positions = [[0, 0] for _ in range(6)]
    for cell in measured(older, values):
        if cell.cycle <= 6:
            positions[cell.cycle - 1]["ab".index(cell.arm)] = cell.position
    (_, expected) = contrasts(values, analysis="position", positions=positions, confidence=0.99)
    assert (pair.ci_low, pair.ci_high) == pytest.approx((expected.ci_low, expected.ci_high))
