"""Shared helpers: running the real command, in this process or in a separate one, and reading its results."""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from lem.machine.host import Host
from lem.results.directory import ExperimentDir
from lem.runner import job
from lem.runner.attempt import Attempt
from lem.runner.progress import Report
from lem.runner.stopping import INTERRUPTING
from lem.workload import tiny
from tests.backends.confirmations import Engines
from tests.nvml_standin import driver, standin  # noqa: F401 - fixtures
from tests.tensorrt_standin.build import build as build_tensorrt

# No test may wait for an unreachable hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("LLM_ENERGY_RESULTS_DIR", None)
# The consent that a test gives is discarded after the tests.
os.environ["LEM_STATE_DIR"] = tempfile.mkdtemp(prefix="lem-tests-state-")
atexit.register(shutil.rmtree, os.environ["LEM_STATE_DIR"], ignore_errors=True)
# If a script starts pytest in the background, this process ignores Ctrl-C; under nohup, it ignores SIGHUP. The commands
# that the tests start would inherit this behavior.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Tests run side by side, so OpenMP's threads would spin against each other for the same cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Composing configurations and importing modules create many long-lived objects, in addition to those of torch. With the
# default thresholds, searching all of them for reference cycles would take 5% of the tests' time.
gc.set_threshold(100_000, 50, 100)
# Property tests use the same examples each time and have no deadline, so their outcome depends only on the commit.
# `--hypothesis-profile=search` looks for new examples.
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile("same")

# The value of a test's property with this name is printed at the end, whichever process ran the test.
SUMMARY = "summary"


def pytest_terminal_summary(terminalreporter):
    """Print information that tests report beyond passing, such as how many kills a run has survived."""
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, text in getattr(report, "user_properties", ()):
            if name == SUMMARY and report.when == "call":
                terminalreporter.write_line(text)


@pytest.fixture(scope="session")
def tensorrt_folder(tmp_path_factory):
    """Build the stand-in for TensorRT-LLM once; return the folder to put on the import path."""
    return build_tensorrt(tmp_path_factory.mktemp("tensorrt"))


@pytest.fixture
def tensorrt_standin(tensorrt_folder, monkeypatch):
    """Replace TensorRT-LLM with its stand-in, in this process and in those that it starts."""
    monkeypatch.syspath_prepend(tensorrt_folder)
    monkeypatch.setenv("PYTHONPATH", f"{tensorrt_folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    yield tensorrt_folder
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@dataclass
class Finished:
    """A command that has ended, with its exit code and output."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def signals_still_heard():
    """Fail a test that leaves signals ignored: a process that a later test forks would inherit this and never end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        assert signal.getsignal(number) == handler, f"the test changed how {number.name} is handled"


@pytest.fixture
def lem(tmp_path, monkeypatch, capfd):
    """Run `lem …` in this process, in an empty directory; an unexpected exception fails the test."""
    from lem import cli

    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)

    def run(*arguments: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["lem", *arguments])
        capfd.readouterr()
        handlers = {number: signal.getsignal(number) for number in INTERRUPTING}
        with pytest.raises(SystemExit) as stop:
            cli.main()
        for number, handler in handlers.items():
            signal.signal(number, handler)  # at its end, a command ignores signals
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Finished(int(stop.value.code or 0), out, err)

    yield run
    # The command loads .env files into this process's environment.
    os.environ.clear()
    os.environ.update(before)
    # --verbose turns on logging in this process.
    logging.getLogger("lem").handlers.clear()
    logging.getLogger("lem").setLevel(logging.NOTSET)


@pytest.fixture
def in_this_process(monkeypatch):
    """Run the worker of a single-process experiment in this process, because starting a new one takes a second."""

    def launch(directory: ExperimentDir, attempt: int, _host: Host, report: Report) -> None:
        Attempt(directory, attempt).run(report)

    for function in (job.run_ready, job.resume):
        monkeypatch.setitem(function.__kwdefaults__, "launcher", launch)
    # An attempt that ends in an error ignores signals from then on.
    monkeypatch.setattr("lem.runner.attempt.ignore_signals", lambda: None)


def command(*arguments: str, cwd: Path, timeout_s: float = 300, **env: str) -> Finished:
    """Run `lem …` in a separate process."""
    done = subprocess.run(
        [sys.executable, "-m", "lem", *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


SIMULATED = ("--backend", "simulated", "--model", "any", "-d", "sample", "energy=none", "-y")


def raw_record(results: Path, rank: int = 0, cycle: int = 1, attempt: int = 1) -> dict:
    """Read a raw record of the only experiment."""
    (file,) = results.glob(f"raw/*/process_{rank}_c{cycle}_a{attempt}.json")
    return json.loads(file.read_text())


def begin(*arguments: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start `lem …` in a new session, as a terminal would, so that signals to its group reach no other process."""
    return subprocess.Popen(
        [sys.executable, "-m", "lem", *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], beginning: str) -> str:
    """Read stderr up to the first line that begins with a text; return this line."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(beginning):
            return line
    raise AssertionError(f"no line '{beginning}…' came; exit code {process.wait()}")


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the running workers of a command, but not the launcher that starts several workers."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command_line = child.cmdline()  # a zombie has no command line
            if "lem.runner.worker" not in command_line or "torch.distributed.run" in command_line:
                continue
            # Just after a fork, a process that is about to run another program still has its parent's command line.
            if child.ppid() not in {worker.pid for worker in found}:
                found.append(child)
    return found


def kill_group(process: subprocess.Popen[str]) -> None:
    """Kill a command and its whole process group at once, without warning."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of 16 MB; skip the test where mounting is not allowed."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder: Path, but_for_pages: int = 0) -> Path:
    """Fill a file system except for some pages of 4 KiB; return the file that fills it."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(file.tell() - but_for_pages * 4096)
    return filler


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEM_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return tiny.path()


@pytest.fixture(scope="session")
def tiny_that_ends(tiny_folder, tmp_path_factory):
    # A model with random weights rarely chooses the one end token among 4096 tokens. With 400 end tokens, about half of
    # the outputs end.
    folder = tmp_path_factory.mktemp("tiny") / "that-ends"
    shutil.copytree(tiny_folder, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": list(range(2, 402))}))
    return folder


@pytest.fixture(scope="session")
def engines():
    kept = Engines()
    yield kept
    kept.close()
