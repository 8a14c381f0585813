"""Carbon intensity: what turns joules into grams of CO2e.

A configured intensity comes first, then the mean of a named country's grid from codecarbon's tables. Without either,
CO2e is null: no country is ever assumed. Knows nothing about energy meters.
"""

from __future__ import annotations

from lem.energy.quiet import quiet_stdout
from lem.errors import ConfigError, did_you_mean
from lem.record import Carbon
from lem.spec.experiment import Energy

G_PER_KG = 1000.0


def carbon_intensity(energy: Energy) -> Carbon | None:
    """Return the configured carbon intensity, or None.

    Raises:
        ConfigError: the tables have no such country.
    """
    if energy.carbon_intensity_g_per_kwh is not None:
        return Carbon(energy.carbon_intensity_g_per_kwh, "energy.carbon_intensity_g_per_kwh")
    if energy.country_iso_code is None:
        return None
    return Carbon(
        _country_intensity(energy.country_iso_code),
        f"mean of the grid of {energy.country_iso_code}, codecarbon's tables",
    )


def _country_intensity(country: str) -> float:
    with quiet_stdout():
        from codecarbon.core.emissions import Emissions
        from codecarbon.core.units import Energy as KilowattHours
        from codecarbon.external.geography import GeoMetadata
        from codecarbon.input import DataSource

    tables = DataSource()
    known = tables.get_global_energy_mix_data()
    # For a country it does not know, the library would silently use the world's average.
    if country not in known:
        raise ConfigError(
            f"energy.country_iso_code: no carbon intensity is known for '{country}'.{did_you_mean(country, known)}"
        )
    one_kwh = KilowattHours.from_energy(kWh=1.0)
    place = GeoMetadata(country_iso_code=country, country_name=known[country].get("country_name"))
    return float(Emissions(tables).get_country_emissions(one_kwh, place)) * G_PER_KG
