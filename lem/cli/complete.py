"""What a shell's completion offers: presets, datasets, experiment ids. Knows their names, not what they hold.

A shell asks with each press of the key: nothing heavy is imported, and whatever fails offers nothing.
"""

from __future__ import annotations

from pathlib import Path

import typer


def presets(incomplete: str) -> list[tuple[str, str]]:
    """Offer presets with their purposes."""
    return _choices("preset", incomplete)


def datasets(incomplete: str) -> list[tuple[str, str]]:
    """Offer the built-in datasets with what they hold."""
    return _choices("dataset", incomplete)


def backends(incomplete: str) -> list[tuple[str, str]]:
    """Offer the backends."""
    return _choices("backend", incomplete)


def experiment_ids(ctx: typer.Context, incomplete: str) -> list[str]:
    """Offer the ids in the results directory that the command would use, newest first."""
    import dotenv

    from lem.results.store import Store, default_root

    try:
        dotenv.load_dotenv(dotenv.find_dotenv(usecwd=True))
        given: Path | None = ctx.params.get("results_dir")
        ids = Store(Path(given) if given else default_root()).ids()
    except OSError:
        return []
    return [name for name in reversed(ids) if name.startswith(incomplete)]


def _choices(group: str, incomplete: str) -> list[tuple[str, str]]:
    from lem.config.inventory import choices

    return [(choice.name, choice.purpose) for choice in choices(group) if choice.name.startswith(incomplete)]
