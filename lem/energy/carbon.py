"""Carbon intensity, the factor that converts joules into grams of CO2e.

If a trace of intensities is configured, the intensity is its mean over the measured window. Otherwise, it is the
configured intensity or the mean for the configured country's electricity grid, from codecarbon's tables. If none of
these is configured, CO2e is null: lem never assumes a country. This module knows nothing about meters.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from lem.energy.carbon_trace import CarbonTrace, read_carbon_trace
from lem.energy.quiet import quiet_stdout
from lem.errors import ConfigError, did_you_mean
from lem.record import Carbon
from lem.spec.experiment import Energy

G_PER_KG = 1000.0


@dataclass(frozen=True)
class WindowEnergy:
    """When a measured window opened (in seconds since 1970), how long it was, and the energy of its parts.

    `duration_s` is None if the window has only just opened. `energy_of` returns the energy between two moments, which
    are given in seconds from the opening; it returns None if this energy is unknown.
    """

    opened_unix_s: float
    duration_s: float | None
    energy_of: Callable[[float, float], float | None]


def carbon_of(energy: Energy, window: WindowEnergy | None) -> Carbon | None:
    """Return the carbon intensity of a window.

    The result is None if neither a trace, an intensity nor a country is configured, or if a trace is configured but
    `window` is None.

    Raises:
        ConfigError: the country is not in the tables.
        BadInput: the trace cannot be read, or does not cover the window.
    """
    if energy.carbon_trace is None:
        return carbon_intensity(energy)
    return None if window is None else _over(read_carbon_trace(energy.carbon_trace), window)


def _over(trace: CarbonTrace, window: WindowEnergy) -> Carbon:
    source = f"energy.carbon_trace {os.path.basename(trace.path)}"
    if window.duration_s is None:
        piece = trace.at(window.opened_unix_s)
        return Carbon(piece.intensity_g_per_kwh, f"{source}, weighted by time", trace.sha256, piece.end_s)
    found = trace.mean(window.opened_unix_s, window.duration_s, window.energy_of)
    weight = "energy" if found.by_energy else "time"
    return Carbon(found.intensity_g_per_kwh, f"{source}, weighted by {weight}", trace.sha256)


def carbon_intensity(energy: Energy) -> Carbon | None:
    """Return the constant carbon intensity, or None if neither an intensity nor a country is configured.

    Raises:
        ConfigError: the country is not in the tables.
    """
    if energy.carbon_intensity_g_per_kwh is not None:
        return Carbon(energy.carbon_intensity_g_per_kwh, "energy.carbon_intensity_g_per_kwh")
    if energy.country_iso_code is None:
        return None
    return Carbon(
        _country_intensity(energy.country_iso_code),
        f"mean of the {energy.country_iso_code} grid, from codecarbon's tables",
    )


def _country_intensity(country: str) -> float:
    with quiet_stdout():
        from codecarbon.core.emissions import Emissions
        from codecarbon.core.units import Energy as KilowattHours
        from codecarbon.external.geography import GeoMetadata
        from codecarbon.input import DataSource

    tables = DataSource()
    known = tables.get_global_energy_mix_data()
    # For an unknown country, the library would silently use the world average.
    if country not in known:
        raise ConfigError(
            f"energy.country_iso_code: no carbon intensity is known for '{country}'.{did_you_mean(country, known)}"
        )
    one_kwh = KilowattHours.from_energy(kWh=1.0)
    place = GeoMetadata(country_iso_code=country, country_name=known[country].get("country_name"))
    return float(Emissions(tables).get_country_emissions(one_kwh, place)) * G_PER_KG
