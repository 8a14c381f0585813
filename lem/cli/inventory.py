"""`lem gpus`, `lem datasets`, `lem presets`: what there is to choose from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated

import typer

from lem.cli.base import ConfigDir, app
from lem.machine import gpu
from lem.machine.gpu import MigInstance, PhysicalGpu, Topology


@app.command()
def gpus(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Show the NVIDIA GPUs, their MIG instances, and which of them CUDA_VISIBLE_DEVICES hides."""
    raise typer.Exit(show_gpus(as_json=as_json))


@app.command()
def datasets(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False, config_dir: ConfigDir = None
) -> None:
    """List the datasets that can be named with --dataset: built-in ones and your own."""
    from lem.config import inventory

    raise typer.Exit(inventory.show_datasets(config_dir, as_json=as_json))


@app.command()
def presets(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False, config_dir: ConfigDir = None
) -> None:
    """List the presets that can be named with --preset: built-in ones and your own."""
    from lem.config import inventory

    raise typer.Exit(inventory.show_presets(config_dir, as_json=as_json))


HIDDEN = "hidden by CUDA_VISIBLE_DEVICES"


def show_gpus(as_json: bool = False) -> int:
    """Print the GPUs as a tree, or as JSON."""
    found = gpu.topology()
    if as_json:
        print(json.dumps(asdict(found or Topology(None, None, ())), indent=2))
    elif found is None:
        print("There is no NVIDIA driver on this machine, or it does not answer, so there are no GPUs to show.")
    elif not found.gpus:
        print(f"The NVIDIA driver {found.driver_version or 'of this machine'} has no GPU.")
    else:
        print("\n".join(_tree(found)))
    return 0


def _tree(found: Topology) -> Iterator[str]:
    yield f"GPU Topology ({len(found.gpus)} device(s) detected)"
    for device in found.gpus:
        last = device is found.gpus[-1]
        yield f"{_branch(last)}{_device(device)}"
        for instance in device.instances:
            stem = "    " if last else "│   "
            yield f"{stem}{_branch(instance is device.instances[-1])}{_instance(instance, device)}"
    yield f"Driver {found.driver_version or 'unknown'}, CUDA up to {found.cuda_version or 'unknown'}"


def _branch(last: bool) -> str:
    return "└── " if last else "├── "


def _device(device: PhysicalGpu) -> str:
    if device.reason is not None:
        return f"[{device.index}] does not answer: {device.reason}"
    # Rounded, GiB are what a GPU's name calls GB.
    size = "" if device.memory_bytes is None else f" ({device.memory_bytes / 2**30:.0f}GB)"
    limit = None if device.power_limit_w is None else f"power limit {device.power_limit_w:g} W"
    details = [_mode(device), limit, device.uuid, None if device.visible else HIDDEN]
    return f"[{device.index}] {device.name}{size} - {', '.join(filter(None, details))}"


def _mode(device: PhysicalGpu) -> str:
    if not device.mig:
        return "Full GPU"
    count = len(device.instances)
    return f"MIG Enabled ({count} instance{'' if count == 1 else 's'})"


def _instance(instance: MigInstance, device: PhysicalGpu) -> str:
    size = None if instance.memory_bytes is None else f"{instance.memory_bytes / 2**20:.0f} MiB"
    hidden = HIDDEN if device.visible and not instance.visible else None
    details = [instance.profile or "unknown profile", size, instance.uuid, hidden]
    return ", ".join(filter(None, details))
