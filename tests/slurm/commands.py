"""Running lem's commands against a cluster of the tests, and reading what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from tests.slurm.cluster import Cluster

# The defaults spare shared schedulers and slow file systems; here, both are this machine. Without exclusive nodes, four
# jobs fit on the two nodes.
ASKING = (
    "--launcher", "slurm", "hydra.launcher.poll_s=1", "hydra.launcher.settle_s=2",
    "hydra.launcher.never_starts_s=2", "hydra.launcher.exclusive=false", "hydra.launcher.mem_gb=1",
)  # fmt: skip
HERE = (*ASKING, "-y")
COMMAND_S = 240.0


@dataclass
class Lem:
    """Runs lem in a folder."""

    folder: Path
    environment: dict[str, str]

    def __call__(self, *arguments: str, cluster: Cluster | None = None) -> subprocess.CompletedProcess[str]:
        """Run lem to its end, with the commands of a cluster if one is given."""
        process = self.start(*arguments, cluster=cluster)
        output, errors = process.communicate(timeout=COMMAND_S)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def start(self, *arguments: str, cluster: Cluster | None = None) -> subprocess.Popen[str]:
        """Start lem and return at once."""
        variables = self.environment | (cluster.environment if cluster else {})
        return subprocess.Popen(
            [sys.executable, "-m", "lem", *arguments],
            cwd=self.folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rows(self, results: str = "results") -> list[dict[str, Any]]:
        """Return the rows of the experiments table, oldest first."""
        table = parquet.read_table(self.folder / results / "experiments").to_pylist()
        return sorted(table, key=lambda row: (row["started_at"], row["experiment_id"]))

    def requests(self, results: str = "results") -> list[dict[str, Any]]:
        """Return the rows of the requests table in order."""
        table = parquet.read_table(self.folder / results / "requests").to_pylist()
        return sorted(table, key=lambda row: (row["experiment_id"], row["request"]))

    def cells(self) -> list[dict[str, Any]]:
        """Return the cells of the newest sweep or batch as its manifest has them; none before it has begun."""
        manifests = sorted((self.folder / "multirun").glob("*/experiments.json"))
        cells: list[dict[str, Any]] = json.loads(manifests[-1].read_text()) if manifests else []
        return cells


def make_lem(folder: Path) -> Lem:
    """Write config files for the simulated backend to a folder, and return how to run lem there."""
    (folder / "quick.yaml").write_text(
        "model: any\nbackend: {name: simulated, sleep: false, decode_s_per_token: 0.01}\nenergy: {name: none}\n"
        "max_output_tokens: 8\n"
    )
    # A second for each prompt.
    (folder / "slow.yaml").write_text(
        "model: any\nbackend: {name: simulated, decode_s_per_token: 0.1}\nenergy: {name: none}\n"
        "min_output_tokens: 10\nmax_output_tokens: 10\n"
    )
    return Lem(folder, dict(os.environ))


def wait_for(what: str, is_there: Callable[[], bool], seconds: float = 90.0) -> None:
    """Wait until a condition holds; fail the test if that takes too long."""
    deadline_s = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < deadline_s, f"Waiting for {what} took too long."
        time.sleep(0.2)


def measuring_jobs(lem: Lem, cluster: Cluster | None = None) -> list[str]:
    """Return the ids of the jobs whose experiments are running and have finished some requests.

    With a cluster, lem is asked to look first, because no command follows the jobs.
    """
    if cluster is not None:
        lem("jobs", cluster=cluster)
    cells = [cell for cell in lem.cells() if cell["status"] == "running"]
    return [
        Path(cell["log"]).parent.name
        for cell in cells
        if any(file.read_bytes().count(b"\n") > 2 for file in Path(cell["directory"]).glob("journal_*"))
    ]


def process_of(job: str) -> int:
    """Return the id of the process that Slurm started for a job."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            array, _, task = job.partition("_")
            own = {f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}"} if task else {f"SLURM_JOB_ID={job}"}
            is_of_job = b"submitit.core._submit" in arguments and {each.encode() for each in own} <= set(variables)
            if is_of_job and Path(os.fsdecode(arguments[0])).name.startswith("python"):
                return int(entry.name)
    raise AssertionError(f"Job {job} has no process.")


def prompts(count: int) -> tuple[str, ...]:
    """Return the arguments that choose so many prompts."""
    return "-d", "sample", "-n", str(count)
