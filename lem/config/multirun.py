"""A study's plan and its Hydra multirun: one resolved config file per cell, composed and run by Hydra in turn.

The plan is a config group in the study's own directory, so that Hydra merges nothing else into a cell. If the cells are
submitted to Slurm, Hydra runs a single task that submits all of them, because Hydra would take a tenth of a second to
compose each cell. This module does not know how a cell is run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import env_override, setup_globals
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lem.config.launcher import Launcher
from lem.config.overrides import first_sentence, quoted
from lem.config.problem import shortened
from lem.config.yamltext import escaped
from lem.errors import ConfigError
from lem.results.codec import to_json
from lem.results.files import write_atomically
from lem.spec.experiment import Experiment

SWEEP_DIR = "hydra.sweep.dir="
FOLDER, NAME = "plan", "study"
HEAD = """\
# The plan of this study: each file in cell/ is one resolved configuration.
defaults:
  - cell: c000
"""
HEAD_SUBMITTED = """\
# The settings of Hydra with which this study was submitted to Slurm. The configuration of each experiment is in
# spec.json in its own directory, which ../experiments.json names.
defaults:
"""
SETTINGS = """\
  - override hydra/job_logging: none
  - override hydra/hydra_logging: none
  - _self_
hydra:
  output_subdir: null
  job: {name: experiment}
  run: {dir: .}
  sweep: {subdir: .}
"""
# A task function with this attribute submits its cells to Slurm; hydra_plugins/lem_slurm refuses all other tasks.
SUBMITS = "submits_to_slurm"


def sweep_dir(overrides: Iterable[str]) -> Path:
    """Return a study's directory: hydra.sweep.dir if it is given, or else a directory named after the current time.

    Raises:
        ConfigError: the given name contains an interpolation that cannot be resolved.
    """
    given = [text.removeprefix(SWEEP_DIR).strip("'\"") for text in overrides if text.startswith(SWEEP_DIR)]
    if not given:
        return Path("multirun") / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    setup_globals()  # ${now:…}
    try:
        return Path(str(OmegaConf.create({"dir": given[-1]})["dir"]))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{SWEEP_DIR.rstrip('=')}: {first_sentence(error)}") from None


def run_plan(
    directory: Path,
    cells: Sequence[tuple[str, Experiment]],
    settings: Sequence[str],
    run: Callable[[int, Any], None],
) -> None:
    """Write the plan and let Hydra run it.

    Args:
        directory: the study's directory.
        cells: a label and a checked experiment for each cell.
        settings: overrides of Hydra's own settings.
        run: called with the number and the composed config of each cell.

    Raises:
        ConfigError: Hydra rejects a setting.
    """

    def task(composed: Any) -> None:
        run(int(HydraConfig.get().job.num), composed)

    folder = (directory / FOLDER).resolve()
    _write_plan(folder, cells)
    _run_by_hydra(directory, [f"cell={','.join(map(cell_name, range(len(cells))))}", *settings], task)


def submit_plan(directory: Path, settings: Sequence[str], submit_all: Callable[[], None], launcher: Launcher) -> None:
    """Let Hydra run a task that submits all cells; the cells' own plans contain their configurations.

    Args:
        directory: the study's directory.
        settings: overrides of Hydra's own settings, apart from those of the launcher.
        submit_all: submits the cells.
        launcher: the launcher for Slurm.

    Raises:
        ConfigError: Hydra rejects a setting.
    """

    def task(_: Any) -> None:
        submit_all()

    setattr(task, SUBMITS, True)
    _register_launcher()
    search_path = f"  searchpath: {json.dumps(list(launcher.search_path))}\n"
    write_atomically((directory / FOLDER).resolve() / f"{NAME}.yaml", f"{HEAD_SUBMITTED}{SETTINGS}{search_path}")
    _run_by_hydra(directory, [*settings, *launcher.settings], task)


def _run_by_hydra(directory: Path, overrides: Sequence[str], task: Callable[[Any], None]) -> None:
    folder = (directory / FOLDER).resolve()
    command_line = sys.argv
    # hydra.main reads its overrides from sys.argv.
    sys.argv = [*sys.argv[:1], "--multirun", *overrides, f"{SWEEP_DIR}{quoted(escaped(str(directory)))}"]
    try:
        # Without this setting, Hydra would print errors and exit instead of raising them.
        with env_override({"HYDRA_FULL_ERROR": "1"}):
            hydra.main(version_base="1.3", config_path=str(folder), config_name=NAME)(task)()
    except HydraException as error:
        raise ConfigError(first_sentence(error)) from None
    finally:
        sys.argv = command_line


def _register_launcher() -> None:
    """Register the Slurm launcher with Hydra, which does not find it in an editable installation."""
    from hydra.core.plugins import Plugins

    from hydra_plugins.lem_slurm import SlurmLauncher

    Plugins.instance().register(SlurmLauncher)


def cell_name(number: int) -> str:
    """Return the base name of a cell's file; it starts with a letter so that Hydra does not read it as a number."""
    return f"c{number:03d}"


def _write_plan(folder: Path, cells: Iterable[tuple[str, Experiment]]) -> None:
    write_atomically(folder / f"{NAME}.yaml", HEAD + SETTINGS)
    for number, (label, experiment) in enumerate(cells):
        values = escaped(json.loads(to_json(experiment)))
        head = f"# @package _global_\n# {shortened(label, 200)}\n"
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
        write_atomically(folder / "cell" / f"{cell_name(number)}.yaml", head + text)
