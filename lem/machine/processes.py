"""Processes of engines and servers: which there are, whether they live, their memory, their end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# On a machine with other work it takes a while until the kernel has cleared away what was killed.
GONE_S = 10.0


def children() -> list[Any]:
    """Return all processes that this one has started, and those that these have."""
    return family_of([os.getpid()])[1:]


def is_alive(process: Any) -> bool:
    """Tell whether a process does anything any more."""
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def listening_at(port: int) -> list[Any]:
    """Return the processes that take connections at a port of this machine, with all that they have started.

    Only those are found that the user may look into.
    """
    import psutil

    try:
        found = psutil.net_connections("tcp")
    except psutil.Error:
        return []
    listening = (c for c in found if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr[1] == port)
    pids = {connection.pid for connection in listening if connection.pid is not None}
    return family_of(sorted(pids))


def family_of(pids: Iterable[int]) -> list[Any]:
    """Return processes, each followed by its descendants; those that are gone are left out."""
    import psutil

    found: dict[int, Any] = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            found |= {each.pid: each for each in (process, *process.children(recursive=True))}
        except psutil.Error:
            continue
    return list(found.values())


def kill(processes: Sequence[Any]) -> None:
    """Kill processes, and wait a while until they are gone."""
    import psutil

    for process in reversed(processes):
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=GONE_S)


def peak_memory_bytes(processes: Iterable[Any]) -> int | None:
    """Return the sum of the peaks of processes' resident memory; None when it cannot be told of one, or of none."""
    peaks = []
    for process in processes:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return None
        peaks += [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
    return sum(peaks) if peaks else None
