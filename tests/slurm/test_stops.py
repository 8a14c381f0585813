"""Jobs on a real Slurm cluster that are stopped on purpose: cancelled, or by jobs that take precedence."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.commands import HERE, Lem, measuring_jobs, prompts, wait_for

pytestmark = pytest.mark.slurm


def test_cancelled_jobs_save_their_work_and_the_same_command_resumes(cluster: Cluster, lem: Lem) -> None:
    command = ("experiment", "slow.yaml", *prompts(12), "seed=1,2", "--multirun", *HERE)
    given = ("hydra.launcher.nodelist=n1", "hydra.launcher.exclusive=true", "--detach")
    assert lem(*command, *given, cluster=cluster).returncode == 0
    wait_for("a running experiment", lambda: bool(measuring_jobs(lem, cluster)))
    done = lem("jobs", "cancel", "20", "-y", cluster=cluster)  # the beginning of its name, which is a date
    assert done.returncode == 0, done.stderr
    assert "1 interrupted, 1 not run" in done.stdout
    assert cluster.command("squeue", "-h", "-t", "PENDING,RUNNING") == ""
    (row,) = lem.rows()
    assert row["status"] == "interrupted"
    assert row["requests_completed"] > 0
    done = lem(*command, cluster=cluster)
    assert done.returncode == 0, done.stderr
    rows = lem.rows()
    assert [(row["status"], row["requests_completed"]) for row in rows] == [("completed", 12)] * 2
    assert sorted(row["resumed"] for row in rows) == [0, 1]
    (twice,) = (row for row in rows if row["resumed"])
    assert len(str(twice["slurm_job_id"]).split("+")) == 2


def test_a_preempted_job_is_resumed(cluster: Cluster, lem: Lem) -> None:
    given = (*prompts(15), *HERE, "hydra.launcher.partition=cheap")
    process = lem.start("experiment", "slow.yaml", *given, cluster=cluster)
    wait_for("a running experiment", lambda: bool(measuring_jobs(lem)))
    (job,) = measuring_jobs(lem)
    node = cluster.command("squeue", "-h", "-j", job, "-o", "%N").strip()
    urgent = ("--partition=urgent", "--exclusive", f"--nodelist={node}", "--output=/dev/null")
    cluster.command("sbatch", *urgent, "--wrap", "sleep 1")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    (row,) = lem.rows()
    assert (row["status"], row["requests_completed"]) == ("completed", 15)
    assert row["resumed"] >= 1
    assert row["slurm_job_id"] == job
