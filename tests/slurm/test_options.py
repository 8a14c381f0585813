"""The options of hydra/launcher=slurm, from a site's own file and the command line, as the real Slurm receives them."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.commands import HERE, Lem, prompts, wait_for

pytestmark = pytest.mark.slurm

SITE = """\
defaults: [slurm]
partition: urgent
account: project42
qos: normal
wckey: key7
comment: how far
exclude: n1
timeout_min: 90
setup:
  - echo before the experiment
  - export LEM_TESTED=1
container: image.sqsh
srun_args: [--label]
# Held, so that it can be looked at.
additional_parameters: {hold: true, nice: 5}
"""


def test_every_option_reaches_sbatch(cluster: Cluster, lem: Lem) -> None:
    cluster.wait_until_idle()
    site = lem.folder / "conf" / "hydra" / "launcher" / "mysite.yaml"
    site.parent.mkdir(parents=True)
    site.write_text(SITE)
    cluster.command("scontrol", "update", "NodeName=n2", "AvailableFeatures=big", "ActiveFeatures=big")
    try:
        given = ("--config-dir", "conf", "--launcher", "mysite", "hydra.launcher.constraint=big", *HERE[2:])
        process = lem.start("experiment", "quick.yaml", *prompts(2), *given, cluster=cluster)
        wait_for("the job", lambda: bool(cluster.command("squeue", "-h", "-t", "PENDING")))
        (job,) = cluster.command("squeue", "-h", "-t", "PENDING", "-o", "%A").split()
        shown = cluster.command("scontrol", "--oneliner", "show", "job", job)
        script = cluster.command("scontrol", "write", "batch_script", job, "-")
        cluster.command("scancel", "--user", "root")
        _, errors = process.communicate(timeout=60)
    finally:
        cluster.command("scontrol", "update", "NodeName=n2", "AvailableFeatures=", "ActiveFeatures=")
    fields = (
        "Partition=urgent", "QOS=normal", "Comment=how far", "ExcNodeList=n1", "Features=big",
        "TimeLimit=01:30:00", "Nice=5", "Requeue=1", "NumNodes=1-1", "MinMemoryNode=1G", "JobName=lem",
    )  # fmt: skip
    assert [field for field in fields if f"{field} " not in f"{shown} "] == []
    # This cluster keeps neither accounts nor keys.
    assert "#SBATCH --account=project42" in script
    assert "#SBATCH --wckey=key7" in script
    assert "#SBATCH --signal=USR2@120" in script
    assert "\necho before the experiment\nexport LEM_TESTED=1\n" in script
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    assert "--container-image=image.sqsh --label" in srun
    assert process.returncode == 1, errors
    # A job that never ran has no host, although the command knows its own.
    (row,) = lem.rows()
    assert (row["status"], row["hostname"], row["slurm_node"]) == ("failed", None, None)
    assert row["error"].startswith(f"Slurm job {job}: CANCELLED")
    assert not [path for path in lem.folder.rglob("*") if "=" in path.name]


def test_a_wrong_option_gets_the_nearest_name(cluster: Cluster, lem: Lem) -> None:
    done = lem("experiment", "quick.yaml", *prompts(2), *HERE, "hydra.launcher.partiton=x", cluster=cluster)
    assert done.returncode == 2
    assert "hydra.launcher.partiton: unknown key." in done.stderr
    assert "partition" in done.stderr.partition("unknown key.")[2]
    assert not (lem.folder / "multirun").exists()
