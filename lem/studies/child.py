"""One experiment of a parallel batch as a child process: `python -m lem.studies.child <job file> --report-fd N`.

It runs the composed experiment in the job file. Through a pipe, it reports to its parent the directory that it has
claimed, its progress and, if it could not run, the reason. Its output goes to the log that the parent opened. It knows
nothing about Hydra or the other runs of the batch.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lem.errors import Interrupted, LemError
from lem.machine import host
from lem.results.codec import from_json
from lem.results.directory import ExperimentDir
from lem.results.files import DiskFull
from lem.runner.early import early_worker
from lem.runner.job import run_ready
from lem.runner.preflight import preflight
from lem.runner.progress import Event, PipeReport
from lem.runner.stopping import raise_stopped
from lem.spec.experiment import Experiment
from lem.studies.ask import show_outcome
from lem.studies.display import Lines


@dataclass(frozen=True)
class Job:
    """The experiment that a child runs, and the options for running it."""

    experiment: Experiment
    overrides: tuple[str, ...]
    config_file: str | None
    force: bool
    write_tables: bool
    shared_with: int
    unfinished: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m lem.studies.child", description="Run one experiment of a batch.")
    parser.add_argument("job", type=Path, help="the job file")
    parser.add_argument(
        "--report-fd", type=int, required=True, help="the file descriptor to write progress to, as JSON lines"
    )
    options = parser.parse_args(argv)
    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGTERM, raise_stopped)
    try:
        return _run(from_json(Job, options.job.read_bytes()), options.report_fd)
    except (Interrupted, KeyboardInterrupt) as stop:
        print(stop, file=sys.stderr)
        return Interrupted.exit_code
    except DiskFull as full:
        _send(options.report_fd, "full", str(full.folder.absolute()))
        print(f"Error: {full}", file=sys.stderr)
        return full.exit_code
    except LemError as error:
        _send(options.report_fd, "error", " ".join(str(error).split()))
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        _send(options.report_fd, "error", f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise


def _run(job: Job, report_fd: int) -> int:
    to_parent, to_log = PipeReport(report_fd), Lines(sys.stderr)

    def report(event: Event) -> None:
        to_parent(event)
        to_log(event)

    machine = host.look()
    with early_worker(job.experiment, machine) as early:
        outcome = run_ready(
            preflight(job.experiment, machine, force=job.force),
            overrides=job.overrides,
            config_file=Path(job.config_file) if job.config_file else None,
            write_tables=job.write_tables,
            shared_with=job.shared_with,
            unfinished=ExperimentDir(Path(job.unfinished)) if job.unfinished else None,
            claimed=lambda directory: _send(report_fd, "claimed", str(directory.path.resolve())),
            early=early,
            report=report,
        )
    return show_outcome(outcome, write_tables=job.write_tables)


def _send(descriptor: int, what: str, text: str) -> None:
    os.write(descriptor, json.dumps({what: text}).encode() + b"\n")


def end_with_parent() -> None:
    """Interrupt the run when standard input closes; the parent keeps it open until the parent itself ends."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
