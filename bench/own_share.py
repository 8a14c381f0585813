"""Samples the worker during its window: which share of the time is spent in lem's own Python code?

Run with `python -m bench.own_share`. The experiment has batch size 1 and a model with about 6 million parameters, on
one thread and without a meter. py-spy notes the stack of the worker's main thread 200 times per second. Each sample
belongs to the innermost function that is part of lem, torch or transformers, so that the standard library counts for
its caller, and a hook of lem that transformers calls counts for lem. The CPU time of the other threads, of which lem
has one, is the kernel's count. The benchmark fails if the sum of both is 1% of the window or more.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import perturbation
from bench.perturbation import Case, Lem
from bench.usage import parser, write_json
from lem.quantities import NS_PER_S

LIMIT_PERCENT = 1.0
SIZES = {"hidden_size": 224, "intermediate_size": 640, "num_hidden_layers": 7, "num_attention_heads": 7}
HEADS = {"num_key_value_heads": 7, "head_dim": 32}
CASE = Case(prompts=600, batch_size=1, input_tokens=32, output_tokens=32)
# The other threads are observed before py-spy begins, because it wakes them up for every sample.
ALONE_S, SAMPLED_S, PER_S = 5, 20, 200
ENGINE, OWN = ("/torch/", "/transformers/"), "/lem/"


def worker_of(folder: Path) -> int:
    """Wait until the worker of an experiment opens its window, and return its process id."""
    until_s = time.monotonic() + 120
    while time.monotonic() < until_s:
        # The first line of the journal is written when the window opens.
        if any(file.stat().st_size for file in folder.glob("results/raw/*/journal_*")):
            for process in Path("/proc").glob("[0-9]*"):
                command = (process / "cmdline").read_bytes() if (process / "cmdline").exists() else b""
                if b"lem.runner.worker" in command and os.readlink(process / "cwd") == str(folder):
                    return int(process.name)
        time.sleep(0.05)
    raise SystemExit("The worker did not open its window within two minutes.")


def sample(py_spy: str, process: int, file: Path) -> Counter[str]:
    """Sample a main thread; return how often each stack was seen, outermost function first, separated by semicolons."""
    command = [py_spy, "record", "--pid", str(process), "--duration", str(SAMPLED_S), "--rate", str(PER_S)]
    command += ["--threads", "--format", "raw", "--full-filenames", "--output", str(file)]
    subprocess.run(command, check=True, capture_output=True)
    stacks: Counter[str] = Counter()
    for line in file.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        if "MainThread" in stack.partition(";")[0]:
            stacks[stack] += int(count)
    return stacks


def other_threads_s(process: int) -> float:
    """Return the CPU time that the threads of a process other than its main thread have used so far, in seconds."""
    threads = [thread for thread in Path(f"/proc/{process}/task").iterdir() if thread.name != str(process)]
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / NS_PER_S


def is_own(stack: str) -> bool:
    """Return whether a sample belongs to lem; one that belongs to neither lem nor the engine counts for lem too."""
    for function in reversed(stack.split(";")):
        if any(part in function for part in ENGINE):
            return False
        if OWN in function:
            return True
    return True


def measured() -> dict[str, Any]:
    """Run the experiment, sample its worker and return all figures."""
    py_spy = shutil.which("py-spy")
    if py_spy is None:
        raise SystemExit("py-spy is not installed; it is among the dependencies that python -m nox -s dev installs.")
    with tempfile.TemporaryDirectory(prefix="lem-share-") as name:
        folder = Path(name)
        perturbation.prepare(folder, SIZES | HEADS)
        lem = Lem(folder / "lem")
        lem.begin(CASE, folder, sys.executable, 1, [])
        process = worker_of(lem.folder)
        before_s = other_threads_s(process)
        time.sleep(ALONE_S)
        others_percent = 100 * (other_threads_s(process) - before_s) / ALONE_S
        stacks = sample(py_spy, process, folder / "stacks")
        lem.result()
        (file,) = lem.folder.glob("results/raw/*/process_0_c1_a1.json")
        record = json.loads(file.read_text())
    return figures(stacks, others_percent, record)


def figures(stacks: Counter[str], others_percent: float, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return all figures, given the stacks of the main thread, the share of the other threads, and the record."""
    window_s = next(phase["duration_s"] for phase in record["phases"] if phase["name"] == "measured")
    if window_s < ALONE_S + SAMPLED_S:
        raise SystemExit(f"The window took only {window_s:.0f} s, so it ended before the sampling; raise CASE.prompts.")
    own = Counter({stack: count for stack, count in stacks.items() if is_own(stack)})
    own_percent, recording_s = 100 * own.total() / stacks.total(), record["own_time"]["recording_s"]
    return {
        "samples": stacks.total(),
        "own_samples": own.total(),
        "own_percent": own_percent,
        "others_percent": others_percent,
        "both_percent": own_percent + others_percent,
        "limit_both_percent": LIMIT_PERCENT,
        "batches": CASE.prompts,
        "recording_us_per_batch": 1e6 * recording_s / CASE.prompts,
        "recording_percent": 100 * recording_s / window_s,
        "functions": [{"samples": count, "function": stack.split(";")[-1]} for stack, count in own.most_common(5)],
    }


def report(found: Mapping[str, Any]) -> None:
    """Print all figures."""
    own = f"{found['own_samples']} of them in lem's own code: {found['own_percent']:.2f}%."
    print(f"{found['samples']} samples of the main thread, {own}")
    others = f"Other threads used the CPU for {found['others_percent']:.2f}% of the time."
    print(f"{others} The limit for both is {LIMIT_PERCENT:g}%.")
    recording = f"Recording each of {found['batches']} batches took {found['recording_us_per_batch']:.0f} µs on average"
    print(f"{recording}, {found['recording_percent']:.3f}% of the window.")
    for each in found["functions"]:
        print(f"  {each['samples']}  {each['function']}")


def main() -> int:
    """Measure and print the shares; return 1 if lem's own share is too large."""
    options = parser(__doc__).parse_args()
    found = measured()
    report(found)
    write_json(options.json, found)
    return int(found["both_percent"] >= LIMIT_PERCENT)


if __name__ == "__main__":
    sys.exit(main())
