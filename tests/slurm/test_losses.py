"""Jobs that a real Slurm cluster ends or never starts: a failed row with the reason for each; the rest goes on."""

from __future__ import annotations

import os
import signal

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.commands import HERE, Lem, measuring_jobs, process_of, prompts, wait_for

pytestmark = pytest.mark.slurm


def test_lost_jobs_are_failed_rows_with_reasons(either_cluster: Cluster, lem: Lem) -> None:
    cluster = either_cluster
    cluster.wait_until_idle()
    # Four jobs fit on the nodes; the fifth starts when one of them is gone.
    seeds = range(1, 6)
    for seed in seeds:
        (lem.folder / f"cell{seed}.yaml").write_text(f"defaults: [slow]\nseed: {seed}\n")
    command = lem.start("batch", "cell*.yaml", "-d", "sample", "-n", "30", *HERE, cluster=cluster)
    wait_for("four running experiments", lambda: len(measuring_jobs(lem)) == 4, seconds=120)
    nodes = {job: cluster.command("squeue", "-h", "-j", job, "-o", "%N").strip() for job in measuring_jobs(lem)}
    on_n1 = [job for job, node in nodes.items() if node == "n1"]
    cancelled, killed = [job for job, node in nodes.items() if node == "n2"]
    cluster.command("scancel", cancelled)
    os.kill(process_of(killed), signal.SIGKILL)
    wait_for("both to end", lambda: not {cancelled, killed} & set(measuring_jobs(lem)), seconds=60)
    cluster.command("scontrol", "update", "NodeName=n1", "State=DOWN", "Reason=testing")
    try:
        _, errors = command.communicate(timeout=150)
    finally:
        cluster.command("scontrol", "update", "NodeName=n1", "State=RESUME")
    cluster.wait_until_idle()
    assert command.returncode == 1, errors
    rows = {row["slurm_job_id"]: row for row in lem.rows()}
    assert len(rows) == 5
    assert rows[cancelled]["error"].startswith(f"Slurm job {cancelled}: CANCELLED")
    assert rows[killed]["error"].startswith(f"Slurm job {killed}: FAILED on n2")
    assert "signal 9" in rows[killed]["error"]
    assert [rows[job]["error"] for job in on_n1] == [
        f"Slurm job {job}: NODE_FAIL, node n1 is DOWN (testing)." for job in on_n1
    ]
    (last,) = set(rows) - set(nodes)
    assert rows[last]["status"] == "completed"
    assert [rows[job]["status"] for job in nodes] == ["failed"] * 4
    assert all(rows[job]["requests_completed"] > 0 for job in nodes)
    assert errors.count("accounting") == 0


REASONS = {
    "hydra.launcher.partition=nope": "Slurm refused the job: invalid partition specified: nope",
    "hydra.launcher.partition=brief": "it could not start and was canceled (PartitionTimeLimit).",
    "hydra.launcher.mem_gb=0.05": "memory limit",
}


def test_jobs_that_cannot_start_or_have_too_little_memory_fail(either_cluster: Cluster, lem: Lem) -> None:
    commands = {
        option: lem.start(
            # Slow, because the memory is looked at once a second.
            "experiment",
            "slow.yaml",
            *prompts(10),
            *HERE,
            option,
            "-o",
            f"results{number}",
            cluster=either_cluster,
        )
        for number, option in enumerate(REASONS)
    }
    for number, (option, command) in enumerate(commands.items()):
        _, errors = command.communicate(timeout=120)
        assert command.returncode == 1, errors
        (row,) = lem.rows(f"results{number}")
        assert row["status"] == "failed"
        assert REASONS[option] in row["error"]
        assert row["slurm_job_id"] is None or row["error"].startswith(f"Slurm job {row['slurm_job_id']}: ")
    assert either_cluster.command("squeue", "-h") == ""
