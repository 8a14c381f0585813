"""Measures what lem adds to a cell on Slurm, and how long the submission of 10,000 cells takes, on a private cluster.

Run with `python -m nox -s bench`. The benchmark is skipped if no cluster can be started (tests/slurm/cluster.py). It
fails if the submission exceeds its limit, which was set for a machine of 2026.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from bench.usage import is_within, parser, write_json
from tests.slurm.cluster import Cluster, missing

CELLS = 10_000
LIMIT_S = 60.0
# The number of cells that run one after another in a job.
IN_A_JOB = 20
BASE = "model: any\nbackend: {name: simulated, sleep: false}\nenergy: {name: none}\nmax_output_tokens: 8\n"
COMMAND = (
    sys.executable, "-m", "lem", "experiment", "base.yaml", "-d", "sample", "-n", "4", "--multirun", "-y",
    "--launcher", "slurm", "hydra.launcher.poll_s=0.5", "hydra.launcher.settle_s=2", "hydra.launcher.exclusive=false",
    "hydra.launcher.mem_gb=1",
)  # fmt: skip
WAIT_S = 600.0


def start(folder: Path, cluster: Cluster, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a sweep in a folder; its output goes to the file `output` in that folder."""
    with (folder / "output").open("wb") as output:
        variables = {**os.environ, **cluster.environment}
        return subprocess.Popen([*COMMAND, *arguments], cwd=folder, env=variables, stdout=output, stderr=output)


def wait_until(is_true: Callable[[], bool], command: subprocess.Popen[bytes], folder: Path) -> None:
    """Wait for a condition.

    Raises:
        RuntimeError: the command ended, or the time was up, before the condition was true.
    """
    deadline_s = time.monotonic() + WAIT_S
    while not is_true():
        if command.poll() is not None or time.monotonic() > deadline_s:
            raise RuntimeError((folder / "output").read_text()[-2000:])
        time.sleep(0.2)


def submission_s(folder: Path, cluster: Cluster) -> float:
    """Return how long a sweep takes from its start until all of its jobs are in the queue, in seconds."""
    began_s = time.monotonic()
    # The jobs are held, so none of them runs. They are canceled afterwards.
    held = "+hydra.launcher.additional_parameters.hold=true"
    command = start(folder, cluster, f"seed=range(0,{CELLS // 10})", "max_output_tokens=range(1,11)", held)

    def all_are_queued() -> bool:
        return len(cluster.command("squeue", "-h", "--array", "--format=%A").split()) == CELLS

    try:
        wait_until(all_are_queued, command, folder)
        return time.monotonic() - began_s
    finally:
        command.kill()
        command.wait()
        cluster.command("scancel", "--user", "root")


def cell_s(folder: Path, cluster: Cluster) -> float:
    """Return the mean time from the start of one cell to the start of the next in a job, in seconds.

    The simulated backend does not sleep here, so nearly all of this time is lem's: starting a worker and its imports,
    checks and files.
    """
    command = start(folder, cluster, f"seed=range(0,{IN_A_JOB})", "--per-job", str(IN_A_JOB))
    if command.wait(WAIT_S):
        raise RuntimeError((folder / "output").read_text()[-2000:])
    (manifest,) = folder.glob("multirun/*/experiments.json")
    begun = sorted(started_s(Path(cell["directory"])) for cell in json.loads(manifest.read_text()))
    return (begun[-1] - begun[0]) / (len(begun) - 1)


def started_s(directory: Path) -> float:
    """Return when an experiment's worker started, in seconds."""
    record = json.loads((directory / "process_0_c1_a1.json").read_text())
    return datetime.fromisoformat(record["started_at"]).timestamp()


def empty_job_s(cluster: Cluster) -> float:
    """Return how long a job that does nothing takes from its submission to its end, in seconds."""
    began_s = time.monotonic()
    cluster.command("sbatch", "--wait", "--output=/dev/null", "--mem=100", "--wrap", "true")
    return time.monotonic() - began_s


def single_job_s(folder: Path, cluster: Cluster) -> float:
    """Return how long a command with one cell takes, in seconds."""
    began_s = time.monotonic()
    command = start(folder, cluster, "seed=1")
    if command.wait(WAIT_S):
        raise RuntimeError((folder / "output").read_text()[-2000:])
    return time.monotonic() - began_s


def measured() -> dict[str, float]:
    """Start a cluster and return all figures."""
    # The path must be short, because it contains munge's socket.
    with tempfile.TemporaryDirectory(prefix="lem-slurm-", ignore_cleanup_errors=True) as root:
        cluster = Cluster(Path(root) / "c", has_accounting=False, max_jobs=2 * CELLS)
        cluster.root.mkdir()
        folders = {name: Path(root) / name for name in ("many", "one", "row")}
        for folder in folders.values():
            folder.mkdir()
            (folder / "base.yaml").write_text(BASE)
        cluster.start()
        try:
            return {
                "empty_job_s": empty_job_s(cluster),
                "job_of_one_cell_s": single_job_s(folders["one"], cluster),
                "further_cell_s": cell_s(folders["row"], cluster),
                "cells_per_job": IN_A_JOB,
                "submission_s": submission_s(folders["many"], cluster),
                "limit_submission_s": LIMIT_S,
                "cells_submitted": CELLS,
            }
        finally:
            cluster.stop()


def report(found: Mapping[str, float]) -> None:
    """Print all figures."""
    each_s, took_s = found["further_cell_s"], found["submission_s"]
    print(f"an empty Slurm job, from sbatch to its end       {found['empty_job_s']:8.1f} s")
    print(f"lem experiment with one cell as a job            {found['job_of_one_cell_s']:8.1f} s")
    print(f"what lem adds for each further cell of a job     {each_s:8.2f} s  ({IN_A_JOB} cells, --per-job {IN_A_JOB})")
    print(f"submission of {CELLS} cells as jobs of their own  {took_s:8.1f} s  (limit {LIMIT_S:g})")


def main() -> int:
    """Measure and print the times; return 1 if the limit is exceeded."""
    options = parser(__doc__).parse_args()
    if (reason := missing()) is not None:
        print(f"slurm: skipped, because no Slurm cluster can be started: {reason}")
        write_json(options.json, {"skipped": reason})
        return 0
    found = measured()
    report(found)
    write_json(options.json, found)
    return int(not is_within(found))


if __name__ == "__main__":
    sys.exit(main())
