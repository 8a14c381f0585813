"""The `lem` command starts with the garbage collector paused, and ends without tearing the interpreter down."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Prints whether the collector is on at the first import of a module, and what happens when the process exits.
PROGRAM = """
import atexit, gc, os, sys

class Watch:
    @staticmethod
    def find_spec(name, *_):
        if name == {module!r}:
            print("collector on:", gc.isenabled(), file=sys.stderr)
            atexit.register(print, "a library cleans up", file=sys.stderr)

def leave(code, end=os._exit):
    print("left at once, collector on:", gc.isenabled(), file=sys.stderr, flush=True)
    end(code)

os._exit = leave
sys.meta_path.insert(0, Watch)
sys.argv = {argv!r}
from lem.cli import main
main()
"""
RUN = ("experiment", "-m", "any", "backend=simulated", "-d", "sample", "-n", "2", "energy=none", "-y")


@pytest.mark.parametrize(
    ("module", "arguments", "on"),
    [
        ("typer", ["--help"], False),
        ("lem.cli.experiment", [*RUN, "--dry-run"], False),
        ("hydra", [*RUN, "--dry-run"], False),
        ("lem.cli.validate", ["config", "show", "model=any"], False),
        ("lem.results.browse", ["results", "list"], False),
        ("lem.runner.launch", RUN, True),
    ],
    ids=["first library", "command", "composition", "check", "list", "run"],
)
def test_the_collector_is_paused_except_during_runs(tmp_path, module, arguments, on):
    program = PROGRAM.format(module=module, argv=["lem", *arguments])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"collector on: {on}" in done.stderr
    # A forked process of a run ends in this way too, so the line may occur more than once.
    assert "a library cleans up\nleft at once, collector on: True\n" in done.stderr


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["--nope"], 2), (["results", "show", "x"], 2)])
def test_the_exit_code_and_the_output_are_complete(tmp_path, arguments, code):
    program = PROGRAM.format(module="nothing", argv=["lem", *arguments])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code
    assert done.stdout.endswith("\n") if code == 0 else "Error" in done.stderr
    assert done.stderr.endswith("left at once, collector on: True\n")


def test_an_error_of_lem_itself_still_prints_its_traceback(tmp_path):
    program = "from lem.cli import commands, main\ncommands.run = lambda: 1 / 0\nmain()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
