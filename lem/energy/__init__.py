"""The family of energy meters: one file each, one interface, chosen by the `energy` group.

A new meter is a file here that passes the contract suite, a name in `lem.spec.Energy` and a line below.
"""

from __future__ import annotations

from collections.abc import Sequence

from lem.energy.base import CombinedMeter, Meter, NoMeter, OnlyComponents
from lem.gpu import Gpu
from lem.spec import Energy

__all__ = ["Meter", "NoMeter", "make_meter"]


def make_meter(energy: Energy, gpus: Sequence[Gpu]) -> Meter:
    """Return the meter that the configuration names, for the physical GPUs in use (none: no GPU is read)."""
    # Each meter's library is imported by its own module, and only when that meter is chosen.
    from lem.energy.codecarbon import CodecarbonMeter
    from lem.energy.nvml import NvmlMeter
    from lem.energy.rapl import RaplMeter
    from lem.energy.replay import ReplayMeter
    from lem.energy.zeus import ZeusMeter

    match energy.name:
        case "none":
            return NoMeter()
        case "replay":
            return ReplayMeter(energy.trace)
        case "nvml":
            return NvmlMeter(gpus, energy.power_hz)
        case "rapl":
            return RaplMeter(energy.powercap_dir)
        case "codecarbon":
            return CodecarbonMeter()
        case "zeus":
            return ZeusMeter(gpus)
        case "auto":
            return _best_of_each(energy, gpus)


def _best_of_each(energy: Energy, gpus: Sequence[Gpu]) -> Meter:
    """Combine the best available for each component: counters before estimates."""
    from lem.energy import rapl
    from lem.energy.codecarbon import CodecarbonMeter
    from lem.energy.nvml import NvmlMeter

    meters: list[Meter] = [NvmlMeter(gpus, energy.power_hz)] if gpus else []
    if not rapl.readable(energy.powercap_dir):
        return CombinedMeter(*meters, CodecarbonMeter())
    meters.append(rapl.RaplMeter(energy.powercap_dir))
    if not any(zone.component == "dram" for zone in rapl.find_zones(energy.powercap_dir)):
        meters.append(OnlyComponents(CodecarbonMeter(), "dram"))
    return CombinedMeter(*meters)
