"""Runs code on a stand-in for NVIDIA's driver: builds it, writes a scenario, and sets up an environment with both.

The scenario's format is described at the top of nvml_standin.c. The dynamic linker finds the library through the
environment of a new process, and the library reads its scenario once, so code runs on it in a separate process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "nvml_standin.c"
SONAME = "libnvidia-ml.so.1"


def build(folder: Path) -> Path:
    """Compile the stand-in into the folder and return the library."""
    library = folder / SONAME
    flags = ["-shared", "-fPIC", "-pthread", "-O2", "-Wall", "-Werror", f"-Wl,-soname,{SONAME}"]
    subprocess.run(["gcc", *flags, "-o", str(library), str(SOURCE)], check=True)
    return library


def scenario(path: Path, text: str) -> Path:
    """Write a scenario, free of the indentation of the code around it."""
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def environment(library: Path, scenario_file: Path | None = None, **env: str) -> dict[str, str]:
    """Return the environment of a process that sees the stand-in's GPUs; `env` may restrict them."""
    chosen = {} if scenario_file is None else {"NVML_STANDIN_SCENARIO": str(scenario_file)}
    clean = {k: v for k, v in os.environ.items() if k not in ("CUDA_VISIBLE_DEVICES", "NVML_STANDIN_SCENARIO")}
    return {**clean, "LD_LIBRARY_PATH": str(library.parent), **chosen, **env}


@pytest.fixture(scope="session")
def standin(tmp_path_factory) -> Path:
    """Build the stand-in once and return the library."""
    return build(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(standin, tmp_path):
    """Return a function that runs Python code on a scenario and returns what it prints as JSON."""

    def run(code: str, text: str = "", **env: str):
        file = scenario(tmp_path / "scenario.txt", text)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=environment(standin, file, **env),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run
