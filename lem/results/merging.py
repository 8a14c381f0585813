"""Merges a process's attempts at a cycle into one record, removes repeated warnings, and sums the headline energy.

Windows follow each other, energy is summed device by device, and a value that one attempt lacks is unknown for all.
Knows only records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from msgspec.structs import replace

from lem.record import CodedWarning, Component, EnergyReading, Flops, Memory, Phase, Prefill, ProcessRecord

NOT_IN_ALL = "it was not metered in every attempt at the cycle"


# ------------------------------------------------------------------ attempts of a process at one cycle
def merged(records: Sequence[ProcessRecord]) -> ProcessRecord:
    """Merge a process's attempts at one cycle, in order: windows follow each other and never span a gap.

    An attempt without a window is ignored, except that the last attempt's status and error are kept.
    """
    if len(records) == 1:
        return records[0]
    counted = [r for r in records if r.phase("measured")] or [records[-1]]
    latest, ran = counted[-1], [r for r in counted if r.requests_completed]
    return replace(
        latest,
        status=records[-1].status,
        error=records[-1].error,
        started_at=counted[0].started_at,
        phases=_merged_phases(counted),
        requests_planned=max(r.requests_planned for r in counted),
        requests_completed=sum(r.requests_completed for r in counted),
        input_tokens=sum(r.input_tokens for r in counted),
        output_tokens=sum(r.output_tokens for r in counted),
        memory=_merged_memory([r.memory for r in counted]),
        flops=_merged_flops([r.flops for r in ran]) if ran else latest.flops,
        prefill=_merged_prefill([r.prefill for r in ran]),
        warnings=_merged_warnings(counted),
    )


def _merged_phases(records: Sequence[ProcessRecord]) -> tuple[Phase, ...]:
    """Return the first attempt's phases up to the window, and all windows combined into one."""
    phases = [phase for phase in records[0].phases if phase.name != "measured"]
    windows = [window for r in records if (window := r.phase("measured"))]
    if not windows:
        return tuple(phases)
    return (*phases, Phase("measured", sum(w.duration_s for w in windows), _merged_readings(windows)))


def _merged_readings(windows: Sequence[Phase]) -> tuple[EnergyReading, ...]:
    """Sum the readings of each device; a component that one window lacks has no energy."""
    components = [{reading.component for reading in window.energy} for window in windows]
    by_device: dict[tuple[str, ...], list[EnergyReading]] = {}
    for reading in (reading for window in windows for reading in window.energy):
        by_device.setdefault((reading.component, reading.device, reading.source, reading.scope), []).append(reading)
    return tuple(
        _merged_reading(same)
        if all(same[0].component in found for found in components)
        else replace(same[0], energy_j=None, trace_energy_j=None, reason=NOT_IN_ALL)
        for same in by_device.values()
    )


def _merged_reading(readings: Sequence[EnergyReading]) -> EnergyReading:
    return replace(
        readings[-1],
        energy_j=total([r.energy_j for r in readings]),
        trace_energy_j=total([r.trace_energy_j for r in readings]),
        reason=next((r.reason for r in readings if r.reason), None),
    )


def _merged_memory(parts: Sequence[Memory | None]) -> Memory | None:
    """Return the largest memory peak and the largest cache of all attempts."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    caches = [part.kv_cache_bytes for part in known if part.kv_cache_bytes is not None]
    return replace(max(known, key=lambda part: part.peak_bytes or 0), kv_cache_bytes=max(caches, default=None))


def _merged_flops(parts: Sequence[Flops | None]) -> Flops | None:
    known = [part for part in parts if part is not None]
    return replace(known[-1], total=sum(p.total for p in known)) if known and len(known) == len(parts) else None


def _merged_prefill(parts: Sequence[Prefill | None]) -> Prefill | None:
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    return Prefill(
        duration_s=total([p.duration_s for p in known]),
        energy_j=total([p.energy_j for p in known]),
        uncertainty_j=total([p.uncertainty_j for p in known]),
        reason=joined(p.reason for p in known if p.reason) or None,
    )


def _merged_warnings(records: Sequence[ProcessRecord]) -> tuple[CodedWarning, ...]:
    texts = once_each([list(map(as_text, r.warnings)) for r in records], "attempt")
    return tuple(CodedWarning(code, text) for code, _, text in (text.partition(": ") for text in texts))


def total(values: Sequence[float | None]) -> float | None:
    """Return the sum, or None if there are no values or any of them is None."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


# ------------------------------------------------------------------ warnings
# A standalone number: not the end of a device's name or id.
_NUMBER = re.compile(r"(?<![\w-])\d[\d.]*(e[+-]?\d+)?")
_AND_MORE = re.compile(r" \(and \d+ more \w+\)$")


def as_text(warning: CodedWarning) -> str:
    """Return a warning as it appears in rows: `code: message`."""
    return f"{warning.code}: {warning.text}"


def once_each(groups: Sequence[Sequence[str]], what: str) -> list[str]:
    """Return the warnings of several groups; those that differ only in their numbers appear once.

    Args:
        groups: the warnings of each attempt, process or cycle.
        what: the name for one group, such as cycle.
    """
    if len(groups) == 1:
        return list(groups[0])
    first: dict[str, list[str]] = {}
    seen: dict[str, int] = {}
    for group in groups:
        by_key: dict[str, list[str]] = {}
        for text in group:
            by_key.setdefault(_NUMBER.sub("#", _AND_MORE.sub("", text)), []).append(text)
        for key, texts in by_key.items():
            first.setdefault(key, texts)
            seen[key] = seen.get(key, 0) + 1
    return [_and_more(text, seen[key] - 1, what) for key, texts in first.items() for text in texts]


def _and_more(text: str, more: int, what: str) -> str:
    many = {"process": "processes"}.get(what, f"{what}s")
    return f"{text} (and {more} more {many if more > 1 else what})" if more else text


# ------------------------------------------------------------------ energy
MEASURED_SOURCES = ("counter", "integral", "replay")


class Energy(NamedTuple):
    """A sum of readings of one kind of source; `energy_j` is None if any of them is."""

    energy_j: float | None
    source: str | None
    scope: str | None
    components: str | None


UNMETERED = Energy(None, None, None, None)


def headline(readings: Sequence[EnergyReading]) -> Energy:
    """Return the headline energy of one window: the GPUs', else what was measured, else the estimates."""
    if len(readings) < 2:
        return _sum(readings)
    # A module contains its GPU: if both were read, only the module counts.
    modules = [r for r in readings if r.component == "module"]
    gpus = modules or [r for r in readings if r.component == "gpu"]
    measured = [r for r in readings if r.source in MEASURED_SOURCES]
    return _sum(gpus or measured or readings)


def energy_j(readings: Sequence[EnergyReading]) -> float | None:
    """Return the headline energy in joules."""
    return readings[0].energy_j if len(readings) == 1 else headline(readings).energy_j


def by_component(readings: Sequence[EnergyReading]) -> dict[Component, Energy]:
    """Return the energy of each component that was metered in one window."""
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
    """Return the distinct words, joined by plus signs."""
    return "+".join(dict.fromkeys(words))
