"""What a campaign of one configuration against itself says, on cells whose noise, drift and so on are known."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from msgspec.structs import replace

from lem.results import campaign as results
from lem.results.campaign import Arm, CellEntry, Definition, Machine
from lem.results.noise import EXAMPLES, cycles_for, finds, noise_of, percent
from lem.results.noise_show import as_plain, show_noise
from lem.results.schema import ExperimentRow
from lem.spec.campaign import Campaign
from lem.spec.experiment import Experiment
from lem.studies.orders import order

MEASURE = "energy_per_output_token_j"
ARMS = ("A", "A again")


def answer(values, *, seed=42, warnings=(), source="counter", **settings):
    """Return the answer of a campaign whose cells have these values, in order; None for a cell without a result."""
    campaign = Campaign(name="noise", cycles=(len(values) + 1) // 2, baseline="A", seed=seed, **settings)
    places = order(campaign.structure, 2, campaign.cycles, seed)
    cells = []
    for i, (place, value) in enumerate(zip(places, values, strict=False)):
        status = "failed" if value is None else "completed"
        found = row(i, value, warnings, source)
        cells.append(CellEntry(ARMS[place.arm], place.cycle, place.position, f"exp_{i}", status, found))
    arms = tuple(Arm(name, Experiment(model="m")) for name in ARMS)
    definition = Definition(campaign, arms, ("0",), Machine("here", None, (), {}, None))
    return results.answer(definition, cells)


def row(i, value, warnings, source):
    if value is None:
        return None
    known = {
        "status": "completed",
        "started_at": f"2026-01-02T03:{i // 60:02d}:{i % 60:02d}+00:00",
        "output_tokens": 100,
    }
    known |= {"energy_source": source, "warnings": list(warnings), MEASURE: value, "output_tokens_per_s": 100 / value}
    return ExperimentRow(**dict.fromkeys(ExperimentRow.__struct_fields__) | known)


def values(cycles, *, sd=0.01, drift=0.0, first=0.0, second=0.0, memory=0.0, seed=0):
    """Return the values of a machine's cells: noise of one cell, and effects as logarithms.

    `memory` is the share of a cell's deviation that the next one keeps.
    """
    n, noise = 2 * cycles, np.random.default_rng(seed).normal(0, sd, 2 * cycles)
    for i in range(1, n):
        noise[i] += memory * noise[i - 1]
    logs = noise + drift * np.arange(n) / (n - 1) + second * (np.arange(n) % 2)
    logs[0] += first
    return np.exp(logs).tolist()


def noise(given, difference=0.02, **more):
    return noise_of(answer(given, **more), difference)


# ------------------------------------------------------------------ the floor
def test_the_floor_is_the_spread_of_the_log_ratios_of_a_cycles_cells():
    found = noise([1.0, 1.02, 1.0, 0.99, 1.01, 1.0])
    ratios = np.log([1.02 / 1.0, 0.99 / 1.0, 1.0 / 1.01])
    assert found.floor.sd == pytest.approx(ratios.std(ddof=1))
    assert found.floor.pairs == 3
    assert found.floor.low < found.floor.sd < found.floor.planning < found.floor.high


def test_the_floor_does_not_contain_a_drift_from_cycle_to_cycle():
    quiet, drifting = noise(values(10, sd=0.01)), noise(values(10, sd=0.01, drift=0.5))
    assert drifting.floor.sd == pytest.approx(quiet.floor.sd, rel=0.6)


@pytest.mark.simulations
def test_the_interval_of_the_floor_covers_and_its_planning_limit_holds_as_often_as_it_says():
    sd = 0.01 * math.sqrt(2)
    floors = [noise(values(5, seed=seed)).floor for seed in range(400)]
    assert sum(each.low < sd < each.high for each in floors) / 400 == pytest.approx(0.95, abs=0.03)
    assert sum(each.planning > sd for each in floors) / 400 == pytest.approx(0.8, abs=0.05)


def test_the_cycles_that_are_recommended_find_the_difference_with_the_chance_that_is_said():
    from scipy import stats

    sd, difference, rng = 0.02, 0.02, np.random.default_rng(1)
    cycles = cycles_for(sd, difference)
    assert cycles == 11
    assert finds(sd, cycles) <= difference < finds(sd, cycles - 1)
    logs = rng.normal(math.log1p(difference), sd, (20_000, cycles))
    assert (stats.ttest_1samp(logs, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.04)


def test_what_is_found_shrinks_with_cycles_and_each_example_is_given():
    found = noise(values(5)).floor.finds
    assert tuple(cycles for cycles, _ in found) == EXAMPLES
    assert sorted((difference for _, difference in found), reverse=True) == [difference for _, difference in found]


def test_other_measures_have_floors_of_their_own_and_those_without_values_have_none():
    assert [floor.measure for floor in noise(values(5)).floors] == [MEASURE, "output_tokens_per_s"]
    assert noise(values(5), primary="output_tokens_per_s").floor.measure == "output_tokens_per_s"


# ------------------------------------------------------------------ what changes
def test_a_drift_is_seen_with_its_size_and_its_rate():
    found = noise(values(10, sd=0.005, drift=0.1))
    assert found.drift.is_seen
    assert found.drift.low < math.expm1(0.1) < found.drift.high
    assert math.log1p(found.drift_per_cycle.change) == pytest.approx(math.log1p(found.drift.change) * 2 / 19)
    assert next(each for each in found.advice if each.about == "warm-up").setting.startswith("Warm up longer, wait")


def test_a_first_cell_unlike_the_others_is_seen():
    found = noise(values(10, sd=0.005, first=0.1))
    assert found.first.is_seen
    assert found.first.low < math.expm1(0.1) < found.first.high
    assert "the first cell differs" in next(each for each in found.advice if each.about == "warm-up").why


def test_an_effect_of_the_position_is_seen_and_a_longer_gap_recommended():
    found = noise(values(10, sd=0.005, second=0.05), config_gap_s=20.0)
    assert found.position.is_seen
    assert found.position.low < math.expm1(0.05) < found.position.high
    (gap,) = [each for each in found.advice if each.about == "gap"]
    assert gap.setting == "--config-gap 40"


@pytest.mark.simulations
def test_a_drift_is_mistaken_neither_for_an_effect_of_the_position_nor_for_a_first_cell_unlike_the_others():
    found = [noise(values(8, sd=0.005, drift=0.2, seed=seed)) for seed in range(100)]
    assert all(each.drift.is_seen for each in found)
    for of in ("first", "position"):
        assert sum(getattr(each, of).is_seen for each in found) <= 8, of


def test_the_first_cell_is_compared_with_what_scipys_line_predicts():
    from scipy import stats

    given = values(5, drift=0.1)
    logs = np.log(given)
    line = stats.linregress(range(1, 10), logs[1:])
    found = noise(given).first
    assert math.log1p(found.change) == pytest.approx(logs[0] - line.intercept)
    # The standard error of a new value at place 0 (Draper and Smith, Applied Regression Analysis).
    left = logs[1:] - line.intercept - line.slope * np.arange(1, 10)
    error = math.sqrt((left @ left) / 7 * (1 + 1 / 9 + 5**2 / 60))
    half = stats.t.ppf(0.975, 7) * error
    assert math.log1p(found.high) - math.log1p(found.change) == pytest.approx(half)


def test_cells_that_resemble_the_one_before_are_seen():
    found = noise(values(20, sd=0.01, memory=0.8))
    assert found.neighbors.is_seen
    assert found.neighbors.r > 0.4


@pytest.mark.simulations
def test_on_a_machine_without_effects_one_campaign_in_twenty_sees_any_and_one_in_twenty_is_a_false_alarm():
    found = [noise(values(6, seed=seed), seed=seed) for seed in range(300)]
    seen = [any(each.is_seen for each in (n.drift, n.first, n.position, n.neighbors)) for n in found]
    assert sum(seen) / len(found) <= 0.09
    assert 0.02 <= sum(each.is_false_alarm for each in found) / len(found) <= 0.09


@pytest.mark.simulations
def test_intervals_of_changes_cover():
    found = [noise(values(6, seed=seed)) for seed in range(300)]
    for of in ("drift", "first", "position"):
        covers = [getattr(n, of).low <= 0 <= getattr(n, of).high for n in found]
        assert sum(covers) / len(covers) == pytest.approx(0.95, abs=0.035), of


# ------------------------------------------------------------------ what the data cannot tell
@pytest.mark.parametrize("cells", [0, 1, 2, 4])
def test_too_few_cells_give_reasons_and_no_numbers(cells, capsys):
    found = noise(values(2)[:cells] + [None] * (4 - cells))
    assert (found.floor.sd, found.drift.change, found.first.change, found.position.change) == (None,) * 4
    assert found.neighbors.r is None
    assert all(each.reason for each in (found.floor, found.drift, found.first, found.position, found.neighbors))
    assert found.advice[0].setting == "not known"
    show_noise(found)
    shown = capsys.readouterr().out
    assert "Would find" not in shown
    if cells == 0:
        assert shown.endswith("No cell has completed yet, so nothing is known about the noise.\n")
    else:
        assert shown.count("not known: ") >= 6


def test_each_thing_is_told_from_as_many_cells_as_it_takes():
    three, five = noise(values(3)), noise(values(5))
    assert three.floor.sd is not None
    assert three.drift.change is not None
    assert three.neighbors.reason == "6 cells are too few for correlating neighbors; at least 10 are needed"
    assert five.neighbors.r is not None


def test_a_cell_without_a_value_takes_only_its_pair_along():
    given = values(5)
    given[3] = None
    found = noise(given)
    assert (found.floor.pairs, found.position.n, found.drift.n) == (4, 4, 9)


def test_values_that_are_all_equal_have_no_noise_to_tell():
    found = noise([2.0] * 10)
    assert found.floor.reason == "all pairs of cells have the same ratio, so no noise is visible"
    assert not any(each.is_seen for each in (found.drift, found.first, found.position, found.neighbors))


def test_without_energy_the_noise_is_not_known_but_that_of_speed_is():
    given = answer(values(5), source=None)
    without = [dataclasses.replace(cell, row=replace(cell.row, **{MEASURE: None})) for cell in given.cells]
    found = noise_of(results.answer(given.definition, without), 0.02)
    assert found.floor.reason == f"no cycle has a value for {MEASURE} in both cells"
    assert [floor.sd is None for floor in found.floors] == [True, False]


# ------------------------------------------------------------------ what is recommended and shown
def test_a_noisy_machine_needs_less_noise_rather_than_more_cycles():
    cycles = noise(values(5, sd=0.2)).advice[0]
    assert cycles.setting == "more than 100"
    assert "reduce the machine's noise" in cycles.why


def test_more_is_recommended_for_smaller_differences():
    given = values(8)
    wanted = [int(noise(given, difference).advice[0].setting.split()[1]) for difference in (0.05, 0.02, 0.01)]
    assert wanted == sorted(wanted)
    assert wanted[0] < wanted[2]


@pytest.mark.parametrize(
    ("code", "about"),
    [
        ("high_variation", "warm-up"),
        ("short_window", "window"),
        ("foreign_process", "machine"),
        ("busy_host", "machine"),
    ],
)
def test_what_most_cells_warn_of_is_recommended_with_the_warnings_own_remedy(code, about):
    from lem.warning_codes import WARNINGS

    (found,) = [each for each in noise(values(5), warnings=[f"{code}: text"]).advice if each.about == about]
    assert found.setting == WARNINGS[code].remedy.rstrip(".")
    assert found.why == f"10 of 10 cells have the warning {code}."


def test_a_false_alarm_is_shown_as_one(capsys):
    given = answer([1.0 + i * 1e-4 for i in range(10)])
    larger = [
        dataclasses.replace(cell, row=replace(cell.row, **{MEASURE: 1.1 * getattr(cell.row, MEASURE)}))
        if cell.arm == "A again"
        else cell
        for cell in given.cells
    ]
    found = noise_of(results.answer(given.definition, larger), 0.02)
    assert found.is_false_alarm
    show_noise(found)
    assert "False alarm  FALSE ALARM: A again needs 1.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "label"),
    [
        ("estimate", "≈ estimated: this is the noise of the estimate"),
        ("simulated", "≈ simulated: this is the noise of the simulation"),
    ],
)
def test_an_estimate_is_labelled(capsys, source, label):
    show_noise(noise(values(5), source=source))
    shown = capsys.readouterr().out
    assert label in shown
    assert "Noise floor  ≈" in shown
    show_noise(noise(values(5)))
    shown = capsys.readouterr().out
    assert "Energy per output token (counter)" in shown
    assert "≈" not in shown


def test_the_speed_of_a_run_with_estimated_energy_is_no_estimate(capsys):
    show_noise(noise(values(5), source="estimate", primary="output_tokens_per_s"))
    assert "≈" not in capsys.readouterr().out


def test_as_plain_data_it_is_json_with_nulls_for_what_is_not_known():
    plain = json.loads(json.dumps(as_plain(noise(values(2)))))
    assert plain["floors"][0]["sd"] is None
    assert plain["floors"][0]["finds"] == []
    assert plain["drift"] == {
        "n": 4, "change": None, "low": None, "high": None, "p_value": None,
        "reason": "4 cells are too few for a trend; at least 6 are needed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("share", "sign", "text"),
    [
        (0.0123, "", "1.2%"), (0.02, "+", "+2%"), (-0.0996, "+", "-10%"), (0.998, "", "100%"), (3.0, "+", "+300%"),
        (1e-7, "", "under 0.01%"), (0.0, "+", "0%"),
    ],
)  # fmt: skip
def test_percentages_have_no_exponents(share, sign, text):
    assert percent(share, sign) == text
