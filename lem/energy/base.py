"""The interface of the energy meters and its null object.

A meter is opened once, then measures windows one after another, never two at a time. It knows nothing of
models, tokens or experiments; `lem.measure` decides where a window begins and ends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from lem.record import Component, EnergyReading, PowerSample


class Meter(ABC):
    """Reads the energy of some components over windows.

    Contract, checked for each meter by `tests/test_energy.py`: `begin` and `end` alternate; `end` returns a
    reading for each device the meter watches, in the same order each time; what cannot be read has
    `energy_j=None` and a reason; nothing is read as 0 for lack of a sensor.
    """

    def open(self) -> None:
        """Acquire the sensors and pay all one-time costs. Raises `BadInput` when there is nothing to read."""

    @abstractmethod
    def begin(self) -> None:
        """Open a window."""

    @abstractmethod
    def end(self) -> tuple[EnergyReading, ...]:
        """Close the window and return what it took, in joules."""

    def trace(self) -> list[PowerSample]:
        """Return the power samples taken so far, where the meter takes any."""
        return []

    def close(self) -> None:
        """Release the sensors; the meter is not used afterwards."""


class NoMeter(Meter):
    """Reads nothing, so that energy is null in the record: for `energy=none`."""

    def begin(self) -> None:
        """Do nothing."""

    def end(self) -> tuple[EnergyReading, ...]:
        """Return no readings."""
        return ()


class CombinedMeter(Meter):
    """Several meters over the same windows, for different components."""

    def __init__(self, *meters: Meter) -> None:
        self._meters = meters

    def open(self) -> None:
        """Open all."""
        for meter in self._meters:
            meter.open()

    def begin(self) -> None:
        """Begin in reverse order, so that the first meter's window is the tightest."""
        for meter in reversed(self._meters):
            meter.begin()

    def end(self) -> tuple[EnergyReading, ...]:
        """End in order: the first meter's window closes first."""
        return tuple(reading for meter in self._meters for reading in meter.end())

    def trace(self) -> list[PowerSample]:
        """Return the samples of all."""
        return [sample for meter in self._meters for sample in meter.trace()]

    def close(self) -> None:
        """Close all."""
        for meter in self._meters:
            meter.close()


class OnlyComponents(Meter):
    """Another meter without the components that a better one reads."""

    def __init__(self, meter: Meter, *components: Component) -> None:
        self._meter = meter
        self._components = components

    def open(self) -> None:
        """Open the meter."""
        self._meter.open()

    def begin(self) -> None:
        """Begin the meter's window."""
        self._meter.begin()

    def end(self) -> tuple[EnergyReading, ...]:
        """Return the readings of the wanted components."""
        return tuple(reading for reading in self._meter.end() if reading.component in self._components)

    def trace(self) -> list[PowerSample]:
        """Return the meter's samples."""
        return self._meter.trace()

    def close(self) -> None:
        """Close the meter."""
        self._meter.close()
