"""lem as a library: the job without Hydra."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys

import pytest

import lem
from lem.machine import host
from lem.results.store import Store
from lem.runner.job import resume, run_ready
from lem.runner.preflight import preflight
from lem.runner.stopping import Stopped
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Dataset, Energy, Io


def test_a_library_user_runs_an_experiment(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "lem.runner.job")
    outcome = lem.run(
        lem.Experiment(
            model="any",
            backend=SimulatedBackend(),
            dataset=Dataset(name="sample", path="builtin:sample", sample_size=3),
            energy=Energy(name="none"),
            io=Io(results_dir=str(tmp_path)),
        )
    )
    assert outcome.row.status == "completed"
    assert outcome.row.requests_completed == 3
    assert outcome.directory.path.parent.parent == tmp_path
    (record,) = outcome.directory.records()
    own = record.own_time
    assert min(own.import_s, own.encode_s, own.recording_s) >= 0
    assert own.recording_s < record.phase("measured").duration_s
    # What --verbose shows.
    (line,) = (text for text in caplog.messages if text.startswith("seconds of process 0 in cycle 1: "))
    assert re.search(r"import \d.*encode \d.*load \d.*measured \d.*of the window, recording \d", line)


@pytest.mark.parametrize(
    ("stop", "cause"),
    [(KeyboardInterrupt(), "Ctrl-C"), (Stopped(signal.SIGTERM), "SIGTERM")],
    ids=["SIGINT", "SIGTERM"],
)
def test_a_signal_between_the_plan_and_the_workers_is_recorded(tmp_path, stop, cause):
    def stopped_at_once(*_):
        raise stop

    ready = preflight(made(tmp_path), host.look())
    with pytest.raises(lem.errors.Interrupted, match="To resume: lem experiment --resume"):
        run_ready(ready, launcher=stopped_at_once)
    store = Store(tmp_path / "results")
    (name,) = store.ids()
    directory = store.directory(name)
    (record,) = directory.records()
    assert (directory.state().status, record.status) == ("interrupted", "interrupted")
    assert record.error.message == f"stopped by {cause}"
    assert record.requests_completed == 0
    assert resume(store, directory).row.status == "completed"


def test_a_library_user_gets_an_error_not_an_exit(tmp_path):
    with pytest.raises(lem.LemError, match="No model"):
        lem.run(lem.Experiment(dataset=Dataset(path="builtin:sample"), io=Io(results_dir=str(tmp_path))))


def made(tmp_path, **values):
    known = {"model": "any", "backend": SimulatedBackend(), "energy": Energy(name="none")}
    known |= {"dataset": Dataset(path="builtin:sample", sample_size=2), "io": Io(results_dir=str(tmp_path / "results"))}
    return lem.Experiment(**known | values)


@pytest.mark.parametrize(
    ("values", "problems"),
    [
        ({"cycles": -1}, ["cycles: should be greater than or equal to 1, not -1."]),
        (
            {"seed": "x", "backend": SimulatedBackend(decode_s_per_token=-1)},
            [
                "seed: should be a valid integer, not 'x'.",
                "backend.decode_s_per_token: should be greater than or equal to 0, not -1.",
            ],
        ),
        ({"energy": Energy(name="nothing")}, ["energy.name: should be 'auto', 'nvml', 'rapl', 'codecarbon'"]),
        ({"backend": "simulated"}, ["backend: should be an object, not 'simulated'."]),
        ({"dataset": None}, ["dataset: should be an object, not None."]),
        ({"model": object()}, ["The experiment has a value that is not plain data"]),
    ],
)  # fmt: skip
def test_values_that_python_does_not_check_are_checked_before_anything_is_written(values, problems, tmp_path):
    with pytest.raises(lem.ConfigError) as caught:
        lem.run(made(tmp_path, **values))
    assert len(caught.value.problems) == len(problems)
    for found, wanted in zip(caught.value.problems, problems, strict=True):
        assert found.startswith(wanted)
    assert not (tmp_path / "results").exists()


def test_what_is_not_an_experiment_is_refused():
    with pytest.raises(lem.ConfigError, match=r"An Experiment is needed, not dict; see lem\.Experiment"):
        lem.run({"model": "any"})


def test_a_results_directory_that_cannot_be_used_is_bad_input(tmp_path):
    (tmp_path / "results").write_text("a file")
    with pytest.raises(lem.BadInput, match="results"):
        lem.run(made(tmp_path))


def test_a_path_is_as_good_as_its_text(tmp_path):
    outcome = lem.run(made(tmp_path, io=Io(results_dir=tmp_path / "results")))
    assert outcome.row.status == "completed"


def test_the_domain_runs_without_hydra(tmp_path):
    code = (
        "import sys; sys.modules['hydra'] = sys.modules['omegaconf'] = None\n"
        "import lem\n"
        "from lem.spec.experiment import Dataset, Energy, Io\n"
        "from lem.spec.engines import SimulatedBackend\n"
        "e = lem.Experiment(model='any', backend=SimulatedBackend(), energy=Energy(name='none'),\n"
        "    dataset=Dataset(path='builtin:sample', sample_size=2), io=Io(results_dir=sys.argv[1]))\n"
        "print(lem.run(e).row.status)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "completed"
