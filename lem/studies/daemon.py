"""Works through a schedule's table: `python -m lem.studies.daemon <the schedule's directory>`.

    wait for the next start ─> a run in a child process ─> write its outcome into the table ─> wait …

`lem schedule` replaces itself with this process. Because the daemon may wait for days, it imports nothing heavy, and
each run has a separate process (`lem.studies.scheduled_run`). The daemon sleeps only briefly and reads the clock each
time, so it notices if the machine was suspended or the clock was set. It does not know what a run measures.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Protocol
from zoneinfo import ZoneInfo

from lem.errors import Interrupted, LemError
from lem.quantities import one_line
from lem.results.files import DiskFull
from lem.results.schedule import (
    CUT,
    LOG,
    RunOutcome,
    ScheduleManifest,
    Start,
    Status,
    due,
    held,
    read_manifest,
    read_outcome,
    results_hint,
    resume_command,
    run_log,
    write_manifest,
)
from lem.spec.schedule import length_of

LONGEST_SLEEP_S = 30.0
# A start that is more than this late is missed, because a run at another time says nothing about the planned time.
GRACE_S = 60.0
# A change of the clock is reported if the clock goes back by more than this, or advances by this much more than the
# time slept.
CLOCK_STEP_S = 5.0
LAST_MINUTE_S = 60.0
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
NOT_RUNNING = "the schedule was not running"
NOT_AWAKE = "the machine was suspended, or its clock was set forward"


class Clock:
    """The system clock, and a sleep that ends early when a signal arrives or a child process ends.

    Signals are blocked and are fetched only while sleeping, so none is lost and none interrupts anything else.
    """

    def __init__(self) -> None:
        heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        self._signals = {*heard, signal.SIGCHLD}
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)

    def now(self) -> datetime:
        """Return the current time."""
        return datetime.now(UTC)

    def sleep(self, seconds: float) -> int | None:
        """Sleep for the given time or until a signal arrives; return the signal's number, or None if none arrived."""
        found = signal.sigtimedwait(self._signals, seconds)
        return found.si_signo if found else None


class Run(Protocol):
    """A run that has begun."""

    def poll(self) -> RunOutcome | None:
        """Return how the run ended, or None if it is still going."""

    def interrupt(self) -> None:
        """Ask the run to end, keeping what is finished."""


class Screen:
    """Prints a line for each event and, on a terminal (`is_live`), shows the time to the next start below the lines."""

    def __init__(self, log: Path | None) -> None:
        self._log = log
        self.is_live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = ""

    def say(self, now: datetime, text: str) -> None:
        """Print a line, and write it to the log with the time; if either fails, the schedule continues."""
        self.show("")
        line = one_line(text)
        try:
            print(line, flush=True)
        except OSError:  # the reader has closed the pipe, or the disk is full
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process
        if self._log is None:
            return
        try:
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{now.isoformat(timespec='seconds')} {line}\n")
        except OSError as error:
            print(f"Warning: cannot write to {self._log}: {error.strerror}.", file=sys.stderr)
            self._log = None

    def show(self, text: str) -> None:
        """Show a text on the last line of the terminal, replacing the previous text; do nothing without a terminal."""
        if self.is_live and text != self._shown:
            width = shutil.get_terminal_size().columns - 1
            self._shown = text
            try:
                print(f"\r\x1b[K{one_line(text)[:width]}", end="", file=sys.stderr, flush=True)
            except OSError:  # the terminal is closed
                self.is_live = False


@dataclass
class Daemon:
    """Works through the starts of a schedule, one run at a time, and keeps its table up to date.

    `begin_run` starts a run. Before each call, the table is saved with the run listed as running, so that a daemon that
    is started later resumes the run instead of starting it again. `save` writes the table.
    """

    folder: Path
    manifest: ScheduleManifest
    clock: Clock
    begin_run: Callable[[Start], Run]
    screen: Screen
    save: Callable[[Path, ScheduleManifest], None] = write_manifest
    longest_sleep_s: float = LONGEST_SLEEP_S
    current: tuple[Start, Run] | None = None
    is_stopping: bool = False
    zone: ZoneInfo = field(init=False)
    # The starts before this position in the table are no longer planned.
    position: int = 0

    def __post_init__(self) -> None:
        self.zone = ZoneInfo(self.manifest.time_zone)

    def work(self) -> int:
        """Work through all starts that are left; return the exit code.

        Returns:
            130 if a signal ended the schedule early, 1 if a run failed or none was done, and otherwise 0.
        """
        self._catch_up()
        while self._step():
            pass
        self.screen.show("")
        if self._next() is not None or any(start.status in CUT for start in self.manifest.starts):
            self._say(f"Stopped: {self.manifest.counts()}. To continue: {resume_command(self.folder)}")
            return Interrupted.exit_code
        self._say(f"Schedule {self.manifest.name} is over: {self.manifest.counts()}. {results_hint(self.folder)}")
        return exit_code(self.manifest)

    # -------------------------------------------------------------- a step
    def _step(self) -> bool:
        """Do what is due, then sleep; return False if nothing is left to do."""
        self._end_run()
        now = self.clock.now()
        if self.current is None:
            if self.is_stopping:
                return False
            self._miss_late(now)
        else:
            self._skip_due(now, self.current[0])
        start = self._next()
        if self.current is None:
            if start is None:
                return False
            if due(start) <= now:
                self._begin(start)
                return True
        self._sleep(now, start)
        return True

    def _next(self) -> Start | None:
        starts = self.manifest.starts
        while self.position < len(starts) and starts[self.position].status != "planned":
            self.position += 1
        return starts[self.position] if self.position < len(starts) else None

    def _overdue(self, now: datetime) -> list[Start]:
        """Return the planned starts whose time has come."""
        found = []
        for start in islice(self.manifest.starts, self.position, None):
            if due(start) > now:
                break
            if start.status == "planned":
                found.append(start)
        return found

    def _miss_late(self, now: datetime, reason: str = NOT_AWAKE) -> None:
        """Record all overdue starts as missed, except the last one if there is still time to begin it."""
        overdue = self._overdue(now)
        if overdue and (now - due(overdue[-1])).total_seconds() <= GRACE_S:
            overdue.pop()
        self._pass_over("missed", overdue, reason)

    def _skip_due(self, now: datetime, running: Start) -> None:
        self._pass_over("skipped", self._overdue(now), f"run {running.number} was still going")

    def _pass_over(self, status: Status, starts: Sequence[Start], reason: str) -> None:
        for start in starts:
            start.status, start.error = status, reason
        if starts:
            self._save()
        for start in starts:
            self._say(f"{self._label(start)} {status} ({due(start):%a %Y-%m-%d %H:%M:%S}): {reason}.")

    def _sleep(self, now: datetime, start: Start | None) -> None:
        left_s = (due(start) - now).total_seconds() if start else LONGEST_SLEEP_S
        self._show_status(start, left_s)
        is_counting = self.screen.is_live and self.current is None and left_s <= LAST_MINUTE_S
        longest_s = 1.0 if is_counting else self.longest_sleep_s
        seconds = min(max(left_s, 0.001), longest_s)
        number = self.clock.sleep(seconds)
        self._notice_clock((self.clock.now() - now).total_seconds(), seconds)
        if number in STOPPING:
            self._stop(signal.Signals(number))

    def _notice_clock(self, passed_s: float, slept_s: float) -> None:
        if passed_s < -CLOCK_STEP_S:
            self._say(f"The clock was set back by {length_of(slept_s - passed_s)}; no start is repeated.")
        elif passed_s > slept_s + CLOCK_STEP_S:
            self._say(f"{length_of(passed_s - slept_s)} passed unnoticed: {NOT_AWAKE}.")

    # -------------------------------------------------------------- runs
    def _begin(self, start: Start) -> None:
        """Start a run, or resume one that was cut off."""
        now = self.clock.now()
        is_new = start.started_at is None
        if is_new:
            start.started_at = self._text(now)
            start.late_s = round((now - due(start)).total_seconds(), 3)
        start.status, start.error, start.ended_at = "running", None, None
        self._save()
        late = f", {start.late_s:.1f} s late" if is_new and (start.late_s or 0) >= 1 else ""
        self._say(f"{self._label(start)} {'started' if is_new else 'resumed'}{late}.")
        try:
            self.current = start, self.begin_run(start)
        except OSError as error:  # memory for the process may be short now, but not at the next run
            self._record(start, RunOutcome("failed", error=f"its process could not be started ({error.strerror})"))

    def _end_run(self) -> None:
        if self.current is None:
            return
        start, run = self.current
        outcome = run.poll()
        if outcome is not None:
            self.current = None
            if outcome.status == "interrupted" and not self.is_stopping:
                outcome.status, outcome.error = "failed", "it was interrupted by a signal from outside"
            self._record(start, outcome)

    def _record(self, start: Start, outcome: RunOutcome) -> None:
        start.status, start.error = outcome.status, outcome.error
        start.experiment_id, start.campaign = outcome.experiment_id, outcome.campaign
        start.ended_at = outcome.ended_at or self._text(self.clock.now())
        self._save()
        name = f" {outcome.experiment_id or outcome.campaign}" if outcome.experiment_id or outcome.campaign else ""
        error = f": {outcome.error}" if outcome.error else ""
        self._say(f"{self._label(start)} {outcome.status}{name}{error}")

    def _stop(self, number: signal.Signals) -> None:
        """At the first signal, let the current run finish; at any further signal, interrupt it."""
        again, self.is_stopping = self.is_stopping, True
        if self.current is None:
            return
        start, run = self.current
        name = "Ctrl-C" if number == signal.SIGINT else number.name
        if again:
            self._say(f"{name}: interrupting run {start.number}.")
            run.interrupt()
        else:
            self._say(
                f"{name}: no further runs will start; waiting for run {start.number}. A second signal interrupts it."
            )

    # -------------------------------------------------------------- after a crash
    def _catch_up(self) -> None:
        """Record what happened while no process worked through the schedule, and resume a run that was cut off."""
        cut = None
        for start in self.manifest.starts:
            if start.status not in (*CUT, "planned"):
                continue
            outcome = read_outcome(self.folder, start.number)
            if outcome is not None and outcome.status in ("done", "failed"):
                self._record(start, outcome)
            elif outcome is not None or start.status in CUT:
                cut = start
        now = self.clock.now()
        if cut is None:
            self._miss_late(now, NOT_RUNNING)
        else:
            if cut.status == "planned":  # its start was not saved because the disk was full
                cut.status = "running"
            self._pass_over("missed", self._overdue(now), NOT_RUNNING)
            self._begin(cut)

    # -------------------------------------------------------------- words
    def _save(self) -> None:
        try:
            self.save(self.folder, self.manifest)
        except (DiskFull, OSError) as error:  # the schedule continues; the next change is saved together with this one
            self._say(f"Warning: the table of starts was not saved. {error}")

    def _say(self, text: str) -> None:
        self.screen.say(self.clock.now().astimezone(self.zone), text)

    def _text(self, moment: datetime) -> str:
        return moment.astimezone(self.zone).isoformat(timespec="milliseconds")

    def _label(self, start: Start) -> str:
        return f"Run {start.number}/{len(self.manifest.starts)}"

    def _show_status(self, start: Start | None, left_s: float) -> None:
        if not self.screen.is_live:
            return
        if self.current is not None:
            # This text never changes during a run, so that redrawing it does not disturb the measurement.
            running = self.current[0]
            began = datetime.fromisoformat(running.started_at or running.planned_at)
            self.screen.show(f"{self._label(running)} has been running since {began:%H:%M:%S}")
        elif start is not None:
            self.screen.show(f"{self._label(start)} starts at {due(start):%a %H:%M:%S}, in {_coarse(left_s)}")


def _coarse(seconds: float) -> str:
    """Return a length of time as text: in seconds below a minute, else in minutes, so that it rarely changes."""
    return length_of(max(0.0, seconds) if seconds <= LAST_MINUTE_S else 60.0 * round(seconds / 60))


def exit_code(manifest: ScheduleManifest) -> int:
    """Return the exit code of a schedule that is over: 1 if a run failed or none was done, otherwise 0."""
    return int(manifest.has_failed or not any(start.status == "done" for start in manifest.starts))


class ChildRun:
    """A run in a separate process and session, so that a Ctrl-C reaches only the daemon.

    The process's standard input is a pipe to which nothing is written. When the pipe closes, the process knows that the
    daemon has ended.
    """

    def __init__(self, folder: Path, start: Start, working_dir: str) -> None:
        self._folder, self._number = folder, start.number
        command = [sys.executable, "-P", "-m", "lem.studies.scheduled_run", str(folder.absolute()), str(start.number)]
        log = run_log(folder, start.number)
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=working_dir if os.path.isdir(working_dir) else None,
                start_new_session=True,
            )

    def poll(self) -> RunOutcome | None:
        """Return how the run ended, or None if it is still going."""
        code = self._process.poll()
        if code is None:
            return None
        assert self._process.stdin is not None
        self._process.stdin.close()
        found = read_outcome(self._folder, self._number) or RunOutcome()
        if found.status == "running" and code == Interrupted.exit_code:
            found.status = "interrupted"
        elif found.status == "running":
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            log = run_log(self._folder, self._number)
            found.status, found.error = "failed", f"its process {how}; its output is in {log}"
        return found

    def interrupt(self) -> None:
        """Ask the run to end, keeping finished requests."""
        self._process.terminate()


def main(argv: Sequence[str] | None = None) -> int:
    """Work through the schedule in the given directory; return the exit code."""
    (argument,) = sys.argv[1:] if argv is None else argv
    folder = Path(argument)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal may be limited to ASCII
    try:
        with held(folder):
            clock, manifest = Clock(), read_manifest(folder)

            def begin_run(start: Start) -> Run:
                return ChildRun(folder, start, manifest.config.working_dir)

            return Daemon(folder, manifest, clock, begin_run, Screen(folder / LOG)).work()
    except LemError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
