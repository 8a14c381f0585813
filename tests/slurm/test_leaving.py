"""Commands that end before their jobs on a real Slurm cluster, and commands that return to the jobs."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.commands import ASKING, HERE, Lem, process_of, prompts, wait_for

pytestmark = pytest.mark.slurm


def states(lem: Lem, cluster: Cluster) -> list[dict[str, Any]]:
    """Return what `lem jobs` says about the experiments of the only study."""
    done = lem("jobs", "--json", cluster=cluster)
    assert done.returncode == 0, done.stderr
    (study,) = json.loads(done.stdout)
    experiments: list[dict[str, Any]] = study["experiments"]
    return experiments


def listed(lem: Lem, cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Return what `lem results list` says, by experiment."""
    done = lem("results", "list", "--json", cluster=cluster)
    assert done.returncode == 0, done.stderr
    return {one["experiment_id"]: one for one in json.loads(done.stdout)}


def queued(cluster: Cluster, lem: Lem) -> list[str]:
    """Return the ids of the jobs in the queue that belong to this test."""
    lines = cluster.command("squeue", "-h", "--array", "-o", "%i %o").splitlines()
    return [line.split()[0] for line in lines if f"{lem.folder}/" in line]


def test_after_logging_out_the_jobs_are_found_again_at_each_stage(cluster: Cluster, lem: Lem) -> None:
    cluster.wait_until_idle()
    command = [sys.executable, "-m", "lem", "experiment", "slow.yaml", *prompts(4), "seed=1,2", "--multirun", *HERE]
    alone = ("hydra.launcher.nodelist=n1", "hydra.launcher.exclusive=true", "--detach")
    shell = subprocess.Popen(
        ["bash", "-c", '"$@"; sleep 100', "shell", *command, *alone],
        cwd=lem.folder,
        env=lem.environment | cluster.environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert shell.stdout is not None
    lines = [shell.stdout.readline() for _ in range(3)]
    assert lines[0].startswith("2 experiments in 2 Slurm jobs (")
    os.killpg(shell.pid, signal.SIGHUP)
    shell.wait(10)
    # Stored before the command returned, and never more than one job at a time, so each stage can be told apart.
    jobs = queued(cluster, lem)
    assert [f"{jobs[0].partition('_')[0]}_{task}" for task in range(2)] == sorted(jobs)
    seen: list[tuple[str, ...]] = []
    name = lines[1].split()[-1]
    while True:
        by_id = listed(lem, cluster)
        in_order = [each["status"] for each in by_id.values()]
        if not seen or seen[-1] != tuple(in_order):
            seen.append(tuple(in_order))
        for one in by_id.values():
            if one["status"] == "running":
                assert (one["slurm_node"], one["slurm_job_id"] in jobs) == ("n1", True)
        if in_order == ["completed"] * 2:
            break
        cells = states(lem, cluster)
        assert [cell["slurm_job_id"] for cell in cells] == sorted(jobs)
        assert {cell["experiment_id"] for cell in cells} == set(by_id)
        time.sleep(0.5)
    ranks = {"pending": 0, "running": 1, "completed": 2}
    assert all(
        [ranks[status] for status in before] <= [ranks[status] for status in after] for before, after in pairwise(seen)
    )
    assert {"pending", "running", "completed"} == {status for stage in seen for status in stage}
    rows = lem.rows()
    assert [(row["status"], row["requests_completed"]) for row in rows] == [("completed", 4)] * 2
    assert sorted(row["slurm_job_id"] for row in rows) == sorted(jobs)
    done = lem("jobs", name, cluster=cluster)
    assert done.returncode == 0, done.stderr
    assert "2 completed" in done.stdout
    assert "No study in" in lem("jobs", cluster=cluster).stdout


def test_the_same_command_attaches_and_submits_nothing_while_others_look(cluster: Cluster, lem: Lem) -> None:
    command = ("batch", "slow.yaml", "quick.yaml", *prompts(4), *HERE)
    first = lem(*command, "--detach", cluster=cluster)
    second = lem(*command, "--detach", cluster=cluster)
    assert (first.returncode, second.returncode) == (0, 0), second.stderr
    waiting = lem.cells()[0]["experiment_id"]
    done = lem("experiment", "--resume", waiting, "-y", cluster=cluster)
    assert (done.returncode, f"{waiting} is to be run or finished by a job" in done.stderr) == (2, True)
    following = lem.start(*command, cluster=cluster)
    others = [lem.start(*arguments, cluster=cluster) for arguments in (("jobs",), ("results", "list"))]
    output, errors = following.communicate(timeout=120)
    assert following.returncode == 0, errors
    assert "Following the jobs of" in errors
    assert "2 completed" in output
    for other in others:
        _, errors = other.communicate(timeout=60)
        assert other.returncode == 0, errors
    rows = lem.rows()
    assert [row["status"] for row in rows] == ["completed"] * 2
    assert len({str(row["slurm_job_id"]).partition("_")[0] for row in rows}) == 1
    assert len(list((lem.folder / "multirun").iterdir())) == 1


@pytest.mark.parametrize("answer", ["y\n", "\n"], ids=["cancel", "leave"])
def test_ctrl_c_on_a_terminal_asks(cluster: Cluster, lem: Lem, answer: str) -> None:
    given = ("experiment", "slow.yaml", *prompts(4 if answer == "\n" else 60), *ASKING)
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lem", *given],
        cwd=lem.folder,
        env=lem.environment | cluster.environment | {"COLUMNS": "200"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown = ""

    def appears(text: str) -> bool:
        nonlocal shown
        while select.select([screen], [], [], 0)[0]:
            try:
                shown += os.read(screen, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                break
        return text in shown

    wait_for("the first question", lambda: appears("Run 1 experiment as a Slurm job?"))
    os.write(screen, b"y\n")
    wait_for("a running experiment", lambda: [cell["status"] for cell in lem.cells()] == ["running"])
    process.send_signal(signal.SIGINT)
    wait_for("the question", lambda: appears("Cancel the job?"))
    os.write(screen, answer.encode())
    wait_for("the end", lambda: not appears("\0") and process.poll() is not None)
    assert process.returncode == 130, shown
    if answer == "y\n":
        assert queued(cluster, lem) == []
        assert [row["status"] for row in lem.rows()] == ["interrupted"]
    else:
        assert "To follow them and write their rows: lem jobs" in shown
        assert len(queued(cluster, lem)) == 1
        assert lem("jobs", "20", cluster=cluster).returncode == 0
        assert [row["status"] for row in lem.rows()] == ["completed"]
    os.close(screen)


def test_a_closed_terminal_leaves_the_jobs(cluster: Cluster, lem: Lem) -> None:
    command = lem.start("experiment", "slow.yaml", *prompts(4), *HERE, cluster=cluster)
    wait_for("a running experiment", lambda: [cell["status"] for cell in lem.cells()] == ["running"])
    command.send_signal(signal.SIGHUP)
    _, errors = command.communicate(timeout=30)
    assert command.returncode == 130
    assert "Stopped by SIGHUP" in errors
    assert len(queued(cluster, lem)) == 1
    wait_for("its end", lambda: [one["status"] for one in listed(lem, cluster).values()] == ["completed"])


def known(cluster: Cluster, lem: Lem) -> list[str]:
    """Return the ids of the jobs of this test that Slurm knows, also of those that have ended."""
    lines = cluster.command("squeue", "-h", "--array", "-t", "all", "-o", "%i %o").splitlines()
    return [line.split()[0] for line in lines if f"{lem.folder}/" in line]


def kill_at_sbatch(lem: Lem, cluster: Cluster, *command: str) -> None:
    """Start a command and kill it while it waits for `slow_sbatch`; then put the real sbatch back in place."""
    process = lem.start(*command, "--detach", cluster=cluster)
    wait_for("sbatch", (lem.folder / "waiting").exists)
    process.kill()
    process.communicate()
    os.kill(int((lem.folder / "waiting").read_text()), signal.SIGKILL)
    (lem.folder / "bin" / "sbatch").unlink()


def slow_sbatch(lem: Lem, script: str) -> None:
    """Put a program in place of sbatch that runs a script, in which $SBATCH is the real one."""
    folder = lem.folder / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f"#!/bin/bash\nSBATCH=$(PATH=${{PATH#*:}} command -v sbatch)\n{script}\n")
    (folder / "sbatch").chmod(0o755)
    lem.environment["PATH"] = f"{folder}:{lem.environment['PATH']}"


@pytest.mark.parametrize("is_held", [True, False], ids=["the jobs wait", "the jobs have failed"])
def test_no_job_is_lost_or_doubled_if_the_command_is_killed_after_sbatch(
    cluster: Cluster, lem: Lem, is_held: bool
) -> None:
    slow_sbatch(lem, f'"$SBATCH" {"--hold" * is_held} "$@"\necho $$ > waiting\nexec sleep 100')
    command = ("experiment", "quick.yaml", *prompts(4), "seed=1,2", "--multirun", *HERE)
    kill_at_sbatch(lem, cluster, *command)
    (array,) = {job.partition("_")[0] for job in known(cluster, lem)}
    if is_held:
        assert [cell["slurm_job_id"] for cell in states(lem, cluster)] == [f"{array}_0", f"{array}_1"]
        cluster.command("scontrol", "release", array)
    else:  # because submitit creates the directory of their logs only after sbatch
        wait_for("their end", lambda: not queued(cluster, lem))
    done = lem(*command, cluster=cluster)
    assert done.returncode == 0, done.stderr
    rows = lem.rows()
    assert [row["status"] for row in rows] == ["completed"] * 2
    arrays = {row["slurm_job_id"].partition("_")[0] for row in rows}
    assert (arrays == {array}) is is_held
    assert done.stderr.count("had not begun will be submitted again") == (0 if is_held else 2)


def test_what_was_not_submitted_before_the_command_was_killed_is_submitted_later(cluster: Cluster, lem: Lem) -> None:
    # Of two arrays, the first is submitted.
    slow_sbatch(lem, 'test -e first || { touch first; exec "$SBATCH" "$@"; }\necho $$ > waiting\nexec sleep 100')
    command = ("experiment", "quick.yaml", *prompts(4), "backend.gpus=0,1", *HERE, "--multirun", "backend.sleep=true")
    kill_at_sbatch(lem, cluster, *command)
    assert [cell["status"] for cell in states(lem, cluster)][1] == "pending"
    (ledger,) = (lem.folder / "multirun").glob("*/jobs.jsonl")
    lines = ledger.read_text().splitlines()
    assert len(lines) == 4  # nothing is decided while sbatch might still be running
    intent = json.loads(lines[-1])
    intent["submitting"]["at_s"] -= 60
    ledger.write_text("\n".join([*lines[:-1], json.dumps(intent)]) + "\n")
    done = lem(*command, cluster=cluster)
    assert done.returncode == 1, done.stderr  # without a driver, the check in the job finds no GPU
    rows = lem.rows()
    assert Counter(row["status"] for row in rows) == {"completed": 1, "failed": 1}
    assert len({row["slurm_job_id"] for row in rows}) == 2


def test_a_campaign_left_alone_continues_with_each_look(cluster: Cluster, lem: Lem) -> None:
    for name, text in (("good", "max_output_tokens: 4"), ("bad", "backend: {fail_at_request: 0}")):
        (lem.folder / f"{name}.yaml").write_text(f"defaults: [quick]\n{text}\n")
    by_latency = ("--campaign-name", "pair", "--primary", "latency_mean_s", *prompts(4), *HERE)
    command = ("campaign", "good.yaml", "bad.yaml", *by_latency, "--cycles", "2", "--retries", "1")
    done = lem(*command, "--detach", cluster=cluster)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 experiments in 2 Slurm jobs (")

    def counts() -> Counter[str]:
        return Counter(cell["status"] for cell in states(lem, cluster))

    # `results list` collects rows, and `lem jobs` submits the retries too.
    def has_collected() -> bool:
        return Counter(one["status"] for one in listed(lem, cluster).values()) == {"completed": 2, "failed": 2}

    wait_for("both cycles", has_collected)
    assert counts() == {"completed": 2, "pending": 2}
    wait_for("the retries", lambda: counts() == {"completed": 2, "failed": 2})
    rows = lem.rows()
    assert Counter((row["campaign_arm"], row["status"]) for row in rows) == {
        ("good", "completed"): 2,
        ("bad", "failed"): 4,
    }
    done = lem("jobs", "pair", cluster=cluster)
    assert done.returncode == 1
    assert "Campaign pair:" in done.stdout


def test_an_adaptive_campaign_submits_its_next_cycle_at_a_look(cluster: Cluster, lem: Lem) -> None:
    for tokens in (4, 8):
        (lem.folder / f"arm{tokens}.yaml").write_text(f"defaults: [quick]\nmax_output_tokens: {tokens}\n")
    command = ("campaign", "arm4.yaml", "arm8.yaml", "--campaign-name", "few", "--until-ci", "50%")
    given = ("--primary", "latency_mean_s", *prompts(4), *HERE)
    done = lem(*command, *given, "--detach", cluster=cluster)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 experiments in 1 Slurm job (")
    assert [cell["status"] for cell in states(lem, cluster)][-1] == "not run"
    wait_for("the next cycle", lambda: [cell["status"] for cell in states(lem, cluster)][2] != "not run")
    done = lem("jobs", "cancel", "few", "-y", cluster=cluster)
    assert done.returncode == 0, done.stderr
    assert queued(cluster, lem) == []
    # The campaign is resumed as usual.
    preview = lem("campaign", "--resume", "few", "--launcher", "slurm", "--dry-run", cluster=cluster)
    assert re.search("[1-9] of 60 cells are completed", preview.stdout), preview.stdout + preview.stderr


def test_a_lost_job_with_several_experiments_loses_only_those_that_had_begun(cluster: Cluster, lem: Lem) -> None:
    given = (*prompts(8), "seed=1,2,3", "--multirun", "--per-job", "3", *HERE)
    command = lem.start("experiment", "slow.yaml", *given, cluster=cluster)
    wait_for("the first experiment", lambda: [cell["status"] for cell in lem.cells()][:1] == ["running"])
    (job,) = queued(cluster, lem)
    os.kill(process_of(job), signal.SIGKILL)
    _, errors = command.communicate(timeout=120)
    assert command.returncode == 1, errors
    assert "The 2 experiments that it had not begun will be submitted again." in errors
    rows = sorted(lem.rows(), key=lambda row: row["seed"])
    assert [row["status"] for row in rows] == ["failed", "completed", "completed"]
    assert rows[1]["slurm_job_id"] == rows[2]["slurm_job_id"] != job
    assert rows[0]["error"].startswith(f"Slurm job {job}: ")
