"""The `lem` command. Importing a command module registers its commands, which delegate to the other packages.

This module imports no heavy libraries; a command that needs torch, transformers, hydra, pyarrow or codecarbon imports
it when it runs.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lem import __version__
from lem.cli.base import app, exit_code_of, ignore_ctrl_c, log_origin
from lem.cli.environment import load_dotenv
from lem.cli.streams import forgiving_streams, lost_output
from lem.units import one_line

# Importing a module registers its commands; the order of imports is the order of commands in lem --help.
# isort: off
from lem.cli import experiment, batch, campaign, jobs, config, results, inventory, doctor  # noqa: F401
# isort: on

# Flags by the path of the configuration value that they set; an error about one of these values mentions the flag.
FLAGS = {
    "model": "--model",
    "dataset.split": "--split",
    "dataset.column": "--column",
    "dataset.sample_size": "--sample-size",
    "max_output_tokens": "--max-tokens",
    "seed": "--seed",
    "io.results_dir": "--results-dir",
}

# The exception that typer raises for invalid arguments; typer does not export it.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

log = logging.getLogger(__name__)


def _version(asked: bool) -> None:
    if asked:
        print(f"lem {__version__}")
        raise typer.Exit


@app.callback()
def _lem(
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool, typer.Option("--version", "-v", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Log lem's steps and the tracebacks of errors to stderr.")
    ] = False,
) -> None:
    """Read .env before any command reads the environment; variables already set take precedence."""
    if verbose:
        _log_to_stderr()
    load_dotenv()
    log.debug("lem %s, Python %s (%s) in %s", __version__, sys.version.split()[0], sys.executable, Path.cwd())
    log.debug("command line: %s", sys.argv[1:])


class _ToStderr(logging.Handler):
    """Write log lines to the current sys.stderr, so that they appear above any progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    """Log lem's own modules to stderr; leave the loggers of other libraries unchanged."""
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(name)s: %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("lem")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.DEBUG)
    ours.propagate = False


def main() -> NoReturn:
    """Run the `lem` command and exit; print lem's own errors as messages, without a traceback."""
    forgiving_streams()
    code = _with_output(exit_code_of(_run, _with_flag))
    log.debug("exit code %d", code)
    ignore_ctrl_c()
    sys.exit(code)


@cache
def _command() -> Callable[..., Any]:
    """Return the complete click command, cached because building it takes longer than running many of the commands."""
    return typer.main.get_command(app)


def _run() -> int:
    """Run the command and return its exit code; an exception that this function does not catch is a bug in lem."""
    try:
        return int(_command()(prog_name="lem", standalone_mode=False) or 0)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except typer.Abort:
        print("Aborted.", file=sys.stderr)
        return 1
    except UsageError as error:
        return _misused(error)
    except OSError as error:
        if error.strerror is None:
            raise
        log_origin(error)
        file = f"{error.filename}: " if error.filename is not None else ""
        print(f"Error: {one_line(file)}{error.strerror}. Run lem --verbose … for the traceback.", file=sys.stderr)
        return 1


def _misused(error: Any) -> int:
    """Print a usage error, with control characters escaped; return the error's exit code.

    For a value of the wrong type, print one sentence, as for a wrong value in a file. Print other errors in typer's
    format.
    """
    from typer import rich_utils

    if sentence := _wrong_value(error):
        print(f"Error: {one_line(sentence)}", file=sys.stderr)
        return int(error.exit_code)
    message = error.format_message()
    error.format_message = lambda: one_line(message)
    rich_utils.rich_format_error(error)
    return int(error.exit_code)


def _wrong_value(error: Any) -> str | None:
    """Return a sentence about a flag's value that is not of the flag's type, or None for any other error."""
    from pydantic import ValidationError  # which typer converts values with

    cause, parameter = error.__cause__, getattr(error, "param", None)
    if parameter is None or not isinstance(cause, ValidationError):
        return None
    detail = cause.errors(include_url=False)[0]
    wanted = detail["msg"].removeprefix("Input should be ").partition(",")[0]
    return f"{'/'.join(parameter.opts)}: must be {wanted}, not {json.dumps(detail['input'], ensure_ascii=False)}."


def _with_flag(line: str) -> str:
    """If an error message starts with the path of a configuration value, add the flag that sets the value."""
    path = line.partition(":")[0]
    return line.replace(path, f"{path} ({FLAGS[path]})", 1) if path in FLAGS else line


def _with_output(code: int) -> int:
    """Return the given exit code, or 1 in place of 0 if some of the output was lost.

    A closed pipe (lem … | head) is not an error: the reader has all it wanted.
    """
    lost = lost_output()
    if lost is None or isinstance(lost, BrokenPipeError):
        return code
    print(f"Error: cannot write to standard output ({lost.strerror}); results are not affected.", file=sys.stderr)
    return code or 1
