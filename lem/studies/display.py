"""The progress of an experiment or a study: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO

from lem.runner.progress import Event, Report

TITLES = {
    "cycle": "Cycle",
    "cooldown": "Cooling down",
    "idle_before": "Idle, unloaded",
    "load": "Loading the model",
    "idle_loaded": "Idle, loaded",
    "warmup": "Warm-up",
    "measured": "Prompts",
}


class Display(Protocol):
    """Shows the events of a run; a context manager around it."""

    def __enter__(self) -> Report: ...

    def __exit__(self, *error: object) -> None: ...


def display() -> Display:
    """Return bars if stderr is a terminal, else plain lines."""
    return Bars() if _is_terminal(sys.stderr) else Lines(sys.stderr)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class Bars:
    """rich's progress bars on stderr; drawn when an event arrives, not by a timer."""

    def __enter__(self) -> Report:
        self._progress = _bars()
        self._phases = _Phases(self._progress)
        self._progress.start()
        return self._phases

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._phases.finish()
        self._progress.stop()


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
            if title in self._tasks:  # entered again, like loading after the idle time: its bar is already full
                self._progress.remove_task(self._tasks[title])
            self._tasks[title] = self._progress.add_task(title, total=event.total or None, note="")
            self._current = title
        self._progress.update(
            self._tasks[title], completed=event.done, total=event.total or None, note=self._rate(event)
        )
        self._progress.refresh()

    def finish(self) -> None:
        """Stop all bars and fill those of phases without a count."""
        for task in self._progress.tasks:
            if task.id in self._tasks.values():
                if task.total is None:
                    self._progress.update(task.id, total=1, completed=1)
                self._progress.stop_task(task.id)

    def clear(self) -> None:
        """Remove the bars."""
        for task in self._tasks.values():
            self._progress.remove_task(task)


def _bars(bar_width: int = 30) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(bar_width=bar_width),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        auto_refresh=False,
    )


class Lines:
    """A line at the start of each phase, at each tenth of the prompts, and at the end."""

    def __init__(self, stream: TextIO, prefix: str = "") -> None:
        self._stream = stream
        self._prefix = prefix

    def __enter__(self) -> Report:
        self._phase, self._tenth, self._rate, self._cycle = "", -1, Rate(), ""
        return self._show

    def _show(self, event: Event) -> None:
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

    def __exit__(self, *error: object) -> None:
        return None


class StudyDisplay(Protocol):
    """Shows the runs of a study; a context manager around all of them."""

    def __enter__(self) -> StudyDisplay: ...

    def begin(self, number: int, label: str) -> Report:
        """Show that a run begins; return what its events are passed to."""

    def end(self, number: int, sentence: str, *, failed: bool) -> None:
        """Show how a run ended."""

    def __exit__(self, *error: object) -> None: ...


def study_display(total: int, *, at_once: int = 1) -> StudyDisplay:
    """Return the display of `total` runs, `at_once` at the same time: bars if stderr is a terminal, else lines."""
    return StudyBars(total, at_once) if _is_terminal(sys.stderr) else StudyLines(sys.stderr, total, at_once)


class StudyBars:
    """A bar for the study, above those of the one run, or above one bar for each of several runs."""

    def __init__(self, total: int, at_once: int) -> None:
        self._total, self._at_once = total, at_once
        self._failed = 0
        self._runs: dict[int, tuple[str, Any]] = {}

    def __enter__(self) -> StudyDisplay:
        self._progress = _bars(30 if self._at_once == 1 else 10)
        self._all = self._progress.add_task("Experiments", total=self._total, note="")
        self._progress.start()
        return self

    def begin(self, number: int, label: str) -> Report:
        """Add the run's bars."""
        run = _Phases(self._progress) if self._at_once == 1 else _OneBar(self._progress, label)
        self._runs[number] = label, run
        self._head()
        report: Report = run
        return report

    def end(self, number: int, sentence: str, *, failed: bool) -> None:
        """Remove the run's bars and print its sentence above the others."""
        label, run = self._runs.pop(number)
        run.clear()
        self._failed += failed
        self._progress.advance(self._all)
        style = "red" if failed else None
        self._progress.console.print(
            f"[{number + 1}/{self._total}] {label}: {sentence}", markup=False, highlight=False, style=style
        )
        self._head()

    def _head(self) -> None:
        labels = [label for label, _ in self._runs.values()] if self._at_once == 1 else []
        note = "  ".join([*([f"{self._failed} failed"] if self._failed else []), *labels])
        self._progress.update(self._all, note=note)
        self._progress.refresh()

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


class _OneBar:
    """One bar for a whole run: its prompts, or its current phase; short enough for 80 columns."""

    def __init__(self, progress: Any, label: str) -> None:
        self._progress, self._rate = progress, Rate()
        # The end of a label is what distinguishes files.
        title = label if len(label) <= 18 else f"…{label[-17:]}"
        self._task = progress.add_task(title, total=None, note="starting")
        self._cycle = ""

    def __call__(self, event: Event) -> None:
        if event.phase == "cycle":
            self._cycle = f" in cycle {event.done}/{event.total}" if event.total > 1 else ""
            return
        rate = self._rate(event).split("  ")
        del rate[1:2]  # tokens a second
        note = ("  ".join(rate) or TITLES.get(event.phase, event.phase)) + self._cycle
        self._progress.update(self._task, completed=event.done, total=event.total or None, note=note)
        self._progress.refresh()

    def clear(self) -> None:
        """Remove the bar."""
        self._progress.remove_task(self._task)


class StudyLines:
    """A line when a run begins and one when it ends, with its phases in between."""

    def __init__(self, stream: TextIO, total: int, at_once: int) -> None:
        self._stream, self._total, self._at_once = stream, total, at_once
        self._done = self._failed = 0
        self._labels: dict[int, str] = {}

    def __enter__(self) -> StudyDisplay:
        return self

    def begin(self, number: int, label: str) -> Report:
        """Print which run begins."""
        self._labels[number] = label
        self._print(f"[{number + 1}/{self._total}] {label}")
        return Lines(self._stream, f"[{number + 1}] " if self._at_once > 1 else "").__enter__()

    def end(self, number: int, sentence: str, *, failed: bool) -> None:
        """Print how the run ended, and how many have ended so far."""
        self._done += 1
        self._failed += failed
        so_far = f"{self._done} of {self._total} ended" + (f", {self._failed} failed" if self._failed else "")
        self._print(f"[{number + 1}/{self._total}] {self._labels[number]}: {sentence} ({so_far})")

    def _print(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def __exit__(self, *error: object) -> None:
        return None


class Rate:
    """Prompts and tokens a second since the phase began, and the time left at that rate."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._phase = ""
        self._since_s = 0.0

    def __call__(self, event: Event) -> str:
        """Return the text beside the bar."""
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
