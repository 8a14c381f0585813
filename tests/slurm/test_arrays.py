"""Sweeps on a real Slurm cluster as job arrays, with limits on their size, and with several experiments in a job."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.commands import HERE, Lem, prompts, wait_for

SMALL = prompts(4)


@pytest.fixture(scope="module")
def narrow() -> Iterator[Cluster]:
    """A cluster on which an array has at most 4 jobs, and a user at most 6."""
    if (reason := missing()) is not None:
        pytest.skip(f"no Slurm cluster can be started: {reason}")
    # A short path, because munge's socket is in it.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="lem-slurm-")), max_array_size=4, max_submit=6)
    cluster.start()
    yield cluster
    cluster.stop()
    shutil.rmtree(cluster.root, ignore_errors=True)


@pytest.mark.slurm
def test_a_grid_is_divided_into_arrays_and_waits_for_its_users_limit(narrow: Cluster, lem: Lem) -> None:
    given = ("backend.gpus=0,1", "seed=range(0,5)", "backend.sleep=true", "--multirun")
    done = lem("experiment", "quick.yaml", *SMALL, *given, *HERE, cluster=narrow)
    assert done.returncode == 1, done.stderr
    rows = lem.rows()
    # The jobs with a GPU fail in their last check, because there is no driver.
    assert Counter(row["status"] for row in rows) == {"completed": 5, "failed": 5}
    assert all("GPU" in row["error"] for row in rows if row["status"] == "failed")
    assert "Slurm accepts no more jobs now" in done.stderr
    assert "MaxSubmit" in done.stderr
    jobs = [str(row["slurm_job_id"]) for row in rows]
    assert len(set(jobs)) == 10
    tasks = [int(job.partition("_")[2] or 0) for job in jobs]
    assert max(tasks) == 3
    assert max(Counter(job.partition("_")[0] for job in jobs).values()) == 4


@pytest.mark.slurm
def test_a_job_runs_several_experiments_and_resumes_at_the_one_where_it_stopped(cluster: Cluster, lem: Lem) -> None:
    for number, text in enumerate(
        (
            "defaults: [quick]",
            "defaults: [quick]\nbackend: {fail_at_request: 1}",
            "defaults: [slow]\ndataset: {sample_size: 8}",
            "defaults: [quick]\nseed: 4",
        )
    ):
        (lem.folder / f"cell{number}.yaml").write_text(f"{text}\n")
    given = ("-d", "sample", "dataset.sample_size=8", *HERE, "--per-job", "3")
    command = lem.start("batch", "cell*.yaml", *given, cluster=cluster)

    def third_runs() -> bool:
        cells = lem.cells()
        if len(cells) != 4 or cells[2]["status"] != "running":
            return False
        return any(file.read_bytes().count(b"\n") > 2 for file in Path(cells[2]["directory"]).glob("journal_*"))

    wait_for("the third experiment", third_runs)
    before = lem.cells()
    assert [cell["status"] for cell in before[:2]] == ["completed", "failed"]
    job = Path(before[2]["log"]).parent.name
    assert job.endswith("_0")
    cluster.command("scontrol", "requeue", job)
    output, errors = command.communicate(timeout=120)
    assert command.returncode == 1, errors
    assert "1 failed" in output
    assert "3 completed" in output
    rows = {row["experiment_id"]: row for row in lem.rows()}
    first, second, third, fourth = (rows[cell["experiment_id"]] for cell in lem.cells())
    assert [row["status"] for row in (first, second, third, fourth)] == [
        "completed",
        "failed",
        "completed",
        "completed",
    ]
    assert [row["resumed"] for row in (first, second, third, fourth)] == [0, 0, 1, 0]
    assert third["requests_completed"] == 8
    assert not second["error"].startswith("Slurm job")
    assert {first["slurm_job_id"], second["slurm_job_id"], third["slurm_job_id"]} == {job}
    assert fourth["slurm_job_id"] == job.replace("_0", "_1")
    log = Path(lem.cells()[0]["log"]).read_text()
    assert log.count(first["experiment_id"] + " on ") == 1
    assert log.count(third["experiment_id"] + " on ") == 2


@pytest.mark.slurm
def test_a_limit_of_jobs_at_once_and_a_cancelled_array(cluster: Cluster, lem: Lem) -> None:
    given = ("seed=range(0,6)", "--multirun", "hydra.launcher.array_parallelism=1")
    command = lem.start("experiment", "slow.yaml", *prompts(60), *given, *HERE, cluster=cluster)

    def states() -> Counter[str]:
        return Counter(cluster.command("squeue", "-h", "--array", "--name=lem", "-o", "%T").split())

    wait_for("a running job", lambda: states()["RUNNING"] > 0)
    time.sleep(3)  # without the limit, the other node would have started a job within this time
    assert states() == {"RUNNING": 1, "PENDING": 5}
    (array,) = set(cluster.command("squeue", "-h", "--name=lem", "-o", "%F").split())
    cluster.command("scancel", array)
    _, errors = command.communicate(timeout=120)
    assert command.returncode == 1, errors
    rows = lem.rows()
    assert [row["status"] for row in rows] == ["failed"] * 6
    assert all(row["error"].startswith(f"Slurm job {row['slurm_job_id']}: CANCELLED") for row in rows)
    assert {row["slurm_job_id"] for row in rows} == {f"{array}_{task}" for task in range(6)}


@pytest.mark.slurm
@pytest.mark.slow
def test_two_thousand_experiments_go_through_two_nodes(cluster: Cluster, lem: Lem) -> None:
    given = ("seed=range(0,400)", "max_output_tokens=1,2,3,4,5", "--multirun", "--per-job", "100")
    command = lem.start("experiment", "quick.yaml", *prompts(2), *given, *HERE, cluster=cluster)
    output, errors = command.communicate(timeout=3600)
    assert command.returncode == 0, errors[-3000:]
    assert "2000 completed" in output
    rows = lem.rows()
    assert Counter(row["status"] for row in rows) == {"completed": 2000}
    assert len({(row["seed"], row["max_output_tokens"]) for row in rows}) == 2000
    assert len({row["experiment_id"] for row in rows}) == 2000
    assert Counter(Counter(row["slurm_job_id"] for row in rows).values()) == {100: 20}
