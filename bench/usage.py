"""What the benchmarks share: the cost of a command, limits, and the option `--json`.

The cost of a command is its CPU time and wall time, including all processes that it starts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# prctl(2): orphaned descendants become children of this process, so that their CPU time is counted too.
PR_SET_CHILD_SUBREAPER = 36
# The highest priority that an ordinary process can have.
HIGHEST = -20


@dataclass(frozen=True)
class Cost:
    """The cost of a command; `cpu_s` is the user and system time of all its processes."""

    cpu_s: float
    wall_s: float


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the option `--json` and a description, usually the docstring of a benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="a file for all figures")
    return made


def write_json(file: Path | None, figures: object) -> None:
    """Write figures to a file; do nothing if no file is given."""
    if file is not None:
        file.write_text(json.dumps(figures, indent=2) + "\n")


def is_within(figures: Mapping[str, Any]) -> bool:
    """Return whether no figure exceeds its limit, which has the same name after `limit_`.

    A figure that is None was not measured; a limit that is None does not apply.
    """
    limits = {name.removeprefix("limit_"): each for name, each in figures.items() if name.startswith("limit_")}
    return all(None in (figures[name], limit) or figures[name] <= limit for name, limit in limits.items())


def variables() -> dict[str, str]:
    """Return this process's environment variables, but let Python cache bytecode, as it does for users."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def begin(core: int | None = None, *, is_ahead: bool = False) -> None:
    """Prepare the process of a command: bind it to a core, and give its session priority over other programs."""
    if core is not None and (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {core})
    if is_ahead:
        os.setpriority(os.PRIO_PROCESS, 0, HIGHEST)
        with suppress(FileNotFoundError):  # if the kernel has no autogroups, the priority of the process counts
            Path("/proc/self/autogroup").write_text(str(HIGHEST))


def cost(
    command: Sequence[str],
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
    timeout_s: float = 600.0,
) -> Cost:
    """Run a command to its end, and write its output to a file; the command's process calls `before` at its start.

    Raises:
        SystemExit: the command failed; the message contains the end of its output.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    cpu_s, begun_s = _cpu_s(), time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, preexec_fn=before,
            start_new_session=True, cwd=log.parent,
        )  # fmt: skip
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        code = process.wait()
    wall_s = time.perf_counter() - begun_s
    _reap_orphans(process.pid)
    if code:
        end = log.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{' '.join(command)} failed with exit code {code}:\n{end}")
    return Cost(_cpu_s() - cpu_s, wall_s)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _reap_orphans(session: int) -> None:
    """Wait for the processes of the command's session that the command left behind, for at most 10 s."""
    until_s = time.monotonic() + 10.0
    while time.monotonic() < until_s:
        try:
            pid, _ = os.waitpid(-session, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.05)
