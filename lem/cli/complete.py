"""Shell completion for presets, datasets, backends, experiment ids and names of schedules.

The shell runs this code each time the user presses Tab. The code therefore imports nothing heavy, and if an error
occurs, it offers no completions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from lem.results.store import Store


def presets(incomplete: str) -> list[tuple[str, str]]:
    """Return the built-in presets that begin with the typed text, with their purposes."""
    return _options("preset", incomplete)


def datasets(incomplete: str) -> list[tuple[str, str]]:
    """Return the built-in datasets that begin with the typed text, with their descriptions."""
    return _options("dataset", incomplete)


def backends(incomplete: str) -> list[tuple[str, str]]:
    """Return the backends that begin with the typed text, with their descriptions."""
    return _options("backend", incomplete)


def experiment_ids(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the experiment ids that begin with the typed text, newest first, from the command's results directory."""
    return [name for name in reversed(_in_store(ctx, lambda store: store.ids())) if name.startswith(incomplete)]


def schedules(ctx: typer.Context, incomplete: str) -> list[str]:
    """Return the names of schedules that begin with the typed text, from the command's results directory."""
    from lem.results.schedule import names

    return [name for name in _in_store(ctx, names) if name.startswith(incomplete)]


def _in_store(ctx: typer.Context, listed: Callable[[Store], list[str]]) -> list[str]:
    import dotenv

    from lem.errors import BadInput
    from lem.results.store import Store, default_root

    try:
        dotenv.load_dotenv(dotenv.find_dotenv(usecwd=True))
        given: Path | None = ctx.params.get("results_dir")
        return listed(Store(given or default_root()))
    except (OSError, BadInput):
        return []


def _options(group: str, incomplete: str) -> list[tuple[str, str]]:
    from lem.config.inventory import summaries

    return [(option.name, option.purpose) for option in summaries(group) if option.name.startswith(incomplete)]
