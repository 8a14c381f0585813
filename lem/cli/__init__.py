"""The `lem` command: flags become overrides, and each command calls its app.

Nothing heavy is imported here: torch, transformers, hydra, pyarrow and codecarbon come with the command that
needs them.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lem import __version__
from lem.cli.base import app
from lem.cli.streams import forgiving_streams, lost_output
from lem.errors import Interrupted, LemError

# Each registers its commands; the order is that of lem --help.
# isort: off
from lem.cli import experiment, batch, config, results, inventory  # noqa: F401
# isort: on

# The values that have a flag of their own.
FLAGS = {
    "model": "--model",
    "dataset.split": "--split",
    "dataset.column": "--column",
    "dataset.sample_size": "--sample-size",
    "max_output_tokens": "--max-tokens",
    "seed": "--seed",
    "io.results_dir": "--results-dir",
}


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
        bool, typer.Option("--verbose", help="Tell on stderr what is done, and where an error comes from.")
    ] = False,
) -> None:
    """Read .env before any command looks at the environment; what is set already wins."""
    import dotenv

    if verbose:
        _log_to_stderr()
    file = dotenv.find_dotenv(usecwd=True)
    dotenv.load_dotenv(file)
    log.debug("lem %s, Python %s (%s) in %s", __version__, sys.version.split()[0], sys.executable, Path.cwd())
    log.debug("command line: %s", sys.argv[1:])
    log.debug(".env: %s", file or "none")


class _ToStderr(logging.Handler):
    """Writes to what sys.stderr is at the time: while a progress bar is drawn, that is above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    """Show the log of lem's own modules; those of libraries keep their settings."""
    handler = _ToStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(name)s: %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("lem")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.DEBUG)
    ours.propagate = False


def main() -> NoReturn:
    """Run the command line; an error that lem raises on purpose is one sentence and an exit code."""
    forgiving_streams()
    code = _with_output(_run())
    log.debug("exit code %d", code)
    _end_undisturbed()
    sys.exit(code)


@cache
def _command() -> Callable[..., Any]:
    """Return all commands as one; putting them together takes longer than many of them run."""
    return typer.main.get_command(app)


def _run() -> int:
    """Run the command and return its exit code; only a fault in lem escapes, and is shown as a traceback."""
    try:
        _command()(prog_name="lem")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Interrupted as stop:
        _end_undisturbed()
        _log_origin(stop)
        print(f"\n{stop}", file=sys.stderr)
        return stop.exit_code
    except LemError as error:
        _log_origin(error)
        return _tell(error)
    except KeyboardInterrupt:
        _end_undisturbed()
        return Interrupted.exit_code
    except OSError as error:
        if error.strerror is None:
            raise
        _log_origin(error)
        place = f"{error.filename}: " if error.filename is not None else ""
        print(f"Error: {place}{error.strerror}. lem --verbose … shows where it happened.", file=sys.stderr)
        return 1
    return 0


def _end_undisturbed() -> None:
    """Take no notice of a Ctrl-C more: the command is ending, with its exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _log_origin(error: Exception) -> None:
    """Log the traceback, also of what the error was made from (raise … from None)."""
    error.__suppress_context__ = False
    log.debug("where the error comes from", exc_info=error)


def _tell(error: LemError) -> int:
    for line in str(error).splitlines():
        path = line.partition(":")[0]
        print(
            f"Error: {line.replace(path, f'{path} ({FLAGS[path]})', 1) if path in FLAGS else line}",
            file=sys.stderr,
        )
    return error.exit_code


def _with_output(code: int) -> int:
    """Return the exit code, which is no longer 0 when what was to be shown is lost.

    Of a pipe whose reader has gone (lem … | head) that reader has seen enough: this is no error.
    """
    lost = lost_output()
    if lost is None or isinstance(lost, BrokenPipeError):
        return code
    print(
        f"Error: standard output cannot be written to ({lost.strerror}); files of results are not affected.",
        file=sys.stderr,
    )
    return code or 1
