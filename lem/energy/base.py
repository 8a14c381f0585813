"""The interface of the energy meters and its null object.

A meter is opened once, then measures windows one after another, never two at a time. It knows nothing about models,
tokens or experiments; `lem.runner.window` decides where a window begins and ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.record import Component, EnergyReading, PowerSample
from lem.spec.experiment import Energy
from lem.spec.rules import Objection


class Meter(ABC):
    """Reads the energy of some components over windows.

    Contract, checked for each meter by `tests/energy/test_energy.py`: `begin` and `end` alternate; `end` returns a
    reading for each device the meter watches, always in the same order; what cannot be read has `energy_j=None` and a
    reason, never 0. All calls come from one thread.
    """

    # Options of the energy group that this meter reads; every meter that reads anything also measures the idle phases.
    options: ClassVar[tuple[str, ...]] = ("idle_s",)

    @classmethod
    def configured(cls, energy: Energy, gpus: Sequence[Gpu]) -> Meter:
        """Return the configured meter for the physical GPUs in use; nothing is opened yet."""
        return cls()

    @classmethod
    def objections(cls, energy: Energy, host: Host, *, uses_gpu: bool) -> Iterator[Objection]:
        """Yield the reasons why this meter cannot or should not be used on a machine."""
        return iter(())

    def open(self) -> None:
        """Acquire the sensors and pay all one-time costs; raises `BadInput` when there is nothing to read."""

    def settle(self) -> None:
        """Wait for the best moment to begin a window, for a meter that has one; `begin` follows at once."""

    @abstractmethod
    def begin(self) -> None:
        """Open a window."""

    @abstractmethod
    def mark(self) -> None:
        """Fix the end of the window, without waiting; `end` follows. Only the first call for a window counts."""

    @abstractmethod
    def end(self) -> tuple[EnergyReading, ...]:
        """Close the window, at its mark if it has one, else now, and return its energy in joules."""

    def so_far(self) -> tuple[EnergyReading, ...] | None:
        """Return the energy of the open window so far, or None if the meter cannot give it.

        This keeps the energy of a run that may be killed. It is called between batches, inside the measured window, so
        it never waits for a sensor's next value, costs no more than one call to the driver (mostly well under a
        millisecond), does not raise for a lost device, and does not change what `end` will return. The readings are
        those of `end`, device by device. Their energy only grows and is at most that of `end`: it is the value at the
        sensor's last tick or sample, or null with a reason before the first. One that lags behind by more than a tick
        says in `covered_s` how far it reaches.
        """
        return None

    def trace(self) -> list[PowerSample]:
        """Return the power samples so far; empty for a meter that takes none."""
        return []

    def close(self) -> None:
        """Release the sensors; the meter is not used afterwards."""


class ImmediateMeter(Meter):
    """A meter that knows a window's energy at its end at once."""

    _ended: tuple[EnergyReading, ...] | None = None

    def mark(self) -> None:
        """Close the window, unless it is closed already."""
        if self._ended is None:
            self._ended = self._taken()

    def end(self) -> tuple[EnergyReading, ...]:
        """Return the energy of the window that is closed, or that is closed now."""
        readings = self._taken() if self._ended is None else self._ended
        self._ended = None
        return readings

    @abstractmethod
    def _taken(self) -> tuple[EnergyReading, ...]:
        """Close the window now and return its energy."""


class NoMeter(ImmediateMeter):
    """Reads nothing, so that energy is null in the record; for `energy=none`."""

    options = ()

    def begin(self) -> None:
        """Do nothing."""

    def _taken(self) -> tuple[EnergyReading, ...]:
        return ()

    def so_far(self) -> tuple[EnergyReading, ...]:
        """Return no readings."""
        return ()


class CombinedMeter(Meter):
    """Several meters over the same windows, for different components."""

    def __init__(self, *meters: Meter) -> None:
        self._meters = meters
        self._is_settled = False

    def open(self) -> None:
        """Open all."""
        for meter in self._meters:
            meter.open()

    def settle(self) -> None:
        """Settle all, the first last: the windows begin at the moment for which it waits."""
        for meter in reversed(self._meters):
            meter.settle()
        self._is_settled = True

    def begin(self) -> None:
        """Begin in reverse order, after settling all meters unless that has been done.

        So the first meter's window is the tightest, and none includes the time that another takes to settle.
        """
        if not self._is_settled:
            self.settle()
        self._is_settled = False
        for meter in reversed(self._meters):
            meter.begin()

    def mark(self) -> None:
        """Fix the end for all meters, beginning with the first."""
        for meter in self._meters:
            meter.mark()

    def end(self) -> tuple[EnergyReading, ...]:
        """End all after marking them, so that no window includes what another meter waits for."""
        self.mark()
        parts = [meter.end() for meter in reversed(self._meters)]
        return tuple(reading for part in reversed(parts) for reading in part)

    def so_far(self) -> tuple[EnergyReading, ...] | None:
        """Return the readings of all meters; None if one has none, lest the rest be mistaken for all devices."""
        parts = [meter.so_far() for meter in self._meters]
        return None if None in parts else tuple(reading for part in parts for reading in part or ())

    def trace(self) -> list[PowerSample]:
        """Return the samples of all meters."""
        return [sample for meter in self._meters for sample in meter.trace()]

    def close(self) -> None:
        """Close all."""
        for meter in self._meters:
            meter.close()


class OnlyComponents(CombinedMeter):
    """Wraps a meter and leaves out the components that a better one reads."""

    def __init__(self, meter: Meter, *components: Component) -> None:
        super().__init__(meter)
        self._components = components

    def end(self) -> tuple[EnergyReading, ...]:
        """Return the readings of the wanted components."""
        return self._wanted(super().end())

    def so_far(self) -> tuple[EnergyReading, ...] | None:
        """Return the readings of the wanted components, or None if the meter does."""
        readings = super().so_far()
        return None if readings is None else self._wanted(readings)

    def _wanted(self, readings: tuple[EnergyReading, ...]) -> tuple[EnergyReading, ...]:
        return tuple(reading for reading in readings if reading.component in self._components)
