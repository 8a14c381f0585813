"""Runs a command, and ends its whole family of processes even if the process that requested the command is killed.

This module is a program, `guardian.py COMMAND…`, which lem runs by its path. It needs only the standard library. The
family consists of the command's own process and all of its descendants, including those in other sessions. It also
includes orphans, because the kernel makes the guardian their parent. The guardian ends the family in three cases: the
guardian's own stdin is closed (because the process at the other end closed the pipe or died), the guardian receives a
termination signal, or the command's own process ends. In the third case, the guardian exits with the command's exit
code; in the other two, with 0. If the command cannot be started, it exits with 127. This module knows nothing about
servers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time

# How long the command may take to end, once asked to, before it is killed.
GRACE_S = 2.0
POLL_S = 0.05
# As in shells, the exit code of a command that was ended by a signal is this value plus the signal's number.
KILLED = 128
END_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Constants from <sys/prctl.h>.
SET_PARENT_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36


class EndRequested(Exception):
    """Raised when the command is no longer needed."""


def main(command: list[str]) -> int:
    """Run a command until it ends or is no longer needed, and return the guardian's exit code."""
    for number in END_SIGNALS:
        signal.signal(number, _request_end)
    _prctl(SET_CHILD_SUBREAPER, 1)
    try:
        first = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)
        return 127
    try:
        threading.Thread(target=_wait_for_the_end_of_stdin, daemon=True).start()
        code = _wait_for(first.pid)
    except EndRequested:
        code = 0
    finally:
        for number in END_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _end_family(first.pid)
    return code


def _request_end(_number: int, _frame: object) -> None:
    raise EndRequested


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _end_with_parent() -> None:
    """Have the kernel end the command if the guardian is killed; the child calls this before it runs the command."""
    _prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _wait_for_the_end_of_stdin() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_for(pid: int) -> int:
    """Sleep until the given child has ended, reaping any other children meanwhile; return the child's exit code."""
    while True:
        ended, status = os.waitpid(-1, 0)
        if ended == pid:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else KILLED - code


def _end_family(first: int) -> None:
    """Ask the command to end, and after `GRACE_S` kill the remaining processes of its family."""
    _signal(first, signal.SIGTERM)
    until_s = time.monotonic() + GRACE_S
    while family := _family():
        if time.monotonic() > until_s:
            for pid in family:
                _signal(pid, signal.SIGKILL)
        time.sleep(POLL_S)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _family() -> list[int]:
    """Return the living descendants of this process, after reaping the dead."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return []  # without children, there are no descendants, because orphans become children of this process
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (parent := _parent(entry)) is not None:
            children.setdefault(parent, []).append(int(entry))
    found = list(children.get(os.getpid(), ()))
    for pid in found:  # the list grows during the loop
        found += children.get(pid, ())
    return found


def _parent(pid: str) -> int | None:
    """Return the parent of a living process, or None if the process has ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
    except OSError:
        return None
    return None if state == "Z" else int(parent)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
