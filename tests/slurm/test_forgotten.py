"""Jobs that Slurm's controller no longer knows: how they ended is asked of the accounting, if there is one."""

from __future__ import annotations

import signal

import pytest

from lem.machine import slurm
from lem.machine.slurm import Ended
from tests.slurm.cluster import Cluster
from tests.slurm.commands import HERE, Lem, measuring_jobs, prompts, wait_for
from tests.slurm.conftest import Running, started

pytestmark = pytest.mark.slurm


def test_the_end_of_a_job_is_remembered_or_accounted_for(
    either_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = either_cluster
    cluster.wait_until_idle()
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    given = ("sbatch", "--parsable", "--nodelist=n2", "--output=/dev/null", "--wrap")
    job = cluster.command(*given, "exit 3").strip()
    wait_for("the end of the job", lambda: slurm.ended(job) is not None)
    assert slurm.ended(job) == Ended("FAILED", "NonZeroExitCode", "3:0", "n2")
    assert slurm.has_accounting() is cluster.has_accounting
    if cluster.has_accounting:  # the controller passes jobs on with a delay
        wait_for("the accounting", lambda: "FAILED" in cluster.command("sacct", "-n", "-X", "-j", job, "-o", "State"))
    cluster.forget()
    assert slurm.queue([job]) == {}
    found = slurm.ended(job)
    if not cluster.has_accounting:
        assert found is None
        return
    assert found is not None
    assert (found.state, found.exit_code, found.node) == ("FAILED", "3:0", "n2")
    assert slurm.ended("987654") is None


def test_without_accounting_forgotten_jobs_are_failed_rows_and_one_warning(running: Running, lem: Lem) -> None:
    cluster = started(running, has_accounting=False)
    cluster.wait_until_idle()
    command = ("experiment", "slow.yaml", *prompts(40), "seed=1,2", "--multirun", *HERE)
    process = lem.start(*command, cluster=cluster)
    wait_for("two running experiments", lambda: len(measuring_jobs(lem)) == 2)
    jobs = measuring_jobs(lem)
    process.send_signal(signal.SIGSTOP)  # so that it does not see how the jobs end
    cluster.command("scancel", *jobs)
    wait_for("the end of the jobs", lambda: not cluster.command("squeue", "-h", "-t", "PD,R,CG").strip())
    cluster.forget()
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    rows = lem.rows()
    assert sorted(row["error"] for row in rows) == [
        f"Slurm job {job}: it is gone, and Slurm does not say why." for job in sorted(jobs)
    ]
    assert [row["status"] for row in rows] == ["failed"] * 2
    assert all(row["hostname"] and row["slurm_node"] in ("n1", "n2") for row in rows)  # both had begun
    assert errors.count("there is no accounting (sacct) to ask") == 1
