"""The garbage collector is paused while the `lem` command starts, but not while an experiment runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Prints whether the collector is on at the first import of a module, and how it is when the process exits.
PROGRAM = """
import atexit, gc, sys

class Watch:
    @staticmethod
    def find_spec(name, *_):
        if name == {module!r}:
            print("collector on:", gc.isenabled(), file=sys.stderr)

sys.meta_path.insert(0, Watch)
atexit.register(lambda: print("at exit:", gc.isenabled(), gc.get_freeze_count(), file=sys.stderr))
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
    # It is on again, and no object is frozen: with frozen objects, some listings were aborted while they exited.
    assert "at exit: True 0" in done.stderr
