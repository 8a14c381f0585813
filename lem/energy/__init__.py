"""The family of energy meters: one file each, one interface, chosen by the `energy` group.

"A meter" in docs/architecture.md lists what a new one needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from lem.energy.base import Meter
from lem.machine.gpu import Gpu
from lem.spec.experiment import Energy

__all__ = ["Meter", "make_meter", "meter_class"]


def meter_class(name: str) -> type[Meter]:
    """Return the class of a meter; importing it does not import its library, which `open` does."""
    module, class_name = {
        "none": ("base", "NoMeter"),
        "auto": ("auto", "AutoMeter"),
        "nvml": ("nvml", "NvmlMeter"),
        "rapl": ("rapl", "RaplMeter"),
        "codecarbon": ("codecarbon", "CodecarbonMeter"),
        "zeus": ("zeus", "ZeusMeter"),
        "replay": ("replay", "ReplayMeter"),
    }[name]
    found: type[Meter] = getattr(import_module(f"lem.energy.{module}"), class_name)
    return found


def make_meter(energy: Energy, gpus: Sequence[Gpu]) -> Meter:
    """Return the configured meter for the physical GPUs in use; if there are none, no GPU is read."""
    return meter_class(energy.name).configured(energy, gpus)
