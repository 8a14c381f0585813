"""Measures what the daemon of a schedule costs while it waits: CPU time, scaled to a day, and memory.

Run with `python -m nox -s bench`, or with `python -m bench.waiting --minutes 10` to measure for longer. The benchmark
starts two schedules, each of a week with a start every half hour, and lets both wait at the same time: one without a
terminal, and one on a terminal. It prints a table, and fails if the daemon without a terminal exceeds its limits.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from bench.usage import is_within, parser, write_json

DAY_S = 86_400.0
PLAIN, LIVE = "without a terminal", "on a terminal"
# The limits of the daemon without a terminal; the CPU time is that of a day.
LIMIT_CPU_S, LIMIT_MB = 1.0, 60.0
# In this time, the daemon imports its modules and begins to wait.
SETTLE_S = 10.0


def start(folder: str, name: str, terminal: int | None) -> subprocess.Popen[bytes]:
    """Start a schedule whose first run is an hour away; `terminal` is where its countdown goes."""
    first = datetime.now(UTC) + timedelta(hours=1)
    arguments = ["--at", f"{first:%H:%M}", "--interval", "30m", "--duration", "7d", "--time-zone", "UTC"]
    what = ["--model", "any", "--dataset", "sample", "-n", "2", "backend=simulated", "energy=none", "--yes"]
    output = subprocess.DEVNULL if terminal is None else terminal
    command = [sys.executable, "-m", "lem", "schedule", *what, *arguments, "--name", name]
    environment = {**os.environ, "TERM": "xterm", "LEM_STATE_DIR": folder}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )


def wait_until_waiting(process: subprocess.Popen[bytes]) -> None:
    """Wait until the process has become the daemon and sleeps."""
    for _ in range(1200):
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        if b"lem.studies.daemon" in command:
            time.sleep(SETTLE_S)
            return
        time.sleep(0.1)
    raise SystemExit("The schedule did not start.")


def cpu_s(pid: int) -> float:
    """Return the CPU time of a single-threaded process, in seconds.

    /proc/<pid>/stat would give this time only in hundredths of a second.
    """
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def memory_mb(pid: int) -> float:
    """Return the largest resident size of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def measured(minutes: float) -> dict[str, dict[str, Any]]:
    """Let both daemons wait, and return the figures of each."""
    ours, theirs = pty.openpty()
    threading.Thread(target=_drain, args=(ours,), daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        daemons = {PLAIN: start(folder, "plain", None), LIVE: start(folder, "live", theirs)}
        try:
            for daemon in daemons.values():
                wait_until_waiting(daemon)
            before, began_s = {name: cpu_s(each.pid) for name, each in daemons.items()}, time.monotonic()
            time.sleep(60.0 * minutes)
            elapsed_s = time.monotonic() - began_s
            spent_s = {name: (cpu_s(each.pid) - before[name]) / elapsed_s * DAY_S for name, each in daemons.items()}
            return {name: figures(name, spent_s[name], memory_mb(each.pid)) for name, each in daemons.items()}
        finally:
            for daemon in daemons.values():
                daemon.send_signal(signal.SIGTERM)
                daemon.wait(30)


def _drain(descriptor: int) -> None:
    while os.read(descriptor, 4096):
        pass


def figures(name: str, a_day_s: float, used_mb: float) -> dict[str, float | None]:
    """Return the CPU time and memory of a daemon, with its limits; the daemon on a terminal has none."""
    return {
        "cpu_s_per_day": a_day_s,
        "limit_cpu_s_per_day": LIMIT_CPU_S if name == PLAIN else None,
        "memory_mb": used_mb,
        "limit_memory_mb": LIMIT_MB if name == PLAIN else None,
    }


def report(found: Mapping[str, Mapping[str, Any]], minutes: float) -> None:
    """Print what both daemons cost."""
    for name, each in found.items():
        costs = f"{each['cpu_s_per_day']:6.3f} s CPU a day, {each['memory_mb']:5.1f} MB"
        print(f"{name:<20} {costs}, measured over {minutes:g} min")
    print(f"limits without a terminal: {LIMIT_CPU_S:g} s CPU a day, {LIMIT_MB:g} MB")


def main() -> int:
    """Measure both daemons and print what they cost; return 1 if a limit is exceeded."""
    arguments = parser(__doc__)
    arguments.add_argument("--minutes", type=float, default=3.0, help="how long to measure (default: 3)")
    options = arguments.parse_args()
    found = measured(options.minutes)
    report(found, options.minutes)
    write_json(options.json, {"measured_min": options.minutes, "daemons": found})
    return int(not all(map(is_within, found.values())))


if __name__ == "__main__":
    sys.exit(main())
