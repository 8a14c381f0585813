"""Shell completion for presets, datasets, backends and experiment ids.

The shell runs this code each time the user presses Tab. Therefore, it imports nothing heavy, and offers no completions
if an error occurs.
"""

from __future__ import annotations

from pathlib import Path

import typer


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
    import dotenv

    from lem.errors import BadInput
    from lem.results.store import Store, default_root

    try:
        dotenv.load_dotenv(dotenv.find_dotenv(usecwd=True))
        given: Path | None = ctx.params.get("results_dir")
        ids = Store(given or default_root()).ids()
    except (OSError, BadInput):
        return []
    return [name for name in reversed(ids) if name.startswith(incomplete)]


def _options(group: str, incomplete: str) -> list[tuple[str, str]]:
    from lem.config.inventory import summaries

    return [(option.name, option.purpose) for option in summaries(group) if option.name.startswith(incomplete)]
