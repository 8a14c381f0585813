"""A disk that fills up while a study runs: what was measured is kept, and the command that goes on completes it."""

from __future__ import annotations

import json
import re
import shlex
import time

import pyarrow.parquet as pq
import pytest

from lem.results.directory import ExperimentDir
from tests.conftest import begin, command, fill, small_disk

pytestmark = pytest.mark.processes

PROMPTS = ("-d", "sample", "-n", "40", "max_output_tokens=8", "min_output_tokens=8", "warmup.prompts=0", "-y")
CAMPAIGN = ("campaign", "a.yaml", "b.yaml", "--campaign-name", "one", "-c", "2", "--primary", "latency_mean_s")
BATCH = ("batch", "a.yaml", "b.yaml", "hydra.sweep.dir=study")
NO_SPACE = r"Error: No space left in .* \(the disk at {disk}\); everything written so far is kept\. Free some space"


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as folder:
        for number, name in enumerate(("a", "b")):
            text = (
                f"model: any\nseed: {number}\nbackend: {{name: simulated, decode_s_per_token: 0.003}}\nenergy: none\n"
            )
            (folder / f"{name}.yaml").write_text(text)
        yield folder


def cells_in(file):
    return json.loads(file.read_text())


def requests_in(folder):
    """Return the requests that are kept, each with its experiment."""
    return {
        (path.name, row.request)
        for path in (folder / "results" / "raw").iterdir()
        for part in ExperimentDir(path).parts()
        for row in part.requests
    }


def run_until_full(arguments, disk, experiments, pages=0):
    """Fill the disk, but for some pages, in the middle of so many experiments; return what the command said, and the
    filler.
    """
    process = begin(*arguments, cwd=disk)
    while len(list((disk / "results").glob("raw/*/journal_*"))) < experiments:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.3)
    filler = fill(disk, pages)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err
    assert process.returncode == 1, out + err
    return out, err, filler


@pytest.mark.parametrize("pages", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)])
def test_a_campaign_whose_disk_fills_up_is_completed_once_there_is_space(disk, pages):
    out, err, filler = run_until_full((*CAMPAIGN, *PROMPTS), disk, 2, pages)
    (found,) = re.findall(NO_SPACE.format(disk=disk) + r"\. To resume: (lem .*)", err)
    assert err.count("--resume") == out.count("--resume") + 1 == 1
    assert "Campaign one: 1 of 4 cells completed" in out
    before, file = requests_in(disk), disk / "results" / "campaigns" / "one" / "experiments.json"
    assert len(before) >= 40
    planned = [cell["label"] for cell in cells_in(file)]
    still = command(*shlex.split(found)[1:], "-y", cwd=disk)
    assert (still.code, "Traceback" in still.err) == (1, False), still.err
    assert "No space left" in still.err
    filler.unlink()
    done = command(*shlex.split(found)[1:], "-y", cwd=disk)
    assert done.code == 0, done.err
    cells = cells_in(file)
    assert [(cell["label"], cell["status"]) for cell in cells] == [(label, "completed") for label in planned]
    assert before <= requests_in(disk)
    rows = pq.read_table(disk / "results" / "requests").to_pylist()
    wanted = [(cell["experiment_id"], request) for cell in cells for request in range(40)]
    assert sorted((row["experiment_id"], row["request"]) for row in rows) == sorted(wanted)


@pytest.mark.parametrize("parallel", ["1", "2"])
def test_a_batch_whose_disk_fills_up_says_so_once_and_goes_on_with_the_same_command(disk, parallel):
    arguments = (*BATCH, "--parallel", parallel, *PROMPTS)
    out, err, filler = run_until_full(arguments, disk, int(parallel))
    assert len(re.findall(NO_SPACE.format(disk=disk) + r"\. The same command resumes unfinished experiments", err)) == 1
    assert "--resume" not in out + err
    before = requests_in(disk)
    assert before
    filler.unlink()
    done = command(*arguments, cwd=disk)
    assert done.code == 0, done.out + done.err
    assert before <= requests_in(disk)
    assert {cell["status"] for cell in cells_in(disk / "study" / "experiments.json")} == {"completed"}
    assert {name for name, _ in before} <= {
        cell["experiment_id"] for cell in cells_in(disk / "study" / "experiments.json")
    }


def test_a_study_that_begins_on_a_full_disk_says_so(disk):
    fill(disk)
    for arguments in (CAMPAIGN, BATCH):
        full = command(*arguments, *PROMPTS, cwd=disk)
        assert (full.code, "Traceback" in full.err) == (1, False), full.err
        assert len(re.findall(NO_SPACE.format(disk=disk), full.err)) == 1
