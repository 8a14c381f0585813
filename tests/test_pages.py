"""The blocks of code in the README and on the hand-written pages are run as they stand there, or excused by name.

`lem` commands need no entry here: those that would measure something are run with --dry-run, unless they are in
MEASURED. Every other command, and every block of Python, must be run by a test below or be listed in an EXCUSED table,
with the reason. The quick suite checks that; `nox -s processes` runs the commands.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from textwrap import dedent
from types import ModuleType

import pytest

from lem.results.aggregate import aggregate_all
from lem.results.store import Store
from lem.spec.experiment import Dataset, Energy, Experiment
from lem.workload import tiny
from tests.hosts import IDEAL
from tests.records import finished, power
from tests.results.campaigns import campaign
from tests.results.test_schedule_copy import scheduled

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    *sorted(
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "docs").rglob("*.md")
        if path.parent.name != "reference"  # made by docs/generate.py; tests/cli/test_reference_examples.py runs them
    ),
]
# The languages of blocks; a block of commands must not hide under another name.
LANGUAGES = {"bash", "python", "sql", "yaml", "json", "csv", "ini", ""}

# ------------------------------------------------------------------ what is run, and what is excused
# Pages whose blocks are all run, in order, by the named test.
WHOLE = {
    "docs/start/first-comparison.md": "test_the_first_comparison_works_word_by_word",
    "docs/how-to/ci.md": "test_the_gate_works",
    "docs/how-to/own-dataset.md": "test_a_dataset_of_your_own_works",
}
# Commands that are run without --dry-run.
MEASURED = {
    "lem experiment --preset quick-test --model tiny -d sample -n 10",
    "lem experiment --preset quick-test --model tiny -d sample -n 10 --yes",
    "lem experiment --model ./my-model --prompts prompts.txt batching.batch_size=8 decoder=creative",
    "lem experiment my.yaml --max-tokens 64",
}
# Beginnings of commands that measure or delete something: the test adds --dry-run, which checks everything else.
DRY = ("lem experiment", "lem batch", "lem campaign", "lem schedule", "lem results delete")
CLUSTER = "needs a Slurm cluster; nox -s slurm runs such commands on one"
INSTALLS = "installs packages; nox installs the same into each session's environment"
NOISE = "takes minutes and has no dry run; covered by tests/studies/test_noise.py"
HYDRA = "measures, and has no dry run; covered by tests/studies/test_sweep.py"
PEERS = "takes half an hour; nox -s peers runs it"
DIRECT = "-m lem.cli.direct --config my.yaml --dataset alpaca -n 100"
LAUNCHERS = "starts two processes on a dataset of the hub; covered by tests/runner/test_parallel.py"
OWN_CODE = "needs changes in lem's own files, which the page describes"
# Commands that no test of a page runs, by page, with the reason.
EXCUSED: dict[str, dict[str, str]] = {
    "README.md": {
        "python -m pip install nox && python -m nox -s demo": INSTALLS,
        "python -m pip install nox && python -m nox -s tests": INSTALLS,
        "python -m pip install .": INSTALLS,
        "lem config new -o my.yaml": "asks questions in a terminal; covered by tests/cli/test_new.py",
    },
    "docs/start/install.md": {
        "python3 -m venv lem-env": INSTALLS,
        "source lem-env/bin/activate": INSTALLS,
        "python -m pip install torch": INSTALLS,
        "python -m pip install .": INSTALLS,
    },
    "docs/how-to/batches.md": {
        "lem batch 'configs/*.yaml' --dataset alpaca -n 100": "needs the hub",
    },
    "docs/how-to/campaigns.md": {
        "lem campaign --resume sizes": "needs an interrupted campaign; covered by tests/studies/test_campaign.py",
        "lem results show sizes": "needs the campaign above to be over; covered by tests/results/test_campaign_show.py",
    },
    "docs/how-to/configuring.md": {
        "python -m lem.cli.hydra_app model=tiny dataset=sample dataset.sample_size=10": HYDRA,
        "python -m lem.cli.hydra_app model=tiny dataset=sample --multirun batching.batch_size=1,2,4": HYDRA,
    },
    "docs/how-to/doctor.md": {
        "lem doctor --noise": NOISE,
        "lem doctor --noise my.yaml -c 10": NOISE,
    },
    "docs/how-to/grids.md": {
        "python -m lem.cli.hydra_app --config-dir configs --multirun '+sizes=glob(*,exclude=grid)'": HYDRA,
    },
    "docs/how-to/own-backend.md": {
        "lem experiment -m tiny -d sample -n 5 backend=echo energy=none --yes": OWN_CODE,
        "python -m pytest tests/backends/test_backends.py -k echo": OWN_CODE,
    },
    "docs/how-to/own-meter.md": {
        "python -m pytest tests/energy/test_energy.py -k hwmon": OWN_CODE,
    },
    "docs/how-to/parallel.md": {
        "lem experiment my.yaml num_processes=2 gpus=[2,3]": "needs four GPUs",
        f"accelerate launch --num_processes 2 {DIRECT}": LAUNCHERS,
        f"python -m torch.distributed.run --nproc_per_node 2 {DIRECT}": LAUNCHERS,
    },
    "docs/how-to/reports.md": {"pip install 'lem[plots]'": INSTALLS},
    "docs/how-to/results.md": {
        "lem results merge /data/node1/results /data/node2/results kernels.zip -o results": (
            "needs results in /data; covered by tests/results/test_combine.py"
        ),
    },
    "docs/how-to/schedule.md": {
        "lem schedule --preset benchmark --model meta-llama/Llama-2-7b-hf --interval 12h batching.batch_size=8": (
            "needs the hub"
        ),
        "exec lem schedule my.yaml --interval 6h --duration 7d --name nights --yes": CLUSTER,
    },
    "docs/how-to/sensors.md": {
        "sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj": "changes the machine",
    },
    "docs/how-to/slurm.md": {
        "sacct --jobs 4711 --duplicates --format JobID,State,Elapsed,MaxRSS,NodeList,ConsumedEnergy": CLUSTER,
    },
    "docs/performance.md": {
        "python -m bench.peers load --pairs 5 --json load.json": PEERS,
        "python -m bench.peers job --pairs 5 --json job.json": PEERS,
    },
}
# Blocks of Python that no test of a page runs, by page and their first line, with the reason.
EXCUSED_PYTHON = {
    ("docs/how-to/own-backend.md", "@config"): f"a fragment; {OWN_CODE}",
}
# Pages whose blocks of Python are run in order, as one program, in the prepared folder.
PROGRAMS = ("README.md", "docs/how-to/comparing.md", "docs/how-to/results.md")
# Pages whose first block of Python is a module, with the test that imports it.
MODULES = {
    "docs/how-to/own-backend.md": "test_the_example_of_a_backend_generates",
    "docs/how-to/own-meter.md": "test_the_example_of_a_meter_reads_counters",
}


# ------------------------------------------------------------------ the blocks of the pages
def fenced(page: str) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of each block of code on a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```([^\n]*)\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
        yield match[2].strip(), dedent(match[3])


def blocks(page: str, language: str) -> list[str]:
    """Return a page's blocks of code in a language."""
    return [text for each, text in fenced(page) if each == language]


def commands(page: str) -> list[str]:
    """Return the commands in a page's blocks of bash: each on one line, without comments."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = (re.split(r"(?:^|\s+)#", line)[0] for line in lines)
    return [re.sub(r"\s+", " ", line).strip() for line in found if line.strip()]


def is_excused(page: str, command: str) -> bool:
    """Return whether a command of a page is not run."""
    return command in EXCUSED.get(page, {})


def is_of_lem(command: str) -> bool:
    """Return whether a command runs `lem`, so that a test can run it in the prepared folder."""
    return command.startswith(("lem ", "python -m lem."))


def run_commands(page: str) -> list[str]:
    """Return the commands of a page that a test runs in the prepared folder, with --dry-run where they need it."""
    return [dry(each) for each in commands(page) if is_of_lem(each) and not is_excused(page, each)]


def dry(command: str) -> str:
    """Return a command that measures and deletes nothing."""
    if command in MEASURED or not command.startswith(DRY) or "--dry-run" in command:
        return command
    return f"{command} --dry-run"


WITH_COMMANDS = [page for page in PAGES if page not in WHOLE and run_commands(page)]


# ------------------------------------------------------------------ the tables above are complete and true
@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_run_or_excused(page):
    assert {language for language, _ in fenced(page)} <= LANGUAGES
    if page not in WHOLE:
        assert [each for each in commands(page) if not is_of_lem(each) and not is_excused(page, each)] == []
    modules = 1 if page in MODULES else 0
    others = [text.splitlines()[0] for text in blocks(page, "python")[modules:]]
    assert page in PROGRAMS or [first for first in others if (page, first) not in EXCUSED_PYTHON] == []


def test_the_tables_name_only_what_exists():
    for page, excuses in EXCUSED.items():
        assert excuses.keys() <= set(commands(page)), page
    for page, first in EXCUSED_PYTHON:
        assert first in [text.splitlines()[0] for text in blocks(page, "python")]
    assert {each for page in PAGES for each in commands(page)} >= MEASURED
    assert all(blocks(page, "python") for page in (*PROGRAMS, *MODULES))
    assert all(callable(globals()[name]) for name in (*WHOLE.values(), *MODULES.values()))
    reasons = [*(text for excuses in EXCUSED.values() for text in excuses.values()), *EXCUSED_PYTHON.values()]
    named = {name for text in reasons for name in re.findall(r"tests/[\w/]+\.py", text)}
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_an_unknown_command_is_noticed(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("1. Do:\n\n   ```bash\n   make it \\\n     --so  # now\n   lem doctor\n   ```\n")
    monkeypatch.setattr("tests.test_pages.ROOT", tmp_path)
    assert commands("page.md") == ["make it --so", "lem doctor"]
    with pytest.raises(AssertionError, match="make it --so"):
        test_every_block_is_run_or_excused("page.md")


# ------------------------------------------------------------------ running them
def sh(script: str, folder: Path) -> str:
    """Run a script in a folder, and return its output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder,
        # No page may open a browser here.
        env={**os.environ, "PATH": path, "BROWSER": "true"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the files that the pages name: configs, prompts, a model, stand-ins for the hub, and results."""
    folder = tmp_path_factory.mktemp("prepared")
    _write_configs(folder)
    for name in ("my-model", "meta-llama/Llama-3.1-8B"):
        shutil.copytree(tiny.path(), folder / name)
    (folder / "prompts.txt").write_text("Why is the sky blue?\nHow many legs does a spider have?\n")
    (folder / "alpaca.csv").write_text("instruction\n" + "".join(f"What is {n} plus {n}?\n" for n in range(100)))
    options = folder / "conf"
    (options / "dataset").mkdir(parents=True)
    (options / "dataset" / "alpaca.yaml").write_text("name: alpaca\npath: alpaca.csv\ncolumn: instruction\n")
    _write_results(folder)
    return folder


def _write_configs(folder: Path) -> None:
    small = "model: tiny\ndataset: {name: sample, sample_size: 4}\nmax_output_tokens: 8\nenergy: {idle_s: 0}\n"
    for name in ("my", "base", "config", "small", "large", "configs/a", "configs/b"):
        file = folder / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(small)
    (folder / "sizes.yaml").write_text("name: sums\narms: [small.yaml, large.yaml]\ncycles: 2\n")
    (folder / "campaign.yaml").write_text("name: days\narms: [small.yaml, large.yaml]\ncycles: 2\n")


def _write_results(folder: Path) -> None:
    store = Store(folder / "results")
    for where in (store, *(Store(folder / name) for name in ("results/before", "results/after", "baseline"))):
        for number in range(2):
            power(finished(where, datetime(2026, 1, 2, 3, 4, 5) + timedelta(days=number)))
        assert {one.kind for one in aggregate_all(where, where.ids())} == {"written"}
    for name in ("kernels", "quick-vs-large"):
        campaign(store, name)
    shutil.copytree(store.root / "campaigns" / "kernels", folder / "my-sweep")
    for name in ("nights", "nightly"):
        scheduled(store.root, name)


@pytest.fixture
def home(prepared, tmp_path):
    """A copy of the prepared folder, for one page."""
    return Path(shutil.copytree(prepared, tmp_path / "home"))


@pytest.mark.processes
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_the_commands_of_a_page_run(home, page):
    made = re.findall(r"(?:-o|--output-dir) (\S+)", "\n".join(run_commands(page)))
    for text in blocks(page, "yaml"):
        # The page says what the file is called. Some pages show a file that their own commands write.
        if (named := re.match(r"# (\S+\.yaml)\n", text)) and str(Path(named[1]).parent) not in made:
            (home / named[1]).parent.mkdir(parents=True, exist_ok=True)
            (home / named[1]).write_text(text)
    # The pages pipe JSON through jq, which is not part of lem.
    without_jq = "" if shutil.which("jq") else "jq() { cat > /dev/null; }\n"
    sh(without_jq + "set -x\n" + "\n".join(run_commands(page)), home)


@pytest.mark.processes
@pytest.mark.parametrize("page", PROGRAMS)
def test_the_python_of_a_page_runs(home, page):
    (home / "page.py").write_text("\n".join(blocks(page, "python")))
    exports = [each for each in commands(page) if each == "lem results export --output runs.csv"]
    sh("\n".join([*exports, "python page.py"]), home)


def module(page: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the module that the first block of Python on a page is."""
    found = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", found)  # dataclasses look there
    exec(compile(blocks(page, "python")[0], page, "exec"), found.__dict__)
    return found


def test_the_example_of_a_backend_generates(monkeypatch):
    echo = module("docs/how-to/own-backend.md", monkeypatch).Echo
    experiment = Experiment(model="any", dataset=Dataset(path="builtin:sample"), max_output_tokens=4)
    assert echo.objections(experiment, None, IDEAL) == []
    backend = echo(experiment)
    backend.load()
    prompts = backend.encode(["one two three four five", "six"])
    outputs = [each for batch in backend.generate(prompts) for each in batch]
    assert [(each.index, each.token_ids, each.finish_reason) for each in outputs] == [
        (0, (4, 4, 6, 0), "stop"), (1, (4, 0), "stop"),
    ]  # fmt: skip
    assert (backend.model_info(), backend.engine_info().backend) == (None, "echo")
    assert backend.peak_memory().peak_bytes > 0


def test_the_example_of_a_meter_reads_counters(monkeypatch, tmp_path):
    page = module("docs/how-to/own-meter.md", monkeypatch)
    monkeypatch.setattr(page, "HWMON", tmp_path)
    energy = Energy(name="none")
    assert [each.code for each in page.HwmonMeter.objections(energy, IDEAL, uses_gpu=False)] == ["meter_broken"]
    counter = tmp_path / "hwmon3" / "energy1_input"
    counter.parent.mkdir()
    counter.write_text("1000000\n")
    meter = page.HwmonMeter()
    meter.open()
    meter.begin()
    counter.write_text("3500000\n")
    meter.mark()
    assert [each.energy_j for each in meter.end()] == [2.5]
    counter.unlink()
    assert [each.energy_j for each in meter.so_far()] == [None]


@pytest.mark.processes
def test_the_first_comparison_works_word_by_word(tmp_path):
    page = "docs/start/first-comparison.md"
    single, batched = blocks(page, "yaml")
    # As on the page, but with four prompts instead of a hundred, and without the idle phases.
    (tmp_path / "first-comparison").mkdir()
    short = single.replace("sample_size: 100", "sample_size: 4") + "energy: {idle_s: 0}\n"
    (tmp_path / "first-comparison" / "single.yaml").write_text(short)
    (tmp_path / "first-comparison" / "batched.yaml").write_text(batched)
    assert short.count("sample_size: 4}") == 1
    script = "".join(blocks(page, "bash")).replace("mkdir first-comparison\n", "")
    output = sh(script, tmp_path)
    assert "2 files: 2 valid, 0 invalid." in output
    assert "10 of 10 cells completed" in output
    assert re.search(r"batched has [\d.]+ times the output tokens per second of single", output), output
    assert (tmp_path / "first-comparison" / "batches.html").exists()


@pytest.mark.processes
def test_the_gate_works(tmp_path):
    page = "docs/how-to/ci.md"
    (job,), (config,) = blocks(page, "bash"), blocks(page, "yaml")
    (tmp_path / "gate.yaml").write_text(f"{config}energy: {{idle_s: 0}}\n")
    # Three runs instead of five, and a limit that noise cannot exceed; with two, the interval would be far wider.
    # Other tests run at the same time, so one side may carry warnings about other load.
    job = job.replace("--fail-if", "--allow shared --fail-if")
    sh(job.replace("1 2 3 4 5", "1 2 3").replace("<-10%", "<-99%"), tmp_path)
    comparison = (tmp_path / "comparison.md").read_text()
    assert "passed for candidate" in comparison
    assert "95% interval of the change" in comparison


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
