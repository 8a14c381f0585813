"""Whole campaigns on the simulated engine, whose true ratio, drift and carry-over are known, through the command.

Nobody waits for the simulated times. Cells are measured in this process and not composed once more by Hydra, which
takes half a second for each; one test does both as users do, and has the same numbers.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict

import pyarrow.parquet as pq
import pytest
from scipy import stats

from lem.results.compare import contrasts
from tests.conftest import command

TRUE_RATIO = 1.03
ARMS = {"quick": 0.01, "slow": 0.01 * TRUE_RATIO}
SETTINGS = ("-d", "sample", "-n", "3", "-y")
PRIMARY = "energy_per_output_token_j"


@pytest.fixture
def folder(tmp_path):
    write_arms(tmp_path, ARMS)
    return tmp_path


@pytest.fixture
def quickly(in_this_process, monkeypatch):
    """Hand each cell's experiment, which is composed and checked, to the runner without Hydra's multirun."""

    def run_plan(_directory, cells, _settings, run):
        for number, (_, experiment) in enumerate(cells):
            run(number, experiment)

    monkeypatch.setattr("lem.studies.study.run_plan", run_plan)
    monkeypatch.setattr("lem.studies.study.to_experiment", lambda experiment: experiment)


def write_arms(folder, steps_s):
    for name, step_s in steps_s.items():
        (folder / f"{name}.yaml").write_text(
            f"model: any\nbackend: {{name: simulated, prefill_s_per_token: 0, decode_s_per_token: {step_s}, "
            "sleep: false}\nenergy: {name: simulated, power_w: 300, idle_s: 0}\nwarmup: {prompts: 0}\n"
            "min_output_tokens: 16\nmax_output_tokens: 16\n"
        )


def values_of(folder, name, measure=PRIMARY):
    """Return the values of a campaign's cells, by cycle and arm, from the rows of the experiments table."""
    found = defaultdict(dict)
    for part in sorted((folder / "results" / "experiments").glob("*.parquet")):
        for row in pq.read_table(part).to_pylist():
            if row["campaign"] == name:
                found[row["campaign_cycle"]][row["campaign_arm"]] = row[measure]
    return [found[cycle] for cycle in sorted(found)]


def pair_of(folder, name):
    pairs = pq.read_table(folder / "results" / "campaigns" / name / "pairs.parquet").to_pylist()
    (pair,) = [each for each in pairs if each["is_primary"]]
    return pair


def answer_of(lem, name):
    return json.loads(lem("results", "show", name, "--json").out)


def codes(answer):
    return {note["code"] for note in answer["warnings"]}


@pytest.mark.processes
def test_thirty_campaigns_say_what_their_cells_do_and_cover_the_true_ratio(lem, folder, quickly, record_property):
    covered, verdicts = 0, defaultdict(int)
    for number in range(30):
        name = f"campaign-{number}"
        settings = ("--seed", str(number), "backend.noise=0.02", *SETTINGS)
        done = lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", name, "-c", "3", *settings)
        assert done.code == 0, done.err
        rows, pair = values_of(folder, name), pair_of(folder, name)
        assert len(rows) == 3
        # The functions that the command uses, on the cells' own values …
        (_, expected) = contrasts([[row["quick"], row["slow"]] for row in rows])
        for part in ("ratio", "ci_low", "ci_high", "p_value", "p_adjusted", "verdict", "cycles", "cycles_needed"):
            assert pair[part] == getattr(expected, part), part
        # … and Student's t as scipy has it.
        test = stats.ttest_rel([math.log(row["slow"]) for row in rows], [math.log(row["quick"]) for row in rows])
        interval = test.confidence_interval(0.95)
        assert (pair["ci_low"], pair["ci_high"]) == pytest.approx((math.exp(interval.low), math.exp(interval.high)))
        assert pair["p_value"] == pytest.approx(test.pvalue)
        (sentence,) = [line for line in done.out.splitlines() if line.startswith("slow needs")]
        assert pair["verdict"] in sentence
        covered += pair["ci_low"] <= TRUE_RATIO <= pair["ci_high"]
        verdicts[pair["verdict"]] += 1
    record_property("summary", f"30 simulated campaigns: {covered} intervals cover the true ratio; {dict(verdicts)}")
    # At 95% each, 26 or more of 30 cover in 98 of 100 such tests; this one always draws the same numbers.
    assert covered >= 26
    assert verdicts["less"] <= 1


@pytest.mark.processes
def test_cells_in_processes_of_their_own_have_the_same_numbers_to_the_last_digit(lem, folder, quickly):
    wanted = ("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "3", "--structure", "latin")
    varied = ("backend.noise=0.02", "backend.request_noise=0.05", "backend.drift=0.1", "backend.carry_over=0.2")
    assert lem(*wanted, *varied, *SETTINGS).code == 0
    apart = folder / "apart"
    apart.mkdir()
    write_arms(apart, ARMS)
    done = command(*wanted, *varied, *SETTINGS, cwd=apart)
    assert done.code == 0, done.err
    assert values_of(apart, "one") == values_of(folder, "one")
    assert pair_of(apart, "one") == pair_of(folder, "one")


def test_without_noise_and_drift_a_campaign_finds_the_true_ratio_exactly(lem, folder, quickly):
    lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "3", *SETTINGS)
    assert [row["slow"] / row["quick"] for row in values_of(folder, "one")] == pytest.approx([TRUE_RATIO] * 3, rel=1e-9)
    assert values_of(folder, "one", "duration_s") == [{"quick": 0.48, "slow": pytest.approx(0.4944)}] * 3
    found = answer_of(lem, "one")
    assert {"campaign_trend", "campaign_position", "campaign_carry_over"}.isdisjoint(codes(found))
    assert "campaign_estimate" in codes(found)
    assert found["carry_over"] is None
    (note,) = [each["text"] for each in found["warnings"] if each["code"] == "campaign_cells_warn"]
    assert "energy_simulated (6 of 6)" in note


@pytest.mark.parametrize("option", ["backend.drift=0.1", "backend.carry_over=0.2"])
def test_what_only_a_campaign_has_is_refused_elsewhere(lem, folder, quickly, option):
    refused = f"Error: {option.partition('=')[0]}: it would have no effect: this is not a cell of a campaign. Use lem"
    for words in (("experiment", "quick.yaml"), ("batch", "*.yaml"), ("experiment", "quick.yaml", "--multirun")):
        done = lem(*words, option, "-d", "sample", "-n", "2", "--dry-run", "-y")
        assert done.code == 2
        assert done.err.startswith(refused)
        assert "[no_effect_outside_campaign] (use --force to run it anyway)" in done.err
        assert len(done.err.splitlines()) == 1
    (folder / "own.yaml").write_text(f"defaults: [quick]\nbackend: {{name: simulated, {_pair(option)}}}\n")
    assert lem("config", "validate", "own.yaml").out == "own.yaml: valid\n"  # it may be an arm
    noise = lem("doctor", "--noise", "own.yaml", "-d", "sample", "-n", "2", "--dry-run")
    assert (noise.code, noise.err) == (0, "")


def _pair(option):
    return option.removeprefix("backend.").replace("=", ": ")


def test_a_drift_goes_through_the_cells_in_their_order_and_is_reported(lem, folder, quickly):
    lem(
        "campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "4", "backend.drift=0.2",
        "backend.noise=0.002", *SETTINGS,
    )  # fmt: skip
    cells = answer_of(lem, "one")["cells"]
    values = values_of(folder, "one")
    level = [values[cell["cycle"] - 1][cell["arm"]] / (300 * ARMS[cell["arm"]]) for cell in cells]
    assert level == pytest.approx([1.2 ** (i / 7) for i in range(8)], rel=0.01)
    (note,) = [each["text"] for each in answer_of(lem, "one")["warnings"] if each["code"] == "campaign_trend"]
    assert "changes by +" in note


@pytest.mark.processes
@pytest.mark.parametrize(
    ("structure", "steps_s", "cycles"),
    [
        ("shuffled", {"quick": 0.01, "slow": 0.02}, 12),
        ("latin", {"quick": 0.01, "middle": 0.014, "slow": 0.02, "slower": 0.03}, 8),
    ],
)
def test_what_a_predecessor_leaves_behind_is_found_with_its_size(lem, folder, quickly, structure, steps_s, cycles):
    write_arms(folder, steps_s)
    files = [f"{name}.yaml" for name in steps_s]
    wanted = ("campaign", *files, "-c", str(cycles), "--structure", structure, "backend.noise=0.005", *SETTINGS)
    done = lem(*wanted, "--campaign-name", "with", "backend.carry_over=0.1")
    assert done.code == 0, done.err
    found = answer_of(lem, "with")
    (note,) = [each["text"] for each in found["warnings"] if each["code"] == "campaign_carry_over"]
    assert "energy per output token depends on the preceding arm: after " in note
    assert f"campaign_carry_over: {note[:40]}" in " ".join(done.out.split())
    after = {each["arm"]: each for each in found["carry_over"]["after"]}
    assert set(after) == set(steps_s) - {"quick"}
    for name, each in after.items():
        assert each["ci_low"] <= (steps_s[name] / steps_s["quick"]) ** 0.1 <= each["ci_high"]
    assert found["carry_over"]["p_value"] < 1e-3
    # The same campaign without it.
    assert lem(*wanted, "--campaign-name", "without").code == 0
    without = answer_of(lem, "without")
    assert "campaign_carry_over" not in codes(without)
    assert without["carry_over"]["p_value"] > 0.05
    assert all(each["ci_low"] <= 1 <= each["ci_high"] for each in without["carry_over"]["after"])


def test_a_cell_after_one_that_failed_says_nothing_about_predecessors(lem, folder, quickly):
    lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "8", "backend.noise=0.01", *SETTINGS)
    # 15 cells with a predecessor, 8 cycles, and the differences of arms, of positions and of predecessors.
    assert answer_of(lem, "one")["carry_over"]["degrees_of_freedom"] == 15 - 8 - 3
    file = folder / "results" / "campaigns" / "one" / "experiments.json"
    cells = json.loads(file.read_text())
    cells[4]["status"] = "failed"
    file.write_text(json.dumps(cells))
    # Its own value is gone, and so is that of the cell after it, which is the other one of its cycle.
    assert answer_of(lem, "one")["carry_over"]["degrees_of_freedom"] == 13 - 7 - 3
