"""Compares `lem experiment` with a script that calls the engine directly, bench/bare.py, to show what lem changes.

Run with `python -m bench.perturbation`. Each pair runs both in fresh processes with the same model, prompts, settings
and number of threads. Each ratio is the geometric mean over the pairs, with its 95% interval (Student's t on the
logarithms).

- The windows: in the cases `batch 1`, `batch 8`, `continuous` and those of vLLM, the measured windows are compared,
  without a meter: output tokens per second, and output tokens per second of the process's CPU time. Both windows run at
  the same time on one core, and the kernel switches between them every few milliseconds, so whatever changes the speed
  of the machine changes both alike. With `--in-turn`, they run one after the other instead, and the order alternates
  from pair to pair.
- The jobs: in the cases `job, batch 1` and `job, batch 8`, whole commands with 10 prompts and the default meter are
  compared, one after the other in alternating order: the CPU time of all processes, and the wall time. lem's times
  include two idle phases and the warm-up.

The cases of vLLM need a Python environment with vLLM, which `--vllm-python` names; they are left out otherwise. By
default, `LLM` keeps no statistics. lem turns them on, because the times of requests are among them; in the case `vllm,
statistics`, the script does so too. Options after `--` are added to the command line of lem, so that causes can be
excluded one at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.usage import variables, write_json
from lem.results.statistics import summarize
from lem.workload import builtin, tiny

BARE = Path(__file__).with_name("bare.py")
WINDOW_LIMIT, JOB_LIMIT = 0.99, 1.15
# A Llama with 4.2 million parameters.
SIZES = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 32}
MODEL = """
import json, sys
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(1)
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1])).save_pretrained(sys.argv[1])
"""


@dataclass(frozen=True)
class Case:
    """What is compared: the prompts, the batch size, the lengths in tokens, and whether to time whole jobs.

    `engine` is what the script calls. `has_statistics` says whether vLLM's statistics are on in the script, as in lem.
    """

    prompts: int
    batch_size: int
    input_tokens: int
    output_tokens: int
    is_job: bool = False
    engine: str = "generate"
    has_statistics: bool = False


CASES = {
    "batch 1": Case(60, 1, 32, 32),
    "batch 8": Case(160, 8, 32, 32),
    "continuous": Case(160, 8, 32, 32, engine="generate_batch"),
    "vllm": Case(320, 8, 32, 32, engine="vllm"),
    "vllm, statistics": Case(320, 8, 32, 32, engine="vllm", has_statistics=True),
    "job, batch 1": Case(10, 1, 512, 128, is_job=True),
    "job, batch 8": Case(10, 8, 512, 128, is_job=True),
}
# What both sides pass to vLLM, and lem's options for each engine.
ENGINE_ARGUMENTS = {"max_model_len": 128, "enforce_eager": True, "kv_cache_memory_bytes": 2**28}
OPTIONS = {
    "generate": ["backend.device=cpu"],
    "generate_batch": ["backend.device=cpu", "batching.strategy=continuous"],
    "vllm": ["backend=vllm", "batching.strategy=continuous"]
    + [f"backend.{name}={json.dumps(value)}" for name, value in ENGINE_ARGUMENTS.items()],
}


@dataclass(frozen=True)
class Run:
    """One run of a command: its window, and the CPU time and wall time of the whole command."""

    window_s: float
    window_cpu_s: float
    output_tokens: int
    command_cpu_s: float
    command_s: float


# ------------------------------------------------------------------ inputs
def prepare(folder: Path, sizes: Mapping[str, int] = SIZES | HEADS) -> None:
    """Create the model in a folder, with the tokenizer of the built-in model and random weights."""
    model = folder / "model"
    model.mkdir()
    for file in tiny.path().glob("*.json"):
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | dict(sizes)))
    subprocess.run([sys.executable, "-c", MODEL, str(model)], check=True, capture_output=True)


def texts(count: int) -> list[str]:
    """Return prompts of well over 32 tokens each."""
    rows = [row["text"] for row in builtin.read("builtin:sample")]
    return [" ".join(rows[(i + j) % len(rows)] for j in range(4)) for i in range(count)]


def write_prompts(file: Path, count: int) -> None:
    """Write the prompts to a JSONL file."""
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts(count)))


# ------------------------------------------------------------------ running
class Side:
    """A command that runs in its own folder; in subclasses, `begin` starts it, and `result` waits for its `Run`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def start(self, command: Sequence[str], threads: int) -> None:
        """Start the command."""
        environment = variables() | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self._began_s = time.perf_counter()
        self._output = (self.folder / "output").open("w+b")
        self._process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )

    def wait(self) -> tuple[float, float]:
        """Wait for the command; return the CPU time of its processes and how long it took, in seconds."""
        _, status, usage = os.wait4(self._process.pid, 0)
        took_s = time.perf_counter() - self._began_s
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            raise SystemExit(f"A command failed; its output ends:\n{self.printed()[-2000:]}")
        return _cpu_s(usage), took_s

    def printed(self) -> str:
        """Return the command's output so far."""
        return (self.folder / "output").read_text(errors="replace")


def _cpu_s(usage: resource.struct_rusage) -> float:
    return usage.ru_utime + usage.ru_stime


class Lem(Side):
    """`lem experiment`, with results in the side's folder."""

    def begin(self, case: Case, folder: Path, python: str, threads: int, extra: Sequence[str]) -> None:
        """Start the experiment."""
        write_prompts(self.folder / "prompts.jsonl", case.prompts)
        options = [f"batching.batch_size={case.batch_size}", f"max_input_tokens={case.input_tokens}"]
        options += [f"max_output_tokens={case.output_tokens}", *OPTIONS[case.engine]]
        options += [] if case.is_job else ["energy=none", f"warmup.prompts={case.batch_size * 5}"]
        command = [python, "-m", "lem", "experiment", "-m", str(folder / "model"), "-p", "prompts.jsonl"]
        self.start([*command, *options, "--yes", "--fresh", *extra], threads)

    def result(self) -> Run:
        """Wait for the experiment and read its record."""
        cpu_s, took_s = self.wait()
        (file,) = self.folder.glob("results/raw/*/process_0_c1_a1.json")
        record = json.loads(file.read_text())
        window_s = next(phase["duration_s"] for phase in record["phases"] if phase["name"] == "measured")
        window_cpu_s = record["cpu_load"]["process_cores"] * window_s
        return Run(window_s, window_cpu_s, record["output_tokens"], cpu_s, took_s)


class Bare(Side):
    """The script without lem."""

    def begin(self, case: Case, folder: Path, python: str, threads: int, starts_with: str | None) -> None:
        """Start the script; its window begins when a file matches `starts_with`."""
        job = {
            "engine": case.engine,
            "engine_args": ENGINE_ARGUMENTS | {"disable_log_stats": not case.has_statistics},
            "model": str(folder / "model"),
            "prompts": texts(case.prompts),
            "batch_size": case.batch_size,
            "max_input_tokens": case.input_tokens,
            "max_output_tokens": case.output_tokens,
            "min_output_tokens": 0,
            "warmup_prompts": 0 if case.is_job else case.batch_size * 5,
            "starts_with": starts_with,
        }
        (self.folder / "job.json").write_text(json.dumps(job))
        self.start([python, str(BARE), "job.json"], threads)

    def result(self) -> Run:
        """Wait for the script and parse its output."""
        cpu_s, took_s = self.wait()
        return Run(**json.loads(self.printed().splitlines()[-1]), command_cpu_s=cpu_s, command_s=took_s)


def pair(case: Case, folder: Path, number: int, options: argparse.Namespace) -> tuple[Run, Run]:
    """Run lem and the script once each; return their runs in this order."""
    python = options.vllm_python if case.engine == "vllm" else sys.executable
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        lem, bare = Lem(Path(scratch) / "lem"), Bare(Path(scratch) / "bare")
        begin_lem = partial(lem.begin, case, folder, python, options.threads, options.extra)
        begin_bare = partial(bare.begin, case, folder, python, options.threads)
        if not case.is_job and not options.in_turn:
            with on_one_core():
                begin_lem()
                # lem creates its journal just before the warm-up.
                begin_bare(str(lem.folder / "results/raw/*/journal_*"))
            return lem.result(), bare.result()
        if number % 2:
            begin_lem()
            measured = lem.result()
            begin_bare(None)
            return measured, bare.result()
        begin_bare(None)
        expected = bare.result()
        begin_lem()
        return lem.result(), expected


@contextmanager
def on_one_core() -> Iterator[None]:
    """Let all processes that are started in this context share one core for good."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(allowed)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


# ------------------------------------------------------------------ comparing
def ratios_of(case: Case, lem: Run, bare: Run) -> dict[str, float]:
    """Return the ratios of lem to the script; those of a window are rates, and those of a job are costs."""
    if case.is_job:
        return {
            "CPU time of the job": lem.command_cpu_s / bare.command_cpu_s,
            "time of the job": lem.command_s / bare.command_s,
        }
    per_s = lem.output_tokens / lem.window_s / (bare.output_tokens / bare.window_s)
    per_cpu_s = lem.output_tokens / lem.window_cpu_s / (bare.output_tokens / bare.window_cpu_s)
    return {"output tokens per s": per_s, "output tokens per CPU s": per_cpu_s}


@dataclass(frozen=True)
class Ratio:
    """The geometric mean of a ratio over the pairs, with its 95% interval; no interval with a single pair."""

    pairs: int
    mean: float
    low: float | None
    high: float | None
    lem_median: float
    bare_median: float

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" ({self.low:.3f}–{self.high:.3f})"
        return f"{self.mean:.3f}{interval}"


def ratio_of(name: str, runs: Sequence[tuple[Run, Run]], case: Case) -> Ratio:
    """Combine one ratio over the pairs; the medians are those of the quantity itself."""
    found = summarize([math.log(ratios_of(case, lem, bare)[name]) for lem, bare in runs])
    assert found.mean is not None
    low, high = (None if each is None else math.exp(each) for each in (found.ci95_low, found.ci95_high))
    medians = [statistics.median(quantity(name, pair[side]) for pair in runs) for side in (0, 1)]
    return Ratio(len(runs), math.exp(found.mean), low, high, *medians)


def quantity(name: str, run: Run) -> float:
    """Return the quantity that a ratio compares: tokens per second or seconds."""
    return {
        "output tokens per s": run.output_tokens / run.window_s,
        "output tokens per CPU s": run.output_tokens / run.window_cpu_s,
        "CPU time of the job": run.command_cpu_s,
        "time of the job": run.command_s,
    }[name]


def report(found: dict[str, dict[str, Ratio]]) -> None:
    """Print the ratios as a Markdown table."""
    print(f"\n| {'case':<12} | {'compared':<23} | pairs | lem | script | lem ÷ script (95% interval) |")
    print("|---|---|---|---|---|---|")
    for case, ratios in found.items():
        for name, ratio in ratios.items():
            medians = f"{ratio.lem_median:.4g} | {ratio.bare_median:.4g}"
            print(f"| {case:<12} | {name:<23} | {ratio.pairs} | {medians} | {ratio} |")


def parsed() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10, help="the number of pairs of each case (default: 10)")
    parser.add_argument("--case", action="append", choices=list(CASES), help="a case to run (default: all)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default: 1)")
    parser.add_argument("--prompts", type=int, help="the number of prompts, if not that of the case")
    parser.add_argument("--in-turn", action="store_true", help="run the windows of a pair one after the other")
    parser.add_argument("--vllm-python", help="the Python interpreter of an environment with lem and vLLM")
    parser.add_argument("--json", type=Path, help="a file for all runs and ratios")
    parser.add_argument("extra", nargs="*", help="more arguments for lem experiment, after --")
    return parser.parse_args()


def main() -> int:
    """Run the pairs, taking the cases in turn, and print the table; return 1 if an interval excludes its goal."""
    options = parsed()
    cases = {name: CASES[name] for name in options.case or CASES if CASES[name].engine != "vllm" or options.vllm_python}
    if options.prompts:
        cases = {name: Case(**asdict(case) | {"prompts": options.prompts}) for name, case in cases.items()}
    runs: dict[str, list[tuple[Run, Run]]] = {name: [] for name in cases}
    with tempfile.TemporaryDirectory(prefix="lem-perturbation-") as folder:
        prepare(Path(folder))
        for number in range(options.pairs):
            for name, case in cases.items():
                runs[name].append(pair(case, Path(folder), number, options))
                shown = ", ".join(f"{key} {value:.3f}" for key, value in ratios_of(case, *runs[name][-1]).items())
                print(f"{name}, pair {number + 1}: {shown}", file=sys.stderr, flush=True)
    found = {
        name: {key: ratio_of(key, runs[name], case) for key in ratios_of(case, *runs[name][0])}
        for name, case in cases.items()
    }
    report(found)
    write_json(options.json, _plain(runs, found))
    return int(any(is_exceeded(cases[name], ratio) for name, ratios in found.items() for ratio in ratios.values()))


def is_exceeded(case: Case, ratio: Ratio) -> bool:
    """Return whether the interval of a ratio lies on the wrong side of the goal."""
    if ratio.low is None or ratio.high is None:
        return False
    return ratio.low > JOB_LIMIT if case.is_job else ratio.high < WINDOW_LIMIT


def _plain(runs: dict[str, list[tuple[Run, Run]]], found: dict[str, dict[str, Ratio]]) -> dict[str, Any]:
    return {
        name: {
            "ratios": {key: asdict(ratio) for key, ratio in found[name].items()},
            "pairs": [{"lem": asdict(lem), "bare": asdict(bare)} for lem, bare in each],
        }
        for name, each in runs.items()
    }


if __name__ == "__main__":
    sys.exit(main())
