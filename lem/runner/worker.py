"""A worker process: reads an experiment's directory and writes records.

    python -m lem.runner.worker <directory> --attempt 1

It starts from spec.json and does not know where the configuration came from. Even if its attempt is ended by an error,
a signal or a missing package, it leaves a record with a status (`lem.runner.attempt`) and all finished requests in its
journal. The exit code is 0 if the attempt completed, 130 if it was interrupted, and 1 if it failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from lem.errors import Interrupted, LemError, RunError
from lem.results.directory import ExperimentDir
from lem.runner.attempt import Attempt
from lem.runner.early import log_to, wait_for_arguments
from lem.runner.progress import PipeReport, Report, silent
from lem.runner.ranks import named_by_launcher
from lem.runner.stopping import end_with_parent, ignore_signals, interrupt_on_signals


def main(argv: Sequence[str] | None = None, report: Report = silent) -> int:
    """Run one process of an experiment; return the exit code."""
    try:
        return _main(argv, report)
    except Interrupted as stop:  # a signal arrived while an error was being reported
        return _report(stop)


def _main(argv: Sequence[str] | None, report: Report) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lem.runner.worker", description="Run one process of an experiment."
    )
    parser.add_argument("directory", type=Path, nargs="?", help="the experiment's directory, with its spec.json")
    parser.add_argument("--attempt", type=int, default=1)
    parser.add_argument("--progress", type=Path, default=None, help="a FIFO to which progress is written as JSON lines")
    parser.add_argument("--lifeline", type=Path, default=None, help="a FIFO that the parent keeps open until it ends")
    parser.add_argument("--early", metavar="BACKEND", help="import this engine, and wait for the other arguments")
    parser.add_argument("--ready", type=int, help="a descriptor that tells the parent that the engine is imported")
    parser.add_argument("--log", type=Path, help="a file to which the output is appended from now on")
    options, import_s = parser.parse_args(argv), 0.0
    if options.early is not None:
        arguments, import_s = wait_for_arguments(options.early, options.ready)
        options = parser.parse_args(arguments)
    if options.directory is None:
        parser.error("the experiment's directory is missing")
    if options.log is not None:
        log_to(options.log)
    interrupt_on_signals(except_for=() if options.lifeline is None else (signal.SIGINT,))
    try:
        if options.lifeline is not None:
            end_with_parent(options.lifeline)
        if options.progress is not None:
            report = PipeReport(_open_progress(options.progress), named_by_launcher().rank)
        directory = ExperimentDir(options.directory)
        with directory.hold():
            if (now := directory.state().attempt) > options.attempt:  # a later attempt has taken over
                raise RunError(
                    f"{directory.id} is at attempt {now}; this process belongs to attempt {options.attempt}."
                )
            status = Attempt(directory, options.attempt, import_s).run(report)
    except Interrupted as stop:
        return _report(stop)
    except LemError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return {"completed": 0, "interrupted": Interrupted.exit_code, "failed": 1}[status]


def _report(stop: Interrupted) -> int:
    ignore_signals()
    print(stop, file=sys.stderr)
    return stop.exit_code


def _open_progress(fifo: Path) -> int:
    """Open the parent's FIFO in non-blocking mode, because the parent may be gone now, or too busy to read later.

    Raises:
        Interrupted: the parent is gone.
    """
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        raise Interrupted(f"The parent process is gone: {fifo}: {error.strerror}.") from None


if __name__ == "__main__":
    sys.exit(main())
