"""Output is escaped: the functions themselves, and the command on a terminal and without one."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lem.errors import ConfigError, DatasetError
from lem.quantities import is_printable, one_line, printable
from lem.results.store import Store
from tests.cli.test_streams import terminal
from tests.conftest import SIMULATED

ESC, BEL = "\x1b", "\x07"
NAME = f"p{ESC}[31mred{ESC}]0;title{BEL}\x9b7m\u202ex\ny[bold]z.txt"
SHOWN = "p\\u001b[31mred\\u001b]0;title\\u0007\\u009b7m\\u202ex\\ny[bold]z.txt"
# Sequences that rich and typer write themselves: colours, cursor movement, erasing; never a title, link or C1 code.
OF_RICH = re.compile(r"\x1b\[[0-9;?]*[mKAhlGJ]")


@pytest.mark.parametrize(
    ("text", "all_escaped", "on_one_line"),
    [
        ("plain, naïve, 日本, 😀, שלום", None, None),
        ("tab\tand\nline", "tab\tand\nline", "tab\\tand\\nline"),
        (NAME, SHOWN.replace("\\n", "\n"), SHOWN),
        (
            "\x00\r\x7f\x85\u2028\u2066",
            "\\u0000\\r\\u007f\\u0085\\u2028\\u2066",
            "\\u0000\\r\\u007f\\u0085\\u2028\\u2066",
        ),
    ],
)
def test_control_characters_are_escaped(text, all_escaped, on_one_line):
    assert printable(text) == (all_escaped or text)
    assert one_line(text) == (on_one_line or text)
    assert is_printable(printable(text))


@given(st.text())
def test_what_is_escaped_holds_nothing_to_escape_and_is_the_same_in_json(text):
    assert is_printable(printable(text))
    assert one_line(one_line(text)) == one_line(text)
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text


def test_a_problem_is_one_line_whatever_it_quotes():
    assert str(DatasetError(f"There is no {NAME}.")) == f"There is no {SHOWN}."
    assert str(ConfigError("a\nb", "c")).split("\n") == ["a\\nb", "c"]


def check(shown: str) -> None:
    """Check that the output has only rich's own escape sequences."""
    rest = OF_RICH.sub("", shown.replace("\r", ""))
    assert rest == printable(rest), ascii(rest)
    assert f"{ESC}[31mred" not in shown


@pytest.fixture
def folder(tmp_path):
    (tmp_path / NAME).write_text("one\ntwo\n")
    (tmp_path / f"{NAME}.yaml").write_text("nothing_of_lem: 1\n")
    return tmp_path


RUN = ("experiment", *SIMULATED[:4], "-p", NAME, "energy=none", "-y")


@pytest.mark.processes
@pytest.mark.parametrize(
    "arguments",
    [RUN, (*RUN, "--multirun", f"model='{ESC}[31mred,x','{ESC}]0;t{BEL}'"), (*RUN, "backend.fail_at_request=1")],
    ids=["one", "several", "failed"],
)
def test_a_run_paints_nothing_on_a_terminal(arguments, folder):
    """Bars, tables, the summary and the lines above the bars are all escaped."""
    done = terminal(100, *arguments, cwd=folder)
    assert ESC in done.out  # rich has coloured the output
    check(done.out)
    for more in (("results", "list", "-a"), ("results", "show", "exp")):
        check(terminal(200, *more, cwd=folder).out)
    if "--multirun" not in arguments:
        (name,) = Store(folder / "results").ids()
        assert SHOWN in OF_RICH.sub("", terminal(300, "results", "show", name, cwd=folder).out)


FILE = f"{NAME}.yaml"
REFUSED = (
    ("experiment", FILE, "-y"), ("experiment", f"no{FILE}", "-y"), ("batch", "-y", "."), ("config", "validate", FILE),
    ("results", "show", NAME), ("results", "list", "-o", NAME), ("results", "list", "--sort", NAME), (f"--{NAME}",),
    (NAME,), ("experiment", "--preset", NAME), ("experiment", "-y", "--model", "x", "-d", NAME),
    ("experiment", "-y", f"seed={NAME}"), ("experiment", "-y", f"{NAME}=1"), ("config", "new", "--preset", NAME),
)  # fmt: skip


@pytest.mark.parametrize("arguments", REFUSED, ids=ascii)
def test_an_error_paints_nothing(arguments, folder, lem):
    done = lem(*arguments)
    assert done.code in (0, 2)
    check(done.out + done.err)


@pytest.mark.processes
@pytest.mark.parametrize("arguments", [REFUSED[0], REFUSED[3], REFUSED[7]], ids=ascii)
def test_an_error_paints_nothing_on_a_terminal(arguments, folder):
    check(terminal(100, *arguments, cwd=folder).out)
