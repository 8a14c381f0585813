"""Measures the CPU time and memory of starting up, for the commands that users run most.

Run with `python -m nox -s bench`. It prints a table, and fails if a command exceeds its limit. A limit is a multiple of
the CPU time of an empty interpreter in the same run, because seconds depend more on the machine. The commands take
turns, so that a change in the machine's speed affects all of them. Each time is the shortest of several runs, because
other programs on the machine can only make CPU times longer.

Some of the commands read a model from a local directory and prompts from a local file, as most users do.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.usage import is_within, parser, variables, write_json
from lem.workload import tiny

REPEATS = 10
EXPERIMENTS = 15
NOTHING = "python -c pass"
SIMULATED = "model: any\nbackend: simulated\ndataset: {path: prompts.jsonl, sample_size: 3}\nenergy: none\n"


@dataclass(frozen=True)
class Command:
    """A command, its goal in seconds of CPU time, and its limit as a multiple of an empty interpreter's time."""

    arguments: Sequence[str]
    goal_s: float | None = None
    limit: float | None = None


LOCAL = ["-m", "lem", "experiment", "-m", "./model", "-p", "prompts.jsonl", "-n", "3", "--dry-run"]
COMMANDS = {
    NOTHING: Command(["-c", "pass"]),
    "import lem": Command(["-c", "import lem"]),
    "lem --help": Command(["-m", "lem", "--help"], 0.2, 7),
    "lem experiment --help": Command(["-m", "lem", "experiment", "--help"]),
    "lem presets": Command(["-m", "lem", "presets"], None, 14),
    "lem config validate": Command(["-m", "lem", "config", "validate", "a.yaml"], 0.4, 20),
    "lem experiment --dry-run (built-in model and prompts)": Command(
        ["-m", "lem", "experiment", "-m", "tiny", "-d", "sample", "-n", "3", "--dry-run"], 0.6, 40
    ),
    "lem experiment --dry-run (local model and jsonl)": Command(LOCAL, 1.0, 40),
    "the same, with a tokenizer that only transformers can load": Command([*LOCAL, "-m", "./other"], None, 120),
    f"lem results list ({EXPERIMENTS} rows)": Command(["-m", "lem", "results", "list"], 0.4, 28),
    "lem results show": Command(["-m", "lem", "results", "show", "exp_"], 0.5, 28),
}


@dataclass(frozen=True)
class Figures:
    """What a command costs, with its goal and limit; `times_empty` is relative to an empty interpreter's CPU time."""

    cpu_s: float
    goal_cpu_s: float | None
    memory_mb: float
    times_empty: float
    limit_times_empty: float | None


def cost(arguments: Sequence[str], folder: Path) -> tuple[float, float]:
    """Return the CPU time in seconds, and the peak memory in MB, of one run of Python and its child processes."""
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=folder, env=variables())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def prepare(folder: Path) -> None:
    """Write the model, prompts, config file and results that the commands read."""
    shutil.copytree(tiny.path(), folder / "model")
    shutil.copytree(tiny.path(), folder / "other")
    config = folder / "other" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_prefix_space": False}))
    rows = [{"prompt": f"Tell me about the number {i}."} for i in range(200)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.yaml").write_text(SIMULATED)
    seeds = ",".join(map(str, range(EXPERIMENTS)))
    sweep = ["-m", "lem", "experiment", "a.yaml", "--multirun", f"seed={seeds}", "-y"]
    subprocess.run([sys.executable, *sweep], cwd=folder, check=True, capture_output=True)


def measured(folder: Path) -> dict[str, Figures]:
    """Return each command's figures, from its shortest CPU time and its peak memory."""
    first = min((folder / "results" / "raw").iterdir()).name
    commands = {
        name: [first if text == "exp_" else text for text in command.arguments] for name, command in COMMANDS.items()
    }
    for arguments in commands.values():
        cost(arguments, folder)  # warm-up: compiles bytecode and fills the disk cache
    runs = [{name: cost(arguments, folder) for name, arguments in commands.items()} for _ in range(REPEATS)]
    cpu_s = {name: min(run[name][0] for run in runs) for name in commands}
    return {
        name: Figures(
            cpu_s=cpu_s[name],
            goal_cpu_s=command.goal_s,
            memory_mb=max(run[name][1] for run in runs),
            times_empty=cpu_s[name] / cpu_s[NOTHING],
            limit_times_empty=command.limit,
        )
        for name, command in COMMANDS.items()
    }


def report(found: Mapping[str, Figures]) -> None:
    """Print a table with a row for each command."""
    print(f"{'':<60} {'CPU s':>6} {'goal':>5} {'MB':>5} {'x empty':>8} {'limit':>6}")
    for name, figures in found.items():
        goal, limit = (f"{each:g}" if each else "-" for each in (figures.goal_cpu_s, figures.limit_times_empty))
        costs = f"{figures.cpu_s:6.2f} {goal:>5} {figures.memory_mb:5.0f}"
        print(f"{name:<60} {costs} {figures.times_empty:8.1f} {limit:>6}")


def main() -> int:
    """Measure and print all start-up times; return 1 if a limit is exceeded."""
    options = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="lem-startup-") as folder:
        prepare(Path(folder))
        found = measured(Path(folder))
    report(found)
    figures = {name: asdict(each) for name, each in found.items()}
    write_json(options.json, figures)
    exceeded = [name for name, each in figures.items() if not is_within(each)]
    for name in exceeded:
        print(f"{name} takes more than {COMMANDS[name].limit:g} times as long as an empty interpreter", file=sys.stderr)
    return int(bool(exceeded))


if __name__ == "__main__":
    sys.exit(main())
