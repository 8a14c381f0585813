"""Jobs on a real Slurm cluster that run to their end: sweeps, batches, campaigns, GPUs, the time limit."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nvml_standin import environment, scenario
from tests.slurm.cluster import Cluster
from tests.slurm.commands import HERE, Lem, make_lem, prompts, wait_for
from tests.slurm.conftest import Running, started

pytestmark = pytest.mark.slurm


SMALL = prompts(4)
# Without a meter, arms cannot be compared by energy.
BY_LATENCY = ("--primary", "latency_mean_s")
# So many prompts take longer than the part of a minute that remains until Slurm's signal.
LONG = 50
GRID = ("seed=1,2,3", "batching.batch_size=1,2", "max_output_tokens=4,8", "--multirun")
# What two runs of one configuration do not share: when and where they ran, and what measuring them cost.
UNLIKE = re.compile(
    r"experiment_id|started_at|hostname|slurm_\w+|overrides|config_json|peak_memory_bytes|.*load_\w+_s|\w*warnings?|"
    r"cpu_\w+|.*_unix_s"
)


def alike(row: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in row.items() if not UNLIKE.fullmatch(name)}


def by_point(rows: list[dict[str, object]]) -> dict[object, dict[str, object]]:
    return {(row["seed"], row["batch_size"], row["max_output_tokens"]): alike(row) for row in rows}


@pytest.fixture(scope="module", autouse=True)
def long_run(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lem, subprocess.Popen[str]]]:
    """An experiment in jobs that may take a minute; it runs beside the other tests of this file, because it sleeps."""
    cluster, lem = started(running, has_accounting=True), make_lem(tmp_path_factory.mktemp("long"))
    limits = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=25")
    process = lem.start("experiment", "slow.yaml", *prompts(LONG), *HERE, *limits, cluster=cluster)
    yield lem, process
    process.kill()
    process.communicate()


def test_a_grid_gives_the_same_rows_as_on_this_machine(cluster: Cluster, lem: Lem) -> None:
    there = lem("experiment", "quick.yaml", *SMALL, *GRID, *HERE, "-o", "there", cluster=cluster)
    assert there.returncode == 0, there.stderr
    here = lem("experiment", "quick.yaml", *SMALL, *GRID, "-y", "-o", "here")
    assert here.returncode == 0, here.stderr
    rows = lem.rows("there")
    assert len(rows) == 12
    assert by_point(rows) == by_point(lem.rows("here"))
    jobs = [row["slurm_job_id"] for row in rows]
    assert len(set(jobs)) == 12
    assert {str(job).partition("_")[2] for job in jobs} == {str(task) for task in range(12)}  # an array
    assert {row["slurm_job_id"] for row in lem.rows("here")} == {None}
    assert not [path for path in (lem.folder / "multirun").rglob("*") if "=" in path.name]


def test_a_batch_writes_a_row_for_each_file(cluster: Cluster, lem: Lem) -> None:
    for seed in range(6):
        (lem.folder / f"file{seed}.yaml").write_text(f"defaults: [quick]\nseed: {seed}\n")
    done = lem("batch", "file*.yaml", *SMALL, *HERE, cluster=cluster)
    assert done.returncode == 0, done.stderr
    rows = lem.rows()
    assert [row["status"] for row in rows] == ["completed"] * 6
    assert sorted(row["seed"] for row in rows) == list(range(6))
    assert len({row["slurm_job_id"] for row in rows}) == 6
    for row, cell in zip(sorted(rows, key=lambda row: row["seed"]), lem.cells(), strict=True):
        assert row["experiment_id"] in Path(cell["log"]).read_text()  # the log is the job's own


@pytest.fixture
def arms(lem: Lem) -> tuple[str, ...]:
    for tokens in (4, 8, 12):
        (lem.folder / f"arm{tokens}.yaml").write_text(f"defaults: [quick]\nmax_output_tokens: {tokens}\n")
    return "arm4.yaml", "arm8.yaml", "arm12.yaml"


def test_a_campaign_is_a_job_for_each_cycle(cluster: Cluster, lem: Lem, arms: tuple[str, ...]) -> None:
    done = lem(
        "campaign", *arms, "--campaign-name", "sizes", "--cycles", "3", *BY_LATENCY, *SMALL, *HERE, cluster=cluster
    )
    assert done.returncode == 0, done.stderr
    rows = lem.rows()
    assert len(rows) == 9
    jobs: dict[object, set[object]] = {}
    for row in rows:
        jobs.setdefault(row["campaign_cycle"], set()).add(row["slurm_job_id"])
    assert sorted(map(len, jobs.values())) == [1, 1, 1]
    assert len(set.union(*jobs.values())) == 3
    for cycle in (1, 2, 3):
        started = [row["campaign_position"] for row in rows if row["campaign_cycle"] == cycle]
        assert started == [1, 2, 3]  # rows are in the order of their start


def test_a_campaign_can_be_a_single_job(cluster: Cluster, lem: Lem, arms: tuple[str, ...]) -> None:
    given = ("--campaign-name", "one", "--cycles", "2", "--one-job", *BY_LATENCY, *SMALL, *HERE)
    done = lem("campaign", *arms[:2], *given, cluster=cluster)
    assert done.returncode == 0, done.stderr
    assert len(lem.rows()) == 4
    assert len({row["slurm_job_id"] for row in lem.rows()}) == 1


def test_an_adaptive_campaign_decides_after_each_cycle(cluster: Cluster, lem: Lem, arms: tuple[str, ...]) -> None:
    given = ("--campaign-name", "few", "--until-ci", "50%", "--cycles", "5", "--max-cycles", "7", *BY_LATENCY)
    done = lem("campaign", *arms[:2], *given, *SMALL, *HERE, cluster=cluster)
    assert done.returncode == 0, done.stderr
    assert len(lem.rows()) == 10
    cells = json.loads((lem.folder / "results/campaigns/few/experiments.json").read_text())
    assert [cell["status"] for cell in cells] == ["completed"] * 10 + ["not needed"] * 4


def test_a_job_asks_for_what_its_experiment_needs(cluster: Cluster, lem: Lem) -> None:
    given = ("backend.gpus=2", "backend.sleep=true", "hydra.launcher.exclusive=true", "hydra.launcher.timeout_min=7")
    running = lem.start("experiment", "slow.yaml", "-d", "sample", "-n", "8", *HERE, *given, cluster=cluster)

    def asked() -> str:
        jobs = cluster.command("scontrol", "--oneliner", "show", "job").splitlines()
        return "".join(job for job in jobs if f"={lem.folder}/" in job and "JobState=RUNNING" in job)

    wait_for("the job", asked)
    assert "TresPerNode=gres:gpu:2" in asked()
    assert "TimeLimit=00:07:00" in asked()
    assert "OverSubscribe=NO" in asked()
    running.communicate(timeout=120)
    # There is no driver, so the check inside the job finds that the GPUs to be metered are not there.
    assert running.returncode == 1
    (row,) = lem.rows()
    assert row["status"] == "failed"
    assert "GPU" in row["error"]


def test_a_job_uses_and_meters_the_gpus_that_slurm_granted(cluster: Cluster, lem: Lem, standin: Path) -> None:
    two = "devices 2\ndevice 0 power constant 100\ndevice 1 power constant 100\n"
    lem.environment = environment(standin, scenario(lem.folder / "gpus.txt", two))
    given = (*prompts(4), *HERE, "backend.sleep=true")
    done = lem("experiment", "slow.yaml", *given, "backend.gpus=0,1,2", "--multirun", cluster=cluster)
    assert done.returncode == 0, done.stderr
    shown = [record_of(lem, row)["environment"]["gpus"] for row in lem.rows()]
    assert sorted(map(len, shown)) == [0, 1, 2]
    done = lem("experiment", "slow.yaml", *given, "backend.gpus=1", "energy=nvml", "-o", "metered", cluster=cluster)
    assert done.returncode == 0, done.stderr
    (row,) = lem.rows("metered")
    assert row["energy_j"] == pytest.approx(100 * row["duration_s"], rel=0.1)
    (device,) = record_of(lem, row, "metered")["environment"]["devices_before"]
    assert device["uuid"].startswith("GPU-")


def record_of(lem: Lem, row: dict[str, Any], results: str = "results") -> dict[str, Any]:
    file = lem.folder / results / "raw" / row["experiment_id"] / "process_0_c1_a1.json"
    record: dict[str, Any] = json.loads(file.read_text())
    return record


def test_a_job_that_meets_its_time_limit_is_resumed(
    cluster: Cluster, long_run: tuple[Lem, subprocess.Popen[str]]
) -> None:
    lem, process = long_run
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    (row,) = lem.rows()
    assert row["status"] == "completed"
    assert row["requests_completed"] == LONG
    assert row["resumed"] >= 1
    assert str(row["slurm_job_id"]).isdecimal()
    assert any(text.startswith("resumed:") for text in row["warnings"])
    given = ("--noheader", "--allocations", "--duplicates", "--format=State", "--jobs", row["slurm_job_id"])
    assert cluster.command("sacct", *given).split().count("REQUEUED") == row["resumed"]
    requests = lem.requests()
    assert [request["request"] for request in requests] == list(range(LONG))
    attempts = {request["attempt"] for request in requests}
    assert len(attempts) > 1  # on a busy machine, an attempt may end before its first request
    assert attempts <= set(range(1, row["resumed"] + 2))
    # The simulated engine says what an uninterrupted run says of each request.
    uninterrupted = lem("experiment", "slow.yaml", *prompts(LONG), "-y", "backend.sleep=false", "-o", "here")
    assert uninterrupted.returncode == 0, uninterrupted.stderr
    same = ("request", "input_tokens", "output_tokens", "error")
    assert [[row[name] for name in same] for row in requests] == [
        [row[name] for name in same] for row in lem.requests("here")
    ]
