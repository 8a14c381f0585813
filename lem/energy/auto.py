"""Chooses the best available meter for each component; counters are preferred to estimates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lem.energy import rapl
from lem.energy.base import CombinedMeter, Meter, OnlyComponents
from lem.energy.codecarbon import CodecarbonMeter
from lem.energy.nvml import NvmlMeter
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.spec.experiment import Energy
from lem.spec.processes import changed
from lem.spec.rules import Objection, without_effect


class AutoMeter(CombinedMeter):
    """Uses NVML for the GPUs in use, RAPL if its counters can be read, and codecarbon's estimates for the rest."""

    options = ("idle_s", "power_hz", "powercap_dir")

    @classmethod
    def configured(cls, energy: Energy, gpus: Sequence[Gpu]) -> Meter:
        """Return a combination of the best meters for this machine."""
        meters: list[Meter] = [NvmlMeter(gpus, energy.power_hz)] if gpus else []
        if not rapl.readable(energy.powercap_dir):
            return cls(*meters, CodecarbonMeter())
        meters.append(rapl.RaplMeter(energy.powercap_dir))
        if not any(zone.component == "dram" for zone in rapl.find_zones(energy.powercap_dir)):
            meters.append(OnlyComponents(CodecarbonMeter(), "dram"))
        return cls(*meters)

    @classmethod
    def objections(cls, energy: Energy, host: Host, *, uses_gpu: bool) -> Iterator[Objection]:
        """Object to a sampling rate for GPU power if no GPU is used."""
        if not uses_gpu and changed(energy, "power_hz"):
            yield without_effect("no_effect_without_gpu", "energy.power_hz", "the run uses no GPU.")
