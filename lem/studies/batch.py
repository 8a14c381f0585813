"""`lem batch`: many config files as one Hydra multirun, one after another or several at a time.

All files are checked before the first one runs. The plan becomes a config group of the sweep's own directory, a file
for each cell with everything resolved, and Hydra goes through it. How a cell is run, and what becomes of it, is
`lem.studies.sweep`'s and `lem.studies.pool`'s.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lem.backends import backend_class
from lem.config.compose import prepare
from lem.config.hydra import Task, _refuse_several_values, hydra_multirun, sweep_dir
from lem.errors import BadInput, ConfigError
from lem.machine import host
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.results.codec import to_json
from lem.results.files import write_atomically
from lem.runner.preflight import Ready, preflight
from lem.spec.experiment import Experiment
from lem.studies.ask import Options, confirmed, words
from lem.studies.checks import Checks, RecentPrompts, Unfinished
from lem.studies.display import batch_display
from lem.studies.here import OneByOne
from lem.studies.manifest import Books, Cell, question, show_cells, tell_unfinished
from lem.studies.pool import Pool, Slot, are_disjoint, slots
from lem.studies.sweep import Runner, carry_out

SUFFIXES = (".yaml", ".yml")
# What `lem config generate-grid` writes beside a grid's files; it is no config.
MANIFEST = re.compile(rb"^lem_grid\s*:", re.MULTILINE)
# The meters that read nothing but the GPUs in use.
GPU_METERS = ("nvml", "zeus")
PLAN_NAME = "batch"
# The config that Hydra goes through: a cell holds everything, so nothing else of lem's own configuration is needed.
PLAN = """\
# The plan of this batch: each file in cell/ is one resolved configuration.
defaults:
  - cell: c000
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
  - _self_
hydra:
  output_subdir: null
  run: {dir: .}
  sweep: {subdir: .}
"""


def main(
    patterns: Sequence[str],
    overrides: Sequence[str],
    options: Options,
    *,
    parallel: int = 1,
    fail_fast: bool = False,
    config_dir: Path | None = None,
) -> int:
    """Run the config files that the patterns name; return 0, or 1 when one did not complete.

    Raises:
        BadInput: before anything has run; all problems of all files.
        Interrupted: after the table; what was measured is kept.
    """
    files = find(patterns)
    _refuse_several_values(overrides)
    at_once = min(parallel, len(files))
    visible = host.look().gpus
    places = slots(at_once, visible) if at_once > 1 else [Slot(visible)]
    prompts = RecentPrompts()
    cells = _checked(
        files, Check(overrides, config_dir, options.force, places, visible, prompts), Unfinished(fresh=options.fresh)
    )
    if options.dry_run:
        return show_cells(cells)
    if not (options.yes or confirmed(question(cells, _at_once(at_once)))):
        return 0
    tell_unfinished(cells)
    books = Books(sweep_dir(overrides), cells, "config", fail_fast)
    display = batch_display(len(cells), at_once=at_once)
    runner: Runner = (
        Pool(books, display, options, places, [_shared_with(cell, places) for cell in cells])
        if at_once > 1
        else OneByOne(books, display, options, prompts)
    )

    def launch(task: Task) -> None:
        names = _write_plan(books.directory / "plan", cells)
        # Hydra's own settings, a launcher for one, are the plan's as well.
        of_hydra = [text for text in overrides if text.lstrip("+~").startswith("hydra")]
        chosen = [f"cell={','.join(names)}", *of_hydra]
        hydra_multirun(f"file://{(books.directory / 'plan').resolve()}", PLAN_NAME, chosen, books.directory, task)

    return carry_out(books, display, runner, launch)


def _at_once(count: int) -> str:
    return f", {count} at a time" if count > 1 else ""


# ------------------------------------------------------------------ which files
def find(patterns: Sequence[str]) -> list[Path]:
    """Return the config files that files, folders and glob patterns name, each once, in order.

    Raises:
        ConfigError: patterns that match no config file, all of them.
    """
    found: dict[Path, Path] = {}
    problems = []
    for pattern in patterns:
        files = [path for path in _matches(pattern) if not _is_manifest(path)]
        if not files:
            problems.append(f"{pattern!r} matches no config file (.yaml, .yml).{_quoting_hint(pattern)}")
        for path in files:
            found.setdefault(path.resolve(), path)
    if problems:
        raise ConfigError(*problems)
    return list(found.values())


def _matches(pattern: str) -> Iterator[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        hits = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    elif path.exists():
        hits = [path]
    else:
        hits = [Path(hit) for hit in glob.glob(str(path), recursive=True)]
    return (hit for hit in sorted(hits) if hit.suffix in SUFFIXES and hit.is_file())


def _is_manifest(path: Path) -> bool:
    try:
        return MANIFEST.search(path.read_bytes()) is not None
    except OSError:
        return False  # reading it as a config says what is wrong


def _quoting_hint(pattern: str) -> str:
    return "" if glob.has_magic(pattern) or Path(pattern).exists() else " There is no such file."


# ------------------------------------------------------------------ checks


@dataclass(frozen=True)
class Check:
    """Checks one file as it will be run: alone, or beside others with a share of the GPUs."""

    overrides: Sequence[str]
    config_dir: Path | None
    force: bool
    places: Sequence[Slot]
    visible: tuple[Gpu, ...]
    prompts: RecentPrompts

    def __call__(self, file: Path) -> Ready:
        """Return the checked experiment; raises `BadInput` with all that is wrong."""
        experiment = prepare(file, self.overrides, config_dir=self.config_dir).experiment()
        self._refuse_crowding(experiment)
        try:
            return self._with_gpus(experiment, self.places[0].gpus)
        except BadInput as error:
            raise ConfigError(*self._explained(error, experiment)) from None

    def _with_gpus(self, experiment: Experiment, gpus: tuple[Gpu, ...]) -> Ready:
        return preflight(experiment, Host(gpus), force=self.force, load=self.prompts)

    def _refuse_crowding(self, experiment: Experiment) -> None:
        """Refuse more runs at once than there are GPUs for them."""
        there, at_once = len(self.visible), len(self.places)
        if 0 < there < at_once and backend_class(experiment.backend.name).wants_gpu(experiment, Host(self.visible)):
            raise ConfigError(
                f"--parallel: {at_once} runs at once need a GPU each, and {there} {'is' if there == 1 else 'are'} "
                f"visible. Use --parallel {there}, or run on the CPU."
            )

    def _explained(self, error: BadInput, experiment: Experiment) -> list[str]:
        """Return the problems, with the reason if they come from a run having only some of the GPUs."""
        problems = str(error).splitlines()
        share = self.places[0].gpus
        if len(share) == len(self.visible):
            return problems
        try:
            self._with_gpus(experiment, self.visible)
        except BadInput:
            return problems
        reason = f"(--parallel {len(self.places)} leaves each run {len(share)} of {len(self.visible)} GPUs)"
        return [f"{problem} {reason}" for problem in problems]


def _checked(files: Sequence[Path], check: Check, unfinished: Unfinished) -> list[Cell]:
    checks, cells = Checks(), []
    for file in files:
        ready = checks.cell(str(file), partial(check, file))
        if ready is not None:
            given = tuple(check.overrides)
            cells.append(Cell(str(file), ready.experiment, given, file, words(ready), unfinished(ready)))
    checks.conclude()
    return cells


def _shared_with(cell: Cell, places: Sequence[Slot]) -> int:
    """Return how many other runs may be in this cell's numbers: none where its meter reads its own GPUs alone."""
    backend = backend_class(cell.experiment.backend.name)
    has_own_gpus = backend.wants_gpu(cell.experiment, Host(places[0].gpus)) and are_disjoint(places)
    return 0 if has_own_gpus and cell.experiment.energy.name in GPU_METERS else len(places) - 1


# ------------------------------------------------------------------ the plan
def _write_plan(folder: Path, cells: Sequence[Cell]) -> list[str]:
    """Write the plan as a config group and return the names of its options, in order."""
    import yaml

    write_atomically(folder / f"{PLAN_NAME}.yaml", PLAN)
    names = []
    for number, cell in enumerate(cells):
        # Hydra's grammar takes a name that begins with a letter for a name.
        name = f"c{number:03d}"
        values = literal(json.loads(to_json(cell.experiment)))
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
        write_atomically(folder / "cell" / f"{name}.yaml", f"# @package _global_\n# {cell.label}\n{text}")
        names.append(name)
    return names


def literal(value: Any) -> Any:
    """Escape what Hydra would take for an interpolation: everything has been resolved."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)
    return value
