"""How a worker process is stopped: by signals, or because its launcher is gone.

A signal becomes `Interrupted`, once; those that follow must not break off the writing of the record. Knows nothing of
the run.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lem.errors import Interrupted
from lem.runner.launch import GRACE_S

INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Undisturbed:
    """A stretch of work that no signal comes into: what has been finished is written down whole.

    The run is interrupted at its end. There is one for the process, as signals are the process's.
    """

    def __init__(self) -> None:
        self._is_inside = False
        self._waiting: Interrupted | None = None

    def __enter__(self) -> None:
        self._is_inside = True

    def __exit__(self, kind: object, *_: object) -> None:
        self._is_inside = False
        waiting, self._waiting = self._waiting, None
        if waiting is not None and kind is None:  # an error ends the run as well, and says more
            raise waiting

    def interrupt(self, by: Interrupted) -> None:
        """Interrupt the run, now or at the end of the stretch."""
        if not self._is_inside:
            raise by
        self._waiting = by


UNDISTURBED = Undisturbed()


def interrupt_on_signals(except_for: Sequence[signal.Signals]) -> None:
    """Turn signals into `Interrupted`; Ctrl-C is left to the launcher, where there is one, for it reaches both."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        # The second of two signals must not break off the writing of the record.
        ignore_signals()
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        UNDISTURBED.interrupt(Interrupted(f"stopped by {name}"))

    for number in INTERRUPTING:
        if number in except_for:
            signal.signal(number, signal.SIG_IGN)
        elif signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)


def ignore_signals() -> None:
    """Let nothing come between a run that ended early and its record."""
    for number in INTERRUPTING:
        signal.signal(number, signal.SIG_IGN)


def end_with_launcher(lifeline: Path) -> None:
    """Stop when the launcher is gone, however it ended: nobody is left behind, in whatever group or session."""
    # Without O_NONBLOCK it would wait here for a launcher that is gone already.
    end = os.open(lifeline, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(end, True)

    def wait_for_the_end() -> None:
        os.read(end, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait_for_the_end, name="lifeline", daemon=True).start()
