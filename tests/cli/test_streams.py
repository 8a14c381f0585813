"""The command in unusual surroundings: closed, full or abandoned streams, ASCII, narrow terminals, completion.

Each test starts real processes with real file descriptors.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from lem.results.store import Store
from lem.results.tables import Tables
from tests.conftest import SIMULATED, Finished, command

pytestmark = pytest.mark.processes

RUN = ("experiment", *SIMULATED, "-n", "2")
FAILING = (*RUN, "backend.fail_at_request=1")
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# Shells and CI services set these, and rich follows them.
UNSET = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
PLAIN_ENV = {name: value for name, value in os.environ.items() if name not in UNSET}


def shell(redirection: str, *arguments: str, cwd: Path) -> Finished:
    """Run `lem … <redirection>` in bash."""
    script = f'{sys.executable} -m lem "$@" {redirection}'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, "bash", *arguments],
        cwd=cwd, env=PLAIN_ENV, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return Finished(done.returncode, done.stdout, done.stderr)


def terminal(columns: int, *arguments: str, cwd: Path, **env: str) -> Finished:
    """Run `lem …` on a new terminal, with all three streams on it."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "lem", *arguments],
        cwd=cwd, env={**PLAIN_ENV, "TERM": "xterm-256color", **env}, stdin=its, stdout=its, stderr=its,
        start_new_session=True,
    )  # fmt: skip
    os.close(its)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return Finished(process.wait(timeout=60), shown.decode().replace("\r\n", "\n"), "")


def statuses(results: Path) -> list[str]:
    """Read the statuses in all raw records, and check that each experiment has its row in the table."""
    store = Store(results)
    assert all(Tables(store).location(experiment_id) for experiment_id in store.ids())
    return [record.status for name in store.ids() for record in store.find(name).records()]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory whose results/ holds a completed and a failed experiment; the model's name is not ASCII."""
    there = tmp_path_factory.mktemp("made")
    for arguments in (RUN, FAILING):
        command(*arguments, "--model", "modèle-😀", cwd=there)
    assert statuses(there / "results") == ["completed", "failed"]
    return there


def ids(made: Path) -> list[str]:
    return Store(made / "results").ids()


# ------------------------------------------------------------------ closed, full and abandoned streams
@pytest.mark.parametrize(
    ("redirection", "arguments", "status", "code"),
    [
        *((redirection, RUN, "completed", 0) for redirection in (">&-", "<&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full")),
        *((redirection, FAILING, "failed", 1) for redirection in (">&-", "<&- >&- 2>&-")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_does_not_need_the_standard_streams(redirection, arguments, status, code, tmp_path):
    assert shell(redirection, *arguments, cwd=tmp_path).code == code
    assert statuses(tmp_path / "results") == [status]


def test_without_stdin_no_question_is_asked(tmp_path):
    assert shell("<&-", *(part for part in RUN if part != "-y"), cwd=tmp_path).code == 0
    assert statuses(tmp_path / "results") == ["completed"]


@pytest.mark.parametrize("arguments", [("results", "list"), ("results", "list", "--json"), ("--help",)])
def test_a_closed_stdout_is_like_dev_null(arguments, made):
    """A user who closes stdout does not want its output, so that is no failure."""
    finished = shell(">&-", *arguments, cwd=made)
    assert (finished.code, finished.err) == (0, "")


@pytest.mark.parametrize("arguments", [("results", "list", "--json"), ("datasets",), ("--help",), ("--version",)])
def test_a_full_stdout_is_one_sentence(arguments, made):
    finished = shell(">/dev/full", *arguments, cwd=made)
    assert finished.code == 1
    (sentence,) = finished.err.splitlines()
    assert "No space left on device" in sentence


def test_a_run_with_a_full_stdout_keeps_its_results(tmp_path):
    finished = shell(">/dev/full", *RUN, cwd=tmp_path)
    assert finished.code == 1
    assert finished.err.count("Error:") == 1
    assert statuses(tmp_path / "results") == ["completed"]


def test_bad_input_keeps_its_exit_code_whatever_the_streams_are(tmp_path):
    for redirection in (">/dev/full", ">/dev/full 2>&1", "<&- >&- 2>&-"):
        assert shell(redirection, "results", "show", "exp_1", cwd=tmp_path).code == 2


WAITING = """
import sys
from lem.cli.streams import forgiving_streams
forgiving_streams()
print("line", file=getattr(sys, sys.argv[1]))
sys.stdin.read()
"""


@pytest.mark.parametrize(("stream", "unbuffered"), [("stderr", ""), ("stderr", "1"), ("stdout", "1")])
def test_a_line_leaves_at_once(stream, unbuffered):
    """Without PYTHONUNBUFFERED, Python keeps what is printed to a piped stdout, so that is left out."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, stream], env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    with process:
        ready, _, _ = select.select([process.stdout], [], [], 20)
        assert ready, "the process is waiting, and what it printed before has not arrived"
        assert process.stdout.readline() == b"line\n"
        process.stdin.close()
    assert process.returncode == 0


@pytest.mark.parametrize(("arguments", "code"), [(RUN, 0), (FAILING, 1)])
def test_a_reader_that_leaves_does_not_hide_the_outcome(arguments, code, tmp_path):
    finished = shell("| true", *arguments, cwd=tmp_path)
    assert finished.code == code
    assert "Error" not in finished.err


def test_a_reader_that_leaves_a_listing_is_no_error(made):
    finished = shell("| true", "results", "list", "--json", cwd=made)
    assert (finished.code, finished.err) == (0, "")
    finished = shell("2>&1 | head -c 1 >/dev/null", "results", "show", "exp_1", cwd=made)
    assert finished.code == 2


def test_a_slow_reader_of_a_pipe_that_does_not_block_gets_everything(made):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(
        [sys.executable, "-m", "lem", "results", "list", "--json"], cwd=made, env=PLAIN_ENV, stdout=writing
    )
    os.close(writing)
    time.sleep(1)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    assert process.wait(timeout=60) == 0
    assert len(text) > 8192
    assert [row["status"] for row in json.loads(text)] == ["completed", "failed"]


# ------------------------------------------------------------------ ASCII
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (RUN, 0),
        (FAILING, 1),
        (("results", "list"), 0),
        (("results", "list", "--json"), 0),
        (("results", "show", "ID"), 0),
        (("results", "show", "ID", "--raw"), 0),
        (("datasets",), 0),
        (("presets",), 0),
        (("gpus",), 0),
        (("experiment", "-h"), 0),
        (("experimant",), 2),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, tuple) else "",
)
def test_ascii_is_enough(arguments, code, made, tmp_path):
    arguments = [ids(made)[0] if part == "ID" else part for part in arguments]
    finished = command(*arguments, cwd=tmp_path if arguments[0] == "experiment" else made, **ASCII)
    assert "Traceback" not in finished.err
    assert finished.code == code
    assert (finished.out + finished.err).isascii()


def test_tables_are_spelled_in_ascii_and_json_says_the_same(made):
    shown = command("results", "show", ids(made)[0], cwd=made, **ASCII).out
    assert "| p50 " in shown
    assert "mod\\u00e8le-\\ud83d\\ude00" in shown
    listing = ("results", "list", "--json")
    assert json.loads(command(*listing, cwd=made, **ASCII).out) == json.loads(command(*listing, cwd=made).out)
    # Bytes that the locale cannot decode are written back unchanged.
    assert "no experiment 'é' in" in command("results", "show", "é", cwd=made, **ASCII).err


# ------------------------------------------------------------------ terminals
@pytest.mark.parametrize("columns", [20, 40, 60, 80])
def test_no_terminal_is_too_narrow_for_an_id(columns, made):
    listed = terminal(columns, "results", "list", "--all", cwd=made).out
    assert all(experiment_id in listed for experiment_id in ids(made))
    assert ids(made)[0] in terminal(columns, "results", "show", ids(made)[0], cwd=made).out
    assert "completed" in listed
    assert "…" not in listed


@pytest.mark.parametrize("columns", [40, 60])
def test_a_runs_own_table_fits_a_narrow_terminal(columns, tmp_path):
    finished = terminal(columns, *RUN, cwd=tmp_path)
    (experiment_id,) = ids(tmp_path)
    assert finished.code == 0
    assert experiment_id in finished.out
    assert "2 of 2 from sample, seed 42" in finished.out


def test_mean_and_percentiles_fit_on_one_line_of_80_columns(tmp_path):
    finished = terminal(80, *RUN, "--streaming", cwd=tmp_path, NO_COLOR="1", TERM="dumb")
    names = ("Latency", "Time to first token", "Inter-token latency", "Time per output token")
    shown = [line for line in finished.out.splitlines() if line.startswith(names)]
    assert len(shown) == len(names)
    assert all(re.search(r"mean .* p50 .* p95 .* p99 \S+ \S+$", line.rstrip()) for line in shown)


def test_in_a_terminal_no_line_of_a_table_is_longer_than_it(made):
    for columns in (80, 100, 130):
        shown = terminal(columns, "presets", cwd=made, NO_COLOR="1", TERM="dumb", COLUMNS=str(columns)).out
        assert max(map(len, shown.splitlines())) <= columns
        assert "batching.max_tokens_per_batch=8192" in shown


def test_piped_values_are_whole(tmp_path):
    model = "some/" + "x" * 300 + " y" * 100
    assert command(*RUN, "--model", model, cwd=tmp_path).code == 0
    (experiment_id,) = ids(tmp_path)
    for listing in (("results", "list"), ("results", "show", experiment_id)):
        assert any(model in line for line in command(*listing, cwd=tmp_path, COLUMNS="40").out.splitlines())


def test_colour_is_the_users_choice(made):
    colour = re.compile(r"\x1b\[[0-9;]*3[0-9]m")
    assert colour.search(terminal(100, "results", "list", cwd=made).out)
    assert not colour.search(terminal(100, "results", "list", cwd=made, NO_COLOR="1").out)
    for arguments in (("results", "list"), ("-h",), ("experimant",)):
        assert "\x1b" not in terminal(100, *arguments, cwd=made, TERM="dumb").out
    assert "\x1b" not in command("results", "list", cwd=made, CI="true").out


# ------------------------------------------------------------------ wording
def test_what_was_not_measured_has_no_arithmetic(made):
    completed, failed = (command("results", "show", name, cwd=made).out for name in ids(made))
    for shown in (completed, failed):
        assert "not measured" in shown
        assert "–" not in shown
    assert failed.splitlines()[0].split() == [ids(made)[1], "failed"]
    assert re.match(r"Error +simulated failure at request 1$", failed.splitlines()[1])
    assert "Throughput" in completed
    assert "Throughput" not in failed


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (("experimant",), "'experiment'"),
        (("results", "lst"), "'list'"),
        (("experiment", "--sede", "1"), "--seed"),
        (("results", "list", "--jsn"), "--json"),
        (("--verbos", "presets"), "--verbose"),
    ],
)
def test_a_slip_of_the_pen_gets_a_suggestion(arguments, suggestion, tmp_path):
    finished = command(*arguments, cwd=tmp_path)
    assert finished.code == 2
    assert suggestion in finished.err


def test_every_command_has_its_help_also_in_a_narrow_terminal(lem, monkeypatch):
    import typer

    from lem.cli.commands import all_commands

    def paths(node, path):
        yield path
        for name, child in getattr(node, "commands", {}).items():
            yield from paths(child, (*path, name))

    for columns in ("40", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        for path in paths(typer.main.get_command(all_commands()), ()):
            short, long = lem(*path, "-h"), lem(*path, "--help")
            assert (short.code, long.code) == (0, 0)
            assert short.out == long.out
            assert "Usage: " + " ".join(["lem", *path]) in short.out


def test_a_working_directory_that_is_gone_is_named(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"rmdir {gone} && exec {sys.executable} -P -m lem presets"
    done = subprocess.run(["bash", "-c", script], cwd=gone, env=PLAIN_ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "Error: the working directory no longer exists. Change to another one.\n"


# ------------------------------------------------------------------ verbose
def test_verbose_logs_to_stderr_what_is_done(made):
    quiet, verbose = (command(*more, "results", "list", "--json", cwd=made) for more in ((), ("--verbose",)))
    assert json.loads(verbose.out) == json.loads(quiet.out)
    assert quiet.err == ""
    assert "lem.cli: command line: ['--verbose', 'results', 'list', '--json']" in verbose.err
    assert "lem.cli: exit code 0" in verbose.err


def test_verbose_shows_where_an_error_comes_from_and_no_secret(tmp_path):
    (tmp_path / ".env").write_text("HF_TOKEN=hf_from_file\n")
    finished = command("--verbose", "results", "show", "exp_1", cwd=tmp_path, HF_TOKEN="hf_from_environment")
    assert finished.code == 2
    assert "Traceback (most recent call last)" in finished.err
    assert f".env: {tmp_path / '.env'}" in finished.err
    assert "Error: There is no experiment 'exp_1'" in finished.err
    assert "hf_from" not in finished.err
    assert "Traceback" not in command("results", "show", "exp_1", cwd=tmp_path).err


# ------------------------------------------------------------------ completion
def completed(words: str, cwd: Path, tmp_path: Path) -> list[str]:
    """Let bash complete the last word with the script from `lem --show-completion`."""
    binary = tmp_path / "bin" / "lem"
    binary.parent.mkdir(exist_ok=True)
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} -m lem "$@"\n')
    binary.chmod(0o755)
    script = (
        'eval "$(lem --show-completion)"\n'
        f"COMP_WORDS=(lem {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        '_lem_completion lem; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    path = f"{binary.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=cwd, env={**PLAIN_ENV, "PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_options_and_ids(made, tmp_path):
    assert {"experiment", "results", "presets"} <= set(completed('""', made, tmp_path))
    assert completed("exp", made, tmp_path) == ["experiment"]
    assert completed("--verb", made, tmp_path) == ["--verbose"]
    assert completed("experiment --sam", made, tmp_path) == ["--sample-size"]
    newest_first = list(reversed(ids(made)))
    assert completed("results show exp", made, tmp_path) == newest_first
    assert completed('results show ""', tmp_path, tmp_path) == []
    assert completed(f"aggregate -o {made / 'results'} exp", tmp_path, tmp_path) == newest_first


def test_zsh_gets_what_bash_gets_with_the_help_texts(made):
    finished = command(cwd=made, _LEM_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="lem results sh")
    assert '"show":"Show the measurements' in finished.out


def test_presets_datasets_and_backends_are_offered_with_their_purpose():
    from lem.cli import complete

    assert complete.presets("quick") == [("quick-test", "For a quick check that everything works")]
    assert [name for name, _ in complete.datasets("al")] == ["alpaca"]
    assert "pytorch" in dict(complete.backends(""))
