"""How far a run is: from the worker, through a pipe, to the person who waits.

The worker says little (a few lines a second at most) so that telling costs nothing beside the model; the parent
sleeps until a line arrives and draws only then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TextIO

TITLES = {
    "cooldown": "Cooling down",
    "idle_before": "Idle, unloaded",
    "load": "Loading the model",
    "idle_loaded": "Idle, loaded",
    "warmup": "Warm-up",
    "measured": "Prompts",
}


@dataclass(frozen=True)
class Event:
    """Work done in a phase; `total` 0 means that it cannot be counted."""

    phase: str
    done: int = 0
    total: int = 0
    output_tokens: int = 0


Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """Report nothing."""


class PipeReport:
    """Writes events as JSON lines to a file descriptor, at most one in `period_s` within a phase."""

    def __init__(self, descriptor: int, period_s: float = 0.5) -> None:
        self._descriptor: int | None = descriptor
        self._period_s = period_s
        self._phase = ""
        self._last_s = 0.0

    def __call__(self, event: Event) -> None:
        """Send an event; one that comes too soon after another of its phase is left out, but for the last."""
        now_s = time.monotonic()
        is_news = event.phase != self._phase or event.done == event.total
        if self._descriptor is None or not (is_news or now_s - self._last_s >= self._period_s):
            return
        self._phase, self._last_s = event.phase, now_s
        try:
            os.write(self._descriptor, json.dumps(asdict(event)).encode() + b"\n")
        except OSError:
            self._descriptor = None  # nobody listens any more; the measurement goes on


class Display(Protocol):
    """Shows events to a person; a context manager around a run."""

    def __enter__(self) -> Report: ...

    def __exit__(self, *error: object) -> None: ...


def display() -> Display:
    """Return bars where stderr is a terminal, plain lines where it is anything else."""
    stream = sys.stderr
    return Bars() if stream.isatty() and os.environ.get("TERM") != "dumb" else Lines(stream)


class Bars:
    """rich's progress bars on stderr; drawn when an event arrives, not by a clock of their own."""

    def __enter__(self) -> Report:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description:<18}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self._tasks: dict[str, Any] = {}
        self._rate = Rate()
        self._progress.start()
        return self._show

    def _show(self, event: Event) -> None:
        if event.phase not in self._tasks:
            self._finish_previous()
            title = TITLES.get(event.phase, event.phase)
            self._tasks[event.phase] = self._progress.add_task(title, total=event.total or None, note="")
        self._progress.update(
            self._tasks[event.phase], completed=event.done, total=event.total or None, note=self._rate(event)
        )
        self._progress.refresh()

    def _finish_previous(self) -> None:
        for task in self._progress.tasks:
            if task.total is None:
                self._progress.update(task.id, total=1, completed=1)
            self._progress.stop_task(task.id)

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._finish_previous()
        self._progress.stop()


class Lines:
    """A line at the start of each phase, at each tenth of the prompts, and at the end."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __enter__(self) -> Report:
        self._phase, self._tenth, self._rate = "", -1, Rate()
        return self._show

    def _show(self, event: Event) -> None:
        tenth = event.done * 10 // event.total if event.total else 0
        note = self._rate(event)
        if event.phase == self._phase and tenth == self._tenth:
            return
        self._phase, self._tenth = event.phase, tenth
        count = f" {event.done}/{event.total}" if event.total else ""
        print(f"{TITLES.get(event.phase, event.phase)}{count} {note}".rstrip(), file=self._stream, flush=True)

    def __exit__(self, *error: object) -> None:
        return None


class Rate:
    """Prompts and tokens a second since the phase began, and the time left at that rate."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._phase = ""
        self._since_s = 0.0

    def __call__(self, event: Event) -> str:
        """Return the words beside the bar."""
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
