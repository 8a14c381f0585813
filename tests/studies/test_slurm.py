"""What a job asks for, and what is checked before it is submitted; tests/slurm/ runs jobs on a real cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from lem.config.launcher import chosen_launcher
from lem.machine import gpu
from lem.machine.slurm import Ended, Queued
from lem.results.codec import to_json
from lem.results.jobs import Ledger, Terms
from lem.spec.engines import OpenaiBackend, PytorchBackend, SimulatedBackend, VllmBackend
from lem.spec.experiment import Experiment, Parallelism
from lem.spec.slurm import SlurmOptions
from lem.studies.slurm import gpus_of_job, sbatch_parameters
from lem.studies.slurm_job import JobFile, Step, use_only_granted_gpus

SLURM = ("--launcher", "slurm", "-y")


@pytest.mark.parametrize(
    ("experiment", "options", "gpus"),
    [
        (Experiment(backend=PytorchBackend()), {}, 1),
        (Experiment(backend=PytorchBackend(), num_processes=4), {}, 4),
        (Experiment(backend=PytorchBackend(device="cpu"), num_processes=4), {}, 0),
        (Experiment(backend=PytorchBackend(), num_processes=4), {"gpus_per_node": 0}, 0),
        (Experiment(backend=VllmBackend(), parallelism=Parallelism(strategy="tensor_parallel", degree=8)), {}, 8),
        (Experiment(backend=SimulatedBackend()), {}, 0),
        (Experiment(backend=SimulatedBackend(gpus=2)), {}, 2),
        (Experiment(backend=OpenaiBackend(url="http://elsewhere.example/v1")), {}, 0),
    ],
    ids=["one", "processes", "on the CPU", "by option", "degree", "simulated", "metered", "server elsewhere"],
)
def test_gpus_follow_from_the_experiment(experiment, options, gpus):
    assert gpus_of_job(experiment, SlurmOptions(**options)) == gpus


def test_an_exclusive_job_gets_all_of_its_node():
    wanted = sbatch_parameters([Experiment(backend=PytorchBackend(), num_processes=2)], SlurmOptions(gpu_type="a100"))
    assert (wanted["exclusive"], wanted["mem"], wanted["gpus_per_node"]) == (True, "0", "a100:2")
    assert "cpus_per_task" not in wanted
    assert wanted["additional_parameters"] == {"requeue": True}


def test_a_job_beside_others_asks_for_a_core_for_each_process():
    options = SlurmOptions(exclusive=False, requeue=False, container="img.sqsh", srun_args=["--mpi=none"])
    wanted = sbatch_parameters([Experiment(backend=SimulatedBackend(), num_processes=3)], options)
    assert wanted["cpus_per_task"] == 3
    assert not {"exclusive", "mem", "gpus_per_node", "partition"} & set(wanted)
    assert wanted["srun_args"] == ["--container-image=img.sqsh", "--mpi=none"]
    assert wanted["additional_parameters"] == {"no-requeue": True}
    assert wanted["wckey"] is None  # submitit would send one of its own


def test_a_job_of_several_cells_fits_the_largest():
    cells = [Experiment(backend=PytorchBackend(), num_processes=n) for n in (1, 4, 2)]
    assert sbatch_parameters(cells, SlurmOptions())["gpus_per_node"] == 4


@pytest.fixture
def without_a_driver(monkeypatch):
    """Fail the test if anything looks for a GPU, as nothing may on a login node."""

    def refuse(*_):
        raise AssertionError("a GPU was looked for")

    monkeypatch.setattr(gpu, "nvml", refuse)


def test_the_login_node_looks_for_no_gpu_and_judges_the_jobs_machine(lem, without_a_driver):
    given = ("experiment", "model=any", "-d", "sample", "-n", "4", "energy=nvml", "--dry-run", *SLURM)
    done = lem(*given, "backend=simulated", "backend.gpus=2")
    assert done.code == 0, done.err
    done = lem(*given, "backend=simulated", "backend.gpus=2", "cooldown.to_c=40", "hydra.launcher.gpus_per_node=2")
    assert done.code == 0, done.err
    done = lem(*given, "backend=pytorch", "model=tiny", "num_processes=4", "hydra.launcher.gpus_per_node=2")
    assert done.code == 2
    assert "num_processes: GPUs needed: 4, visible: 2." in done.err


def test_what_does_not_go_together_is_refused(lem, tmp_path):
    name = "a.yaml"
    (tmp_path / name).write_text("model: any\nbackend: {name: simulated}\n")
    done = lem("batch", name, "--parallel", "2", *SLURM)
    assert (done.code, "--parallel: Slurm decides" in done.err) == (2, True)
    done = lem("campaign", name, name, "--campaign-name", "x", "--one-job", "-y")
    assert (done.code, "--one-job needs --launcher slurm." in done.err) == (2, True)
    done = lem("campaign", name, name, "--campaign-name", "x", "--one-job", "--until-ci", "2%", *SLURM)
    assert (done.code, "--until-ci decides after each" in done.err) == (2, True)
    done = lem("experiment", "--resume", "exp_20260102_030405", *SLURM)
    assert (done.code, "--resume runs the experiment on this machine" in done.err) == (2, True)


def test_nodes_are_not_mixed_where_that_makes_no_sense(lem, tmp_path):
    name = "a.yaml"
    (tmp_path / name).write_text("model: any\nbackend: {name: simulated}\n")
    given = ("campaign", name, name, "--campaign-name", "x", "--across-nodes", "-y")
    done = lem(*given)
    assert (done.code, "across_nodes: without --launcher slurm, all cycles run on this machine." in done.err) == (
        2,
        True,
    )
    done = lem(*given, "--one-job", "--launcher", "slurm")
    assert (done.code, "across_nodes: with --one-job, all cycles run on one node." in done.err) == (2, True)
    done = lem(*given, "--structure", "grouped", "--launcher", "slurm")
    assert (done.code, "across_nodes: with structure=grouped, each arm is a job" in done.err) == (2, True)


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "slurm.md"


def test_the_site_file_in_the_docs_is_a_launcher(lem, tmp_path):
    name, content = re.search(
        r"```yaml\n# (conf/hydra/launcher/mysite.yaml)\n(.*?)```", PAGE.read_text(), re.S
    ).groups()
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    found = chosen_launcher(["hydra/launcher=mysite"], tmp_path / "conf")
    options = found.options
    given = {key: value for key, value in yaml.safe_load(content).items() if key != "defaults"}
    assert {key: getattr(options, key) for key in given} == given
    others = {each.name for each in fields(SlurmOptions)} - set(given)
    assert {key: getattr(options, key) for key in others} == {key: getattr(SlurmOptions(), key) for key in others}
    (tmp_path / "a.yaml").write_text("model: any\nbackend: {name: simulated}\n")
    done = lem("batch", "*.yaml", "--config-dir", "conf", "--launcher", "mysite", "-d", "sample", "--dry-run")
    assert done.code == 0, done.err


def test_the_docs_list_every_option_with_its_default():
    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| (\S+) \|", PAGE.read_text(), re.M)
    listed = {name: default for names, default in rows for name in re.findall(r"`(\w+)`", names)}
    defaults = {each.name: getattr(SlurmOptions(), each.name) for each in fields(SlurmOptions)}
    assert listed.keys() == defaults.keys()
    for name, default in defaults.items():
        assert listed[name] == (
            "–" if default in (None, [], {}) else f"{default:g}" if type(default) is not bool else str(default).lower()
        )


def test_the_hydra_app_does_not_run_jobs_here_by_mistake(tmp_path):
    command = [sys.executable, "-m", "lem.cli.hydra_app", "hydra/launcher=slurm", "model=any", "backend=simulated"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "Use lem experiment or lem batch with --launcher." in done.stderr


def test_gpus_that_were_not_granted_are_hidden(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # of the shell that submitted the job
    use_only_granted_gpus({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_GPUS": "0,1"})
    assert gpu.visible() == []


def test_granted_gpus_are_named_by_uuid(driver):
    code = """
    import json, os
    from lem.studies.slurm_job import JobFile, Step, use_only_granted_gpus
    use_only_granted_gpus()
    print(json.dumps(os.environ["CUDA_VISIBLE_DEVICES"]))
    """
    found = driver(code, "devices 4\n", CUDA_VISIBLE_DEVICES="2,3", SLURM_STEP_GPUS="2,3", SLURM_STEP_ID="0")
    assert [name.startswith("GPU-") for name in found.split(",")] == [True, True]


@pytest.mark.parametrize(
    ("reason", "never"),
    [
        ("PartitionTimeLimit", True),
        ("AssocGrpGRESMinutes", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("JobHeldAdmin", True),
        ("Priority", False),
        ("Resources", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("BeginTime", False),
    ],
)
def test_only_reasons_that_do_not_pass_mean_that_a_job_never_starts(reason, never):
    assert Queued("PENDING", reason, 0, "").cannot_start is never
    assert not Queued("RUNNING", reason, 0, "n1").cannot_start


def test_the_end_of_a_job_in_words():
    assert Ended("CANCELLED by 0", "None", "0:0", "n1").sentence == "CANCELLED by 0 on n1"
    assert Ended("FAILED", "NonZeroExitCode", "137:0", "n1").sentence == (
        "FAILED on n1, NonZeroExitCode, exit code 137 (ended by signal 9)"
    )
    assert Ended("OUT_OF_MEMORY", "", "0:125").sentence == "OUT_OF_MEMORY, ended by signal 125"


def test_several_experiments_in_a_job_need_a_sweep_on_slurm(lem, tmp_path):
    (tmp_path / "a.yaml").write_text("model: any\nbackend: {name: simulated}\n")
    needs_slurm, needs_several = "--per-job needs --launcher slurm.", "--per-job needs several experiments"
    for arguments, message in (
        (("experiment", "a.yaml", "--multirun", "seed=1,2"), needs_slurm),
        (("batch", "a.yaml"), needs_slurm),
        (("experiment", "a.yaml", *SLURM), needs_several),
        (("campaign", "a.yaml", "a.yaml", *SLURM), "each job runs a whole cycle"),
    ):
        done = lem(*arguments, "--per-job", "2")
        assert (done.code, message in done.err) == (2, True), done.err


def test_detaching_needs_jobs(lem, tmp_path):
    (tmp_path / "a.yaml").write_text("model: any\nbackend: {name: simulated}\n")
    for arguments in (("experiment", "a.yaml"), ("batch", "a.yaml"), ("campaign", "a.yaml", "a.yaml")):
        done = lem(*arguments, "--detach")
        assert (done.code, "--detach needs --launcher slurm." in done.err) == (2, True), done.err


def test_jobs_that_do_not_exist_are_named(lem, tmp_path):
    assert lem("jobs").out == f"No study in {tmp_path}/results has jobs to wait for.\n"
    assert lem("jobs", "--json").out == "[]\n"
    for arguments, message in (
        (("sizes",), "No study 'sizes' in "),
        (("cancel", "sizes", "-y"), "No study 'sizes' in "),
        (("cancel",), "lem jobs cancel needs the name of a study"),
        (("",), "The name of the study is empty"),
        (("sizes", "-y"), "--yes has an effect only with lem jobs cancel"),
        (("a", "b"), "lem jobs takes one study, not 2: a, b."),
        (("cancel", "a", "--json"), "leave it out with cancel"),
    ):
        done = lem("jobs", *arguments)
        assert (done.code, message in done.err) == (2, True), done.err


@pytest.fixture
def left_study(tmp_path):
    """A study with a job of one experiment, on a machine without Slurm."""
    study, raw = tmp_path / "multirun" / "mine", tmp_path / "results" / "raw" / "exp_20260102_030405"
    raw.mkdir(parents=True)
    entry = {
        "label": "a.yaml", "config_file": "a.yaml", "overrides": [], "experiment_id": raw.name, "status": "queued",
        "directory": str(raw), "error": None, "log": None,
    }  # fmt: skip
    study.mkdir(parents=True)
    (study / "experiments.json").write_text(json.dumps([entry]))
    (study / "jobs").mkdir()
    (study / "jobs" / "array0000.json").write_text(to_json(JobFile(((Step(str(raw)),),), True, 3)))
    results = str(tmp_path / "results")
    ledger = Ledger.begin(
        study, Terms(SlurmOptions(), "", "config", False, True, False, False, None, (results,), str(tmp_path))
    )
    ledger.submitting("array0000.json", [[0]])
    ledger.submitted(["4711"])
    return raw


def test_without_slurm_the_states_of_jobs_are_unknown_and_nothing_changes(lem, left_study, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    done = lem("jobs")
    assert (done.code, "mine: 1 experiment, 1 pending" in done.out) == (0, True), done.err
    assert done.err.count("Slurm does not answer") == 1
    (study,) = json.loads(lem("jobs", "min", "--json").out)
    assert [(cell["status"], cell["slurm_job_id"]) for cell in study["experiments"]] == [("pending", "4711")]
    done = lem("jobs", "mina")
    assert (done.code, "Did you mean 'mine'?" in done.err) == (2, True)
    done = lem("experiment", "--resume", left_study.name, "-y")
    assert (done.code, "Follow it with lem jobs mine" in done.err) == (2, True)


def test_a_study_that_cannot_be_read_is_reported_and_does_not_hide_results(lem, left_study, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "multirun" / "mine" / "experiments.json").write_text("[")
    done = lem("results", "list")
    assert done.code == 0
    assert "experiments.json cannot be read" in done.err
