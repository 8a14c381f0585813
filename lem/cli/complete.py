"""What shell completion offers: presets, datasets, experiment ids.

A shell calls this at each key press, so nothing heavy is imported, and after an error nothing is offered.
"""

from __future__ import annotations

from pathlib import Path

import typer


def presets(incomplete: str) -> list[tuple[str, str]]:
    """Offer presets with their purposes."""
    return _options("preset", incomplete)


def datasets(incomplete: str) -> list[tuple[str, str]]:
    """Offer the built-in datasets with their descriptions."""
    return _options("dataset", incomplete)


def backends(incomplete: str) -> list[tuple[str, str]]:
    """Offer the backends."""
    return _options("backend", incomplete)


def experiment_ids(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the ids in the results directory that the command would use, newest first."""
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
