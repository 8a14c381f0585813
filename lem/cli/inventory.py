"""`lem gpus`, `lem datasets`, `lem presets`: what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer

from lem.cli.base import app


@app.command()
def gpus(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show the NVIDIA GPUs, their MIG instances, and which of them CUDA_VISIBLE_DEVICES hides."""
    from lem.apps import gpus as gpus_app

    raise typer.Exit(gpus_app.show_gpus(as_json=as_json))


@app.command()
def datasets() -> None:
    """List the datasets that can be named with --dataset."""
    from lem.apps import inventory

    raise typer.Exit(inventory.show_datasets())


@app.command()
def presets() -> None:
    """List the presets that can be named with --preset."""
    from lem.apps import inventory

    raise typer.Exit(inventory.show_presets())
