"""The interface of the energy meters, its null object, and combinations of meters.

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
from lem.workload.clock import REAL, Clock


class Meter(ABC):
    """Reads the energy of some components over windows.

    `tests/energy/test_energy.py` checks each meter against this contract: `begin` and `end` alternate. `end` returns
    one reading for each device that the meter watches, always in the same order. If a reading failed, its energy is
    None, never 0, and it gives a reason. Calls never overlap, but `so_far` may be called from a different thread than
    the other methods.
    """

    # Options of the `energy` group that this meter uses. Every meter except `none` also measures the idle phases.
    options: ClassVar[tuple[str, ...]] = ("idle_s",)
    # The clock that times the run; set before `open`. Meters with sensors ignore it.
    clock: Clock = REAL

    @classmethod
    def configured(cls, energy: Energy, gpus: Sequence[Gpu]) -> Meter:
        """Return the configured meter for the physical GPUs in use; nothing is opened yet."""
        return cls()

    @classmethod
    def objections(cls, energy: Energy, host: Host, *, uses_gpu: bool) -> Iterator[Objection]:
        """Yield objections to using this meter on this machine."""
        return iter(())

    def open(self) -> None:
        """Acquire the sensors and do all one-time work.

        Raises:
            BadInput: there is nothing to read.
        """

    def settle(self) -> None:
        """Wait for the best moment to begin a window, if the meter has a preference; `begin` follows immediately."""

    @abstractmethod
    def begin(self) -> None:
        """Begin a window."""

    @abstractmethod
    def mark(self) -> None:
        """Record the present time as the window's end, without waiting; `end` follows. A second call has no effect."""

    @abstractmethod
    def end(self) -> tuple[EnergyReading, ...]:
        """Return the window's energy in joules. The window ended at `mark`; if `mark` was not called, it ends now."""

    def so_far(self) -> tuple[EnergyReading, ...] | None:
        """Return the energy of the open window so far, or None if the meter cannot provide it.

        The caller stores the result, so that the energy is not lost if the run is killed. The method is called inside
        the measured window: between batches and, if other processes run a share of the prompts, also during a batch,
        from another thread, but never from two threads at once. Therefore, it never waits for a sensor's next value,
        and makes at most one call to the driver for each device. It does not raise an error if a device is lost, and it
        does not change the result of `end`.

        There is a reading for each device that `end` reports, in the same order. A reading holds the energy at the
        sensor's last tick or sample, so the energy never decreases and never exceeds the final energy. Before the first
        tick or sample, the energy is None, with a reason. If a reading lags by more than a tick, `covered_s` says how
        much time its energy covers.
        """
        return None

    def trace(self) -> list[PowerSample]:
        """Return the power samples so far; the list is empty for a meter that takes none."""
        return []

    def close(self) -> None:
        """Release the sensors; the meter is not used afterward."""


class ImmediateMeter(Meter):
    """Base class of meters that can read a window's energy immediately at its end, without waiting."""

    _ended: tuple[EnergyReading, ...] | None = None

    def mark(self) -> None:
        """Close the window, unless it is already closed."""
        if self._ended is None:
            self._ended = self._taken()

    def end(self) -> tuple[EnergyReading, ...]:
        """Close the window unless it is already closed, and return its energy."""
        readings = self._taken() if self._ended is None else self._ended
        self._ended = None
        return readings

    @abstractmethod
    def _taken(self) -> tuple[EnergyReading, ...]:
        """Close the window now and return its energy."""


class NoMeter(ImmediateMeter):
    """The meter for `energy=none`: it reads nothing, so energy is null in the record."""

    options = ()

    def begin(self) -> None:
        """Do nothing."""

    def _taken(self) -> tuple[EnergyReading, ...]:
        return ()

    def so_far(self) -> tuple[EnergyReading, ...]:
        """Return no readings."""
        return ()


class CombinedMeter(Meter):
    """Several meters that measure the same windows, each for different components."""

    def __init__(self, *meters: Meter) -> None:
        self._meters = meters
        self._is_settled = False

    def open(self) -> None:
        """Open all meters."""
        for meter in self._meters:
            meter.open()

    def settle(self) -> None:
        """Have each meter wait for its best moment to begin a window.

        The first meter waits last, so that the window begins at this meter's best moment.
        """
        for meter in reversed(self._meters):
            meter.settle()
        self._is_settled = True

    def begin(self) -> None:
        """Begin the window on all meters in reverse order; settle the meters first, unless they are already settled.

        The first meter thus gets the tightest window, and no window includes the time that another meter takes to
        settle.
        """
        if not self._is_settled:
            self.settle()
        self._is_settled = False
        for meter in reversed(self._meters):
            meter.begin()

    def mark(self) -> None:
        """Have all meters record the present time as the window's end, starting with the first meter."""
        for meter in self._meters:
            meter.mark()

    def end(self) -> tuple[EnergyReading, ...]:
        """Close the window on all meters, and return their readings.

        The end is marked on all meters before any of them waits, so that no window includes another meter's waiting
        time.
        """
        self.mark()
        parts = [meter.end() for meter in reversed(self._meters)]
        return tuple(reading for part in reversed(parts) for reading in part)

    def so_far(self) -> tuple[EnergyReading, ...] | None:
        """Return the readings of all meters, or None if any meter returns None."""
        parts = [meter.so_far() for meter in self._meters]
        return None if None in parts else tuple(reading for part in parts for reading in part or ())

    def trace(self) -> list[PowerSample]:
        """Return the power samples of all meters."""
        return [sample for meter in self._meters for sample in meter.trace()]

    def close(self) -> None:
        """Close all meters."""
        for meter in self._meters:
            meter.close()


class OnlyComponents(CombinedMeter):
    """Wraps a meter and keeps only some components, because a better meter reads the others."""

    def __init__(self, meter: Meter, *components: Component) -> None:
        super().__init__(meter)
        self._components = components

    def end(self) -> tuple[EnergyReading, ...]:
        """Return the readings of the wanted components."""
        return self._wanted(super().end())

    def so_far(self) -> tuple[EnergyReading, ...] | None:
        """Return the readings of the wanted components, or None if the wrapped meter returns None."""
        readings = super().so_far()
        return None if readings is None else self._wanted(readings)

    def _wanted(self, readings: tuple[EnergyReading, ...]) -> tuple[EnergyReading, ...]:
        return tuple(reading for reading in readings if reading.component in self._components)
