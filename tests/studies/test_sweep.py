"""Sweeps: checked before the first cell, and every cell accounted for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lem.config import multirun
from lem.config.multirun import sweep_dir
from lem.spec.experiment import Dataset
from lem.studies.checks import RecentPrompts
from tests.conftest import SIMULATED, begin, raw_record, wait_for

pytestmark = pytest.mark.processes


def manifest(tmp_path):
    (file,) = tmp_path.glob("multirun/*/experiments.json")
    return json.loads(file.read_text())


def test_every_combination_runs_and_is_remembered(lem, tmp_path):
    sweep = lem("experiment", *SIMULATED, "-n", "4", "--multirun", "batching.batch_size=1,2", "seed=0,1")
    assert sweep.code == 0
    rows = json.loads(lem("results", "list", "--json").out)
    assert {(row["batch_size"], row["seed"]) for row in rows} == {(1, 0), (1, 1), (2, 0), (2, 1)}
    assert len({row["experiment_id"] for row in rows}) == 4
    made = manifest(tmp_path)
    assert made[0]["label"] == "batching.batch_size=1 seed=0"
    assert [m["experiment_id"] for m in made] == [row["experiment_id"] for row in rows]
    assert {"dataset.sample_size=4", "seed=0"} <= set(made[0]["overrides"])
    assert {"dataset.sample_size=4", "seed=0"} <= set(rows[0]["overrides"])
    assert "4 completed" in sweep.out


def test_a_failing_cell_ends_nothing(lem, tmp_path):
    sweep = lem("experiment", *SIMULATED, "-n", "4", "--multirun", "backend.fail_at_request=2,null")
    assert sweep.code == 1
    rows = json.loads(lem("results", "list", "--json").out)
    assert [row["status"] for row in rows] == [m["status"] for m in manifest(tmp_path)] == ["failed", "completed"]
    assert "backend.fail_at_request=2: simulated failure" in sweep.out


def test_a_cell_that_cannot_start_is_a_row_too(lem, tmp_path, monkeypatch):
    def run_plan(*arguments):
        (tmp_path / "taken").touch()  # between the check and the run
        multirun.run_plan(*arguments)

    monkeypatch.setattr("lem.studies.study.run_plan", run_plan)
    sweep = lem("experiment", *SIMULATED, "-n", "1", "--multirun", "io.results_dir=taken,good")
    assert sweep.code == 1
    failed, good = manifest(tmp_path)
    assert (failed["label"], failed["status"], failed["experiment_id"]) == ("io.results_dir=taken", "failed", None)
    assert "taken is a file, not a directory" in failed["error"]
    assert failed["error"] in sweep.out
    assert (good["label"], good["status"]) == ("io.results_dir=good", "completed")


def test_a_bug_in_lem_is_a_row_and_a_traceback(lem, tmp_path, monkeypatch, capfd):
    def broken(*_arguments, **_more):
        raise RuntimeError("out of cheese")

    monkeypatch.setattr("lem.studies.study.run_ready", broken)
    with pytest.raises(AssertionError, match="Traceback"):
        lem("experiment", *SIMULATED, "-n", "1", "--multirun", "seed=1,2")
    assert [m["error"] for m in manifest(tmp_path)] == ["RuntimeError: out of cheese"] * 2


def test_all_bad_cells_are_reported_before_the_first_one_runs(lem, tmp_path):
    sweep = lem("experiment", *SIMULATED, "--multirun", "batching.strategy=static,dynamic,sorted_dynamic", "seed=1,2")
    assert sweep.code == 2
    assert "[in batching.strategy=dynamic seed=1 and 1 more]" in sweep.err
    assert "[in batching.strategy=sorted_dynamic seed=1 and 1 more]" in sweep.err
    assert sweep.err.count("Error:") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_lists_the_cells(lem, tmp_path):
    listed = lem("experiment", *SIMULATED, "--multirun", "batching.batch_size=1,2,4", "--dry-run")
    assert listed.code == 0
    assert "[3/3] batching.batch_size=4: 300 prompts of sample through any (simulated)" in listed.out
    assert list(tmp_path.iterdir()) == []


def test_presets_can_be_swept(lem):
    assert lem("experiment", *SIMULATED, "-n", "2", "--multirun", "preset=quick-test,throughput").code == 0
    rows = json.loads(lem("results", "list", "--json").out)
    assert [row["batching_strategy"] for row in rows] == ["static", "dynamic"]


def test_a_sweep_over_nothing_says_so(lem):
    single = lem("experiment", *SIMULATED, "-n", "1", "--multirun", "seed=3")
    assert single.code == 0
    assert "No value is varied" in single.err
    assert "No value is varied" not in lem("experiment", *SIMULATED, "-n", "1", "--multirun", "seed=3,4").err


def test_a_sweeps_directory_can_be_named(lem, tmp_path):
    given = ("--multirun", "seed=1,2", "hydra.sweep.dir='my sweeps/${now:%Y}'")
    assert lem("experiment", *SIMULATED, "-n", "1", *given).code == 0
    (file,) = tmp_path.glob("my sweeps/2*/experiments.json")
    assert (file.parent / "multirun.yaml").is_file()
    assert [cell.name for cell in sorted((file.parent / "plan" / "cell").iterdir())] == ["c000.yaml", "c001.yaml"]
    (tmp_path / "file").write_text("")
    refused = lem("experiment", *SIMULATED, "-n", "1", "--multirun", "seed=1,2", "hydra.sweep.dir=file/x")
    assert refused.code == 2
    assert "file/x cannot be used" in refused.err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("hydra.sweep.subdir=a,b", "a Hydra setting must have a single value for all cells"),
        ("hydra/launcher=nope", "Could not find 'hydra/launcher/nope'"),
        ("hydra.sweep.dir=${nope:x}", "hydra.sweep.dir: Unsupported interpolation type nope"),
    ],
)
def test_a_wrong_setting_of_hydra_is_a_sentence(lem, tmp_path, setting, message):
    refused = lem("experiment", *SIMULATED, "-n", "1", "--multirun", "seed=1,2", setting)
    assert refused.code == 2
    assert message in refused.err
    assert list(tmp_path.iterdir()) == []


def test_settings_of_hydra_apply_to_the_multirun_and_the_command_line_is_restored(lem, tmp_path):
    given = ("hydra/launcher=basic", "hydra.job.name=mine")
    assert lem("experiment", *SIMULATED, "-n", "1", "--multirun", "seed=1,2", *given).code == 0
    (file,) = tmp_path.glob("multirun/*/multirun.yaml")
    assert "name: mine" in file.read_text()
    assert sys.argv[-1] == "hydra.job.name=mine"
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_the_directory_is_named_for_the_time_unless_it_is_given():
    assert sweep_dir(["seed=1"]).parent.name == "multirun"
    assert str(sweep_dir(["hydra.sweep.dir=a/b"])) == "a/b"


# ------------------------------------------------------------------ prompts
def test_the_prompts_of_neighbouring_cells_are_loaded_once(lem, monkeypatch):
    import lem.studies.checks as module

    loaded = []
    load = module.load_prompts
    monkeypatch.setattr(module, "load_prompts", lambda *key: loaded.append(key[1]) or load(*key))
    assert lem("experiment", *SIMULATED, "-n", "2", "--multirun", "batching.batch_size=1,2,4").code == 0
    assert loaded == [42]


def test_only_a_few_datasets_are_kept(tmp_path, monkeypatch):
    import lem.studies.checks as module

    loaded = []
    load = module.load_prompts
    monkeypatch.setattr(module, "load_prompts", lambda *key: loaded.append(key[0].path) or load(*key))
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    for file in files:
        file.write_text("\n".join(f"{file.stem}{number}" for number in range(9)))
    a, b, c = (Dataset(name="custom", path=str(file), sample_size=3) for file in files)
    recent = RecentPrompts(size=2)
    first = recent(a, 1)
    assert first.texts != recent(a, 2).texts
    recent(b, 1), recent(a, 3), recent(c, 1), recent(a, 1)
    assert loaded == [a.path, b.path, c.path], "a is still kept, because it was used more recently than b"
    recent(b, 1)
    assert recent(a, 1) == first
    recent(c, 1)
    assert loaded == [a.path, b.path, c.path, b.path, c.path]


# ------------------------------------------------------------------ interrupts
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_cell_and_those_to_come_are_listed(tmp_path, how):
    arguments = ("-n", "60", "backend.decode_s_per_token=0.002", "--multirun", "seed=1,2,3")
    process = begin("experiment", *SIMULATED, *arguments, cwd=tmp_path)
    wait_for(process, "Prompts 0")
    time.sleep(1)
    os.killpg(process.pid, how)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    made = manifest(tmp_path)
    assert [m["status"] for m in made] == ["interrupted", "not run", "not run"]
    assert made[0]["experiment_id"] in out
    assert "1 interrupted, 2 not run" in out
    assert 0 < raw_record(tmp_path / "results")["requests_completed"] < 60


# ------------------------------------------------------------------ as a plain Hydra app
PLAIN = ("backend=simulated", "model=any", "dataset=sample", "dataset.sample_size=3", "energy=none")


def hydra_app(*arguments: str, cwd):
    return subprocess.run(
        [sys.executable, "-m", "lem.cli.hydra_app", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=dict(os.environ),
    )


@pytest.mark.processes
def test_the_plain_hydra_app_sweeps(tmp_path):
    done = hydra_app(*PLAIN, "--multirun", "seed=1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [m["label"] for m in manifest(tmp_path)] == ["seed=1", "seed=2"]


@pytest.mark.processes
def test_the_plain_hydra_app_checks_a_sweep_first(tmp_path):
    done = hydra_app(*PLAIN, "--multirun", "batching.strategy=static,dynamic", cwd=tmp_path)
    assert done.returncode == 2
    assert "[in batching.strategy=dynamic]" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--info", *PLAIN], "Config search path"),
        (["--hydra-help", *PLAIN], "Hydra"),
        ([*PLAIN, "--cfg", "job"], "sample_size: 3"),
        (["--shell-completion", "install=bash"], "COMP_WORDBREAKS"),
    ],
)
def test_hydras_own_flags_work_beside_overrides(tmp_path, arguments, word):
    done = hydra_app(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert word in done.stdout
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_hydras_modes_exclude_each_other_in_a_sentence(tmp_path):
    done = hydra_app(*PLAIN, "--multirun", "--cfg", "job", "seed=1,2", cwd=tmp_path)
    assert done.returncode == 2
    assert "are mutually exclusive" in done.stderr
    assert "Traceback" not in done.stderr
