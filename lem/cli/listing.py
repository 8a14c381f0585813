"""The output of `lem gpus`, `lem datasets` and `lem presets`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lem.config.inventory import Summary, summary
from lem.config.options import CUSTOM, Options
from lem.config.problem import Problems, shown_path
from lem.machine import gpu
from lem.machine.gpu import MigInstance, PhysicalGpu, Topology
from lem.results import show

HIDDEN = "hidden by CUDA_VISIBLE_DEVICES"


def show_gpus(as_json: bool = False) -> int:
    """Print the GPUs as a tree, or as JSON."""
    found = gpu.topology()
    if as_json:
        print(json.dumps(asdict(found or Topology(None, None, ())), indent=2))
    elif found is None:
        print("No GPUs to show: this machine has no NVIDIA driver, or the driver does not respond.")
    elif not found.gpus:
        print(f"The NVIDIA driver {found.driver_version or 'of this machine'} reports no GPU.")
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
        return f"[{device.index}] does not respond: {device.reason}"
    # Memory in rounded GiB matches the GB figure in a GPU's name.
    size = "" if device.memory_bytes is None else f" ({device.memory_bytes / 2**30:.0f}GB)"
    limit = None if device.power_limit_w is None else f"power limit {device.power_limit_w:g} W"
    count = len(device.instances)
    mode = f"MIG Enabled ({count} instance{'' if count == 1 else 's'})" if device.mig else "Full GPU"
    details = [mode, limit, device.uuid, None if device.visible else HIDDEN]
    return f"[{device.index}] {device.name}{size} - {', '.join(filter(None, details))}"


def _instance(instance: MigInstance, device: PhysicalGpu) -> str:
    size = None if instance.memory_bytes is None else f"{instance.memory_bytes / 2**20:.0f} MiB"
    hidden = HIDDEN if device.visible and not instance.visible else None
    return ", ".join(filter(None, [instance.profile or "unknown profile", size, instance.uuid, hidden]))


def show_datasets(config_dir: Path | None = None, *, as_json: bool = False) -> int:
    """Print the named datasets; return 2 if one of the user's files cannot be used, otherwise 0."""
    found, errors = _readable("dataset", config_dir)
    if as_json:
        print(json.dumps([_as_data(option, "dataset.") for option in found], indent=2, ensure_ascii=False))
    else:
        rows = [_dataset_row(option) for option in found if (option.name, option.file) != (CUSTOM, None)]
        _print_table(("dataset", "source", "split", "column", "description"), rows)
        print("\nA hub dataset (owner/name) or a json, jsonl, csv, tsv, parquet or txt file can be used as well.")
        print("The default dataset is ai-energy-score.")
        _print_folders(found)
    return _print_errors(errors)


def show_presets(config_dir: Path | None = None, *, as_json: bool = False) -> int:
    """Print the presets and the values they set; return 2 if one of the user's files cannot be used, otherwise 0."""
    found, errors = _readable("preset", config_dir)
    if as_json:
        print(json.dumps([_as_data(option) for option in found], indent=2, ensure_ascii=False))
    else:
        rows = [(option.name, _purpose(option), _settings(option.values)) for option in found]
        _print_table(("preset", "purpose", "sets"), rows)
        _print_folders(found)
    return _print_errors(errors)


def _readable(group: str, config_dir: Path | None) -> tuple[list[Summary], list[Problems]]:
    options = Options.find(config_dir)
    found: list[Summary] = []
    errors: list[Problems] = []
    for name in options.names(group):
        try:
            found.append(summary(options, group, name))
        except Problems as error:
            errors.append(error)
    return found, errors


def _dataset_row(option: Summary) -> tuple[str, ...]:
    values = {key.removeprefix("dataset."): value for key, value in option.values.items()}
    config = f" ({values['config']})" if values.get("config") else ""
    source = f"{values.get('path') or '–'}{config}"
    return option.name, source, values.get("split") or "–", values.get("column") or "–", _purpose(option)


def _purpose(option: Summary) -> str:
    """Return an option's purpose, with a note if the option is the user's own."""
    if option.file is None:
        return option.purpose
    return f"{option.purpose} ({'yours, in place of the built-in one' if option.shadows else 'yours'})".strip()


def _settings(values: dict[str, Any]) -> str:
    texts = {key: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for key, v in values.items()}
    return ", ".join(f"{key}={text}" for key, text in texts.items())


def _as_data(option: Summary, prefix: str = "") -> dict[str, Any]:
    return {
        "name": option.name,
        "purpose": option.purpose,
        "values": {key.removeprefix(prefix): value for key, value in option.values.items()},
        "file": shown_path(option.file) if option.file else None,
        "replaces_builtin": option.shadows,
    }


def _print_folders(found: Sequence[Summary]) -> None:
    for folder in sorted({option.file.parent for option in found if option.file}):
        print(f"\nYour own options are in {shown_path(folder)}.")


def _print_errors(errors: Sequence[Problems]) -> int:
    for error in errors:
        for problem in error.problems:
            print(f"Error: {problem}", file=sys.stderr)
    return 2 if errors else 0


def _print_table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*map(show.cell, row))
    show.print_table(table)
