"""Stops a run when a worker or its parent receives a signal, or when the parent is gone.

In a worker, the first signal raises `Interrupted`; later signals must not interrupt the writing of the record. This
module knows nothing about the run itself.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lem.errors import Interrupted

INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# How long interrupted workers have to write their records before they are killed.
GRACE_S = 8.0


# ------------------------------------------------------------------ in a worker
class Undisturbed:
    """A stretch of work that no signal interrupts, so that finished work is always written completely.

    A signal that arrives during the stretch interrupts the run when the stretch ends. Signals belong to the whole
    process, so there is only one instance.
    """

    def __init__(self) -> None:
        self._is_inside = False
        self._waiting: Interrupted | None = None

    def __enter__(self) -> None:
        self._is_inside = True

    def __exit__(self, kind: object, *_: object) -> None:
        self._is_inside = False
        waiting, self._waiting = self._waiting, None
        if waiting is not None and kind is None:  # an error also ends the run, and is more informative
            raise waiting

    def interrupt(self, by: Interrupted) -> None:
        """Interrupt the run, now or at the end of the current stretch."""
        if not self._is_inside:
            raise by
        self._waiting = by


UNDISTURBED = Undisturbed()


def interrupt_on_signals(except_for: Sequence[signal.Signals]) -> None:
    """Turn signals into `Interrupted`, and ignore those in `except_for`, such as a Ctrl-C that the parent handles."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        # The second of two signals must not interrupt the writing of the record.
        ignore_signals()
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        UNDISTURBED.interrupt(Interrupted(f"stopped by {name}"))

    for number in INTERRUPTING:
        if number in except_for:
            signal.signal(number, signal.SIG_IGN)
        elif signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def ignore_signals() -> None:
    """Ignore all interrupting signals until this process ends."""
    for number in INTERRUPTING:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent(lifeline: Path) -> None:
    """Stop this process when its parent is gone, even if the parent was killed or is in another session."""
    # Without O_NONBLOCK, opening the pipe would wait forever for a parent that is already gone.
    end = os.open(lifeline, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(end, True)

    def wait_for_the_end() -> None:
        os.read(end, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_the_end, name="lifeline", daemon=True).start()


# ------------------------------------------------------------------ in the parent
def signals_ignored() -> AbstractContextManager[None]:
    """Ignore signals while the end of a run is recorded and reported."""
    return _handled_by(dict.fromkeys(INTERRUPTING, signal.SIG_IGN))


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold back signals during a step that must not be interrupted; the first one takes effect when the step ends."""
    held: list[int] = []
    # A signal that is ignored must stay ignored, because processes that are started meanwhile inherit the setting.
    heard = [number for number in INTERRUPTING if signal.getsignal(number) != signal.SIG_IGN]
    with _handled_by(dict.fromkeys(heard, lambda number, _frame: held.append(number))):
        yield
    if held:
        signal.raise_signal(held[0])


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold back signals as `signals_held` does, and also keep them from programs that are started within the block.

    A Ctrl-C reaches all processes of a terminal. While it is blocked, it cannot end a program whose work may already be
    done.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTING)
    try:
        with signals_held():
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP stopped this command. Like Ctrl-C, it is no Exception, which libraries would catch."""

    def __init__(self, number: int) -> None:
        self.signal_name = signal.Signals(number).name
        super().__init__(f"Stopped by {self.signal_name}.")


def cause_of(stop: KeyboardInterrupt) -> str:
    """Return what stopped this command: the name of a signal, or Ctrl-C."""
    return stop.signal_name if isinstance(stop, Stopped) else "Ctrl-C"


def raise_stopped(number: int, _frame: FrameType | None) -> None:
    """Handle a signal by raising `Stopped`."""
    raise Stopped(number)


def signals_raise() -> AbstractContextManager[None]:
    """Within the block, raise `Stopped` on SIGTERM (from a scheduler) and on SIGHUP (from a closed terminal)."""
    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    return _handled_by(dict.fromkeys(heard, raise_stopped))


@contextmanager
def _handled_by(handlers: Mapping[signal.Signals, Any]) -> Iterator[None]:
    """Install signal handlers temporarily; do nothing outside the main thread, where Python allows no handlers.

    A handler that someone else installs within the block, such as a worker that runs in this process, stays.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == handlers[number]:
                signal.signal(number, handler)
