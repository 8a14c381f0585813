"""Shows the progress of an experiment or a study: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO, cast

from lem.quantities import one_line
from lem.results import show
from lem.runner.progress import Event, Report, silent

TITLES = {
    "cycle": "Cycle",
    "cooldown": "Cooling down",
    "gap": "Waiting",
    "idle_before": "Idle, unloaded",
    "load": "Loading the model",
    "idle_loaded": "Idle, loaded",
    "warmup": "Warm-up",
    "measured": "Prompts",
}


@contextmanager
def display() -> Iterator[Report]:
    """Show the events of a run: bars if stderr is a terminal, else lines."""
    if _is_terminal(sys.stderr):
        with bars() as report:
            yield report
    else:
        yield Lines(sys.stderr)


@contextmanager
def bars() -> Iterator[Report]:
    """Show events as rich progress bars on stderr, redrawn when an event arrives rather than by a timer."""
    with _shown(_progress()) as progress:
        phases = _Phases(progress)
        yield phases
        phases.finish()


@contextmanager
def study_display(total: int, *, at_once: int = 1, settled: Iterable[int] = ()) -> Iterator[StudyDisplay]:
    """Show `total` runs, `at_once` of them at a time: bars if stderr is a terminal, else lines.

    `settled` has the numbers of the runs that count as ended from the start.
    """
    outcomes = Outcomes(total, set(settled))
    if _is_terminal(sys.stderr):
        with _shown(_progress(30 if at_once == 1 else 10)) as progress:
            yield StudyBars(progress, outcomes, at_once)
    else:
        yield StudyLines(sys.stderr, outcomes, at_once)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _progress(bar_width: int = 30) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(bar_width=bar_width),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=show.console(stderr=True),
        auto_refresh=False,
        # Without this, rich would interpret control characters as colors in text that is printed above the bars.
        redirect_stdout=False,
        redirect_stderr=False,
    )


@contextmanager
def _shown(progress: Any) -> Iterator[Any]:
    """Show bars; text printed on the terminal in the meantime appears above them."""
    above = [_Above(stream, progress.console) for stream in (sys.stdout, sys.stderr)]
    with progress, redirect_stdout(cast(TextIO, above[0])), redirect_stderr(cast(TextIO, above[1])):
        yield progress


class _Above:
    """A stream that prints its lines above the bars on a terminal, and otherwise passes text to the original stream."""

    def __init__(self, stream: TextIO, console: Any) -> None:
        self._stream, self._console, self._begun = stream, console, ""
        # Rich consoles, including this one, write to the stream in this attribute.
        self.rich_proxied_file = getattr(stream, "rich_proxied_file", stream)

    def write(self, text: str) -> int:
        """Write a string; a line appears when it is complete."""
        if not self._stream.isatty():
            return self._stream.write(text)
        *lines, self._begun = (self._begun + text).split("\n")
        if lines:
            self._console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Phases:
    """One bar for each phase of a run."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}
        self._cycle = self._current = ""
        self._rate = Rate()

    def __call__(self, event: Event) -> None:
        if event.phase == "cycle":
            self._cycle = f" {event.done}/{event.total}" if event.total > 1 else ""
            return
        title = TITLES.get(event.phase, event.phase) + self._cycle
        if title != self._current:
            self.finish()
            if title in self._tasks:  # the phase is entered again, so its bar may already be full
                self._progress.remove_task(self._tasks[title])
            self._tasks[title] = self._progress.add_task(title, total=event.total or None, note="")
            self._current = title
        self._progress.update(
            self._tasks[title], completed=event.done, total=event.total or None, note=self._rate(event)
        )
        self._progress.refresh()

    def finish(self) -> None:
        """Stop all bars, and fill the bars of phases without a known total."""
        for task in self._progress.tasks:
            if task.id in self._tasks.values():
                if task.total is None:
                    self._progress.update(task.id, total=1, completed=1)
                self._progress.stop_task(task.id)

    def clear(self) -> None:
        """Remove the bars."""
        for task in self._tasks.values():
            self._progress.remove_task(task)


class Lines:
    """Prints a line at the start of each phase, at each tenth of the prompts, and at the end."""

    def __init__(self, stream: TextIO, prefix: str = "") -> None:
        self._stream, self._prefix = stream, prefix
        self._phase = self._cycle = ""
        self._tenth, self._rate = -1, Rate()

    def __call__(self, event: Event) -> None:
        """Print an event if it shows something new."""
        if event.phase == "cycle":
            self._cycle = f" in cycle {event.done}/{event.total}" if event.total > 1 else ""
            return
        tenth = event.done * 10 // event.total if event.total else 0
        note = self._rate(event)
        if event.phase == self._phase and tenth == self._tenth:
            return
        self._phase, self._tenth = event.phase, tenth
        count = f" {event.done}/{event.total}" if event.total else ""
        title = TITLES.get(event.phase, event.phase)
        print(f"{self._prefix}{title}{count}{self._cycle} {note}".rstrip(), file=self._stream, flush=True)


class StudyDisplay(Protocol):
    """Shows the runs of a study."""

    def begin(self, number: int, label: str) -> Report:
        """Show that a run begins; return the function that receives its events."""

    def end(self, number: int, sentence: str, *, failed: bool) -> None:
        """Show how a run ended."""


class Quiet:
    """Shows nothing."""

    def begin(self, _number: int, _label: str) -> Report:
        """Return a function that ignores the run's events."""
        return silent

    def end(self, _number: int, _sentence: str, *, failed: bool) -> None:
        """Show nothing."""


@dataclass
class Outcomes:
    """Which runs of a study have ended and which of these have failed; a run that is retried counts once."""

    total: int
    ended: set[int]
    failed: set[int] = field(default_factory=set)

    def end(self, number: int, *, failed: bool) -> None:
        """Record how a run ended, replacing the outcome of an earlier try of the same run."""
        self.ended.add(number)
        self.failed.discard(number)
        if failed:
            self.failed.add(number)


class StudyBars:
    """A bar for the study; below it, the bars of the current run, or one bar for each run if several go on at once."""

    def __init__(self, progress: Any, outcomes: Outcomes, at_once: int) -> None:
        self._progress, self._outcomes, self._at_once = progress, outcomes, at_once
        self._runs: dict[int, tuple[str, Any]] = {}
        self._all = progress.add_task("Experiments", total=outcomes.total, completed=len(outcomes.ended), note="")

    def begin(self, number: int, label: str) -> Report:
        """Add the run's bars."""
        run = _Phases(self._progress) if self._at_once == 1 else _OneBar(self._progress, one_line(label))
        self._runs[number] = one_line(label), run
        self._head()
        return run

    def end(self, number: int, sentence: str, *, failed: bool) -> None:
        """Remove the run's bars and print its outcome above the remaining bars."""
        label, run = self._runs.pop(number)
        run.clear()
        self._outcomes.end(number, failed=failed)
        self._progress.update(self._all, completed=len(self._outcomes.ended))
        style = "red" if failed else None
        line = one_line(f"[{number + 1}/{self._outcomes.total}] {label}: {sentence}")
        self._progress.console.print(line, markup=False, highlight=False, style=style)
        self._head()

    def _head(self) -> None:
        labels = [label for label, _ in self._runs.values()] if self._at_once == 1 else []
        failed = len(self._outcomes.failed)
        note = "  ".join([*([f"{failed} failed"] if failed else []), *labels])
        self._progress.update(self._all, note=note)
        self._progress.refresh()


class _OneBar:
    """One bar for a whole run, showing its prompts or its current phase, short enough for 80 columns."""

    def __init__(self, progress: Any, label: str) -> None:
        self._progress, self._rate = progress, Rate()
        # Keep the end of a label, because file names usually differ there.
        title = label if len(label) <= 18 else f"…{label[-17:]}"
        self._task = progress.add_task(title, total=None, note="starting")
        self._cycle = ""

    def __call__(self, event: Event) -> None:
        if event.phase == "cycle":
            self._cycle = f" in cycle {event.done}/{event.total}" if event.total > 1 else ""
            return
        rate = self._rate(event).split("  ")
        del rate[1:2]  # drop the tokens per second
        note = ("  ".join(rate) or TITLES.get(event.phase, event.phase)) + self._cycle
        self._progress.update(self._task, completed=event.done, total=event.total or None, note=note)
        self._progress.refresh()

    def clear(self) -> None:
        """Remove the bar."""
        self._progress.remove_task(self._task)


class StudyLines:
    """Prints a line when a run begins and another when it ends, with its phases in between."""

    def __init__(self, stream: TextIO, outcomes: Outcomes, at_once: int) -> None:
        self._stream, self._outcomes, self._at_once = stream, outcomes, at_once
        self._labels: dict[int, str] = {}

    def begin(self, number: int, label: str) -> Report:
        """Print which run begins; return the function that receives its events."""
        self._labels[number] = label
        self._print(f"[{number + 1}/{self._outcomes.total}] {label}")
        return Lines(self._stream, f"[{number + 1}] " if self._at_once > 1 else "")

    def end(self, number: int, sentence: str, *, failed: bool) -> None:
        """Print how the run ended, and how many runs have ended so far."""
        self._outcomes.end(number, failed=failed)
        total, ended, wrong = self._outcomes.total, len(self._outcomes.ended), len(self._outcomes.failed)
        so_far = f"{ended} of {total} ended" + (f", {wrong} failed" if wrong else "")
        self._print(f"[{number + 1}/{total}] {self._labels[number]}: {sentence} ({so_far})")

    def _print(self, line: str) -> None:
        print(one_line(line), file=self._stream, flush=True)


class Rate:
    """Prompts and tokens per second since the phase began, and the remaining time at that rate."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._phase = ""
        self._since_s = 0.0

    def __call__(self, event: Event) -> str:
        """Return the text to show next to the bar; it is empty as long as the rate is unknown."""
        now_s = self._clock_s()
        if event.phase != self._phase:
            self._phase, self._since_s = event.phase, now_s
        spent_s = now_s - self._since_s
        if event.phase != "measured" or not event.done or spent_s <= 0:
            return ""
        left_s = spent_s / event.done * (event.total - event.done)
        words = f"{event.done / spent_s:.3g} prompts/s  {event.output_tokens / spent_s:.3g} tokens/s"
        return f"{words}  {_span(left_s)} left" if event.done < event.total else words


def _span(seconds: float) -> str:
    whole = round(seconds)
    minutes, hours = whole // 60, whole // 3600
    if hours:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{minutes} min {whole % 60:02d} s" if minutes else f"{whole} s"
