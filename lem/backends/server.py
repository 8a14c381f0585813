"""A server that is started for a run and stopped afterward: its command, its log and its processes.

The guardian, a process between lem and the server, ends all of the server's processes. It outlives both lem and the
server. This module knows nothing about the server's protocol or its requests.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lem.backends import guardian
from lem.errors import RunError
from lem.machine.processes import family_of, kill, without_launchers

LOG_NAME = "server.log"
# The maximum number of lines and of characters that a message quotes from the end of a log.
LOG_LINES, LONGEST_END = 5, 900
# Only this many bytes are read from the end of a log, because logs can grow to gigabytes.
LOG_BYTES = 2**16
# The guardian may take `GRACE_S`, and on a busy machine the kernel takes a while to remove a server's processes.
ENDING_S = guardian.GRACE_S + 8.0


class Server:
    """One server, from its start to its end."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        """Store the command without starting anything.

        Args:
            command: the program and its arguments.
            environment: all environment variables of the server.
            log: the file to which the server's output is appended.
        """
        self._command, self._environment, self._log = command, environment, log
        self._log_start = 0
        self._guardian: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server.

        Raises:
            RunError: the program does not exist.
        """
        program = program_path(self._command[0])
        if program is None:
            raise RunError(f"The program {self._command[0]}, which should start the server, does not exist.")
        guard = [sys.executable, "-I", guardian.__file__, program, *self._command[1:]]
        with self._log.open("ab") as output:
            self._log_start = output.tell()
            # The server gets its own session, so that Ctrl-C reaches only lem, which then ends the server.
            self._guardian = subprocess.Popen(
                guard,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=dict(self._environment),
                start_new_session=True,
            )

    def how_it_ended(self, patience_s: float = 0.0) -> str | None:
        """Describe how the server ended, quoting its log; None if it still runs after `patience_s` seconds."""
        if self._guardian is None:
            return None
        try:
            code = self._guardian.wait(patience_s)
        except subprocess.TimeoutExpired:
            return None
        number = -code if code < 0 else code - guardian.KILLED
        is_signal = number in set(signal.Signals)
        how = f"was ended by {signal.Signals(number).name}" if is_signal else f"ended with exit code {code}"
        return f"The server {how}.{self.last_words()}"

    def last_words(self) -> str:
        """Return the end of the server's log as a sentence to append to a message; empty if the log is empty."""
        with self._log.open("rb") as file:
            file.seek(max(self._log_start, file.seek(0, os.SEEK_END) - LOG_BYTES))
            written = (line.strip() for line in file.read().decode(errors="replace").splitlines())
        lines = [line for line in written if line.strip("^~ ")]  # without the markers that Python prints below a line
        end = " | ".join(lines[-LOG_LINES:])[-LONGEST_END:]
        return f" The end of its log: {end} (full log: {self._log})" if lines else ""

    def processes(self) -> list[Any]:
        """Return the server's processes as psutil objects."""
        return [] if self._guardian is None else family_of([self._guardian.pid])[1:]

    def close(self) -> None:
        """Stop the server, and wait until all of its processes have ended."""
        if self._guardian is None:
            return
        assert self._guardian.stdin is not None
        with suppress(OSError):
            self._guardian.stdin.close()
        try:
            self._guardian.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            kill(family_of([self._guardian.pid]))
            self._guardian.wait()
        self._guardian = None


def program_path(program: str) -> str | None:
    """Return the path of a program on PATH or next to the Python that runs lem; None if it is in neither place."""
    return shutil.which(program) or shutil.which(program, path=str(Path(sys.executable).parent))


def free_port() -> int:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(host: str, port: int, timeout_s: float) -> bool:
    """Return whether a program is listening at an address."""
    try:
        with socket.create_connection((host, port), timeout_s):
            return True
    except OSError:
        return False


def environment(shown_gpus: str | None) -> dict[str, str]:
    """Return the environment variables for a server: this process's own, without those that launchers set.

    If `shown_gpus` is None, the server sees the same GPUs as lem. Otherwise, it sees only the GPUs in `shown_gpus`.
    """
    variables = {**without_launchers(os.environ), "PYTHONUNBUFFERED": "1"}
    # This variable is meant for lem's own processes; a user's server may import modules from its own directory.
    variables.pop("PYTHONSAFEPATH", None)
    if shown_gpus is not None:
        variables |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": shown_gpus}
    return variables
