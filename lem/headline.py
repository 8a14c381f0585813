"""Which readings make the headline energy of a window, and the energy of one component.

The GPUs' when it was read from them, else the sum over the components that were measured, else the sum of the
estimates; never a mix. Knows readings only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lem.merging import total
from lem.record import Component, EnergyReading

MEASURED_SOURCES = ("counter", "integral", "replay")


class Energy(NamedTuple):
    """A sum of readings of one kind of source; `energy_j` is None when any of them is."""

    energy_j: float | None
    source: str | None
    scope: str | None
    components: str | None


UNMETERED = Energy(None, None, None, None)


def headline(readings: Sequence[EnergyReading]) -> Energy:
    """Return the headline energy of one window; nothing in it where no meter watched."""
    if len(readings) < 2:
        return _sum(readings)
    # A module contains its GPU: where both were read, only the module counts.
    modules = [r for r in readings if r.component == "module"]
    gpus = modules or [r for r in readings if r.component == "gpu"]
    measured = [r for r in readings if r.source in MEASURED_SOURCES]
    return _sum(gpus or measured or readings)


def energy_j(readings: Sequence[EnergyReading]) -> float | None:
    """Return the joules of the headline."""
    return readings[0].energy_j if len(readings) == 1 else headline(readings).energy_j


def by_component(readings: Sequence[EnergyReading]) -> dict[Component, Energy]:
    """Return the energy of each component that a meter watched in one window."""
    found: dict[Component, list[EnergyReading]] = {}
    for reading in readings:
        found.setdefault(reading.component, []).append(reading)
    return {component: _sum(same) for component, same in found.items()}


def _sum(readings: Sequence[EnergyReading]) -> Energy:
    if not readings:
        return UNMETERED
    if len(readings) == 1:
        return Energy(readings[0].energy_j, readings[0].source, readings[0].scope, readings[0].component)
    return Energy(
        energy_j=total([r.energy_j for r in readings]),
        source=joined(r.source for r in readings),
        scope=joined(r.scope for r in readings),
        components=joined(r.component for r in readings),
    )


def joined(words: Iterable[str]) -> str:
    """Return words once each, with a plus between them."""
    return "+".join(dict.fromkeys(words))
