"""Importing typer's formatter without unused parts of rich leaves the help and rich as they are."""

from __future__ import annotations

import subprocess
import sys

import pytest

FORMATTED = """
import sys
from lem.cli.commands import all_commands
from lem.cli.formatter import UNUSED, import_formatter
if sys.argv[1] == "lean":
    import_formatter()
    assert not set(UNUSED) & set(sys.modules), "loaded although unused"
import typer
typer.main.get_command(all_commands())(sys.argv[2:], prog_name="lem", standalone_mode=False)
"""


def output(code: str, *arguments: str) -> str:
    """Return the standard output of a program that succeeds."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["experiment", "--help"], ["results", "list", "--help"]])
def test_help_is_the_same_with_all_of_rich(arguments: list[str]) -> None:
    lean = output(FORMATTED, "lean", *arguments)
    assert "Usage: lem" in lean
    assert lean == output(FORMATTED, "full", *arguments)


def test_rich_is_complete_afterwards() -> None:
    code = (
        "from lem.cli.formatter import import_formatter; import_formatter();"
        "from rich.markdown import Markdown; from rich.traceback import Traceback;"
        "print(Markdown('# a').markup, Traceback.__module__)"
    )
    assert output(code) == "# a rich.traceback\n"
