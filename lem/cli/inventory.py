"""The `lem gpus`, `lem datasets` and `lem presets` commands, which list the available choices."""

from __future__ import annotations

from typing import Annotated

import typer

from lem.cli.base import ConfigDir, app


@app.command()
def gpus(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show the NVIDIA GPUs, their MIG instances, and which of them CUDA_VISIBLE_DEVICES hides."""
    from lem.cli import listing

    raise typer.Exit(listing.show_gpus(as_json=as_json))


@app.command()
def datasets(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, config_dir: ConfigDir = None
) -> None:
    """List the datasets that --dataset accepts by name, both built-in ones and your own."""
    from lem.cli import listing

    raise typer.Exit(listing.show_datasets(config_dir, as_json=as_json))


@app.command()
def presets(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False, config_dir: ConfigDir = None
) -> None:
    """List the presets that --preset accepts, both built-in ones and your own."""
    from lem.cli import listing

    raise typer.Exit(listing.show_presets(config_dir, as_json=as_json))
