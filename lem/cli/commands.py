"""Finds and runs the requested command. Importing a command module registers its commands.

The commands delegate to the other packages. Only the modules of the requested command are imported; `lem --help`
imports no command module, and shell completion imports all of them. This module imports no heavy libraries; a command
that needs hydra, pyarrow or codecarbon imports that library when it runs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from lem import __version__
from lem.cli.base import app, exit_code_of, log_origin, new_app
from lem.cli.environment import load_dotenv
from lem.cli.formatter import import_formatter
from lem.cli.streams import forgiving_streams, lost_output
from lem.errors import BadInput
from lem.machine.collector import paused_collector
from lem.quantities import one_line
from lem.runner.stopping import ignore_signals

# For each command, its module and the first sentence of its help, in the order of lem --help. A test compares these
# sentences with the help of the commands themselves.
COMMANDS = {
    "experiment": ("experiment", "Run an experiment and show its results."),
    "batch": ("batch", "Check many config files, then run one experiment for each of them."),
    "campaign": ("campaign", "Measure several configurations in turn and compare them."),
    "schedule": (
        "schedule",
        "Run an experiment or a campaign at planned times, to study how costs vary over time.",
    ),
    "jobs": (
        "jobs",
        "List the studies with jobs on a Slurm cluster, follow the jobs of one study until they end, or cancel them.",
    ),
    "aggregate": (
        "results",
        "Build table rows from raw records; lem experiment does this automatically at the end of a run.",
    ),
    "gpus": ("inventory", "Show the NVIDIA GPUs, their MIG instances, and which of them CUDA_VISIBLE_DEVICES hides."),
    "datasets": ("inventory", "List the datasets that --dataset accepts by name, both built-in ones and your own."),
    "presets": ("inventory", "List the presets that --preset accepts, both built-in ones and your own."),
    "doctor": ("doctor", "Report what can be measured on this machine, what cannot, and how to fix that."),
    "config": ("config", "Check, show and create configurations."),
    "results": ("results", "Show, compare, report, export and manage results."),
}

# Further modules with subcommands of a command.
MORE_MODULES = {"results": ("compare", "report", "keeping")}

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

HELP = frozenset({"-h", "--help"})

# The exception that typer raises for invalid arguments; typer does not export it.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

log = logging.getLogger(__package__)


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
    """Start the log if --verbose is given; then, in any case, load .env, before a command reads the environment."""
    if verbose:
        _log_to_stderr()
    load_dotenv()
    log.debug("lem %s, Python %s (%s) in %s", __version__, sys.version.split()[0], sys.executable, Path.cwd())
    log.debug("command line: %s", sys.argv[1:])


class _ToStderr(logging.Handler):
    """Writes log lines to the current sys.stderr, so that they appear above any progress bar."""

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


def run() -> int:
    """Run the requested command and return its exit code; print lem's own errors as messages."""
    forgiving_streams()
    code = _with_output(exit_code_of(_run, _with_flag))
    log.debug("exit code %d", code)
    ignore_signals()  # the command is exiting, and its exit code is already known
    return code


def all_commands() -> typer.Typer:
    """Return the app with all commands, in the order of lem --help."""
    for name in COMMANDS:
        _import_modules_of(name)
    order = list(COMMANDS)
    app.registered_commands.sort(key=lambda each: order.index(str(each.name or getattr(each.callback, "__name__", ""))))
    app.registered_groups.sort(key=lambda each: order.index(str(each.name)))
    return app


def _listing() -> typer.Typer:
    """Return an app that knows only the names and first sentences of the commands, for lem --help."""
    listing = new_app()
    listing.callback()(_lem)
    for name, (_, sentence) in COMMANDS.items():
        listing.command(name, help=sentence)(_not_run)
    return listing


def _not_run() -> None:
    raise AssertionError("the listing only prints help, but one of its commands was run")


def _asked(arguments: list[str]) -> str | None:
    """Return the name of the command on a command line; None if the line names no command or an unknown one."""
    # The options before a command take no values, so the first other word is the command.
    first = next((text for text in arguments if not text.startswith("-")), None)
    return first if first in COMMANDS else None


@cache
@paused_collector()
def _command(asked: str | None) -> Callable[..., Any]:
    """Return a click command that includes the requested command or, if none is requested, only prints help.

    The result is cached, because building it takes a while.
    """
    if "_LEM_COMPLETE" in os.environ:
        return typer.main.get_command(all_commands())
    if asked is None or not HELP.isdisjoint(sys.argv):
        import_formatter()
    if asked is None:
        return typer.main.get_command(_listing())
    _import_modules_of(asked)
    return typer.main.get_command(app)


def _import_modules_of(command: str) -> None:
    """Import the modules that define a command; importing a module registers its commands."""
    for module in (COMMANDS[command][0], *MORE_MODULES.get(command, ())):
        import_module(f"lem.cli.{module}")


def _run() -> int:
    """Run the command and return its exit code.

    `exit_code_of` handles lem's own errors and Ctrl-C; any other exception that leaves this function is a bug in lem.
    """
    try:
        return int(_command(_asked(sys.argv[1:]))(prog_name="lem", standalone_mode=False) or 0)
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
        if error.filename is None and not _has_working_directory():
            print("Error: the working directory no longer exists. Change to another one.", file=sys.stderr)
            return BadInput.exit_code
        file = f"{error.filename}: " if error.filename is not None else ""
        print(f"Error: {one_line(file)}{error.strerror}. Run lem --verbose … for the traceback.", file=sys.stderr)
        return 1


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def _misused(error: Any) -> int:
    """Print a usage error, with control characters escaped; return the error's exit code.

    For a value of the wrong type, print one sentence, as for a wrong value in a file. Print other errors in typer's
    format.
    """
    if sentence := _wrong_value(error):
        print(f"Error: {one_line(sentence)}", file=sys.stderr)
        return int(error.exit_code)
    import_formatter()
    from typer import rich_utils

    message = error.format_message()
    error.format_message = lambda: one_line(message)
    rich_utils.rich_format_error(error)
    return int(error.exit_code)


def _wrong_value(error: Any) -> str | None:
    """Return a sentence about a flag whose value has the wrong type; None if the error is about something else."""
    from pydantic import ValidationError  # the library with which typer converts values

    cause, parameter = error.__cause__, getattr(error, "param", None)
    if parameter is None or not isinstance(cause, ValidationError):
        return None
    detail = cause.errors(include_url=False)[0]
    wanted = detail["msg"].removeprefix("Input should be ").partition(",")[0]
    return f"{'/'.join(parameter.opts)}: must be {wanted}, not {json.dumps(detail['input'], ensure_ascii=False)}."


def _with_flag(line: str) -> str:
    """Return a line of an error message; if the line starts with the path of a value that a flag sets, add the flag."""
    path = line.partition(":")[0]
    return line.replace(path, f"{path} ({FLAGS[path]})", 1) if path in FLAGS else line


def _with_output(code: int) -> int:
    """Return the given exit code, but 1 instead of 0 if some of the output was lost.

    A closed pipe (lem … | head) is not an error, because the reader has read all that it wanted.
    """
    lost = lost_output()
    if lost is None or isinstance(lost, BrokenPipeError):
        return code
    print(f"Error: cannot write to standard output ({lost.strerror}); results are not affected.", file=sys.stderr)
    return code or 1
