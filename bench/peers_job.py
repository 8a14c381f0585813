"""Compares the cost of a whole job in lem and in optimum-benchmark with its cost in a bare script.

`python -m bench.peers job` runs this comparison. A job starts a program, loads the built-in model on the CPU, and
generates output for a number of batches: greedily, on one thread, without warm-up and without meters, with the same
numbers of input and output tokens. CPU and wall time are those of the whole command with all of its processes.

optimum-benchmark needs an older version of transformers than lem does, and the older version loads and generates at a
different speed. optimum-benchmark is therefore compared with the bare script in an environment that has the older
version. The inputs of optimum-benchmark are random token ids; it reads no prompts and stores no requests.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.usage import begin, cost, variables
from lem.workload import tiny

BATCHES, BATCH_SIZES = 6, (1, 8)
INPUT_TOKENS, OUTPUT_TOKENS = 32, 64
BARE_NEW, BARE_OLD = "bare script", "bare script, transformers 4"
# What each tool is compared with.
REFERENCES = {BARE_NEW: BARE_NEW, "lem": BARE_NEW, BARE_OLD: BARE_OLD, "optimum-benchmark": BARE_OLD}
BARE = Path(__file__).with_name("bare.py")
TEXT = "the river carries small stones to the sea and leaves them where the water slows, every winter anew; "


def job(pairs: int, optimum: Path | None, *, is_ahead: bool) -> dict[str, Any]:
    """Run every job `pairs` times in turn; return the figures of each turn by batch size and tool.

    Args:
        pairs: how many turns each tool takes.
        optimum: the directory of the programs in optimum-benchmark's environment; None leaves it out.
        is_ahead: whether the commands run at a higher priority than other programs.
    """
    turns: dict[int, dict[str, list[dict[str, float | None]]]] = {}
    for size in BATCH_SIZES:
        turns[size] = {name: [] for name in _commands(size, optimum)}
        first = -1 if size == BATCH_SIZES[0] else 0
        for turn in range(first, pairs):
            names = list(turns[size])
            for name in [*names[turn % len(names) :], *names[: turn % len(names)]]:
                found = _run(_commands(size, optimum)[name], is_ahead=is_ahead)
                print(f"batch size {size}, turn {turn}, {name}: {json.dumps(found)}", file=sys.stderr, flush=True)
                if turn >= 0:  # turn -1 only fills the disk cache
                    turns[size][name].append(found)
    return {"turns": turns}


def _run(command: Callable[[Path], list[str]], *, is_ahead: bool) -> dict[str, float | None]:
    with tempfile.TemporaryDirectory(prefix="lem-peers-") as name:
        folder = Path(name)
        env = variables() | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        spent = cost(command(folder), folder / "log.txt", env=env, before=partial(begin, is_ahead=is_ahead))
    return {"cpu_s": spent.cpu_s, "wall_s": spent.wall_s}


def _commands(size: int, optimum: Path | None) -> dict[str, Callable[[Path], list[str]]]:
    """Return, for each tool, a function that writes a job's files and returns its command.

    The names of the tools are also the table's columns.
    """
    found: dict[str, Callable[[Path], list[str]]] = {
        BARE_NEW: partial(_bare, sys.executable, size),
        "lem": partial(_lem, size),
    }
    if optimum is not None:
        found[BARE_OLD] = partial(_bare, str(optimum / "python"), size)
        found["optimum-benchmark"] = partial(_optimum, optimum, size)
    return found


def _prompts(size: int) -> list[str]:
    return [f"{i}: {TEXT * 4}" for i in range(BATCHES * size)]


def _bare(python: str, size: int, folder: Path) -> list[str]:
    content = {
        "model": str(tiny.path()), "batch_size": size, "prompts": _prompts(size), "max_input_tokens": INPUT_TOKENS,
        "max_output_tokens": OUTPUT_TOKENS, "min_output_tokens": OUTPUT_TOKENS, "warmup_prompts": 0,
        "starts_with": None, "engine": "generate",
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(content))
    return [python, str(BARE), str(folder / "job.json")]


def _lem(size: int, folder: Path) -> list[str]:
    rows = [{"prompt": text} for text in _prompts(size)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        sys.executable, "-m", "lem", "experiment", "-m", "tiny", "-p", str(folder / "prompts.jsonl"),
        "-n", str(len(rows)), "backend.device=cpu", "fp_precision=float32", f"batching.batch_size={size}",
        f"max_input_tokens={INPUT_TOKENS}", f"max_output_tokens={OUTPUT_TOKENS}",
        f"min_output_tokens={OUTPUT_TOKENS}", "warmup.prompts=0", "energy=none", "-o", str(folder / "results"), "-y",
    ]  # fmt: skip


def _optimum(programs: Path, size: int, folder: Path) -> list[str]:
    generate = {"max_new_tokens": OUTPUT_TOKENS, "min_new_tokens": OUTPUT_TOKENS, "do_sample": False}
    config = {
        "defaults": ["benchmark", {"scenario": "inference"}, {"launcher": "process"}, {"backend": "pytorch"}, "_self_"],
        "name": "job",
        "launcher": {"device_isolation": False},
        "backend": {
            "device": "cpu", "model": str(tiny.path()), "task": "text-generation", "library": "transformers",
            "torch_dtype": "float32",
        },
        "scenario": {
            "latency": True, "memory": False, "energy": False, "warmup_runs": 0, "iterations": BATCHES, "duration": 0,
            "input_shapes": {"batch_size": size, "sequence_length": INPUT_TOKENS}, "generate_kwargs": generate,
        },
        "hydra": {"run": {"dir": str(folder / "run")}},
    }  # fmt: skip
    (folder / "job.yaml").write_text(json.dumps(config))
    return [str(programs / "optimum-benchmark"), "--config-dir", str(folder), "--config-name", "job"]
