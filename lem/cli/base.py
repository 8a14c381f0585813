"""Code shared by all commands: the typer app, common options, and the printing of errors."""

from __future__ import annotations

import logging
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

import lem
from lem.errors import Interrupted, LemError
from lem.runner.stopping import signals_raise
from lem.spec.paths import literal

log = logging.getLogger(__name__)


class _Commands(typer.core.TyperGroup):
    """Commands whose interruption keeps its message; typer would only turn it into an exit code."""

    def invoke(self, ctx: Any) -> Any:  # typer does not export the type
        """Run the requested command.

        Raises:
            Interrupted: a signal stopped the command.
        """
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted(str(stop)) from stop


def new_app() -> typer.Typer:
    """Return an app without commands."""
    return typer.Typer(
        cls=_Commands,
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
    """Run a command and return its exit code; print lem's own errors. SIGTERM and SIGHUP interrupt it like Ctrl-C.

    Each line of an error is formatted with `shown`; the message of an interruption is printed as it is.
    """
    try:
        with signals_raise():
            return run()
    except (Interrupted, KeyboardInterrupt) as stop:
        return _interrupted(stop)
    except LemError as error:
        log_origin(error)
        for line in str(error).split("\n"):
            print(f"Error: {shown(line)}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        # An interruption in the middle of a library's cleaning up can surface as an error of the library.
        interruption = _interruption_behind(error)
        if interruption is None or _is_own(error):
            raise
        log_origin(error)
        return _interrupted(interruption)


def _interrupted(stop: Interrupted | KeyboardInterrupt) -> int:
    ignore_ctrl_c()
    log_origin(stop)
    if str(stop):
        print(f"\n{stop}", file=sys.stderr)
    return Interrupted.exit_code


def _interruption_behind(error: BaseException) -> Interrupted | KeyboardInterrupt | None:
    """Return the interruption during whose handling an error occurred, or None."""
    before, seen = error.__cause__ or error.__context__, {id(error)}
    while before is not None and id(before) not in seen:
        if isinstance(before, (Interrupted, KeyboardInterrupt)):
            return before
        seen.add(id(before))
        before = before.__cause__ or before.__context__
    return None


def _is_own(error: Exception) -> bool:
    """Return whether lem's own code raised an error, so that the error is a bug in lem."""
    raised_in = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return bool(raised_in) and Path(raised_in[-1]).is_relative_to(Path(lem.__file__).parent)


def ignore_ctrl_c() -> None:
    """Ignore Ctrl-C from now on: the command is exiting. SIGTERM still ends it if its output cannot be written."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def log_origin(error: BaseException) -> None:
    """Log the traceback of an error and of its cause, even if the error was raised `from None`."""
    error.__suppress_context__ = False
    log.debug("traceback of the error", exc_info=error)
