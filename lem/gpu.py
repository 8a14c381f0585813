"""The NVIDIA devices of this machine, as the driver's management library (NVML) tells.

Opens no CUDA context, so it can be asked from any process. Without a driver there are simply no devices.
`CUDA_VISIBLE_DEVICES` is read, never written. Knows nothing of energy or of engines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """A physical GPU; `mig_uuid` is set where only one MIG instance of it is visible to CUDA."""

    index: int
    uuid: str
    name: str
    memory_bytes: int
    mig_uuid: str | None = None


@contextmanager
def nvml() -> Iterator[Any]:
    """Yield the initialised `pynvml` module, or None where there is no NVIDIA driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield None
        return
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def installed() -> list[Gpu]:
    """Return the physical GPUs in the driver's order; empty without a driver."""
    with nvml() as lib:
        if lib is None:
            return []
        return [_gpu(lib, i) for i in range(lib.nvmlDeviceGetCount())]


def visible(environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Return the physical GPUs that CUDA would show, in CUDA's order.

    `CUDA_VISIBLE_DEVICES` may name indices, `GPU-…` or `MIG-…` UUIDs (a unique beginning is enough); as in CUDA,
    the first entry that names no device ends the list. A GPU of which two MIG instances are visible is
    returned twice, once for each.
    """
    everything = installed()
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return everything
    found = []
    for entry in chosen.split(","):
        gpu = _named(entry.strip(), everything)
        if gpu is None:
            break
        found.append(gpu)
    return found


def _named(entry: str, everything: list[Gpu]) -> Gpu | None:
    if entry.isdecimal():
        return everything[int(entry)] if int(entry) < len(everything) else None
    if entry.startswith("GPU-"):
        matches = [gpu for gpu in everything if gpu.uuid.startswith(entry)]
        return matches[0] if len(matches) == 1 else None
    if entry.startswith("MIG-"):
        return _parent_of(entry)
    return None


def _parent_of(mig_uuid: str) -> Gpu | None:
    with nvml() as lib:
        if lib is None:
            return None
        try:
            instance = lib.nvmlDeviceGetHandleByUUID(mig_uuid)
            parent = lib.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance)
            gpu = _gpu(lib, lib.nvmlDeviceGetIndex(parent))
        except lib.NVMLError:
            return None
        return Gpu(gpu.index, gpu.uuid, gpu.name, gpu.memory_bytes, mig_uuid)


def _gpu(lib: Any, index: int) -> Gpu:
    handle = lib.nvmlDeviceGetHandleByIndex(index)
    return Gpu(
        index=index,
        uuid=_text(lib.nvmlDeviceGetUUID(handle)),
        name=_text(lib.nvmlDeviceGetName(handle)),
        memory_bytes=int(lib.nvmlDeviceGetMemoryInfo(handle).total),
    )


def _text(value: str | bytes) -> str:
    # Older versions of the library's Python binding return bytes.
    return value.decode() if isinstance(value, bytes) else value
