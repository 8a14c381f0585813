"""The `lem` command. This module is imported first, and `lem.cli.commands` then finds and runs the requested command.

This module pauses the garbage collector before any library is imported.
"""

from __future__ import annotations

import atexit
import gc
import sys
from typing import NoReturn

from lem.machine.collector import paused_collector


def main() -> NoReturn:
    """Run the `lem` command and exit; print lem's own errors as messages, without a traceback."""
    # At exit, Python would search all remaining objects for garbage, which takes up to a third of a short command's
    # time. Objects that have been frozen are left to the operating system.
    atexit.register(gc.freeze)
    with paused_collector():
        from lem.cli import commands
    sys.exit(commands.run())
