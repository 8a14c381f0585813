"""The commands of the README, of the first pages and of two guides are run as they stand there.

Run by `nox -s processes`. What cannot be run here is listed in EXCUSED, with the reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lem.workload import tiny

ROOT = Path(__file__).parent.parent
# The pages whose commands are all run one by one or excused; the pages below are run as a whole.
LISTED = ("README.md", "docs/index.md", "docs/start/install.md")
SMALL = "model: tiny\ndataset: {name: sample, sample_size: 4}\nmax_output_tokens: 8\nenergy: {idle_s: 0}\n"
EXCUSED = {
    "lem experiment --model meta-llama/Llama-3.1-8B -d alpaca -n 100 --preset benchmark": "needs the hub and a GPU",
    "lem campaign small.yaml large.yaml --campaign-name sizes --cycles 5 -d alpaca -n 100": "needs the hub",
    "lem experiment my.yaml --multirun batching.batch_size=1,2,4 --launcher slurm hydra.launcher.partition=gpu": (
        "needs a cluster; nox -s slurm runs such commands"
    ),
    "lem config new -o my.yaml": "asks questions in a terminal; tests/cli/test_new.py answers them",
    "lem experiment --resume exp_20260102": "needs an interrupted run; tests/runner/test_resume.py has some",
}
# Commands that would take minutes or days: the test adds --dry-run, which checks everything and runs nothing.
LONG = ("--multirun", "lem batch", "lem schedule")


def blocks(page: str, language: str) -> list[str]:
    """Return a page's blocks of code in a language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


def commands(page: str) -> list[str]:
    """Return the `lem` commands of a page, without the comments behind them."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [re.split(r"\s+#\s", line)[0].strip() for line in lines if line.startswith("lem ")]


LISTED_COMMANDS = [(page, line) for page in LISTED for line in commands(page)]
RUN = list(dict.fromkeys(line for _, line in LISTED_COMMANDS if line not in EXCUSED))


def test_every_excused_command_is_on_a_page():
    assert set(EXCUSED) <= {line for _, line in LISTED_COMMANDS}


@pytest.mark.parametrize("page", LISTED)
def test_a_page_has_commands(page):
    assert len(commands(page)) >= 2


def sh(script: str, folder: Path) -> str:
    """Run a script in a folder, and return its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the files that the README's commands name, and a finished experiment."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "my.yaml").write_text(SMALL)
    (folder / "prompts.txt").write_text("Why is the sky blue?\nHow many legs does a spider have?\n")
    shutil.copytree(tiny.path(), folder / "my-model")
    sh("lem experiment my.yaml --yes", folder)
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("line", RUN)
def test_a_command_of_the_first_pages_runs(home, line):
    finished = next(path.name for path in sorted((home / "results" / "raw").iterdir()))
    script = line.replace("exp_20260102", finished)
    if line.startswith("lem batch"):
        script = f"[ -d grid ] || lem config generate-grid my.yaml --vary batching.batch_size=1,2 -o grid; {script}"
    sh(f"{script} --dry-run" if any(each in line for each in LONG) else script, home)


@pytest.mark.processes
def test_the_first_comparison_works_word_by_word(tmp_path):
    page = "docs/start/first-comparison.md"
    one, four = blocks(page, "yaml")
    # As on the page, but with four prompts instead of a hundred, and without the idle phases.
    (tmp_path / "first-comparison").mkdir()
    short = one.replace("sample_size: 100", "sample_size: 4") + "energy: {idle_s: 0}\n"
    (tmp_path / "first-comparison" / "one.yaml").write_text(short)
    (tmp_path / "first-comparison" / "four.yaml").write_text(four)
    assert short.count("sample_size: 4}") == 1
    script = "".join(blocks(page, "bash")).replace("mkdir first-comparison\n", "")
    output = sh(script, tmp_path)
    assert "2 files: 2 valid, 0 invalid." in output
    assert "10 of 10 cells completed" in output
    assert re.search(r"four has [\d.]+ times the output tokens per second of one", output), output
    assert (tmp_path / "first-comparison" / "batches.html").exists()


@pytest.mark.processes
def test_the_gate_works(tmp_path):
    page = "docs/how-to/ci.md"
    (job,), (config,) = blocks(page, "bash"), blocks(page, "yaml")
    (tmp_path / "gate.yaml").write_text(f"{config}energy: {{idle_s: 0}}\n")
    # Two runs instead of five, and a limit that noise cannot exceed.
    sh(job.replace("1 2 3 4 5", "1 2").replace("<-10%", "<-99%"), tmp_path)
    comparison = (tmp_path / "comparison.md").read_text()
    assert "passed for candidate" in comparison
    assert "95 % interval of the change" in comparison


@pytest.mark.processes
def test_a_dataset_of_your_own_works(tmp_path):
    page = "docs/how-to/own-dataset.md"
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "questions.csv").write_text("id,question\n1,Why is the sky blue?\n2,What?\n3,\n4,Who?\n")
    (tmp_path / "conf" / "dataset" / "questions.yaml").write_text(blocks(page, "yaml")[0])
    output = sh("".join(blocks(page, "bash")), tmp_path)
    assert "4 read from data/questions.csv, column question, 1 of them empty and dropped" in output
    assert "Our users' questions (yours)" in output
