"""Measures what the daemon of a schedule costs while it waits: CPU time, scaled to a day, and memory.

Run with `python -m nox -s bench`, or with `python -m bench.waiting --minutes 10` to measure for longer. The benchmark
starts two schedules, each of a week with a start every half hour, and lets both wait at the same time: one without a
terminal, and one on a terminal. It prints a table, and fails if the daemon without a terminal exceeds its limits.
"""

from __future__ import annotations

import argparse
import os
import pty
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

DAY_S = 86_400.0
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


def main() -> int:
    """Measure both daemons and print what they cost; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="how long to measure (default: 3)")
    minutes = parser.parse_args().minutes
    ours, theirs = pty.openpty()
    threading.Thread(target=_drain, args=(ours,), daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        daemons = {"without a terminal": start(folder, "plain", None), "on a terminal": start(folder, "live", theirs)}
        try:
            for daemon in daemons.values():
                wait_until_waiting(daemon)
            before, began_s = {name: cpu_s(each.pid) for name, each in daemons.items()}, time.monotonic()
            time.sleep(60.0 * minutes)
            elapsed_s = time.monotonic() - began_s
            spent = {name: (cpu_s(each.pid) - before[name]) / elapsed_s * DAY_S for name, each in daemons.items()}
            memory = {name: memory_mb(each.pid) for name, each in daemons.items()}
        finally:
            for daemon in daemons.values():
                daemon.send_signal(signal.SIGTERM)
                daemon.wait(30)
    for name in daemons:
        print(f"{name:<20} {spent[name]:6.3f} s CPU a day, {memory[name]:5.1f} MB, measured over {minutes:g} min")
    print(f"limits without a terminal: {LIMIT_CPU_S:g} s CPU a day, {LIMIT_MB:g} MB")
    return int(spent["without a terminal"] > LIMIT_CPU_S or memory["without a terminal"] > LIMIT_MB)


def _drain(descriptor: int) -> None:
    while os.read(descriptor, 4096):
        pass


if __name__ == "__main__":
    sys.exit(main())
