"""The cluster that the other tests run on."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.commands import wait_for

pytestmark = pytest.mark.slurm


def test_the_cluster_runs_jobs_and_grants_gpus(either_cluster: Cluster, tmp_path) -> None:
    output = tmp_path / "granted"
    command = f"echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES > {output}.part; mv {output}.part {output}"
    either_cluster.command(
        "sbatch", "--job-name=lem-probe", "--gpus-per-node=2", "--nodelist=n2", "-o", "/dev/null", "--wrap", command
    )
    wait_for("the job's file", output.exists)
    assert output.read_text().split() == ["n2", "0,1"]

    def is_accounted() -> bool:
        return "lem-probe" in either_cluster.command("sacct", "-n", "-X", "-o", "JobName%20", check=False)

    if either_cluster.has_accounting:  # the controller passes jobs on to slurmdbd with a delay
        wait_for("the job in the accounting", is_accounted)
    else:
        assert not is_accounted()
