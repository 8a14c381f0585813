"""Workers that import their engine before the experiment is checked: they are used, or they leave nothing behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from lem.machine import host
from lem.machine.gpu import Gpu
from lem.results.directory import ExperimentDir
from lem.results.plan import FINISHED
from lem.runner.early import EarlyWorker, early_worker, environment_of_workers
from lem.spec.engines import PytorchBackend, SimulatedBackend
from lem.spec.experiment import Experiment, Parallelism
from tests.conftest import begin, command, wait_for, workers_of
from tests.runner.test_launch import gone, only

pytestmark = pytest.mark.processes

RUN = ("-m", "tiny", "-d", "sample", "-n", "2", "energy=none", "warmup.prompts=0", "max_output_tokens=4", "-y")
PYTORCH = Experiment(model="tiny", backend=PytorchBackend())
# Code that every new Python process runs first; it acts only in a worker.
IN_WORKERS = """
import sys
if "lem.runner.worker" in sys.orig_argv:
    {}
"""


def at_the_start_of_workers(folder: Path, code: str) -> dict[str, str]:
    """Write code that workers run before anything else; return the environment that makes them run it."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(IN_WORKERS.format(code.replace("\n", "\n    ")))
    return {"PYTHONPATH": str(folder)}


def test_the_engine_is_imported_while_the_experiment_is_checked(tmp_path):
    done = command("--verbose", "experiment", *RUN, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "the worker has imported its engine" in done.err
    (record,) = only(tmp_path / "results").records()
    assert record.own_time.import_s > 0.1, "the time of the early import is kept"
    assert gone(tmp_path)


def test_what_is_printed_during_the_import_comes_first_in_the_log(tmp_path):
    noise = at_the_start_of_workers(tmp_path / "site", "print('early', flush=True)\nprint('buffered')")
    assert command("experiment", *RUN, cwd=tmp_path, **noise).code == 0
    assert only(tmp_path / "results").log_file(0).read_text().splitlines()[:2] == ["early", "buffered"]


@pytest.mark.parametrize("wrong", [("batching.batch_size=0",), ("-p", "missing.txt"), ("backend.device=cuda",)])
def test_a_refused_experiment_leaves_no_process(tmp_path, wrong):
    done = command("experiment", *RUN, *wrong, cwd=tmp_path)
    assert done.code == 2
    assert gone(tmp_path, within_s=0)


def test_a_worker_that_cannot_import_its_engine_is_replaced_by_one_that_says_so(tmp_path):
    broken = "sys.modules['transformers'] = None"
    done = command("--verbose", "experiment", *RUN, cwd=tmp_path, **at_the_start_of_workers(tmp_path / "site", broken))
    assert done.code == 1
    assert "the worker starts now" in done.err
    (record,) = only(tmp_path / "results").records()
    assert "transformers" in record.error.message


def test_an_early_worker_that_was_killed_is_replaced(tmp_path):
    killed = "import os, signal\nif '--early' in sys.orig_argv:\n    os.kill(os.getpid(), signal.SIGKILL)"
    done = command("--verbose", "experiment", *RUN, cwd=tmp_path, **at_the_start_of_workers(tmp_path / "site", killed))
    assert done.code == 0, done.err
    assert "the worker starts now" in done.err
    assert only(tmp_path / "results").state().status in FINISHED


SLOWLY = "import time\nif '--early' in sys.orig_argv:\n    time.sleep(60)"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_import_ends_the_run_at_once(tmp_path, number):
    process = begin("experiment", *RUN, cwd=tmp_path, **at_the_start_of_workers(tmp_path / "site", SLOWLY))
    wait_for(process, "Prompts")
    until_s = time.monotonic() + 10
    while not any(ExperimentDir(path).log_file(0).exists() for path in tmp_path.glob("results/raw/*")):
        assert time.monotonic() < until_s
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert gone(tmp_path)
    (record,) = only(tmp_path / "results").records()
    assert record.error.message == f"stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}"
    done = command("experiment", "--resume", only(tmp_path / "results").id, "-y", cwd=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("after_s", [0.0, 2.0])
def test_an_early_worker_does_not_outlive_its_parent_even_if_its_import_takes_long(tmp_path, number, after_s):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "torch.py").write_text("import time\ntime.sleep(60)\n")
    process = begin("experiment", *RUN, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    while not workers_of(process):
        assert process.poll() is None
    time.sleep(after_s)
    os.kill(process.pid, number)
    process.communicate(timeout=10)
    assert gone(tmp_path, within_s=5)


def test_a_worker_is_started_early_only_where_that_is_safe():
    machine = host.Host(())
    several = dataclasses.replace(PYTORCH, parallelism=Parallelism(strategy="data_parallel", degree=2))
    for other in (several, dataclasses.replace(PYTORCH, backend=SimulatedBackend())):
        with early_worker(other, machine) as worker:
            assert worker is None


def test_an_early_worker_is_not_used_in_another_environment(monkeypatch):
    machine = host.Host(())
    with early_worker(PYTORCH, machine) as worker:
        assert worker is not None
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        assert not worker.is_ready(environment_of_workers(PYTORCH, 1, machine))
        monkeypatch.undo()
        assert worker.is_ready(environment_of_workers(PYTORCH, 1, machine))


def test_an_early_worker_sees_the_chosen_gpus():
    first, second = (Gpu(index, f"GPU-{index}", "name", 1) for index in range(2))
    machine, chosen = host.Host((first, second)), dataclasses.replace(PYTORCH, gpus=[1])
    with early_worker(chosen, machine) as worker:
        assert isinstance(worker, EarlyWorker)
        assert worker.is_ready(environment_of_workers(chosen, 1, host.Host((second,))))


def test_closing_kills_a_worker_without_an_experiment_and_spares_one_with_an_experiment(tmp_path):
    with early_worker(PYTORCH, host.Host(())) as worker:
        assert worker is not None
        assert worker.is_ready(environment_of_workers(PYTORCH, 1, host.Host(())))
        process = worker.begin([str(tmp_path / "nothing here")], tmp_path / "log")
        assert process is not None
    assert process.wait() == 1, "it runs on, and finds no experiment"
    assert "nothing here" in (tmp_path / "log").read_text()
