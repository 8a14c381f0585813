"""Finds, checks and kills the processes of workers, engines and servers, and reads their peak memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# Launchers of several processes (torchrun, accelerate, MPI) set these variables to tell each process its rank and the
# addresses of the other processes. A shell or pod that runs under a launcher passes the variables on to all processes
# that it starts.
OF_LAUNCHERS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|MASTER_(ADDR|PORT)|ROLE_NAME|RDZV_.*"
    r"|TORCHELASTIC_.*|TORCH_NCCL_ASYNC_ERROR_HANDLING|PET_.*|ACCELERATE_.*|FSDP_.*"
    r"|OMPI_COMM_WORLD_.*|OMPI_UNIVERSE_SIZE|MV2_COMM_WORLD_.*|MPI_LOCAL.*|PMI_.*|PMIX_.*"
)
# On a busy machine, the kernel takes a while to remove processes that were killed.
GONE_S = 10.0


def without_launchers(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without launcher variables, for a process that does not belong to the launcher's group."""
    return {name: value for name, value in environ.items() if not OF_LAUNCHERS.fullmatch(name)}


def children() -> list[Any]:
    """Return all descendants of this process."""
    return family_of([os.getpid()])[1:]


def is_alive(process: Any) -> bool:
    """Return whether a process is still running."""
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def listening_at(port: int) -> list[Any]:
    """Return the processes that listen on a port of this machine, with their descendants.

    This finds only processes that the user has permission to inspect.
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
    """Return the processes with these ids, each followed by its descendants; processes that have ended are skipped."""
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
    """Kill processes, and wait up to `GONE_S` for them to disappear."""
    import psutil

    for process in reversed(processes):
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=GONE_S)


def peak_memory_bytes(pids: Iterable[int]) -> int | None:
    """Return the sum of the processes' peak resident memory in bytes; None if any has ended, or if `pids` is empty."""
    peaks = []
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return None
        peaks += [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")]
    return sum(peaks) if peaks else None
