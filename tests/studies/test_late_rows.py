"""Experiments that completed, and whose command was killed before it wrote their rows, get them later."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from lem.results.directory import ExperimentDir
from lem.results.store import Store
from lem.runner import job

PROMPTS = ("-d", "sample", "-n", "2", "max_output_tokens=4", "-y")
COMMANDS = {
    "experiment": ("experiment", "a.yaml"),
    "sweep": ("experiment", "a.yaml", "--multirun", "seed=1,2"),
    "batch": ("batch", "a.yaml", "b.yaml"),
    "grid": ("batch", "grid"),
    "campaign": ("campaign", "a.yaml", "b.yaml", "--campaign-name", "one", "-c", "1", "--primary", "latency_mean_s"),
}
# `lem …`, killed when it has an experiment's last record and is about to write the rows.
KILLED = """
import os, signal
from lem.runner import job
job.aggregate = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
from lem.cli import main
main()
"""


@pytest.fixture
def configs(tmp_path, lem):
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("model: any\nbackend: simulated\nenergy: none\n")
    assert lem("config", "generate-grid", "a.yaml", "--vary", "seed=1,2", "-o", "grid").code == 0
    return tmp_path


@pytest.fixture
def cut_short(lem, configs, monkeypatch):
    """Run a command that ends before it writes the first rows; return the experiment that lacks them."""

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(job, "aggregate", lambda *_, **__: sys.exit(137))
            assert lem(*arguments, *PROMPTS).code == 137
        (name,) = ids_in(configs)
        assert ids_with_rows(configs) == []
        assert ExperimentDir(configs / "results" / "raw" / name).state().status == "completed"
        return name

    return run


def ids_in(folder):
    return Store(folder / "results").ids()


def ids_with_rows(folder, table="experiments"):
    path = folder / "results" / table
    return sorted(set(pq.read_table(path)["experiment_id"].to_pylist())) if path.is_dir() else []


def marks(folder):
    return os.listdir(folder / "results" / "unfinished")


@pytest.mark.processes
def test_a_campaign_killed_between_a_cells_end_and_its_rows_has_all_rows_in_the_end(lem, configs):
    done = subprocess.run([sys.executable, "-c", KILLED, *COMMANDS["campaign"], *PROMPTS], cwd=configs, timeout=120)
    assert done.returncode == -9
    assert len(ids_in(configs)) == 1
    assert ids_with_rows(configs) == []
    assert lem("campaign", "--resume", "one", "-y").code == 0
    assert len(ids_in(configs)) == 2
    for table in ("experiments", "cycles", "requests"):
        assert ids_with_rows(configs, table) == ids_in(configs)
    assert marks(configs) == []


@pytest.mark.processes
@pytest.mark.parametrize("kind", COMMANDS)
def test_the_same_command_writes_the_rows_that_are_missing(lem, cut_short, configs, kind):
    name = cut_short(*COMMANDS[kind])
    assert lem(*COMMANDS[kind], *PROMPTS).code == 0
    assert name in ids_with_rows(configs)
    assert ids_with_rows(configs) == sorted(ids_in(configs))
    assert marks(configs) == []


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["experiment", "campaign"])
def test_listing_results_writes_the_rows_that_are_missing(lem, cut_short, configs, kind):
    name = cut_short(*COMMANDS[kind])
    (row,) = json.loads(lem("results", "list", "--json").out)
    assert (row["experiment_id"], row["status"], row["requests_completed"]) == (name, "completed", 2)
    assert ids_with_rows(configs, "requests") == [name]
    assert marks(configs) == []


@pytest.mark.processes
def test_the_rows_of_a_cell_that_were_removed_are_written_again_when_its_campaign_goes_on(lem, configs):
    assert lem(*COMMANDS["campaign"], *PROMPTS).code == 0
    before = ids_with_rows(configs)
    for table in ("experiments", "cycles", "requests"):
        (configs / "results" / table / f"{before[0]}.parquet").unlink()
    assert lem("campaign", "--resume", "one", "-y").code == 0
    assert ids_with_rows(configs) == before


@pytest.mark.processes
def test_the_row_of_an_earlier_attempt_is_replaced(lem, cut_short, configs):
    name = cut_short("experiment", "a.yaml")
    directory = ExperimentDir(configs / "results" / "raw" / name)
    assert lem("aggregate", name).code == 0
    # A second attempt that ran nothing; its row would say that it was resumed.
    directory.write_state(directory.state().now("completed"))
    (directory.path / "aggregated.json").unlink()
    state = json.loads((directory.path / "state.json").read_text())
    (directory.path / "state.json").write_text(json.dumps(state | {"attempt": 2, "status": "completed"}))
    (row,) = json.loads(lem("results", "list", "--json").out)
    assert row["resumed"] == 1


@pytest.mark.processes
def test_a_failed_experiment_gets_its_row_too_and_can_still_be_resumed(lem, configs, monkeypatch):
    failing = ("experiment", "a.yaml", *PROMPTS, "backend.fail_at_request=1")
    with monkeypatch.context() as patch:
        patch.setattr(job, "aggregate", lambda *_, **__: sys.exit(137))
        assert lem(*failing).code == 137
    (row,) = json.loads(lem("results", "list", "--json").out)
    assert row["status"] == "failed"
    assert marks(configs) == [row["experiment_id"]]


@pytest.mark.processes
def test_what_is_not_to_have_rows_gets_none(lem, configs):
    assert lem("experiment", "a.yaml", *PROMPTS, "--no-aggregate").code == 0
    assert json.loads(lem("results", "list", "--json").out) == []
    assert ids_with_rows(configs) == []


@pytest.mark.processes
def test_a_dry_run_writes_no_rows(lem, cut_short, configs):
    cut_short("experiment", "a.yaml")
    assert lem("batch", "b.yaml", *PROMPTS, "--dry-run").code == 0
    assert ids_with_rows(configs) == []


@pytest.mark.processes
def test_rows_that_cannot_be_written_are_named_and_hide_nothing(lem, cut_short, configs):
    name = cut_short("experiment", "a.yaml")
    assert lem("experiment", "b.yaml", *PROMPTS, "--no-aggregate").code == 0
    record = configs / "results" / "raw" / name / "process_0_c1_a1.json"
    record.write_text(record.read_text()[:40])
    done = lem("results", "list", "--all", "--json")
    assert "process_0_c1_a1.json cannot be read" in done.err
    assert len(json.loads(done.out)) == 2
    assert marks(configs) == [name]


@pytest.mark.processes
def test_listing_looks_at_no_experiment_that_has_its_rows(lem, configs, monkeypatch):
    assert lem("batch", "a.yaml", "b.yaml", *PROMPTS).code == 0
    monkeypatch.setattr(ExperimentDir, "state", lambda self: pytest.fail(f"the state of {self.id} was read"))
    assert len(json.loads(lem("results", "list", "--json").out)) == 2
