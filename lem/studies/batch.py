"""`lem batch`: runs one cell for each of many config files, one after another or several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lem.backends import backend_class
from lem.config.compose import compose_quickly, prepare
from lem.config.files import find
from lem.config.layers import Sources
from lem.config.overrides import has_several_values
from lem.config.trust import asked_by
from lem.errors import BadInput, ConfigError
from lem.machine import host
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.runner.preflight import Ready, preflight
from lem.spec.experiment import Experiment
from lem.studies.ask import RunOptions
from lem.studies.checks import Candidate, RecentPrompts, checked
from lem.studies.consent import Consents
from lem.studies.continuing import run_as_jobs
from lem.studies.display import StudyDisplay
from lem.studies.manifest import Cell, Manifest, experiment_of
from lem.studies.pool import Pool, Slot, are_disjoint, slots
from lem.studies.slurm import preflight_for_job
from lem.studies.study import OneByOne, Runner, run_study

# The meters that read only the GPUs in use.
GPU_METERS = ("nvml", "zeus")


def main(
    patterns: Sequence[str],
    overrides: Sequence[str],
    options: RunOptions,
    *,
    parallel: int = 1,
    fail_fast: bool = False,
    config_dir: Path | None = None,
) -> int:
    """Run the config files that match the patterns; return 0, or 1 if any experiment did not complete.

    Raises:
        BadInput: raised before anything runs, listing all problems in all files.
        Interrupted: raised after the table is printed; finished requests are kept.
    """
    files = find(patterns)
    if several := next(filter(has_several_values, overrides), None):
        raise ConfigError(
            f"{several}: a batch needs one value for all files. To try several values, write a file for each with "
            "lem config generate-grid, or run lem experiment FILE --multirun."
        )
    if options.launcher:
        return _as_jobs(files, overrides, options, parallel=parallel, fail_fast=fail_fast, config_dir=config_dir)
    at_once = min(parallel, len(files))
    visible = host.look().gpus
    shares = slots(at_once, visible) if at_once > 1 else [Slot(visible)]
    prompts = RecentPrompts()
    check = Check(files[0], overrides, config_dir, options.force, shares, visible, prompts, Consents(options))
    candidates = (Candidate(str(file), tuple(overrides), file, partial(check, file)) for file in files)
    cells = checked(candidates, fresh=options.fresh)

    def make_runner(manifest: Manifest, display: StudyDisplay) -> Runner:
        if at_once == 1:
            return OneByOne(manifest, display, options, prompts)
        return Pool(manifest, display, options, list(shares), [_shared_with(cell, shares) for cell in cells])

    return run_study(cells, options, overrides, make_runner, head="config", at_once=at_once, fail_fast=fail_fast)


def _as_jobs(
    files: Sequence[Path],
    overrides: Sequence[str],
    options: RunOptions,
    *,
    parallel: int,
    fail_fast: bool,
    config_dir: Path | None,
) -> int:
    """Check the files and run their experiments in Slurm jobs; return the exit code."""
    assert options.launcher is not None
    if parallel > 1:
        raise ConfigError("--parallel: Slurm decides how many jobs run at a time; leave this option out.")
    prompts, consents = RecentPrompts(), Consents(options)

    def check(file: Path) -> Ready:
        experiment, sources = _composed(file, overrides, config_dir, by_hydra=file is files[0])
        consents.require(asked_by(experiment, sources))
        return preflight_for_job(experiment, options, prompts)

    candidates = (Candidate(str(file), tuple(overrides), file, partial(check, file)) for file in files)
    cells = checked(candidates, fresh=options.fresh)
    return run_as_jobs(cells, options, overrides, prompts, head="config", fail_fast=fail_fast)


def _composed(
    file: Path, overrides: Sequence[str], config_dir: Path | None, *, by_hydra: bool
) -> tuple[Experiment, Sources]:
    """Compose a file's experiment; `by_hydra` is slower, but also checks overrides of Hydra's own settings."""
    if not by_hydra:
        return compose_quickly(file, overrides, config_dir)
    composition = prepare(file, overrides, config_dir=config_dir)
    return composition.experiment(), composition.sources


@dataclass(frozen=True)
class Check:
    """Checks a file under the conditions of its run: alone, or alongside others with a share of the GPUs."""

    first: Path
    overrides: Sequence[str]
    config_dir: Path | None
    force: bool
    shares: Sequence[Slot]
    visible: tuple[Gpu, ...]
    prompts: RecentPrompts
    consents: Consents

    def __call__(self, file: Path) -> Ready:
        """Return the checked experiment; raises `BadInput` with all problems."""
        experiment, sources = _composed(file, self.overrides, self.config_dir, by_hydra=file is self.first)
        self.consents.require(asked_by(experiment, sources))
        self._refuse_crowding(experiment)
        try:
            return self._with_gpus(experiment, self.shares[0].gpus)
        except BadInput as error:
            raise ConfigError(*self._explained(error, experiment)) from None

    def _with_gpus(self, experiment: Experiment, gpus: tuple[Gpu, ...]) -> Ready:
        return preflight(experiment, Host(gpus), force=self.force, load=self.prompts)

    def _refuse_crowding(self, experiment: Experiment) -> None:
        """Raise `ConfigError` if the experiment runs on GPUs, but there are fewer GPUs than simultaneous runs."""
        gpus, at_once = len(self.visible), len(self.shares)
        if 0 < gpus < at_once and backend_class(experiment.backend.name).wants_gpu(experiment, Host(self.visible)):
            raise ConfigError(
                f"--parallel: {at_once} simultaneous runs need a GPU each, but {gpus} {'is' if gpus == 1 else 'are'} "
                f"visible. Use --parallel {gpus}, or run on the CPU."
            )

    def _explained(self, error: BadInput, experiment: Experiment) -> list[str]:
        """Return the problems, with an explanation if their cause is that a run gets only some of the GPUs."""
        problems = list(error.problems)
        share = self.shares[0].gpus
        if len(share) == len(self.visible):
            return problems
        try:
            self._with_gpus(experiment, self.visible)
        except BadInput:
            return problems
        reason = f"(--parallel {len(self.shares)} gives each run {len(share)} of {len(self.visible)} GPUs)"
        return [f"{problem} {reason}" for problem in problems]


def _shared_with(cell: Cell, shares: Sequence[Slot]) -> int:
    """Return how many other runs may affect this cell's numbers: 0 if the meter reads only the cell's own GPUs."""
    experiment = experiment_of(cell)
    backend = backend_class(experiment.backend.name)
    has_own_gpus = backend.wants_gpu(experiment, Host(shares[0].gpus)) and are_disjoint(shares)
    return 0 if has_own_gpus and experiment.energy.name in GPU_METERS else len(shares) - 1
