"""Shows what a whole job of `lem experiment` costs beyond a script, part by part, so that the parts add up.

Run with `python -m bench.job_parts`. The job is that of `bench.perturbation`: 10 prompts with up to 512 input tokens
and 128 output tokens each. The first step is the script, bench/bare.py, and each of the other steps adds one part of
lem to the step before it, up to the command as users run it:

1. the script;
2. a worker on its own, without meter and warm-up: lem's modules, its checks of the model, the FLOPs, the records;
3. `lem experiment`, likewise: the parent process, which checks, plans, waits, and writes the rows;
4. with the warm-up;
5. with the default meter, but without the idle phases;
6. with the idle phases, which is the default.

In each round, all steps run once, one after the other, in an order that is drawn anew. The cost of a part is the mean
of the differences between two steps of a round, with its 95% interval (Student's t). The ratio is a geometric mean.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from bench import perturbation
from bench.perturbation import CASES, Bare, Case, Lem, Side
from bench.usage import write_json
from lem.machine import host
from lem.results.statistics import summarize
from lem.runner.job import planned
from lem.runner.preflight import preflight
from lem.spec.engines import PytorchBackend
from lem.spec.experiment import Batching, Dataset, Energy, Experiment, Io, Warmup

SCRIPT, WORKER = "script", "worker alone"
# The options of `lem experiment` in each of the further steps.
COMMANDS = {
    "the parent process": ["energy=none", "warmup.prompts=0"],
    "the warm-up": ["energy=none"],
    "the meter": ["energy.idle_s=0"],
    "the idle phases": [],
}
STEPS = (SCRIPT, WORKER, *COMMANDS)
# CPU time and wall time of a command, in seconds.
Cost = tuple[float, float]


class Worker(Side):
    """A worker process that the benchmark plans itself, without the parent process."""

    def begin(self, case: Case, model: Path, threads: int) -> None:
        """Plan the experiment, which is not timed, and start its worker."""
        prompts = self.folder / "prompts.jsonl"
        perturbation.write_prompts(prompts, case.prompts)
        experiment = Experiment(
            model=str(model),
            dataset=Dataset(path=str(prompts)),
            backend=PytorchBackend(device="cpu"),
            batching=Batching(batch_size=case.batch_size),
            max_input_tokens=case.input_tokens,
            max_output_tokens=case.output_tokens,
            energy=Energy(name="none"),
            warmup=Warmup(prompts=0),
            io=Io(results_dir=str(self.folder / "results")),
        )
        _, directory = planned(preflight(experiment, host.look()))
        self.start([sys.executable, "-m", "lem.runner.worker", str(directory.path)], threads)


def run(step: str, case: Case, folder: Path, threads: int) -> Cost:
    """Run one step in a folder of its own; return its CPU time and wall time."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        own = Path(scratch) / "run"
        if step == SCRIPT:
            script = Bare(own)
            script.begin(case, folder, sys.executable, threads, None)
            return script.wait()
        if step == WORKER:
            worker = Worker(own)
            worker.begin(case, folder / "model", threads)
            return worker.wait()
        command = Lem(own)
        command.begin(case, folder, sys.executable, threads, COMMANDS[step])
        return command.wait()


def parts(rounds: Sequence[dict[str, Cost]], which: int) -> Iterator[tuple[str, str]]:
    """Yield the mean cost of the script, of each part and of the whole job, and the ratio, with intervals, as text."""
    yield SCRIPT, _shown([costs[SCRIPT][which] for costs in rounds])
    for before, step in pairwise(STEPS):
        yield step, _shown([costs[step][which] - costs[before][which] for costs in rounds])
    yield "`lem experiment`", _shown([costs[STEPS[-1]][which] for costs in rounds])
    logs = summarize([math.log(costs[STEPS[-1]][which] / costs[SCRIPT][which]) for costs in rounds])
    low, mean, high = (None if each is None else math.exp(each) for each in (logs.ci95_low, logs.mean, logs.ci95_high))
    yield "`lem experiment` ÷ script", f"{mean:.2f}" + ("" if low is None else f" ({low:.2f} to {high:.2f})")


def _shown(values_s: Sequence[float]) -> str:
    found = summarize(list(values_s))
    if found.ci95_low is None or found.ci95_high is None:
        return f"{found.mean:.2f} s"
    return f"{found.mean:.2f} s ({found.ci95_low:.2f} to {found.ci95_high:.2f})"


def main() -> int:
    """Run the rounds, and print a table for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="how often each step runs (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="PyTorch's threads (default: 1)")
    parser.add_argument("--json", type=Path, help="a file for the costs of all runs")
    options = parser.parse_args()
    generator, found = random.Random(1), {}
    with tempfile.TemporaryDirectory(prefix="lem-job-parts-") as scratch:
        perturbation.prepare(Path(scratch))
        for name in ("job, batch 1", "job, batch 8"):
            rounds: list[dict[str, Cost]] = []
            for number in range(options.rounds):
                order = generator.sample(STEPS, len(STEPS))
                rounds.append({step: run(step, CASES[name], Path(scratch), options.threads) for step in order})
                print(f"{name}, round {number + 1}: {rounds[-1]}", file=sys.stderr, flush=True)
            found[name] = rounds
    for name, rounds in found.items():
        print(f"\n| {name} | CPU time | wall time |\n|---|---|---|")
        for (part, cpu), (_, wall) in zip(parts(rounds, 0), parts(rounds, 1), strict=True):
            print(f"| {part} | {cpu} | {wall} |")
    write_json(options.json, {name: {"case": asdict(CASES[name]), "rounds": rounds} for name, rounds in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
