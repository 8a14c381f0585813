"""LoRA adapters, for engines that load them themselves: where one lies, its rank, its weights."""

from __future__ import annotations

import json
from pathlib import Path

from lem.backends.wording import reason_of
from lem.errors import RunError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def folder_of(adapter: str) -> Path:
    """Return the directory of an adapter, fetched from the hub if it is no local one; raises `RunError`."""
    local = Path(adapter).expanduser()
    if local.is_dir():
        return local
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(adapter))
    except Exception as error:  # the client raises those of its transport as well
        raise RunError(f"The adapter {adapter} cannot be had from the hub: {reason_of(error)}") from error


def rank_of(folder: Path) -> int:
    """Return the rank of an adapter's matrices."""
    return int(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["r"])


def weights_of(folder: Path) -> tuple[int, int]:
    """Return the weights of an adapter's matrices: those in the model's body, and those at its output projection."""
    from safetensors import safe_open

    of_body = of_head = 0
    with safe_open(folder / WEIGHTS, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no mapping
            rows, *columns = tensors.get_slice(name).get_shape()
            size = rows * columns[0] if len(columns) == 1 else 0
            if "lm_head" in name:
                of_head += size
            else:
                of_body += size
    return of_body, of_head
