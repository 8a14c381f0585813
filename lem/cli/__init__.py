"""The `lem` command. This module is imported first, and `lem.cli.commands` then finds and runs the requested command.

This module pauses the garbage collector before any library is imported.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from lem.machine.collector import paused_collector


def main() -> NoReturn:
    """Run the `lem` command and exit; print lem's own errors as messages, without a traceback."""
    # gc.freeze at exit would save some time, but with it, about one in a hundred listings was aborted while it exited
    # ("terminate called without an active exception").
    with paused_collector():
        from lem.cli import commands
    sys.exit(commands.run())
