"""Hydra multiruns: the only file that starts Hydra for a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lem.config.compose import Request
from lem.config.overrides import quoted
from lem.errors import ConfigError


def _refuse_several_values(overrides: Sequence[str]) -> None:
    """Refuse a sweep over values: the cells of a batch are its files."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for text in overrides:
        try:
            is_several = parser.parse_override(text).is_sweep_override()
        except HydraException:
            continue  # a file's name perhaps; composing says what is wrong
        if is_several:
            raise ConfigError(
                f"{text}: a batch takes one value for all files. lem config generate-grid makes a file for each "
                "value, and lem experiment FILE --multirun runs them without."
            )


SWEEP_DIR = "hydra.sweep.dir="


Task = Callable[[Any], None]


def _expanded(request: Request) -> list[tuple[str, ...]]:
    """Expand the overrides of a sweep into those of its experiments, in the order in which Hydra runs them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_overrides(list(request.overrides))
        return [tuple(cell) for cell in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]]
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None


def sweep_dir(overrides: Iterable[str]) -> Path:
    """Return the directory of a sweep: the one that hydra.sweep.dir names, else one called by the time."""
    from hydra.core.utils import setup_globals
    from omegaconf import OmegaConf

    given = [text.removeprefix(SWEEP_DIR).strip("'\"") for text in overrides if text.startswith(SWEEP_DIR)]
    if not given:
        return Path("multirun") / f"{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    setup_globals()  # ${now:…}
    return Path(str(OmegaConf.create({"dir": given[-1]})["dir"]))


def hydra_multirun(search_path: str, config_name: str, overrides: Sequence[str], directory: Path, task: Task) -> None:
    """Let Hydra compose and run each combination of the overrides; raises `ConfigError` for what it refuses."""
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    hydra = Hydra.create_main_hydra2(task_name="experiment", config_search_path=create_config_search_path(search_path))
    try:
        hydra.multirun(config_name, task, [*overrides, f"{SWEEP_DIR}{quoted(str(directory))}"])
    except HydraException as error:
        raise ConfigError(" ".join(str(error).split())) from None
    finally:
        GlobalHydra.instance().clear()
