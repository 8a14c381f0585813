"""`lem doctor --noise`, through the command: an ordinary campaign of one configuration, and what is said of it."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests.conftest import begin, command
from tests.studies.campaigns import QUICK, cells_of


def campaigns(folder):
    return sorted(path.name for path in (folder / "results" / "campaigns").iterdir())


@pytest.mark.processes
def test_one_configuration_is_measured_as_two_arms_and_its_noise_is_told(lem, arms):
    done = lem("doctor", "--noise", "quick.yaml", "-c", "3", *QUICK)
    assert done.code == 0, done.err
    (name,) = campaigns(arms)
    assert done.out.startswith(f"Noise {name}: any (simulated) against itself, 6 of 6 cells completed, shuffled\n")
    assert "Energy per output token (replay)" in done.out
    shown = {line.split("  ")[0]: line for line in done.out.splitlines()}
    assert (
        "% between the two cells of a cycle (standard deviation of the log ratio, 95% interval" in shown["Noise floor"]
    )
    assert shown["Would find"].split("a difference of")[1].count(" with ") == 5
    assert "6 cells are too few" in shown["Carry-over"]
    assert shown["cycles"].startswith(("cycles   --cycles ", "cycles   more than 100: "))
    assert done.out.endswith(f"Campaign: results/campaigns/{name}\n")
    # An ordinary campaign, with its rows and its answer.
    rows = json.loads(lem("results", "list", "--campaign", name, "--json").out)
    assert sorted(row["campaign_arm"] for row in rows) == ["A"] * 3 + ["A again"] * 3
    first, second = json.loads((arms / "results" / "campaigns" / name / "campaign.json").read_text())["arms"]
    assert first["experiment"] == second["experiment"]
    assert lem("results", "show", name).out.startswith(f"Campaign {name}: 6 of 6 cells completed")
    # Shown again without measuring, with another difference, and as JSON.
    before = sorted(os.listdir(arms / "results" / "raw"))
    again = json.loads(lem("doctor", "--noise", "--resume", name, "--json", "--difference", "50%").out)
    assert (again["campaign"], again["cells_completed"], again["difference"]) == (name, 6, 0.5)
    assert again["floors"][0]["sd"] > 0
    assert again["campaign_directory"].endswith(name)
    assert sorted(os.listdir(arms / "results" / "raw")) == before


@pytest.mark.processes
def test_as_json_nothing_else_is_on_stdout(arms):
    done = command("doctor", "--noise", "quick.yaml", "-c", "1", "--json", "--campaign-name", "n", *QUICK, cwd=arms)
    assert done.code == 0, done.err
    shown = json.loads(done.out)
    assert (shown["format_version"], shown["campaign"], shown["cells_completed"], shown["failures"]) == (1, "n", 2, [])
    assert shown["floors"][0]["sd"] is None
    assert "1 pair of cells is too few for a standard deviation; at least 3 are needed" in shown["floors"][0]["reason"]


@pytest.mark.processes
def test_ctrl_c_keeps_what_is_measured_and_names_the_command_that_goes_on(arms):
    process = begin(
        "doctor", "--noise", "quick.yaml", "-c", "2", "--campaign-name", "n", "--config-gap", "600", *QUICK, cwd=arms
    )
    while "Waiting" not in process.stderr.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "To resume: lem doctor --noise --resume n\n" in err
    assert out.startswith("Noise n: any (simulated) against itself, 1 of 4 cells completed")
    file = arms / "results" / "campaigns" / "n" / "campaign.json"
    kept = json.loads(file.read_text())
    kept["campaign"]["config_gap_s"] = 0.0  # the test has no ten minutes to wait
    file.write_text(json.dumps(kept))
    done = command("doctor", "--noise", "--resume", "n", "-y", cwd=arms)
    assert done.code == 0, done.err
    assert "4 of 4 cells completed" in done.out
    assert [cell["status"] for cell in cells_of(arms, "n")] == ["completed"] * 4


@pytest.mark.processes
def test_cells_that_fail_are_named_and_the_exit_code_is_1(lem, arms):
    done = lem("doctor", "--noise", "quick.yaml", "-c", "1", "backend.fail_at_request=2", *QUICK)
    assert done.code == 1
    assert "No cell has completed yet, so nothing is known about the noise." in done.out
    assert "A again, cycle 1/1: failed" in done.out


# ------------------------------------------------------------------ before it runs
def test_a_dry_run_shows_the_order_of_the_built_in_model_and_prompts(lem, tmp_path):
    done = lem("doctor", "--noise", "--dry-run")
    assert done.code == 0, done.err
    first, *cells = done.out.splitlines()
    assert "2 arms in 5 cycles, shuffled" in first
    assert sum(line.startswith("[") and "32 prompts of sample through tiny (pytorch)" in line for line in cells) == 10
    assert not (tmp_path / "results").exists()


def test_what_the_command_line_chooses_replaces_the_defaults(lem, arms):
    of_times = ("energy=none", "--primary", "output_tokens_per_s")
    done = lem("doctor", "--noise", "--dry-run", "-m", "any", "--backend", "simulated", *of_times, "-n", "7", "-c", "2")
    assert "7 prompts of sample through any (simulated)" in done.out, done.err
    (arms / "prompts.txt").write_text("one\ntwo\nthree\n")
    done = lem("doctor", "--noise", "--dry-run", "-p", "prompts.txt")
    assert "3 prompts of prompts.txt through tiny (pytorch)" in done.out, done.err
    done = lem("doctor", "--noise", "--dry-run", "quick.yaml", "-d", "sample", "--seed", "7", "--config-gap", "5")
    assert "300 prompts of sample through any (simulated)" in done.out, done.err
    assert "seed 7" in done.out
    assert done.out.count("pause of 5 s") == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quick.yaml", "slow.yaml"], "one config file, not 2"),
        (["both.yaml"], "is a campaign file; name the config file of a single configuration."),
        (
            ["quick.yaml", "--difference", "2"],
            '--difference: must be a share between 0 and 1, such as 2% or 0.02, not "2".',
        ),
        (
            ["quick.yaml", "--difference", "nan"],
            '--difference: must be a share between 0 and 1, such as 2% or 0.02, not "nan".',
        ),
        (["quick.yaml", "-c", "0"], "cycles: must be greater than or equal to 1, not 0"),
        (["quick.yaml", "--campaign-name", "a/b"], "Error: name: "),
        (["quick.yaml", "--primary", "cost"], "primary: must be 'energy_per_output_token_j'"),
        (
            ["-m", "any", "--backend", "simulated", "energy=none"],
            "with energy=none, an arm has no energy_per_output_token_j",
        ),
        (["quick.yaml", "--json", "--dry-run"], "--dry-run shows the order as text; leave out --json."),
        (["nowhere.yaml"], "nowhere.yaml"),
        (["--resume", "x"], "There is no campaign 'x'"),
        (["--resume", "a/b"], "is neither the name nor the directory of a campaign"),
        (["--resume", "x", "-c", "3", "-m", "tiny"], "as it was planned; leave out --cycles, --model."),
        (["--resume", "x", "--config-dir", "."], "as it was planned; leave out --config-dir."),
    ],
)
def test_bad_input_is_refused_before_anything_runs(lem, arms, arguments, message):
    (arms / "both.yaml").write_text("arms: [quick.yaml, slow.yaml]\n")
    done = lem("doctor", "--noise", *arguments)
    assert done.code == 2
    assert message in done.err
    assert not (arms / "results" / "raw").exists()


def test_a_campaign_of_different_configurations_is_not_taken_for_noise(lem, arms):
    lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    done = lem("doctor", "--noise", "--resume", "one")
    assert done.code == 2
    assert "does not compare one configuration with itself; to resume it: lem campaign --resume one." in done.err
