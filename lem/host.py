"""The machine that an experiment runs on: devices, processor, memory, installed packages.

Imports none of the packages that it reports on. Reads environment variables only where they name devices, so
that no secret can end up in a record.
"""

from __future__ import annotations

import platform
import socket
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path

from lem import gpu
from lem.record import Environment

# Packages whose version can change a number.
REPORTED = (
    "torch", "transformers", "tokenizers", "accelerate", "peft", "bitsandbytes", "flash-attn", "vllm",
    "tensorrt-llm", "codecarbon", "nvidia-ml-py", "numpy", "datasets",
)  # fmt: skip


@dataclass(frozen=True)
class Host:
    """What can be known of the machine without running anything on it."""

    gpus: tuple[gpu.Gpu, ...]

    def has(self, package: str) -> bool:
        """Tell whether a package can be imported."""
        return util.find_spec(package) is not None


def look() -> Host:
    """Look at this machine; `gpus` are the ones that CUDA_VISIBLE_DEVICES leaves visible."""
    return Host(gpus=tuple(gpu.visible()))


def environment(host: Host) -> Environment:
    """Return the snapshot that goes into a record."""
    import psutil

    return Environment(
        hostname=socket.gethostname(),
        os=platform.platform(),
        cpu_model=cpu_model(),
        cpu_threads=psutil.cpu_count() or 0,
        memory_bytes=psutil.virtual_memory().total,
        gpus=tuple(f"{device.name} ({device.uuid})" for device in host.gpus),
        versions={"python": platform.python_version(), **versions()},
    )


@cache
def versions() -> dict[str, str]:
    """Return the versions of the installed packages that matter."""
    found = {}
    for package in REPORTED:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def cpu_model() -> str:
    """Return the processor's name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
