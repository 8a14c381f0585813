"""Measures the CPU time of starting up, in seconds and as a multiple of an empty interpreter's.

Run with `python -m nox -s bench`. It prints a table, and fails if `lem --help` exceeds its limit. The limit is a
multiple, because seconds depend more on the machine.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys

REPEATS = 7
HELP_LIMIT = 20.0
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "import lem": ["-c", "import lem"],
    "lem --help": ["-m", "lem", "--help"],
    "lem presets": ["-m", "lem", "presets"],
    "lem experiment --dry-run": [
        "-m", "lem", "experiment", "--model", "tiny", "-d", "sample", "-n", "3", "--dry-run",
    ],
}  # fmt: skip


def cpu_s(arguments: list[str]) -> float:
    """Return the CPU time of one run of Python with these arguments, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Bytecode is cached, as it would be for a command that is run often.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    """Measure and print all start-up times; return 1 if the limit is exceeded."""
    medians = {}
    for name, arguments in COMMANDS.items():
        cpu_s(arguments)  # warm-up: compiles bytecode and fills the disk cache
        medians[name] = statistics.median(cpu_s(arguments) for _ in range(REPEATS))
    nothing = medians["python -c pass"]
    for name, seconds in medians.items():
        print(f"{name:<26} {seconds:7.3f} s CPU  {seconds / nothing:6.1f} x an empty interpreter")
    print(f"limit for lem --help: {HELP_LIMIT:g} x")
    return int(medians["lem --help"] > HELP_LIMIT * nothing)


if __name__ == "__main__":
    sys.exit(main())
