"""The direct form: the user's own launcher starts all processes, and together they run one experiment.

    accelerate launch --num_processes 2 -m lem.cli.direct --config my.yaml --dataset alpaca -n 100

Like `lem experiment`, the first process composes and checks the configuration, claims the directory and writes the
plan. Then all processes run as workers. At the end, the first process writes the row and shows it. An interrupted run
can be resumed with `lem experiment --resume`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lem.cli.base import exit_code_of
from lem.cli.environment import load_dotenv
from lem.cli.flags import choice_overrides, value_overrides
from lem.cli.streams import forgiving_streams
from lem.config.compose import Composition, prepare
from lem.config.layers import origin
from lem.config.trust import asked_by
from lem.errors import ConfigError, Interrupted
from lem.machine import host
from lem.results.aggregate import catch_up
from lem.results.directory import ExperimentDir
from lem.results.store import Store
from lem.runner import worker
from lem.runner.job import Outcome, fingerprint, resume, run_ready
from lem.runner.launch import INTERRUPTED
from lem.runner.preflight import Ready, preflight
from lem.runner.progress import Report
from lem.runner.ranks import Ranks, announce_end, named_by_launcher, publish, receive, wait_for_ends
from lem.spec.experiment import Experiment
from lem.spec.processes import process_counts, runs_in_one_process
from lem.spec.schema import leaf
from lem.studies.ask import RunOptions, print_warnings, show_outcome
from lem.studies.consent import Consents
from lem.studies.display import display

# The message that the first process sends to the others if there is nothing to run.
NOTHING = "nothing"


def main(argv: Sequence[str] | None = None) -> int:
    """Run as one of the processes started by a launcher; return the exit code."""
    forgiving_streams()
    options = _parser().parse_intermixed_args(argv)
    return exit_code_of(lambda: _take_part(options))


def _take_part(options: argparse.Namespace) -> int:
    here = named_by_launcher()
    return _follow(here) if here.rank else _lead(here, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lem.cli.direct", description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    parser.add_argument("--config", type=Path, help="a config file")
    parser.add_argument("--model", "-m", help=leaf("model").description)
    parser.add_argument("--dataset", "-d", help="dataset: a name, a hub id, or a local file or directory")
    parser.add_argument("--sample-size", "-n", type=int, help=leaf("dataset.sample_size").description)
    parser.add_argument("--preset", help="start from a preset; lem presets lists them")
    parser.add_argument("--results-dir", "-o", help=leaf("io.results_dir").description)
    parser.add_argument("--force", action="store_true", help="run despite inadvisable options")
    for kind, what in {"command": "start programs", "code": "run code", "key": "send API keys"}.items():
        parser.add_argument(f"--allow-{kind}", action="store_true", help=f"{what} that the config file names")
    parser.add_argument("--fresh", action="store_true", help="start over even if an identical experiment is unfinished")
    return parser


def _lead(here: Ranks, options: argparse.Namespace) -> int:
    """Compose the experiment, run it together with the other processes, and show the result.

    Even after an error, the other processes are told to exit, so that they do not wait forever.
    """
    others = _Others(here)
    choices = {"preset": options.preset, "dataset": options.dataset}
    values = {"model": options.model, "dataset.sample_size": options.sample_size, "io.results_dir": options.results_dir}
    overrides = [*choice_overrides(choices), *value_overrides(values), *options.overrides]
    try:
        allowed = RunOptions(
            force=options.force, allow_command=options.allow_command, allow_code=options.allow_code,
            allow_key=options.allow_key,
        )  # fmt: skip
        ready = _ready(options.config, overrides, here.size, allowed)
        outcome = _run(ready, overrides, options, others)
    finally:
        others.dismiss()
    return show_outcome(outcome)


def _ready(config_file: Path | None, overrides: Sequence[str], started: int, options: RunOptions) -> Ready:
    """Compose and check the experiment that the launched processes will run."""
    _check_all_started(os.environ)
    load_dotenv()
    composition = prepare(config_file, overrides)
    experiment = _shared_by(started, composition)
    Consents(options).require(asked_by(experiment, composition.sources))
    ready = preflight(experiment, host.look(), force=options.force)
    print_warnings(*ready.warnings)
    return ready


def _check_all_started(environ: os._Environ[str]) -> None:
    """Raise `ConfigError` if accelerate was asked for several processes but silently started only this one."""
    by_accelerate, several = "ACCELERATE_MIXED_PRECISION" in environ, "MASTER_PORT" in environ
    if by_accelerate and several and "WORLD_SIZE" not in environ:
        raise ConfigError(
            "accelerate launch was asked for several processes but started only one, as it does on a machine without "
            "enough GPUs. Use python -m torch.distributed.run --nproc_per_node N -m lem.cli.direct …"
        )


def _shared_by(started: int, composition: Composition) -> Experiment:
    """Return the experiment; if it leaves the number of processes open, set the number that the launcher started.

    Raises:
        ConfigError: the experiment needs more or fewer processes than the launcher started.
    """
    experiment = composition.experiment()
    source = origin(composition.sources.layers(), ("num_processes",))
    if experiment.parallelism.strategy == "none" and (source is None or source.kind == "default"):
        return replace(experiment, num_processes=started)
    planned, _ = process_counts(experiment)
    if planned != started:
        if runs_in_one_process(experiment):
            path = "parallelism.strategy"
        else:
            path = "num_processes" if experiment.parallelism.strategy == "none" else "parallelism.degree"
        raise ConfigError(
            f"{path}: the configuration sets the number of processes to {planned}, but the launcher started {started}. "
            f"Start {planned}, or change {path}."
        )
    return experiment


def _run(ready: Ready, overrides: Sequence[str], options: argparse.Namespace, others: _Others) -> Outcome:
    """Run the experiment, or resume an identical one that was left unfinished."""
    store = Store(ready.experiment.io.results_dir)
    print_warnings(*catch_up(store))
    unfinished = [] if options.fresh else store.unfinished(fingerprint(ready))
    with display() as progress:
        if unfinished:
            print(f"Resuming {unfinished[-1].id}, which was left unfinished.", file=sys.stderr)
            return resume(store, unfinished[-1], report=progress, launcher=others.work_together)
        return run_ready(
            ready, overrides=overrides, config_file=options.config, report=progress, launcher=others.work_together
        )


class _Others:
    """Lets the first process direct the other processes, which wait for one message and then act on it."""

    def __init__(self, here: Ranks) -> None:
        self._ranks = range(1, here.size)
        self._waiting = here.size > 1

    def work_together(self, directory: ExperimentDir, attempt: int, host: host.Host, report: Report) -> None:
        """Do the work of `lem.runner.launch.launch`, but with processes that are already running.

        Raises:
            Interrupted: this process was told to stop; finished requests are kept.
        """
        self._send(f"{attempt} {directory.path.absolute()}")
        code = _work(directory, attempt, report)
        wait_for_ends(self._ranks)
        failed = any(r.status == "failed" and r.attempt == attempt for r in directory.records())
        if code == Interrupted.exit_code and not failed:
            raise Interrupted(INTERRUPTED)

    def dismiss(self) -> None:
        """Let the other processes exit if they have not been given any work."""
        self._send(NOTHING)

    def _send(self, text: str) -> None:
        if self._waiting:
            publish(text)
            self._waiting = False


def _follow(here: Ranks) -> int:
    """Wait for the first process's message and act on it."""
    message = receive()
    if message == NOTHING:
        return 0
    attempt, _, path = message.partition(" ")
    try:
        return _work(ExperimentDir(Path(path)), int(attempt))
    finally:
        announce_end(here.rank)


def _work(directory: ExperimentDir, attempt: int, *report: Report) -> int:
    """Run as a worker, on the GPUs that the experiment names, if any; return the exit code."""
    wanted = directory.plan().experiment.gpus
    if wanted is not None:
        chosen = host.look().only(wanted).gpus
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpu.visible_uuid for gpu in chosen)
    return worker.main([str(directory.path), "--attempt", str(attempt)], *report)


if __name__ == "__main__":
    sys.exit(main())
