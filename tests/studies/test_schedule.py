"""`lem schedule`, through the command: what it refuses, the table it writes, its runs, and going on after a crash."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from lem.results.schedule import LOG, due, load_schedule
from lem.results.store import Store
from tests.conftest import SUMMARY, begin, command

SIMULATED = ("--dataset", "sample", "-n", "2", "--model", "any", "backend=simulated", "energy=none", "--yes")
EVERY = ("--interval", "6h")


def table_of(folder: Path, name: str = "any"):
    return load_schedule(Store(folder / "results"), name)


def plans_of(folder: Path):
    """Return the plans of all experiments that have one."""
    store = Store(folder / "results")
    return [
        store.directory(name).plan() for name in store.ids() if (store.directory(name).path / "spec.json").is_file()
    ]


# ------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "needs --interval, such as --interval 6h, or --at, such as --at 09:00"),
        (("--interval", "0"), "--interval: '0' is not a length of time"),
        (("--interval", "0h"), "--interval: must be longer than 0 seconds"),
        (("--interval", "-5m"), "--interval: '-5m' is not a length of time"),
        (("--at", "25:00"), "--at: '25:00' is not a time of day"),
        (("--at", "09:00,9"), "--at: '9' is not a time of day"),
        (("--at", "09:00", "--days", "mon-fri,foo"), "--days: 'foo' is not a day"),
        (("--at", "09:00", "--days", "tues"), "Did you mean 'tue' or 'tuesday'?"),
        ((*EVERY, "--duration", "0"), "--duration: '0' is not a length of time"),
        ((*EVERY, "--duration", "2h"), "--interval: 6h is longer than the duration of 2h"),
        ((*EVERY, "--duration", "40000d"), "longer than ten years"),
        ((*EVERY, "--time-zone", "Europe/Berlln"), "Did you mean 'Europe/Berlin'"),
        ((*EVERY, "--carbon-trace", "none.csv"), "--carbon-trace: there is no file none.csv"),
        ((*EVERY, "--name", "../x"), "--name: '../x' cannot be a directory name"),
        ((*EVERY, "--name", "exp_2026"), "would hide the experiments"),
        ((*EVERY, "max_output_tokens=0"), "max_output_tokens"),
        ((*EVERY, "backend.decode_s_per_token=-1"), "backend.decode_s_per_token"),
        (("--resume", "one", *EVERY), "leave out backend=simulated, energy=none, --interval, --dataset"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(lem, tmp_path, arguments, problem):
    done = lem("schedule", *SIMULATED, *arguments)
    assert done.code == 2
    assert problem in done.err
    assert len(done.err.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_an_unknown_schedule_cannot_be_resumed(lem):
    done = lem("schedule", "--resume", "nightly")
    assert (done.code, done.err) == (2, "Error: There is no schedule 'nightly' in results.\n")


def test_a_program_in_a_file_needs_consent_before_the_table_is_written(lem, tmp_path):
    (tmp_path / "served.yaml").write_text(
        "model: any\nbackend: {name: openai, command: sleep 1}\nenergy: {name: none}\n"
    )
    done = lem("schedule", "served.yaml", "--dataset", "sample", *EVERY, "--yes")
    assert done.code == 2
    assert "--allow-command" in done.err
    assert not (tmp_path / "results").exists()


def test_a_carbon_trace_is_that_of_every_run(lem, tmp_path):
    (tmp_path / "carbon.csv").write_text("time,g/kWh\nnoon,300\n")
    done = lem("schedule", *SIMULATED, *EVERY, "--carbon-trace", "carbon.csv")
    assert done.code == 2
    assert done.err.startswith("Error: energy.carbon_trace: ")
    assert "line 2" in done.err


# ------------------------------------------------------------------ a dry run
def test_a_dry_run_shows_the_table_with_the_time_zone(lem, tmp_path):
    done = lem(
        "schedule", *SIMULATED, "--at", "09:00", "--days", "weekdays", "-d", "7d", "--time-zone", "Asia/Kathmandu",
        "--dry-run",
    )  # fmt: skip
    assert done.code == 0, done.err
    head, *lines, expected, end = done.out.splitlines()
    assert re.fullmatch(r"Schedule any: 5 runs until .* \(Asia/Kathmandu\), each 2 prompts of sample .*", head)
    assert all(re.fullmatch(r"\d  (Mon|Tue|Wed|Thu|Fri) \d{4}-\d\d-\d\d 09:00:00 \+0545", line) for line in lines)
    assert len(lines) == 5
    assert expected == "No earlier run of this configuration: the time that a run takes is unknown."
    assert end == "# dry run: nothing was measured"
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("cycles", [1, 3])
def test_a_dry_run_knows_the_time_of_earlier_runs(lem, in_this_process, cycles):
    config = ("backend=simulated", "energy=none", "backend.decode_s_per_token=0.02", f"cycles={cycles}")
    ran = lem("experiment", "--model", "any", "-d", "sample", "-n", "2", *config, "--yes")
    assert ran.code == 0, ran.err
    done = lem("schedule", *SIMULATED, *config, "-i", "1s", "-d", "3s", "--dry-run")
    found = re.search(r"Expected from earlier runs: (\d+)s for each run, (\d+)s in all", done.out)
    row = json.loads(lem("results", "list", "--json").out)[0]
    of_cycle_s = sum(row[name] or 0 for name in ("duration_s", "warmup_duration_s"))
    took_s = (row["load_duration_s"] or 0) + cycles * of_cycle_s
    assert int(found[1]) == pytest.approx(took_s, abs=1)
    assert int(found[2]) == pytest.approx(3 * took_s, abs=2)
    assert "starts that come while a run is still going are skipped" in done.err


# ------------------------------------------------------------------ real runs
@pytest.mark.processes
def test_the_runs_of_a_schedule_are_experiments_of_their_own(tmp_path):
    done = command("schedule", *SIMULATED, "--interval", "12s", "--duration", "13s", "--name", "two", cwd=tmp_path)
    assert done.code == 0, done.err + done.out
    table = table_of(tmp_path, "two")
    first, second = table.starts
    assert {start.status for start in table.starts} == {"done"}
    assert (due(second) - due(first)).total_seconds() == 12
    listed = json.loads(command("results", "list", "--json", cwd=tmp_path).out)
    rows = {row["experiment_id"]: row for row in listed}
    assert len(rows) == 2
    for start in table.starts:
        row = rows[start.experiment_id]
        place = (row["schedule"], row["schedule_run"], row["schedule_planned_at"], row["schedule_started_at"])
        assert place == ("two", start.number, start.planned_at, start.started_at)
        assert row["schedule_late_s"] == pytest.approx(start.late_s, abs=0.01)
        assert row["status"] == "completed"
    folder = tmp_path / "results" / "schedules" / "two"
    assert [line.split(" ", 1)[1] for line in (folder / LOG).read_text().splitlines()] == done.out.splitlines()
    assert "Prompts 2/2" in (folder / "runs" / "1.log").read_text()
    # The same command finds nothing left to do, and another one does not change the schedule.
    again = command("schedule", *SIMULATED, "--interval", "12s", "--duration", "13s", "--name", "two", cwd=tmp_path)
    assert (again.code, again.out.startswith("Schedule two is over: 2 done.")) == (0, True)
    other = command("schedule", *SIMULATED, "--interval", "10s", "--duration", "20s", "--name", "two", cwd=tmp_path)
    assert other.code == 2
    assert "other settings already exists" in other.err


@pytest.mark.processes
def test_the_runs_may_be_campaigns(arms):
    (arms / "both.yaml").write_text("arms: [quick.yaml, slow.yaml]\ncycles: 1\n")
    wanted = ("both.yaml", "--dataset", "sample", "-n", "2", "max_output_tokens=8", "--yes")
    done = command("schedule", *wanted, "--interval", "20s", "--duration", "20s", cwd=arms)
    assert done.code == 0, done.err + done.out
    assert [(start.status, start.campaign) for start in table_of(arms, "both").starts] == [("done", "both_run1")]
    listed = json.loads(command("results", "list", "--json", cwd=arms).out)
    places = sorted((row["campaign"], row["campaign_arm"], row["schedule"], row["schedule_run"]) for row in listed)
    assert places == [("both_run1", "quick", "both", 1), ("both_run1", "slow", "both", 1)]


@pytest.mark.processes
def test_a_run_that_fails_is_recorded(tmp_path):
    wanted = (*SIMULATED, "backend.fail_at_request=1", "--interval", "5s", "--duration", "5s")
    done = command("schedule", *wanted, cwd=tmp_path)
    assert done.code == 1
    (start,) = table_of(tmp_path).starts
    assert start.status == "failed"
    assert start.experiment_id
    assert start.error
    assert f"Run 1/1 failed {start.experiment_id}: {start.error}" in done.out


@pytest.mark.processes
def test_prompts_that_change_are_noticed(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    wanted = ("--prompts", "prompts.txt", "--model", "any", "backend=simulated", "energy=none", "--yes")
    daemon = begin("schedule", *wanted, "--interval", "12s", "--duration", "13s", cwd=tmp_path)
    assert "started" in daemon.stdout.readline()
    assert "done" in daemon.stdout.readline()
    prompts.write_text("one\nthree\n")
    out, _ = daemon.communicate(timeout=120)
    assert daemon.returncode == 1
    assert "The prompts have changed since schedule 'any' began" in out


# ------------------------------------------------------------------ signals and crashes
LONG = (
    *SIMULATED,
    "-n",
    "4",
    "backend.decode_s_per_token=0.1",
    "max_output_tokens=40",
    "--interval",
    "60s",
    "--duration",
    "150s",
)


def wait_until_measuring(folder: Path) -> None:
    """Wait until the first prompt of a run is finished."""
    for _ in range(600):
        if any(journal.stat().st_size for journal in folder.glob("results/raw/*/journal_*")):
            return
        time.sleep(0.1)
    raise AssertionError("nothing was measured")


@pytest.mark.processes
def test_one_signal_lets_the_run_finish_and_two_interrupt_it(tmp_path):
    daemon = begin("schedule", *LONG, cwd=tmp_path)
    wait_until_measuring(tmp_path)
    second = command("schedule", "--resume", "any", cwd=tmp_path)
    assert second.code == 2
    assert "Another process is working through schedule 'any'" in second.err
    daemon.send_signal(signal.SIGTERM)
    time.sleep(1)
    daemon.send_signal(signal.SIGINT)
    out, err = daemon.communicate(timeout=60)
    assert daemon.returncode == 130, err
    assert out.splitlines()[-1] == "Stopped: 1 interrupted, 2 not started. To continue: lem schedule --resume any"
    assert (table_of(tmp_path).starts[0].status, len(plans_of(tmp_path))) == ("interrupted", 1)
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
    daemon = begin("schedule", *LONG, cwd=tmp_path)  # the same command goes on
    assert daemon.stdout.readline() == "Run 1/3 resumed.\n"
    daemon.send_signal(signal.SIGTERM)
    out, _ = daemon.communicate(timeout=60)
    assert daemon.returncode == 130
    start = table_of(tmp_path).starts[0]
    assert (start.status, f"Run 1/3 done {start.experiment_id}" in out) == ("done", True)
    (plan,) = plans_of(tmp_path)
    row = json.loads(command("results", "show", plan.experiment_id, "--json", cwd=tmp_path).out)
    assert (row["resumed"], row["requests_completed"]) == (1, 4)


KILLS = 10


@pytest.mark.processes
def test_a_schedule_that_is_killed_again_and_again_keeps_to_its_table(tmp_path, record_property):
    """Kill the daemon, or everything as a power cut would, at random moments; no start is repeated, and none is lost
    but those that the table names."""
    chance = random.Random(5)
    wanted = ("schedule", *SIMULATED, "--interval", "4s", "--duration", "44s")
    original, kills, cuts = None, 0, 0
    while True:
        is_begun = (tmp_path / "results" / "schedules" / "any" / "schedule.json").is_file()
        by_name = is_begun and chance.random() < 0.5
        daemon = begin(*(("schedule", "--resume", "any") if by_name else wanted), cwd=tmp_path)
        if kills < KILLS and chance.random() < 0.6:  # else at any time from the start
            next((line for line in daemon.stdout if re.search("started|resumed", line)), None)
        try:
            out, err = daemon.communicate(timeout=chance.uniform(0.3, 4) if kills < KILLS else 120)
            break
        except subprocess.TimeoutExpired:
            family = [daemon, *psutil.Process(daemon.pid).children(recursive=True)]
            doomed = family if chance.random() < 0.5 else family[:1]
            for process in doomed:
                try:
                    os.kill(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            daemon.communicate()
            kills += 1
            cuts += len(family) > 1
        if is_begun and original is None:
            original = [start.planned_at for start in table_of(tmp_path).starts]
    assert daemon.returncode in (0, 1), out + err
    table = table_of(tmp_path)
    assert [start.planned_at for start in table.starts] == original
    assert len(original) == 11
    assert {start.status for start in table.starts} <= {"done", "missed", "skipped"}, table.starts
    done = {start.number: start.experiment_id for start in table.starts if start.status == "done"}
    assert done
    plans = plans_of(tmp_path)
    assert {plan.schedule.number: plan.experiment_id for plan in plans} == done
    assert len(plans) == len(done), "a run was started twice"
    rows = {row["experiment_id"]: row for row in json.loads(command("results", "list", "--json", cwd=tmp_path).out)}
    assert {rows[name]["status"] for name in done.values()} == {"completed"}
    assert {rows[name]["requests_completed"] for name in done.values()} == {2}
    assert all(datetime.fromisoformat(start.started_at) >= due(start) for start in table.starts if start.started_at)
    record_property(SUMMARY, f"a schedule: {kills} kills, {cuts} in the midst of a run; {table.counts()}")
