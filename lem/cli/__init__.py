"""The `lem` command. This module is imported first, and `lem.cli.commands` then finds and runs the requested command.

This module pauses the garbage collector before any library is imported.
"""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from lem.machine.collector import paused_collector


def main() -> NoReturn:
    """Run the `lem` command and exit; print lem's own errors as messages, without a traceback."""
    outcome: list[int] = []
    # Functions that are registered later, by libraries, are called earlier.
    atexit.register(_leave, outcome)
    with paused_collector():
        from lem.cli import commands
    outcome.append(commands.run())
    sys.exit(outcome[0])


def _leave(outcome: list[int]) -> None:
    """End the process at once if its command has ended, and leave its memory to the operating system.

    Otherwise, Python would search all remaining objects for garbage, which takes up to a third of a short command's
    time. Arrow's libraries would then be unloaded, which aborted about one in a hundred listings: "terminate called
    without an active exception".
    """
    if outcome:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(outcome[0])
