"""Code shared by all commands: the typer app, common options, and the printing of errors."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from lem.errors import Interrupted, LemError
from lem.spec.paths import literal

log = logging.getLogger(__name__)


def new_app() -> typer.Typer:
    """Return an app without commands."""
    return typer.Typer(
        help="Measure what running a language model costs: joules, seconds, tokens, FLOPs and CO2e.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


app = new_app()

ResultsDir = Annotated[
    Path | None,
    typer.Option(
        "--results-dir",
        "-o",
        parser=literal,
        metavar="PATH",
        help="Results directory (default: LLM_ENERGY_RESULTS_DIR, else results/).",
    ),
]

AnyMachine = Annotated[
    bool, typer.Option("--any-machine", help="Ignore problems specific to this machine (GPUs, packages).")
]

ConfigDir = Annotated[
    Path | None,
    typer.Option(
        "--config-dir",
        help="Directory with your own presets, datasets, … (default: conf/ next to the config file, or in the "
        "working directory if no config file is given).",
    ),
]


def exit_code_of(run: Callable[[], int], shown: Callable[[str], str] = str) -> int:
    """Run a command and return its exit code; print lem's own errors.

    Each line of an error is formatted with `shown`; the message of an interruption is printed as it is.
    """
    try:
        return run()
    except Interrupted as stop:
        ignore_ctrl_c()
        log_origin(stop)
        print(f"\n{stop}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        ignore_ctrl_c()
        return Interrupted.exit_code
    except LemError as error:
        log_origin(error)
        for line in str(error).split("\n"):
            print(f"Error: {shown(line)}", file=sys.stderr)
        return error.exit_code


def ignore_ctrl_c() -> None:
    """Ignore Ctrl-C from now on: the command is exiting, and its exit code is already known."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def log_origin(error: Exception) -> None:
    """Log the traceback of an error and of its cause, even if the error was raised `from None`."""
    error.__suppress_context__ = False
    log.debug("traceback of the error", exc_info=error)
