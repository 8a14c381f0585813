"""What the tests share: running the real command, in this process or in one of its own, and reading results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.standin import driver, standin  # noqa: F401 - fixtures

# No test may wait for a hub that it cannot reach.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("LLM_ENERGY_RESULTS_DIR", None)
# Started in the background of a script, this process ignores Ctrl-C, and so would the commands that it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests run side by side: OpenMP's threads would spin against each other for the same cores.
os.environ["OMP_NUM_THREADS"] = "1"


@dataclass
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def lem(tmp_path, monkeypatch, capfd):
    """Run `lem …` in this process, in an empty directory; an unforeseen exception is the test's failure."""
    from lem import cli

    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)

    def run(*arguments: str) -> Finished:
        monkeypatch.setattr(sys, "argv", ["lem", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Finished(int(stop.value.code or 0), out, err)

    yield run
    # The command reads .env files into this process's environment.
    os.environ.clear()
    os.environ.update(before)


def command(*arguments: str, cwd: Path, **env: str) -> Finished:
    """Run `lem …` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "lem.cli", *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


SIMULATED = ("--backend", "simulated", "--model", "any", "-d", "sample", "energy=none", "-y")


def raw_record(results: Path, rank: int = 0) -> dict:
    """Read the only experiment's raw record."""
    (file,) = results.glob(f"raw/*/process_{rank}.json")
    return json.loads(file.read_text())
