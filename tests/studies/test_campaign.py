"""`lem campaign`, through the command: order, pauses, failures, resuming, and the answer at the end."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import jsonschema
import pyarrow.parquet as pq
import pytest
import yaml
from msgspec import structs

from lem.config.campaign import KEYS
from lem.results import campaign
from lem.results.campaign import MEASURES
from lem.results.schema import ExperimentRow
from lem.results.store import Store
from lem.spec.campaign import STRUCTURES, Campaign, Measure
from lem.studies.campaign import pause_s
from lem.studies.orders import order
from tests.conftest import SUMMARY, begin, command, kill_group, wait_for
from tests.studies.campaigns import QUICK, cells_of

CONF = Path(__file__).parents[2] / "conf"


def places(cells):
    return [(cell["campaign"]["arm"], cell["campaign"]["cycle"], cell["campaign"]["position"]) for cell in cells]


def test_a_campaign_measures_each_arm_in_each_cycle_and_says_how_they_compare(lem, arms):
    done = lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "3", *QUICK)
    assert done.code == 0, done.err
    cells = cells_of(arms)
    assert [cell["status"] for cell in cells] == ["completed"] * 6
    assert {(arm, cycle) for arm, cycle, _ in places(cells)} == {(a, c) for a in ("quick", "slow") for c in (1, 2, 3)}
    assert sorted(cell["experiment_id"] for cell in cells) == sorted(os.listdir(arms / "results" / "raw"))
    pairs = pq.read_table(arms / "results" / "campaigns" / "one" / "pairs.parquet").to_pylist()
    (pair,) = [each for each in pairs if each["is_primary"]]
    assert (pair["arm"], pair["baseline"], pair["cycles"]) == ("slow", "quick", 3)
    assert pair["ci_low"] < pair["ratio"] < pair["ci_high"]
    assert pair["ratio"] == pytest.approx(2, rel=0.35)
    (sentence,) = [line for line in done.out.splitlines() if line.startswith("slow needs")]
    assert "times the energy per output token of quick (95% interval" in sentence
    assert re.search(r"3 cycles, shuffled\): (more|cannot tell) \(p = ", sentence)


@pytest.mark.processes
def test_results_know_the_campaign(lem, arms):
    lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "2", *QUICK)
    lem("experiment", "quick.yaml", *QUICK)
    rows = json.loads(lem("results", "list", "--campaign", "one", "--json").out)
    found = [(row["campaign"], row["campaign_arm"], row["campaign_cycle"], row["campaign_position"]) for row in rows]
    assert sorted(found) == sorted(("one", *place) for place in places(cells_of(arms)))
    shown = json.loads(lem("results", "show", "one", "--json").out)
    assert [cell["experiment_id"] for cell in shown["cells"]] == [cell["experiment_id"] for cell in cells_of(arms)]
    assert shown["sentences"][0].startswith("slow needs")
    assert lem("results", "show", "one").out.startswith("Campaign one: 4 of 4 cells completed, shuffled")


@pytest.mark.processes
def test_what_differs_between_cells_is_said_and_what_does_not_is_not(lem, arms):
    lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    store = Store(arms / "results")
    folder = campaign.folder_of(store, "one")
    first, *others = campaign.read_cells(store, folder)

    def notes(**columns):
        cells = [replace(first, row=structs.replace(first.row, **columns)), *others]
        return {note.code: note.text for note in campaign.answer(campaign.read_definition(folder), cells).warnings}

    as_it_is = notes()
    assert not [code for code in as_it_is if code.endswith("_differ")]
    for code, words, columns in (
        ("campaign_engines_differ", "simulated (2)", {"engine_version": "2"}),
        ("campaign_engines_differ", "vllm (0.9)", {"backend": "vllm", "engine_version": "0.9"}),
        ("campaign_boards_differ", "elsewhere", {"hostname": "elsewhere"}),
        ("campaign_meters_differ", "counter", {"energy_source": "counter"}),
        ("campaign_meters_differ", "the energy's components differ between cells: ", {"energy_components": "cpu"}),
        ("campaign_prompts_differ", "did not run the same prompts", {"prompts_sha256": "0"}),
        ("campaign_lengths_differ", " 40", {"output_tokens": 40}),
    ):
        found = notes(**columns)
        assert found.keys() - as_it_is.keys() == {code}
        assert words in found[code]


@pytest.mark.processes
def test_the_same_command_again_runs_nothing_and_shows_the_answer(lem, arms):
    first = lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "2", *QUICK)
    before = cells_of(arms)
    again = lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "2", *QUICK)
    assert again.code == 0
    assert cells_of(arms) == before
    assert again.out == first.out


@pytest.mark.processes
def test_a_finished_campaign_is_shown_while_another_process_holds_its_lock(lem, arms):
    wanted = ("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    first = lem(*wanted)
    folder = arms / "results" / "campaigns" / "one"
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for again in (("campaign", "--resume", "one"), wanted):
            done = lem(*again)
            assert (done.code, done.out.replace(f"{arms}/", "")) == (0, first.out)
        lose(arms, cells_of(arms)[1])
        assert "Another process is measuring campaign 'one'." in lem("campaign", "--resume", "one", "-y").err


def lose(folder, cell):
    """Remove an experiment as if it had never run."""
    shutil.rmtree(folder / "results" / "raw" / cell["experiment_id"])


@pytest.mark.processes
def test_a_dry_run_of_a_begun_campaign_shows_what_is_left(lem, arms):
    wanted = (
        "campaign",
        "quick.yaml",
        "slow.yaml",
        "--campaign-name",
        "one",
        "-c",
        "2",
        "--config-gap",
        "0.01",
        *QUICK,
    )
    assert lem(*wanted).code == 0
    for again in (("campaign", "--resume", "one", "--dry-run"), (*wanted, "--dry-run")):
        assert lem(*again).out.splitlines()[1:] == [
            "4 of 4 cells are completed; nothing is left to run.",
            "# dry run: nothing was measured",
        ]
    lost = cells_of(arms)[2]
    lose(arms, lost)
    out = lem("campaign", "--resume", "one", "--dry-run").out
    assert "3 of 4 cells are completed; this one is left:\n[3/4] " in out
    assert [line for line in out.splitlines() if line.startswith("[")] == [
        f"[3/4] {lost['label']}: 4 prompts of sample through any (simulated)"
    ]
    assert "pause of" not in out
    (energy_j,) = re.findall(r"including pauses, (\S+) J\.", out)
    rows = json.loads(lem("results", "list", "--campaign", "one", "--json").out)
    own = [row["energy_j"] for row in rows if row["campaign_arm"] == lost["campaign"]["arm"]]
    assert float(energy_j) == pytest.approx(sum(own) / len(own), rel=1e-3)


@pytest.mark.processes
def test_a_campaign_goes_on_from_any_directory(lem, arms, monkeypatch):
    (arms / "prompts.txt").write_text("one\ntwo\nthree\n")
    wanted = ("quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", "-p", "prompts.txt", "-y")
    assert lem("campaign", *wanted, "max_output_tokens=8").code == 0
    lose(arms, cells_of(arms)[0])
    (arms / "elsewhere").mkdir()
    monkeypatch.chdir(arms / "elsewhere")
    folder = arms / "results" / "campaigns" / "one"
    done = lem("campaign", "--resume", str(folder), "-y")
    assert done.code == 0, done.err
    assert "Campaign one: 2 of 2 cells completed" in done.out
    assert Path.cwd() == arms / "elsewhere"
    assert lem("results", "show", "../results/campaigns/one").out.startswith("Campaign one: 2 of 2 cells completed")
    kept = json.loads((folder / "campaign.json").read_text())
    assert kept["working_dir"] == str(arms)
    (folder / "campaign.json").write_text(json.dumps({**kept, "working_dir": str(arms / "gone")}))
    refused = lem("campaign", "--resume", str(folder), "-y")
    assert refused.code == 2
    assert "The directory in which campaign 'one' was started cannot be used" in refused.err
    monkeypatch.chdir(arms)
    assert lem("campaign", "--resume", str(folder), "-y").code == 0


@pytest.mark.processes
def test_a_lost_list_of_cells_is_rebuilt_from_the_experiments(lem, arms):
    wanted = ("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    first = lem(*wanted)
    before = cells_of(arms)
    file = arms / "results" / "campaigns" / "one" / "experiments.json"
    for content in (None, "", '{"a": 1}', "[1, 2]", '[{"campaign": {"arm": 1}}]', "[]"):
        file.unlink() if content is None else file.write_text(content)
        if content != "[]":
            shown = lem("results", "show", "one")
            assert shown.code == 2
            assert ("is missing. " if content is None else "is damaged (") in shown.err
            assert shown.err.endswith("run the cells that have no result: lem campaign --resume one\n")
        done = lem("campaign", "--resume", "one", "-y")
        assert (done.code, done.out.replace(f"{arms}/", "")) == (0, first.out)
        assert cells_of(arms) == before
    assert len(os.listdir(arms / "results" / "raw")) == 2


@pytest.mark.processes
def test_cells_of_another_campaign_of_the_same_name_are_not_taken_for_lost_ones(lem, arms):
    wanted = ("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    lem(*wanted)
    shutil.rmtree(arms / "results" / "campaigns" / "one")
    assert lem(*wanted, "max_output_tokens=9").code == 0
    (arms / "results" / "campaigns" / "one" / "experiments.json").unlink()
    lose(arms, {"experiment_id": sorted(os.listdir(arms / "results" / "raw"))[-1]})
    assert lem("campaign", "--resume", "one", "-y").code == 0
    rows = json.loads(lem("results", "list", "--json").out)
    kept = [row["max_output_tokens"] for row in rows if (arms / "results" / "raw" / row["experiment_id"]).is_dir()]
    assert sorted(kept) == [8, 8, 9, 9]


@pytest.mark.processes
def test_a_primary_measure_that_turns_out_to_be_missing_ends_with_1(lem, arms):
    (arms / "short.csv").write_text("t_s,power_w\n0,100\n0.01,100\n")
    (arms / "short.yaml").write_text((arms / "quick.yaml").read_text().replace("power.csv", "short.csv"))
    for first, sentence in (
        ("short", "No cell has a value for energy per output token (energy_per_output_token_j)"),
        ("quick", "short cannot be compared with quick, because short has no energy per output token (no completed"),
    ):
        done = lem("campaign", f"{first}.yaml", "short.yaml", "--campaign-name", first, "-c", "1", *QUICK)
        assert (done.code, sentence in done.out) == (1, True), done.out
        assert [cell["status"] for cell in cells_of(arms, first)] == ["completed"] * 2
        assert lem("campaign", "--resume", first).code == 1


def test_what_shows_an_experiment_is_refused_for_a_campaign(lem, arms):
    lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    for flag, name in (("--raw", "--raw"), ("-e", "--environment")):
        done = lem("results", "show", "one", flag)
        assert (done.code, done.out) == (2, "")
        assert f"Error: {name} applies to a single experiment, but 'one' is a campaign" in done.err
        assert "lem results list --campaign one" in done.err
    done = lem("results", "show", "on")
    assert done.code == 2
    nearest = "no campaign or schedule of that name in results. Nearest: one."
    assert done.err == f"Error: There is no experiment 'on' and {nearest}\n"
    assert lem("results", "show", "x" * 300).err.startswith("Error: There is no experiment 'xxx")


def test_an_experiment_is_not_hidden_by_a_campaign_with_its_id(lem, arms):
    lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    experiment_id = cells_of(arms)[0]["experiment_id"]
    shutil.copytree(arms / "results" / "campaigns" / "one", arms / "results" / "campaigns" / experiment_id)
    assert lem("results", "show", experiment_id).out.startswith(f"{experiment_id}  completed")


def test_another_campaign_of_the_same_name_is_refused(lem, arms):
    lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    done = lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "2", *QUICK)
    assert done.code == 2
    assert "A campaign 'one' with other arms or settings already exists." in done.err
    assert "lem campaign --resume one" in done.err
    other = lem("campaign", "slow.yaml", "quick.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    assert (other.code, "A campaign 'one' with other arms" in other.err) == (2, True)


def test_the_overrides_of_an_arm_that_break_it_are_said_to_be_its(lem, arms):
    broken = "{config: slow.yaml, name: wide, overrides: [batching.batch_size=0]}"
    (arms / "both.yaml").write_text(f"arms: [quick.yaml, {broken}]\n")
    done = lem("campaign", "both.yaml", *QUICK)
    assert (done.code, done.out) == (2, "")
    assert done.err == "Error: both.yaml:1: wide: batching.batch_size: must be greater than or equal to 1, not 0.\n"


def test_a_campaign_whose_machine_has_changed_is_not_continued_unless_forced(lem, arms):
    lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    file = arms / "results" / "campaigns" / "one" / "campaign.json"
    kept = json.loads(file.read_text())
    kept["machine"]["driver_version"] = "1.2"
    file.write_text(json.dumps(kept))
    refused = lem("campaign", "--resume", "one", "-y")
    assert refused.code == 2
    assert "driver: 1.2 then, none now" in refused.err
    assert lem("campaign", "--resume", "one", "-y", "--force").code == 0


@pytest.mark.processes
def test_a_failed_cell_is_tried_again_and_an_arm_that_only_fails_is_given_up(lem, arms):
    text = (arms / "slow.yaml").read_text().replace("name: simulated,", "name: simulated, fail_at_request: 2,")
    (arms / "slow.yaml").write_text(text)
    done = lem(
        "campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "3", "--retries", "1",
        "--structure", "interleaved", *QUICK,
    )  # fmt: skip
    assert done.code == 1
    cells = cells_of(arms)
    by_arm = {arm: [cell["status"] for cell in cells if cell["campaign"]["arm"] == arm] for arm in ("quick", "slow")}
    assert by_arm["quick"] == ["completed"] * 3
    assert by_arm["slow"] == ["failed", "failed", "not run"]
    assert "slow was abandoned after 3 failures in a row." in done.out
    # A cell that is retried is one cell in the progress, too.
    assert [line.rpartition("(")[2] for line in done.err.splitlines() if " ended, " in line][-1] == (
        "5 of 6 ended, 2 failed)"
    )
    # Two fail in the first cycle and one in the second; then no more are run.
    assert len(os.listdir(arms / "results" / "raw")) == 3 + 3
    reason = "abandoned after 3 failures in a row; the last failure: simulated failure at request 2"
    said = f"slow cannot be compared with quick, because slow has no energy per output token ({reason})."
    assert f"slow: {reason}.\n" in done.out
    assert f"{said}\n" in done.out
    assert "campaign_cells_missing" in done.out
    shown = json.loads(lem("results", "show", "one", "--json").out)
    assert shown["sentences"] == [said]
    stored = pq.read_table(arms / "results" / "campaigns" / "one" / "arms.parquet").to_pylist()
    for rows in (shown["arms"], stored):
        of_slow = [row for row in rows if row["arm"] == "slow"]
        assert {row["measure"] for row in of_slow} == {row["measure"] for row in rows if row["arm"] == "quick"}
        for row in of_slow:
            assert (row["cells_completed"], row["cells_planned"], row["reason"]) == (0, 3, reason)
            assert [row[name] for name in ("mean", "ci95_low", "ci95_high", "source")] == [None] * 4
    assert {row["reason"] for row in stored if row["arm"] == "quick"} == {None}


@pytest.mark.processes
def test_pauses_are_between_cells_and_between_cycles_and_none_is_after_the_last(arms):
    begun_s = time.monotonic()
    done = command(
        "campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "2", "--config-gap", "1",
        "--cycle-gap", "2", *QUICK, cwd=arms,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert time.monotonic() - begun_s > 1 + 2 + 1
    rows = [line for line in done.err.splitlines() if line.startswith("Waiting")]
    assert [line for line in rows if line.endswith("/1")] == ["Waiting 0/1", "Waiting 1/1"] * 2
    assert next(line for line in rows if line.endswith("/2")) == "Waiting 0/2"
    assert done.err.rstrip().splitlines()[-1].startswith("[4/4]")


@pytest.mark.processes
def test_ctrl_c_in_a_pause_loses_nothing_and_names_the_command_that_goes_on(arms):
    process = begin(
        "campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "2", "--config-gap", "600", *QUICK,
        cwd=arms,
    )  # fmt: skip
    while "Waiting" not in process.stderr.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "To resume: lem campaign --resume one" in err
    assert "Campaign one: 1 of 4 cells completed" in out
    assert [cell["status"] for cell in cells_of(arms)] == ["completed", "not run", "not run", "not run"]


@pytest.mark.processes
def test_ctrl_c_in_a_cell_names_one_command_which_goes_on(arms):
    process = begin(
        "campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK, "warmup.prompts=100",
        "-o", "its results", cwd=arms,
    )  # fmt: skip
    wait_for(process, "Warm-up 1")
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (out + err).count("--resume") == 1
    (found,) = re.findall("^To resume: (lem campaign --resume one -o .*)$", err, re.MULTILINE)
    done = command(*shlex.split(found)[1:], "-y", cwd=arms)
    assert done.code == 0, done.err
    assert "Campaign one: 2 of 2 cells completed" in done.out
    assert len(os.listdir(arms / "its results" / "raw")) == 2


@pytest.mark.processes
def test_new_prompts_in_each_cycle_are_the_same_for_all_arms(lem, arms):
    done = lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "2", "--resample-prompts", *QUICK)
    assert done.code == 0, done.err
    rows = json.loads(lem("results", "list", "--json").out)
    digests = {cycle: {r["prompts_sha256"] for r in rows if r["campaign_cycle"] == cycle} for cycle in (1, 2)}
    assert [len(each) for each in digests.values()] == [1, 1]
    assert digests[1] != digests[2]


def test_new_prompts_that_would_be_the_same_prompts_are_refused(lem, arms):
    (arms / "prompts.txt").write_text("one\ntwo\nthree\n")
    both = ("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-p", "prompts.txt", "-c", "3")
    done = lem(*both, "--resample-prompts", "--dry-run")
    assert (done.code, "resample_prompts: each cycle would have the same prompts" in done.err) == (2, True)
    assert lem(*both, "--resample-prompts", "-n", "2", "--dry-run").code == 0


def test_two_files_of_one_name_and_one_file_twice_are_arms_of_their_own(lem, arms):
    (arms / "other").mkdir()
    (arms / "other" / "quick.yaml").write_text((arms / "quick.yaml").read_text())
    done = lem(
        "campaign", "quick.yaml", "quick.yaml", "other/quick.yaml", "--campaign-name", "one", "-c", "1", "--dry-run",
        *QUICK,
    )  # fmt: skip
    assert done.code == 0, done.err
    names = {line.split("] ")[1].split(", cycle")[0] for line in done.out.splitlines() if line.startswith("[")}
    assert names == {f"{arms.name}/quick#1", f"{arms.name}/quick#2", "other/quick"}


def test_a_grid_whose_files_the_shell_names_is_compared_without_its_index(lem, arms):
    assert lem("config", "generate-grid", "quick.yaml", "--vary", "seed=1,2", "-o", "grid").code == 0
    named = sorted(str(file.relative_to(arms)) for file in (arms / "grid").glob("*.yaml"))
    assert "grid/grid.yaml" in named
    (arms / "both.yaml").write_text(f"arms: {json.dumps(named)}\ncycles: 1\ndataset: sample\nsample_size: 2\n")
    for arguments in ([*named, "--campaign-name", "one", "-c", "1", *QUICK], ["both.yaml"]):
        done = lem("campaign", *arguments, "--dry-run")
        assert done.code == 0, done.err
        assert "2 arms in 1 cycle" in done.out
    refused = lem("campaign", "grid/grid.yaml", "quick.yaml", "gone.yaml", "--campaign-name", "one", *QUICK)
    assert refused.code == 2
    assert "'grid/grid.yaml' matches no config file (.yaml, .yml): this file is the index of a grid" in refused.err
    assert "'gone.yaml' matches no config file (.yaml, .yml). There is no such file." in refused.err


@pytest.mark.processes
def test_a_dry_run_shows_order_and_pauses_and_what_to_expect(lem, arms):
    wanted = ("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "3", "--config-gap", "60", *QUICK)
    first = lem(*wanted, "--dry-run")
    assert first.code == 0
    assert "No earlier run of quick, slow" in first.out
    assert first.out.count("pause of 60 s") == 5
    assert not (arms / "results").exists()
    for _ in range(2):
        for file in ("quick.yaml", "slow.yaml"):
            lem("experiment", file, *QUICK, "--fresh")
    second = lem(*wanted, "--dry-run")
    assert "Expected from earlier runs: 5." in second.out
    assert "With 3 cycles, a difference of" in second.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quick.yaml", "--campaign-name", "x"], "at least two configurations, not 1"),
        (["quick.yaml", "slow.yaml"], "needs a name: use --campaign-name"),
        (["--campaign-name", "x"], "needs at least two config files"),
        (["quick.yaml", "slow.yaml", "--campaign-name", "a/b"], "name: must be at most 100 letters"),
        (["quick.yaml", "slow.yaml", "--campaign-name", "x", "--baseline", "fast"], "no arm is called 'fast'"),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "-c", "0"],
            "cycles: must be greater than or equal to 1, not 0",
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "-c", "1000000"],
            "cycles: must be less than or equal to 1000, not 1000000",
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "--structure", "random"],
            "structure: 'random' is not one of",
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "--margin", "2"],
            'margin: must be a share between 0 and 1, such as 2% or 0.02, not "2"',
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "--config-gap", "-1"],
            "config_gap_s: must be greater than or equal to 0, not -1",
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "--primary", "cost"],
            "primary: must be 'energy_per_output_token_j'",
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "exp_2026"],
            "name: 'exp_2026' would hide the experiments whose ids begin with it",
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "--primary", "ttft_mean_s"],
            "slow: streaming.enabled: without it, an arm has no ttft_mean_s. Set streaming.enabled=true for all arms",
        ),
        *(
            (
                ["quick.yaml", "slow.yaml", "--campaign-name", "x", "--primary", measure, "energy=none"],
                f"quick: energy.name: with energy=none, an arm has no {measure}. Choose a meter",
            )
            for measure in ("energy_per_output_token_j", "energy_per_request_j", "average_power_w")
        ),
        (["exp_2.yaml"], "name: 'exp_2' would hide the experiments"),
        (["quick.yaml", "nowhere.yaml", "--campaign-name", "x"], "Error: 'nowhere.yaml' matches no config file"),
        (["nowhere.yaml"], "Error: 'nowhere.yaml' matches no config file (.yaml, .yml). There is no such file."),
        (["quick.yaml", "slow.yaml", "--campaign-name", "x", "--baseline", "Quick"], "Did you mean 'quick'? Choose"),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "--config-gap", "abc"],
            'Error: --config-gap: must be a valid number, not "abc".\n',
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "-c", "1.5"],
            'Error: --cycles/-c: must be a valid integer, not "1.5".\n',
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "--warmup-timeout", "-1"],
            "warmup_timeout_s: must be greater than 0, not -1.0.\n",
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "--cool-to", "20"],
            "cool_to_c: no arm runs on a GPU, so there is no temperature to wait for.",
        ),
        *(
            (
                ["quick.yaml", "slow.yaml", "--campaign-name", name],
                "name: must be at most 100 letters",
            )
            for name in ("a b", "../x", "..", "", "😀", "-x", "n" * 300)
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "--baseline", "slow", "--baseline", "quick"],
            "--baseline takes one arm, not 2 (slow, quick)",
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "batching.batch_size=1,2"],
            "batching.batch_size=1,2: an arm has one value for each key",
        ),
        (
            ["quick.yaml", "slow.yaml", "--campaign-name", "x", "batching.batch_size=0"],
            "batching.batch_size: must be greater than or equal to 1, not 0",
        ),
        (["other", "--campaign-name", "x"], "'other' matches no config file"),
        (["empty.yaml", "--campaign-name", "x"], "empty.yaml: the file sets no values"),
        (["empty.yaml", "quick.yaml", "--campaign-name", "x"], "empty: No model"),
        (["bytes.yaml", "--campaign-name", "x"], "bytes.yaml:1: byte 0x80 is not UTF-8"),
        (["bytes.yaml", "quick.yaml", "--campaign-name", "x"], "bytes.yaml:1: byte 0x80 is not UTF-8"),
        (["quick.yaml", "--resume", "x"], "leave out config files and settings"),
        (["--resume", "x", "-c", "5"], "leave out config files and settings"),
        (["--resume", "x", "--baseline", "quick"], "leave out config files and settings"),
        (["--resume", "x"], "There is no campaign 'x'"),
        (["--resume", "other"], "There is no campaign 'other'"),
        (["--resume", "x" * 300], "is neither the name nor the directory of a campaign"),
        (["--resume", ""], "'' is neither the name nor the directory of a campaign"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(lem, arms, arguments, message):
    (arms / "other").mkdir()
    (arms / "exp_2.yaml").write_text("arms: [quick.yaml, slow.yaml]\n")
    (arms / "empty.yaml").write_text("")
    (arms / "bytes.yaml").write_bytes(b"model: \x80")
    done = lem("campaign", *arguments, *(() if "--resume" in arguments else QUICK))
    assert done.code == 2
    assert message in done.err
    assert not (arms / "results" / "raw").exists()


def test_one_cycle_has_no_interval_and_says_so(lem, arms):
    done = lem("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "1", *QUICK)
    assert "cannot tell, because an interval needs at least two cycles." in done.out


def test_an_order_that_repeats_and_a_part_of_a_square_carry_warnings(lem, arms):
    options = ("quick.yaml", "slow.yaml", "--dry-run", *QUICK)
    assert "campaign_fixed_order" in lem("campaign", "--campaign-name", "x", "--structure", "grouped", *options).err
    latin = lem("campaign", "--campaign-name", "x", "--structure", "latin", "-c", "3", *options)
    assert (
        "campaign_unbalanced: the number of cycles (3) is not a multiple of 2, so positions and predecessors are not "
        "balanced; 2 or 4 cycles would balance them.\n"
    ) in latin.err
    assert "complete Latin squares" not in latin.out
    assert "campaign_" not in lem("campaign", "--campaign-name", "x", "--structure", "latin", "-c", "4", *options).err


@pytest.mark.parametrize(("arms_given", "cycles", "size"), [(2, 4, 2), (3, 6, 6), (4, 4, 4), (5, 10, 10), (6, 6, 6)])
def test_a_latin_campaign_without_cycles_gets_the_fewest_whole_squares(lem, arms, arms_given, cycles, size):
    files = ["quick.yaml"] * arms_given
    done = lem("campaign", *files, "--campaign-name", "x", "--structure", "latin", "--dry-run", *QUICK)
    assert done.out.startswith(
        f"Campaign x: {arms_given} arms in {cycles} cycles (complete Latin squares), latin, seed 42;"
    )
    assert f"After every {size} cycles, each arm has had every position" in done.out
    assert "campaign_unbalanced" not in done.err


def test_cycles_of_ones_own_stay_though_they_are_no_whole_squares(lem, arms):
    (arms / "three.yaml").write_text("arms: [quick.yaml, slow.yaml, quick.yaml]\nstructure: latin\n")
    (arms / "four.yaml").write_text("defaults: [three]\ncycles: 4\n")
    for given, cycles in ((["three.yaml"], 6), (["three.yaml", "-c", "4"], 4), (["four.yaml"], 4)):
        done = lem("campaign", *given, "--dry-run", *QUICK)
        assert f"3 arms in {cycles} cycles" in done.out
        assert ("not balanced; 6 cycles would balance them." in done.err) == (cycles == 4)
    shown = [json.loads(lem("config", "show", name, "--json").out)["cycles"] for name in ("three.yaml", "four.yaml")]
    assert shown == [6, 4]


KILLS = 20


@pytest.mark.slow
def test_a_campaign_that_is_killed_again_and_again_ends_with_the_same_cells(arms, record_property):
    """Kill it at random moments and continue it, until it is complete; compare it with one that was left alone."""
    chance = random.Random(11)
    wanted = ("campaign", "quick.yaml", "slow.yaml", "--campaign-name", "one", "-c", "3", *QUICK, "-n", "24")
    alone = begin(*wanted, "-o", "alone", cwd=arms)
    kills = 0
    while True:
        is_planned = (arms / "results" / "campaigns" / "one" / "campaign.json").is_file()
        process = begin(*(("campaign", "--resume", "one", "-y") if is_planned else wanted), cwd=arms)
        try:
            if kills < KILLS and chance.random() < 0.7:  # else at any time from the start
                wait_for(process, chance.choice(("[", "Warm-up", "Prompts ")))
            out, err = process.communicate(timeout=chance.uniform(0, 1.5) if kills < KILLS else 300)
        except subprocess.TimeoutExpired:
            kill_group(process)
            kills += 1
            continue
        assert process.returncode == 0, out + err
        break
    assert alone.wait(timeout=300) == 0
    cells, expected = cells_of(arms), json.loads((arms / "alone/campaigns/one/experiments.json").read_text())
    assert [(cell["label"], cell["status"]) for cell in cells] == [(cell["label"], "completed") for cell in expected]
    assert places(cells) == places(expected)
    assert requests_of(arms / "results", cells) == requests_of(arms / "alone", expected)
    listed = json.loads(command("results", "list", "--campaign", "one", "--json", cwd=arms).out)
    assert sorted(row["experiment_id"] for row in listed) == sorted(cell["experiment_id"] for cell in cells)
    assert kills == KILLS
    resumed = sum(row["resumed"] for row in listed)
    record_property(SUMMARY, f"a campaign: {kills} kills, {len(cells)} cells, {resumed} times in the midst of one")


def requests_of(results, cells):
    """Return the requests of each cell in the tables: their prompts and how many tokens they have."""
    rows = pq.read_table(results / "requests").to_pylist()
    return [
        sorted(
            (row["cycle"], row["request"], row["input_tokens"], row["output_tokens"], row["error"])
            for row in rows
            if row["experiment_id"] == cell["experiment_id"]
        )
        for cell in cells
    ]


# ------------------------------------------------------------------ pauses
@pytest.mark.parametrize(
    ("structure", "expected"),
    [("grouped", [7, 7, 1, 7, 7]), ("interleaved", [1, 7, 1, 7, 1]), ("shuffled", [1, 7, 1, 7, 1]),
     ("latin", [1, 7, 1, 7, 1])],
)  # fmt: skip
def test_a_pause_lies_between_any_two_cells_of_every_structure(structure, expected):
    places = order(structure, 2, 3, 5)
    both = Campaign(structure=structure, config_gap_s=1, cycle_gap_s=7)
    assert [pause_s(both, *pair) for pair in pairwise(places)] == expected
    without = replace(both, cycle_gap_s=None)
    assert [pause_s(without, *pair) for pair in pairwise(places)] == [1] * 5
    none_between_cycles = [pause_s(replace(both, cycle_gap_s=0), *pair) for pair in pairwise(places)]
    assert none_between_cycles == [0 if pause == 7 else 1 for pause in expected]


# ------------------------------------------------------------------ campaign files
@pytest.fixture
def file(arms):
    (arms / "both.yaml").write_text(
        "arms: [quick.yaml, {config: slow.yaml, name: sluggish, overrides: [max_output_tokens=8]}]\n"
        "dataset: sample\nsample_size: 3\ncycles: 2\nstructure: latin\noverrides: [max_output_tokens=9]\n"
    )
    return arms / "both.yaml"


@pytest.mark.processes
def test_a_campaign_file_is_run(lem, arms, file):
    done = lem("campaign", "both.yaml", "-y")
    assert done.code == 0, done.err
    assert {cell["campaign"]["arm"] for cell in cells_of(arms, "both")} == {"quick", "sluggish"}
    rows = {row["campaign_arm"]: row for row in json.loads(lem("results", "list", "--json").out)}
    assert {arm: row["max_output_tokens"] for arm, row in rows.items()} == {"quick": 9, "sluggish": 8}
    assert {row["requests_planned"] for row in rows.values()} == {3}
    assert "2 cycles, latin" in done.out


def test_the_command_line_wins_over_the_file_and_the_file_over_what_it_inherits(lem, arms, file):
    (arms / "child.yaml").write_text("defaults: [both]\ncycles: 3\nseed: 7\n")
    shown = json.loads(lem("config", "show", "child.yaml", "--json").out)
    assert (shown["cycles"], shown["seed"], shown["structure"], shown["sample_size"]) == (3, 7, "latin", 3)
    preview = lem("campaign", "child.yaml", "-c", "4", "-n", "2", "--structure", "grouped", "--dry-run")
    assert preview.out.startswith("Campaign child: 2 arms in 4 cycles, grouped, seed 7; baseline quick")
    assert "2 prompts of sample" in preview.out


def test_a_file_in_another_directory_names_its_arms_beside_it(lem, arms, file, monkeypatch):
    (arms / "elsewhere").mkdir()
    monkeypatch.chdir(arms / "elsewhere")
    shown = json.loads(lem("config", "show", "../both.yaml", "--json").out)
    assert (shown["arms"][0], shown["arms"][1]["config"]) == ("../quick.yaml", "../slow.yaml")


def test_a_campaign_file_inherits_from_at_most_a_hundred_files(lem, arms):
    for number in range(101):
        (arms / f"c{number}.yaml").write_text(f"defaults: [c{number + 1}]\narms: [quick.yaml, slow.yaml]\n")
    (arms / "c101.yaml").write_text("cycles: 2\n")
    refused = lem("campaign", "c0.yaml", *QUICK)
    assert (refused.code, refused.out) == (2, "")
    assert "c0.yaml: defaults: the file inherits from more than 100 files." in refused.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: [quick.yaml, slow.yaml]\ncycels: 3\n", "bad.yaml:2: cycels: unknown key. Did you mean 'cycles'"),
        ("arms: [quick.yaml, slow.yaml]\ncycles: 0\n", "bad.yaml:2: cycles: must be greater than or equal to 1"),
        ("arms: [quick.yaml, slow.yaml]\nstructure: lattin\n", "Did you mean 'latin'?"),
        ("arms: [quick.yaml, {confg: slow.yaml}]\n", "bad.yaml:1: arms.1.confg: unknown key. Did you mean 'config'?"),
        ("arms: [quick.yaml]\n", "at least two configurations, not 1"),
        ("arms: [quick.yaml, gone.yaml]\n", "bad.yaml:1: arms: 'gone.yaml' matches no config file"),
        (
            "arms: [quick.yaml, slow.yaml]\ncool_to_c: 20\n",
            "bad.yaml:2: cool_to_c: no arm runs on a GPU, so there is no temperature to wait for.",
        ),
        ("cycles: 2\narms: []\n", "bad.yaml:2: arms: a campaign compares at least two configurations, not 0"),
        (
            "arms: [quick.yaml, slow.yaml]\nbaseline: slwo\n",
            "bad.yaml:2: baseline: no arm is called 'slwo'. Did you mean 'slow'? Choose one of quick, slow.",
        ),
        ("arms: quick.yaml\n", 'bad.yaml:1: arms: must be a valid array, not "quick.yaml"'),
        ("arms: [quick.yaml, slow.yaml]\ndefaults: [bad]\n", "the file inherits from itself"),
        ("arms: [{config: quick.yaml, name: x}, {config: slow.yaml, name: x}]\n", "two arms are called 'x'"),
        (
            'arms: [quick.yaml, {config: slow.yaml, name: "a\\nb"}]\n',
            "bad.yaml:1: arms: the name 'a\\nb' has characters",
        ),
        ("arms: [quick.yaml, {config: slow.yaml, name: quick}]\n", "bad.yaml:1: arms: two arms are called 'quick'"),
        ("arms: [{config: quick.yaml, name: ''}, slow.yaml]\n", "bad.yaml:1: arms.0.name: must not be empty."),
        (
            "arms: [quick.yaml, slow.yaml]\nbaseline: fast\n",
            "bad.yaml:2: baseline: no arm is called 'fast'. Choose one of quick, slow.",
        ),
        (
            "arms: [quick.yaml, slow.yaml]\nbaseline: slow\nbaseline: quick\n",
            "bad.yaml:3: baseline: duplicate key; it was first given on line 2.",
        ),
        ("arms: [quick.yaml, slow.yaml]\nname: exp_20260102_030405\n", "bad.yaml:2: name: 'exp_20260102_030405' would"),
        (
            "arms: [quick.yaml, slow.yaml]\nprimary: ttft_mean_s\n",
            "streaming.enabled: without it, an arm has no ttft_mean_s. Set streaming.enabled=true",
        ),
        ("arms: [quick.yaml, slow.yaml]\nname: a/b\n", "bad.yaml:2: name: must be at most 100 letters"),
        (
            "arms: [quick.yaml, {config: slow.yaml, overrides: [batching.batch_size=0]}]\n",
            "batching.batch_size: must be greater than or equal to 1, not 0",
        ),
        (
            "arms: [quick.yaml, slow.yaml]\nmargin: 1.5\n",
            "bad.yaml:2: margin: must be a share between 0 and 1, such as 2% or 0.02, not 1.5.",
        ),
    ],
)
def test_a_bad_campaign_file_is_refused_with_the_line(lem, arms, text, message):
    (arms / "bad.yaml").write_text(text)
    for command_line in (("campaign", "bad.yaml", "-d", "sample", "--dry-run"), ("config", "validate", "bad.yaml")):
        done = lem(*command_line)
        assert done.code == 2
        said = (done.out + done.err).replace(": error", "")
        assert message in said, said
        assert not (arms / "results").exists()


def test_a_new_campaign_file_explains_every_key_and_is_valid(lem, arms):
    done = lem("config", "new", "--campaign", "-o", "new.yaml")
    assert done.code == 0, done.err
    text = (arms / "new.yaml").read_text()
    assert {f"#{key}:" for key in KEYS if key != "arms"} <= {line.split(" ")[0] for line in text.splitlines()}
    (arms / "new.yaml").write_text(text.replace("first", "quick").replace("second", "slow"))
    assert lem("config", "validate", "new.yaml").code == 0
    (arms / "all.yaml").write_text(re.sub(r"(?m)^#(\w+:)", r"\1", (arms / "new.yaml").read_text()))
    shown, bare = (json.loads(lem("config", "show", name, "--json").out) for name in ("all.yaml", "new.yaml"))
    assert shown == bare


def test_the_schema_of_campaign_files_knows_what_lem_accepts(lem, arms, file):
    schema = json.loads(lem("config", "schema", "--campaign").out)
    jsonschema.Draft7Validator.check_schema(schema)
    validator = jsonschema.Draft7Validator(schema)
    assert validator.is_valid(yaml.safe_load(file.read_text()))
    assert not validator.is_valid({"arms": ["a.yaml"], "cycels": 3})
    assert not validator.is_valid({"cycles": 0})


@pytest.mark.parametrize("structure", STRUCTURES)
def test_each_structure_has_an_option_that_says_why(structure):
    text = (CONF / "campaign" / f"{structure}.yaml").read_text()
    assert yaml.safe_load(text)["structure"] == structure
    assert all("#" in line for line in text.splitlines())


def test_the_measures_of_the_schema_are_those_that_are_compared():
    assert set(get_args(Measure)) == set(MEASURES)
    assert set(MEASURES) <= set(ExperimentRow.__struct_fields__)


# ------------------------------------------------------------------ consent
@pytest.mark.parametrize("by_campaign", [False, True])
def test_a_program_that_a_file_names_is_not_started_unasked(lem, arms, by_campaign):
    canary = arms / "canary"
    command_line = f"touch {canary}"
    server = f"model: any\nbackend: {{name: openai, command: '{command_line}'}}\nenergy: none\n"
    bare = "model: any\nbackend: openai\nenergy: none\n"
    (arms / "server.yaml").write_text(bare if by_campaign else server)
    overrides = f"overrides: [\"backend.command='{command_line}'\"]\n" if by_campaign else ""
    (arms / "both.yaml").write_text(f"arms: [server.yaml, server.yaml]\ndataset: sample\nsample_size: 2\n{overrides}")
    done = lem("campaign", "both.yaml", "-y")
    assert done.code == 2
    assert "starts a program with your permissions, and you have not agreed" in done.err
    assert "--allow-command" in done.err
    assert not canary.exists()
