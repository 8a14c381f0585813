"""lem as a library: the job without Hydra."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest

import lem
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


def test_a_library_user_gets_an_error_not_an_exit(tmp_path):
    with pytest.raises(lem.LemError, match="No model"):
        lem.run(lem.Experiment(dataset=Dataset(path="builtin:sample"), io=Io(results_dir=str(tmp_path))))


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
