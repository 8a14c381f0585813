"""Carbon intensity, the factor that converts joules into grams of CO2e.

If an intensity is configured, it is used. Otherwise, the intensity is the mean for the configured country's electricity
grid, from codecarbon's tables. Without either, CO2e is null: lem never assumes a country. This module knows nothing
about meters.
"""

from __future__ import annotations

from lem.energy.quiet import quiet_stdout
from lem.errors import ConfigError, did_you_mean
from lem.record import Carbon
from lem.spec.experiment import Energy

G_PER_KG = 1000.0


def carbon_intensity(energy: Energy) -> Carbon | None:
    """Return the carbon intensity, or None if neither an intensity nor a country is configured.

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
