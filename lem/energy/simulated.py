"""A simulated meter: a constant power multiplied by the time that has passed on the run's clock.

The meter reads no sensor, and its energy is labeled as simulated everywhere. It is meant for trying out campaigns, and
for tests in which the energy must be known exactly. It knows nothing about the simulated engine.
"""

from __future__ import annotations

from collections.abc import Sequence

from lem.energy.base import ImmediateMeter
from lem.machine.gpu import Gpu
from lem.quantities import NS_PER_S
from lem.record import EnergyReading
from lem.spec.experiment import Energy


class SimulatedMeter(ImmediateMeter):
    """Multiplies a constant power by time."""

    options = ("idle_s", "power_w")

    def __init__(self, power_w: float) -> None:
        self._power_w = power_w
        self._begun_ns = 0

    @classmethod
    def configured(cls, energy: Energy, gpus: Sequence[Gpu]) -> SimulatedMeter:
        """Return a meter with the configured power."""
        return cls(energy.power_w)

    def begin(self) -> None:
        """Record the time at which the window begins."""
        self._begun_ns = self.clock.now_ns()

    def _taken(self) -> tuple[EnergyReading, ...]:
        """Return the energy since `begin`."""
        return self.so_far()

    def so_far(self) -> tuple[EnergyReading, ...]:
        """Return the energy up to now."""
        passed_s = (self.clock.now_ns() - self._begun_ns) / NS_PER_S
        method = f"simulated: {self._power_w:g} W at all times"
        return (EnergyReading("gpu", "simulated", "device", "simulated", self._power_w * passed_s, method),)
