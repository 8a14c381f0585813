"""Objections to the `energy` group: options without effect, unknown countries, and meters that cannot be used."""

from __future__ import annotations

from collections.abc import Iterator

from lem.energy import meter_class
from lem.energy.carbon import carbon_intensity
from lem.energy.carbon_trace import read_carbon_trace
from lem.errors import BadInput, ConfigError
from lem.machine.host import Host
from lem.spec.experiment import Energy
from lem.spec.processes import changed
from lem.spec.rules import Objection, without_effect

# Besides `trace`, the options that only some meters use; all other options of the group apply to every meter.
METER_OPTIONS = ("idle_s", "power_hz", "powercap_dir", "power_w")


def objections(energy: Energy, host: Host, *, uses_gpu: bool) -> Iterator[Objection]:
    """Yield all objections to the `energy` group on this machine."""
    yield from _unread(energy)
    yield from _carbon(energy)
    yield from meter_class(energy.name).objections(energy, host, uses_gpu=uses_gpu)


def _unread(energy: Energy) -> Iterator[Objection]:
    """Object to options that the chosen meter does not use."""
    if energy.trace is not None and energy.name != "replay":
        yield without_effect("no_effect_trace", "energy.trace", "only the replay meter reads a trace.")
    unread = [name for name in METER_OPTIONS if name not in meter_class(energy.name).options]
    for name in changed(energy, *unread):
        yield without_effect(
            "no_effect_meter_option", f"energy.{name}", f"energy={energy.name} does not use this option."
        )


def _carbon(energy: Energy) -> Iterator[Objection]:
    given = changed(energy, "country_iso_code", "carbon_intensity_g_per_kwh", "carbon_trace")
    if energy.name == "none":
        for name in given:
            yield without_effect("no_effect_carbon", f"energy.{name}", "no energy is measured.")
    used = given[-1] if given else None  # the last one takes precedence
    for name in given[:-1]:
        code = "no_effect_country" if name == "country_iso_code" else "no_effect_carbon_intensity"
        yield without_effect(code, f"energy.{name}", f"energy.{used} is used instead.")
    if energy.carbon_trace is not None:
        try:
            read_carbon_trace(energy.carbon_trace)
        except BadInput as error:
            yield Objection("bad_carbon_trace", "energy.carbon_trace", str(error))
    try:
        carbon_intensity(energy)
    except ConfigError as error:
        yield Objection("unknown_country", "energy.country_iso_code", str(error).partition(": ")[2])
