"""Which libraries the `lem` command has loaded by its end: the heavy ones belong in workers and other processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from lem.workload import tiny

HEAVY = {"torch", "transformers", "datasets", "pandas", "scipy", "accelerate", "vllm", "tensorrt_llm", "codecarbon"}
SIMULATED = """\
model: any
backend: {name: simulated}
dataset: {path: prompts.jsonl, sample_size: 3}
energy: {name: simulated, idle_s: 0}
"""


def loaded(*arguments, cwd, code=0) -> set[str]:
    """Run a command in a new process, and return the libraries that it has imported by its end."""
    program = (
        "import json, sys\n"
        "from lem import cli\n"
        f"sys.argv = {['lem', *map(str, arguments)]!r}\n"
        "try:\n    cli.main()\n"
        f"except SystemExit as stop:\n    assert int(stop.code or 0) == {code}, stop.code\n"
        "with open('modules.json', 'w') as file:\n    json.dump(sorted(sys.modules), file)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads((cwd / "modules.json").read_text())}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "number {i}"}}\n' for i in range(9)))
    (tmp_path / "a.yaml").write_text(SIMULATED)
    (tmp_path / "b.yaml").write_text(SIMULATED + "max_output_tokens: 9\n")
    return tmp_path


def of_model(folder, *arguments):
    shutil.copytree(tiny.path(), folder / "model", dirs_exist_ok=True)
    return ("experiment", "-m", "./model", "-p", "prompts.jsonl", "-n", "3", *arguments)


def test_a_dry_run_of_a_local_model_and_file_loads_no_heavy_library(folder):
    found = loaded(*of_model(folder, "--dry-run"), cwd=folder)
    assert not found & (HEAVY | {"numpy", "pyarrow"})


@pytest.mark.processes
def test_a_dry_run_that_needs_transformers_does_not_load_it_here(folder):
    assert not loaded(*of_model(folder, "--dry-run", "chat_template=true"), cwd=folder) & HEAVY


@pytest.mark.parametrize(
    "card",
    [None, pytest.param("configs:\n- config_name: one\n  data_files: a.jsonl\n", marks=pytest.mark.processes)],
    ids=["without a card", "with a card"],
)
def test_a_dry_run_of_a_directory_of_prompts_loads_no_heavy_library(folder, card):
    (folder / "set").mkdir()
    shutil.copy(folder / "prompts.jsonl", folder / "set" / "a.jsonl")
    if card:
        (folder / "set" / "README.md").write_text(f"---\n{card}---\n")
    arguments = ("experiment", "-m", "any", "backend=simulated", "-d", "./set", "--dry-run")
    assert not loaded(*arguments, cwd=folder) & HEAVY


@pytest.mark.processes
def test_a_data_set_of_the_hub_that_cannot_be_had_is_refused_without_loading_the_library(folder):
    arguments = ("experiment", "-m", "any", "backend=simulated", "-d", "nobody/nothing", "--dry-run")
    assert not loaded(*arguments, cwd=folder, code=2) & HEAVY


def test_checking_a_config_file_loads_no_heavy_library(folder):
    assert not loaded("config", "validate", "a.yaml", cwd=folder) & (HEAVY | {"hydra", "numpy", "pyarrow"})


@pytest.mark.processes
def test_an_experiment_and_its_results_load_no_heavy_library(folder):
    arguments = ("max_output_tokens=4", "energy=none", "energy.idle_s=0", "-y")
    assert not loaded(*of_model(folder, *arguments), cwd=folder) & HEAVY
    (experiment,) = (folder / "results" / "raw").iterdir()
    assert not loaded("results", "list", cwd=folder) & (HEAVY | {"hydra"})
    assert not loaded("results", "show", experiment.name, cwd=folder) & (HEAVY | {"hydra"})
    assert not loaded("aggregate", "--all", "--force", cwd=folder) & (HEAVY | {"hydra"})


@pytest.mark.processes
@pytest.mark.parametrize("arguments", [("batch", "a.yaml", "b.yaml"), ("batch", "a.yaml", "b.yaml", "--parallel", "2")])
def test_a_batch_loads_no_heavy_library(folder, arguments):
    assert not loaded(*arguments, "--dry-run", cwd=folder) & HEAVY
    assert not loaded(*arguments, "-y", cwd=folder) & HEAVY


@pytest.mark.processes
def test_a_campaign_loads_only_scipy_and_only_for_its_answer(folder):
    arguments = ("campaign", "a.yaml", "b.yaml", "-c", "2", "--campaign-name", "two", "-y")
    assert not loaded(*arguments, "--dry-run", cwd=folder) & HEAVY
    # The smallest difference that a campaign can find needs the noncentral t distribution.
    assert loaded(*arguments, cwd=folder) & HEAVY <= {"scipy"}
