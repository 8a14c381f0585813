"""`lem campaign --until-ci`, through the command: what it accepts, when it stops, and what it says."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess

import jsonschema
import pytest
import yaml

from lem.config.campaign import compose
from lem.config.problem import Problems
from lem.spec.share import share
from tests.conftest import begin, command
from tests.studies.campaigns import cells_of, write_arms

QUICK = ("-d", "sample", "-n", "2", "max_output_tokens=4", "-y")
TWO = ("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one")


@pytest.fixture
def arms(tmp_path):
    """Config files of two arms that generate few tokens."""
    return write_arms(tmp_path, tokens=4)


def cycles_of(cells, status):
    return sorted({cell["campaign"]["cycle"] for cell in cells if cell["status"] == status})


# ------------------------------------------------------------------ what it accepts
SHARES = [("2%", 0.02), (" 0.7 % ", 0.007), ("12.5%", 0.125), ("0.02", 0.02), ("1e-2", 0.01), (0.02, 0.02)]
NO_SHARES = ["nan", "inf", "-inf", "-1", "0", "200%", "100%", "0%", "2", "%", "", "x", "2,5%", "2%%", "true"]


@pytest.mark.parametrize(("text", "expected"), SHARES)
def test_a_share_is_read_as_people_write_it(text, expected):
    assert share(text) == expected


@pytest.mark.parametrize("value", [*NO_SHARES, 0, 1, -0.5, float("nan"), float("inf"), True, None, [0.02], {}])
def test_what_is_no_share_is_refused(value):
    with pytest.raises(ValueError, match=r"^a share between 0 and 1, such as 2% or 0\.02$"):
        share(value)


@pytest.mark.parametrize("key", ["until_ci", "margin"])
def test_a_campaign_file_reads_shares_as_the_flags_do(tmp_path, key):
    file = tmp_path / "file.yaml"
    for text, expected in SHARES:
        file.write_text(f"arms: [a.yaml, b.yaml]\n{key}: {text}\n")
        assert getattr(compose(file, {}), key) == getattr(compose(None, {key: str(text)}), key) == expected
    for text in (".nan", ".inf", "-1", "0", "200%", "2", "yes", "[0.02]", "'x'"):
        file.write_text(f"arms: [a.yaml, b.yaml]\n{key}: {text}\n")
        with pytest.raises(Problems) as error:
            compose(file, {})
        (problem,) = error.value.problems
        assert problem.startswith(f"{file}:2: {key}: must be a share between 0 and 1, such as 2% or 0.02, not ")
    for text in NO_SHARES:
        with pytest.raises(Problems, match=f"^{key}: must be a share between 0 and 1, such as 2% or 0\\.02, not "):
            compose(None, {key: text})


@pytest.mark.parametrize("value", ["2%", "0.02"])
def test_a_plan_says_when_it_will_stop_and_at_what_level(lem, arms, value):
    done = lem(*TWO, "--until-ci", value, "--dry-run", *QUICK)
    assert done.code == 0, done.err
    assert "2 arms in 5 to 30 cycles, shuffled" in done.out
    assert (
        "Adaptive: the campaign stops after 5 to 30 cycles, as soon as the half-width of each interval is" in done.out
    )
    assert "at most 2% of the ratio." in done.out
    assert "nominal level of 97." in done.out
    assert done.out.count("cycle 30/30") == 2
    latin = lem(*TWO, "--until-ci", value, "--structure", "latin", "--max-cycles", "9", "--dry-run", *QUICK)
    assert "the campaign stops after 6 or 8 cycles (complete Latin squares)" in latin.out
    assert "cycle 8/8" in latin.out
    assert "campaign_unbalanced" not in latin.err
    nine = ("campaign", *["quick.yaml"] * 9, "--campaign-name", "nine", "--until-ci", value, "--structure", "latin")
    assert "the campaign stops after 18 or 36 cycles (complete Latin squares)" in lem(*nine, "--dry-run", *QUICK).out
    long = lem(*TWO, "--until-ci", value, "-c", "30", "--dry-run", *QUICK)
    assert "30 to 100 cycles" in long.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--until-ci", "2%", "-c", "3"], "cycles: a campaign with until_ci measures at least 5 cycles, not 3"),
        (["--until-ci", "2%", "-c", "8", "--max-cycles", "8"], "max_cycles: must be greater than cycles (8), not 8."),
        (["--until-ci", "2%", "-c", "200"], "cycles: must be less than 100 with until_ci, not 200."),
        (["--until-ci", "2%", "--max-cycles", "101"], "max_cycles: must be less than or equal to 100, not 101"),
        (["--until-ci", "2%", "--structure", "grouped"], "structure: a grouped campaign cannot stop after a cycle"),
        (["--until-ci", "2"], 'until_ci: must be a share between 0 and 1, such as 2% or 0.02, not "2".'),
        (["--until-ci", "0%"], 'until_ci: must be a share between 0 and 1, such as 2% or 0.02, not "0%".'),
        (["--until-ci", "narrow"], 'such as 2% or 0.02, not "narrow".'),
        (["--margin", "2"], 'margin: must be a share between 0 and 1, such as 2% or 0.02, not "2".'),
        (["--max-cycles", "20"], "max_cycles: only adaptive campaigns have this limit; set until_ci as well, or leave"),
        (["--until-ci", "2%", "--structure", "latin", "--max-cycles", "7"], "give at least 8, or choose structure="),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(lem, arms, options, message):
    done = lem(*TWO, *options, *QUICK)
    assert done.code == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1
    assert not (arms / "results" / "raw").exists()


def test_a_campaign_file_has_the_same_keys(lem, arms):
    (arms / "file.yaml").write_text("arms: [quick.yaml, slow.yaml]\nuntil_ci: 2%\nmax_cycles: 20\n")
    shown = json.loads(lem("config", "show", "file.yaml", "--json").out)
    assert (shown["until_ci"], shown["cycles"], shown["max_cycles"]) == (0.02, 5, 20)
    assert lem("config", "validate", "file.yaml").code == 0
    (arms / "latin.yaml").write_text("defaults: [file]\nstructure: latin\nmax_cycles: 7\n")
    assert "fewer than two squares end between 5 and 7 cycles" in lem("config", "validate", "latin.yaml").out
    (arms / "bad.yaml").write_text("arms: [quick.yaml, slow.yaml]\ncycles: 4\nuntil_ci: 2%\ndataset: sample\n")
    done = lem("config", "validate", "bad.yaml")
    assert done.code == 2
    assert "bad.yaml:2: error: cycles: a campaign with until_ci measures at least 5 cycles, not 4" in done.out
    # Given on the command line, the share applies to a file that only says how many cycles there are at least.
    (arms / "plain.yaml").write_text("arms: [quick.yaml, slow.yaml]\ncycles: 7\ndataset: sample\n")
    assert "7 to 30 cycles" in lem("campaign", "plain.yaml", "--until-ci", "5%", "--dry-run", *QUICK).out


def test_the_schema_and_the_template_know_the_keys(lem, arms):
    validator = jsonschema.Draft7Validator(json.loads(lem("config", "schema", "--campaign").out))
    for value, valid in (
        ("2%", True), ("0.5 %", True), (0.02, True), ("0.02", True), (None, True), ("2", False), (2, False),
        ("200%", False), (0, False),
    ):  # fmt: skip
        text = yaml.safe_dump({"arms": ["a.yaml", "b.yaml"], "until_ci": value, "max_cycles": 20, "margin": value})
        assert validator.is_valid(yaml.safe_load(text)) == valid
    text = lem("config", "new", "--campaign").out
    assert "#until_ci: null" in text
    assert "#max_cycles: null" in text


# ------------------------------------------------------------------ when it stops
@pytest.mark.processes
def test_it_stops_once_intervals_are_narrow_and_a_latin_one_at_a_whole_square(lem, arms):
    wanted = (*TWO, "--until-ci", "99%", "--structure", "latin", "--max-cycles", "8", *QUICK)
    done = lem(*wanted)
    assert done.code == 0, done.err
    cells = cells_of(arms)
    assert cycles_of(cells, "completed") == [1, 2, 3, 4, 5, 6]
    assert cycles_of(cells, "not needed") == [7, 8]
    assert "Campaign one: 12 of 12 cells completed, latin" in done.out
    assert "stopped after 6 cycles (6 to 8 were allowed)" in done.out
    assert "campaign_limit_reached" not in done.out
    again = lem(*wanted)
    assert (again.code, again.out) == (0, done.out)
    shown = json.loads(lem("results", "show", "one", "--json").out)
    assert (shown["until_ci"], shown["max_cycles"], shown["cycles_reached"], shown["has_ended"]) == (0.99, 8, 6, True)
    (pair,) = [pair for pair in shown["pairs"] if pair["is_primary"]]
    assert pair["confidence"] == shown["nominal_level"] == pytest.approx(0.967, abs=0.003)
    assert len(os.listdir(arms / "results" / "raw")) == 12


@pytest.mark.processes
def test_reaching_the_limit_is_said_aloud(lem, arms):
    done = lem(*TWO, "--until-ci", "0.0001%", "--max-cycles", "6", *QUICK)
    assert done.code == 0, done.err
    assert cycles_of(cells_of(arms), "completed") == [1, 2, 3, 4, 5, 6]
    assert "reached its limit of 6 cycles before the half-width of each interval was at most 0.0001%" in done.out
    assert "campaign_limit_reached: the limit of 6 cycles was reached" in " ".join(done.out.split())


@pytest.mark.processes
def test_an_arm_that_is_given_up_does_not_keep_the_others_from_stopping(lem, arms):
    text = (arms / "slow.yaml").read_text().replace("name: simulated,", "name: simulated, fail_at_request: 1,")
    (arms / "broken.yaml").write_text(text)
    done = lem(
        "campaign", "quick.yaml", "slow.yaml", "broken.yaml", "--campaign-name", "one", "--until-ci", "99%",
        "--max-cycles", "7", *QUICK,
    )  # fmt: skip
    assert done.code == 1
    cells = cells_of(arms)
    assert cycles_of(cells, "completed") == [1, 2, 3, 4, 5]
    assert [cell["status"] for cell in cells if cell["campaign"]["arm"] == "broken"] == [
        *["failed"] * 3, *["not run"] * 2, *["not needed"] * 2,
    ]  # fmt: skip
    assert "the half-width of each interval of the arms that were not given up is at most 99%" in done.out


@pytest.mark.processes
def test_a_campaign_that_is_killed_again_and_again_stops_after_the_same_cycle(arms):
    """Kill it at random moments, at least five times, and continue each time until it is complete."""
    chance = random.Random(12)
    wanted = (*TWO, "--until-ci", "99%", "--max-cycles", "7", *QUICK)
    for attempt in range(60):
        process = begin(*(wanted if attempt == 0 else ("campaign", "--resume", "one", "-y")), cwd=arms)
        try:
            process.communicate(timeout=2 + 4 * chance.random() if attempt < 5 else 120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            continue
        if attempt >= 1 and process.returncode == 0:
            break
        if process.returncode == 2:  # killed before the campaign was written down
            begin(*wanted, cwd=arms).communicate(timeout=120)
    cells = cells_of(arms)
    assert cycles_of(cells, "completed") == [1, 2, 3, 4, 5]
    assert cycles_of(cells, "not needed") == [6, 7]
    assert len(cells) == 14
    # One that lost only what it had written down about the end says the same.
    before = command("results", "show", "one", cwd=arms).out
    file = arms / "results" / "campaigns" / "one" / "experiments.json"
    file.write_text(json.dumps([{**cell, "status": cell["status"].replace("not needed", "not run")} for cell in cells]))
    assert "adaptive and not over" in command("results", "show", "one", cwd=arms).out
    assert command("campaign", "--resume", "one", "-y", cwd=arms).code == 0
    assert command("results", "show", "one", cwd=arms).out == before
    assert cells_of(arms) == cells
