"""The job script of the how-to about schedules, with shortened times, on a real Slurm cluster."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from lem.results.schedule import ScheduleManifest, exists, load_schedule
from lem.results.store import Store
from tests.slurm.cluster import Cluster
from tests.slurm.commands import Lem, wait_for

pytestmark = pytest.mark.slurm

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "schedule.md"


def script(folder: Path, timing: str) -> str:
    """Write the job script of the how-to with other times and no GPU; return its path."""
    (text,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(), re.DOTALL)
    wanted = f"{sys.executable} -m lem schedule slow.yaml {timing} --dataset sample -n 3 "
    changed = text.replace("#SBATCH --gpus=1\n", "").replace(
        "lem schedule my.yaml --interval 6h --duration 7d ", wanted
    )
    assert wanted in changed
    assert "--gpus" not in changed
    file = folder / "job.sh"
    file.write_text(changed)
    return str(file)


def table(lem: Lem) -> ScheduleManifest | None:
    """Return the schedule, or None before it has begun."""
    store = Store(lem.folder / "results")
    return load_schedule(store, "nights") if exists(store, "nights") else None


def test_a_job_works_through_a_schedule_and_goes_on_when_it_is_submitted_again(cluster: Cluster, lem: Lem) -> None:
    file = script(lem.folder, "--interval 15s --duration 40s")
    submit = ("sbatch", "--parsable", f"--chdir={lem.folder}", f"--output={lem.folder}/job.out", file)
    job = cluster.command(*submit).strip()
    wait_for("a run", lambda: (found := table(lem)) is not None and found.starts[0].status == "running")
    cluster.command("scancel", "--batch", "--signal=TERM", job)
    cluster.wait_until_idle()
    found = table(lem)
    assert found is not None
    assert [start.status for start in found.starts] == ["done", "planned", "planned"]
    assert "To continue: lem schedule --resume nights" in (lem.folder / "job.out").read_text()
    job = cluster.command(*submit).strip()
    cluster.wait_until_idle()
    found = table(lem)
    assert found is not None
    output = (lem.folder / "job.out").read_text()
    assert {start.status for start in found.starts} <= {"done", "missed", "skipped"}, output
    assert f"Schedule nights is over: {found.counts()}. To see the results: lem results show nights" in output
    rows = lem.rows()
    done = [start.experiment_id for start in found.starts if start.status == "done"]
    assert [row["experiment_id"] for row in rows] == done
    assert {(row["status"], row["requests_completed"]) for row in rows} == {("completed", 3)}
