"""The family of energy meters: one file each, one interface, chosen by the `energy` group.

A new meter is a file here that passes the contract suite, a name in `lem.spec.Energy` and a line below.
"""

from __future__ import annotations

from collections.abc import Sequence

from lem.energy.base import CombinedMeter, Meter, NoMeter
from lem.gpu import Gpu
from lem.spec import Energy

__all__ = ["Meter", "NoMeter", "make_meter"]


def make_meter(energy: Energy, gpus: Sequence[Gpu]) -> Meter:
    """Return the meter that the configuration names, for the physical GPUs in use (none: no GPU is read).

    `auto` reads the GPUs in use from their counters and adds codecarbon's CPU and memory energy.
    """
    # Each meter's library is imported by its own module, and only when that meter is chosen.
    from lem.energy.codecarbon import CodecarbonMeter
    from lem.energy.nvml import NvmlMeter
    from lem.energy.replay import ReplayMeter

    match energy.name:
        case "none":
            return NoMeter()
        case "replay":
            return ReplayMeter(energy.trace)
        case "nvml":
            return NvmlMeter(gpus)
        case "codecarbon":
            return CodecarbonMeter()
        case "auto":
            return CombinedMeter(NvmlMeter(gpus), CodecarbonMeter()) if gpus else CodecarbonMeter()
