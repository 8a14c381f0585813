"""The energy meters: one file per meter, all with the same interface. The config group `energy` selects a meter.

The section "A meter" in docs/architecture.md lists the steps for adding a meter.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from lem.energy.base import Meter
from lem.machine.gpu import Gpu
from lem.spec.experiment import Energy

__all__ = ["Meter", "make_meter", "meter_class"]


def meter_class(name: str) -> type[Meter]:
    """Return a meter's class. This does not import the meter's library; `Meter.open` does."""
    module, class_name = {
        "none": ("base", "NoMeter"),
        "auto": ("auto", "AutoMeter"),
        "nvml": ("nvml", "NvmlMeter"),
        "rapl": ("rapl", "RaplMeter"),
        "codecarbon": ("codecarbon", "CodecarbonMeter"),
        "zeus": ("zeus", "ZeusMeter"),
        "replay": ("replay", "ReplayMeter"),
        "simulated": ("simulated", "SimulatedMeter"),
    }[name]
    found: type[Meter] = getattr(import_module(f"lem.energy.{module}"), class_name)
    return found


def make_meter(energy: Energy, gpus: Sequence[Gpu]) -> Meter:
    """Return the configured meter for the physical GPUs in use."""
    return meter_class(energy.name).configured(energy, gpus)
