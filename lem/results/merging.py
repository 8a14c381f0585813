"""Merges a process's attempts at a cycle into one record, removes repeated warnings, and sums the headline energy.

The attempts' windows are added up without the gaps between them. Energy is summed per device, together with the time
that it covers; `Phase.usable` discards sums that cover too little of the window. If an attempt with finished requests
lacks FLOPs, prefill times or a carbon intensity, the merged record lacks them too. This module works only on records.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from msgspec.structs import replace

from lem.record import (
    ENERGY_OWNER,
    Carbon,
    CodedWarning,
    Component,
    Cut,
    EnergyReading,
    EngineInfo,
    Flops,
    Memory,
    Phase,
    Prefill,
    ProcessRecord,
    UnderWay,
)
from lem.warning_codes import of_places, warning

# If attempts differ in one of these, they ran on different hardware, so no single idle power holds for all of them.
HARDWARE = ("processor", "device", "GPUs")
IDLE = ("idle_before", "idle_loaded")
# If the energy of more than this share of a window is unknown, the window's energy is null.
UNMETERED_SHARE = 0.02


# ------------------------------------------------------------------ processes of one attempt
def together(records: Sequence[ProcessRecord]) -> list[ProcessRecord]:
    """Return the records of an attempt's processes; if these were interrupted, their windows now end at the same time.

    Each process knows only its own last finished request, and only one process meters. The common end is the latest
    end among the windows of the metering process and of all processes that finished a request. Requests that a
    process had in flight at the end of its own window count as in flight until the common end. Energy that was last
    read too long before the common end becomes null. If the processes were interrupted before any of them finished a
    request, the records lose their windows.

    Args:
        records: the records of one attempt at one cycle, one for each process.
    """
    owner = next((r for r in records if r.rank == ENERGY_OWNER), None)
    is_closed = owner is not None and owner.cut is None and owner.status == "completed"
    if len(records) < 2 or (is_closed and all(r.requests_completed >= r.requests_planned for r in records)):
        return list(records)
    is_cut = any(r.cut or r.phase("measured") is None for r in records)
    if is_cut and not any(r.requests_completed for r in records):  # nothing to count
        return [replace(r, phases=_others(r), cut=None) for r in records]
    ends_s = [window.duration_s if (window := r.phase("measured")) else 0.0 for r in records]
    end_s = max(
        end_s for end_s, r in zip(ends_s, records, strict=True) if r.requests_completed or r.rank == ENERGY_OWNER
    )
    cuts = [_cut_at(end_s - own_s, r) for own_s, r in zip(ends_s, records, strict=True)]
    longest_s = max(cut.under_way.longest_s for cut in cuts)
    return [
        _ended(r, end_s, replace(cut, under_way=replace(cut.under_way, longest_s=longest_s)))
        for r, cut in zip(records, cuts, strict=True)
    ]


def _ended(record: ProcessRecord, end_s: float, cut: Cut) -> ProcessRecord:
    """Return the record of a process with the end of its window moved to `end_s`."""
    readings = _readings_at(end_s, record, cut)
    told = [each for each in record.warnings if each.code != "window_cut"]
    return replace(
        record,
        phases=(*_others(record), Phase("measured", end_s, readings)),
        cut=cut,
        warnings=(*told, *_ends_together(record, cut, readings)),
    )


def _ends_together(record: ProcessRecord, cut: Cut, readings: Sequence[EnergyReading]) -> Iterator[CodedWarning]:
    if record.rank == ENERGY_OWNER:
        behind_s = cut.energy_behind_s
        energy = f"; their energy was last read {behind_s:.3g} s before that time" if behind_s else ""
        yield warning(
            "window_cut", f"the processes' windows were interrupted, and now all end at the same time{energy}."
        )
        window = record.phase("measured")
        lost = () if window is not None and window.energy == readings else readings
        yield from (warning("energy_missing", f"{each.component}: {each.reason}.") for each in lost)
        if window is None and not readings:
            yield warning("energy_missing", "no meter was used.")


def _others(record: ProcessRecord) -> tuple[Phase, ...]:
    return tuple(phase for phase in record.phases if phase.name != "measured")


def _cut_at(later_s: float, record: ProcessRecord) -> Cut:
    """Return a record's `cut`, adjusted for a window that ends `later_s` seconds later."""
    cut = record.cut or Cut(lost_s=0.0 if record.status == "completed" else None)
    has_window = record.phase("measured") is not None
    behind_s = None if cut.energy_behind_s is None else cut.energy_behind_s + later_s
    if record.requests_completed < record.requests_planned:
        cut = replace(cut, under_way=longer(cut.under_way, later_s))
    lost_s = None if cut.lost_s is None else max(0.0, cut.lost_s - later_s)
    return replace(cut, lost_s=lost_s, energy_behind_s=behind_s if has_window else None)


def _readings_at(end_s: float, record: ProcessRecord, cut: Cut) -> tuple[EnergyReading, ...]:
    window = record.phase("measured")
    if window is None:
        reason = "the metering process was stopped before it finished a request; other processes had finished some"
        return unread(record, reason)
    behind_s = cut.energy_behind_s or 0.0
    if behind_s <= UNMETERED_SHARE * end_s:
        return window.energy
    reason = f"energy was last read {behind_s:.3g} s before the other processes' last requests finished"
    return tuple(replace(each, energy_j=None, trace_energy_j=None, reason=reason) for each in window.energy)


def unread(record: ProcessRecord, reason: str) -> tuple[EnergyReading, ...]:
    """For each device in the last metered phase, return a reading that has the given reason instead of an energy."""
    metered = next((phase.energy for phase in reversed(record.phases) if phase.energy), ())
    return tuple(replace(each, energy_j=None, trace_energy_j=None, reason=reason) for each in metered)


def longer(under_way: UnderWay | None, by_s: float) -> UnderWay:
    """Return the work in flight, at least one request, after `by_s` more seconds in which no request finished."""
    known = under_way or UnderWay()
    if by_s <= 0:
        return known
    requests = max(known.requests, 1)
    return UnderWay(requests, None, known.request_s + requests * by_s, known.longest_s + by_s)


# ------------------------------------------------------------------ attempts of a process at one cycle
def merged(records: Sequence[ProcessRecord]) -> ProcessRecord:
    """Merge a process's attempts at one cycle, in order; the windows are joined without the gaps between them.

    An attempt without a window is ignored, except for its Slurm job and, if it is the last, its status and error. If no
    attempt has a window, the last one is used.
    """
    if len(records) == 1:
        return records[0]
    counted = [r for r in records if r.phase("measured")] or [records[-1]]
    latest, ran = counted[-1], [r for r in counted if r.requests_completed]
    places = _places(counted)
    has_moved = any(len(places[what]) > 1 for what in HARDWARE)
    return replace(
        latest,
        status=records[-1].status,
        error=records[-1].error,
        started_at=counted[0].started_at,
        hostname=joined(r.hostname for r in counted if r.hostname) or None,
        engine=_merged_engine([r.engine for r in counted]),
        phases=tuple(p for p in _merged_phases(counted) if not (has_moved and p.name in IDLE)),
        slurm_job_id=joined(r.slurm_job_id for r in records if r.slurm_job_id) or None,
        slurm_node=joined(r.slurm_node for r in counted if r.slurm_node) or None,
        requests_planned=max(r.requests_planned for r in counted),
        requests_completed=sum(r.requests_completed for r in counted),
        requests_failed=sum(r.requests_failed for r in counted),
        input_tokens=sum(r.input_tokens for r in counted),
        output_tokens=sum(r.output_tokens for r in counted),
        memory=_merged_memory([r.memory for r in counted]),
        flops=_merged_flops([r.flops for r in ran]) if ran else latest.flops,
        carbon=_merged_carbon(counted),
        prefill=_merged_prefill([r.prefill for r in ran]),
        cut=merged_cut([r.cut for r in counted]),
        warnings=(*_merged_warnings(counted), *of_places(places)),
    )


def _places(records: Sequence[ProcessRecord]) -> dict[str, list[str]]:
    """Return where the attempts ran: the distinct hosts, processors, devices, GPUs and versions of the engine."""
    environments = [r.environment for r in records if r.environment is not None]
    engines = [r.engine for r in records if r.engine is not None]
    gpus = (", ".join(state.uuid for state in each.devices_before) for each in environments)
    found = {
        "host": [r.hostname for r in records if r.hostname],
        "processor": [each.cpu_model for each in environments],
        "device": [each.device_name for each in engines],
        "GPUs": filter(None, gpus),
        "engine": [each.version for each in engines],
    }
    return {what: list(dict.fromkeys(names)) for what, names in found.items()}


def _merged_engine(engines: Sequence[EngineInfo | None]) -> EngineInfo | None:
    """Return the last attempt's engine, with the names of all devices and versions if attempts differ in them."""
    known = [engine for engine in engines if engine is not None]
    if not known:
        return None
    names, versions = joined(e.device_name for e in known), joined(e.version for e in known)
    return replace(known[-1], device_name=names, version=versions)


def _merged_phases(records: Sequence[ProcessRecord]) -> tuple[Phase, ...]:
    """Return the first attempt's phases before the window, and all windows combined into one."""
    phases = [phase for phase in records[0].phases if phase.name != "measured"]
    windows = [window for r in records if (window := r.phase("measured"))]
    if not windows:
        return tuple(phases)
    return (*phases, Phase("measured", sum(w.duration_s for w in windows), _merged_readings(windows)))


def _merged_readings(windows: Sequence[Phase]) -> tuple[EnergyReading, ...]:
    """For each device, add up its readings and the time that they cover."""
    by_device = [{(r.component, r.device, r.source, r.scope): r for r in window.energy} for window in windows]
    devices = dict.fromkeys(device for of_window in by_device for device in of_window)
    return tuple(_merged_reading([of_window.get(device) for of_window in by_device], windows) for device in devices)


def _merged_reading(found: Sequence[EnergyReading | None], windows: Sequence[Phase]) -> EnergyReading:
    """Return the sum of a device's readings over all windows; `found` has None for a window without a reading."""
    readings = [r for r in found if r is not None]
    known_j = [r.energy_j for r in readings if r.energy_j is not None]
    covered_s = [
        _seconds_without(readings[0], window) if reading is None else reading.seconds_of(window.duration_s)
        for reading, window in zip(found, windows, strict=True)
    ]
    return replace(
        readings[-1],
        energy_j=sum(known_j) if known_j else None,
        trace_energy_j=total([r.trace_energy_j for r in readings]),
        reason=next((r.reason for r in readings if r.reason), None),
        covered_s=sum(covered_s) if known_j else None,
    )


def _seconds_without(device: EnergyReading, window: Phase) -> float:
    """Return how many seconds of a window count as covered for a device that has no reading in it.

    If other devices of the same component were metered in the same way, this device was not in use and used no energy,
    so the time covered by their readings counts. Otherwise its energy is unknown, and the result is 0.
    """
    alike = [r for r in window.energy if (r.component, r.is_measured) == (device.component, device.is_measured)]
    return min((r.seconds_of(window.duration_s) for r in alike), default=0.0)


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


def _merged_carbon(records: Sequence[ProcessRecord]) -> Carbon | None:
    """Return the attempts' carbon intensity or, if it differs, its mean weighted by energy; None if unknown."""
    found = [record.carbon for record in records]
    if None in found or all(each == found[0] for each in found):
        return None if None in found else found[-1]
    windows = [window.usable() if (window := record.phase("measured")) else () for record in records]
    mean = weighted([c.intensity_g_per_kwh for c in found if c], [energy_j(readings) for readings in windows])
    known = [carbon for carbon in found if carbon is not None]
    digests = joined(carbon.trace_sha256 for carbon in known if carbon.trace_sha256) or None
    return None if mean is None else Carbon(mean, joined(carbon.source for carbon in known), digests)


def weighted(values: Sequence[float], weights: Sequence[float | None]) -> float | None:
    """Return the weighted mean; None if a weight is unknown or negative, or if all weights are 0."""
    known = [weight for weight in weights if weight is not None and weight >= 0]
    if len(known) < len(values) or sum(known) == 0:
        return None
    return sum(value * weight for value, weight in zip(values, known, strict=True)) / sum(known)


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


def merged_cut(cuts: Sequence[Cut | None], windows: int | None = None) -> Cut | None:
    """Combine several cuts into one; `windows` is the number of windows cut, by default the sum over the cuts."""
    known = [cut for cut in cuts if cut is not None]
    if len(known) < 2:
        return known[0] if known else None
    parts = [cut.under_way for cut in known]
    tokens = [part.output_tokens for part in parts if part.output_tokens is not None]
    return Cut(
        windows=sum(cut.windows for cut in known) if windows is None else windows,
        lost_s=total([cut.lost_s for cut in known]),
        energy_behind_s=total([cut.energy_behind_s for cut in known]),
        under_way=UnderWay(
            requests=sum(part.requests for part in parts),
            output_tokens=sum(tokens) if len(tokens) == len(parts) else None,
            request_s=sum(part.request_s for part in parts),
            longest_s=sum(part.longest_s for part in parts),
        ),
    )


def _merged_warnings(records: Sequence[ProcessRecord]) -> tuple[CodedWarning, ...]:
    cuts = [r.cut for r in records if r.cut is not None]
    several = merged_cut(cuts) if len(cuts) > 1 else None
    kept = [[each for each in r.warnings if several is None or each.code != "window_cut"] for r in records]
    texts = once_each([list(map(as_text, warnings)) for warnings in kept], "attempt")
    found = tuple(CodedWarning(code, text) for code, _, text in (text.partition(": ") for text in texts))
    return found if several is None else (*found, _of_several(several))


def _of_several(cut: Cut) -> CodedWarning:
    lost = "an unknown time" if cut.lost_s is None else f"a total of {cut.lost_s:.3g} s"
    behind_s = cut.energy_behind_s
    energy = f"; their energy was last read a total of {behind_s:.3g} s before these ends" if behind_s else ""
    text = (
        f"{cut.windows} windows were interrupted {lost} after their last finished requests, and each window ends at "
        f"its last finished request{energy}."
    )
    return warning("window_cut", text)


def total(values: Sequence[float | None]) -> float | None:
    """Return the sum, or None if there are no values or any of them is None."""
    known = [value for value in values if value is not None]
    return sum(known) if values and len(known) == len(values) else None


# ------------------------------------------------------------------ warnings
# A standalone number, not the end of a device's name or id.
_NUMBER = re.compile(r"(?<![\w-])\d[\d.]*(e[+-]?\d+)?")
_AND_MORE = re.compile(r" \(and \d+ more \w+\)$")


def as_text(warning: CodedWarning) -> str:
    """Return a warning as it appears in rows: `code: message`."""
    return f"{warning.code}: {warning.text}"


def once_each(groups: Sequence[Sequence[str]], what: str) -> list[str]:
    """Return the warnings of several groups, leaving out those that an earlier group has, apart from the numbers.

    If more groups have a warning, with the same or other numbers, its text says how many more.

    Args:
        groups: the warnings of each attempt, process or cycle.
        what: the noun for a group, such as "cycle".
    """
    if len(groups) == 1:
        return list(groups[0])
    first: dict[str, list[str]] = {}
    seen: dict[str, int] = {}
    for group in groups:
        by_key: dict[str, list[str]] = {}
        for text in group:
            by_key.setdefault(_without_numbers(text), []).append(text)
        for key, texts in by_key.items():
            first.setdefault(key, texts)
            seen[key] = seen.get(key, 0) + 1
    return [_and_more(text, seen[key] - 1, what) for key, texts in first.items() for text in texts]


# Cached, because many experiments have the same warnings.
@lru_cache(1024)
def _without_numbers(text: str) -> str:
    return _NUMBER.sub("#", _AND_MORE.sub("", text))


def _and_more(text: str, more: int, what: str) -> str:
    many = {"process": "processes"}.get(what, f"{what}s")
    return f"{text} (and {more} more {many if more > 1 else what})" if more else text


# ------------------------------------------------------------------ energy
def is_estimated(source: str | None) -> bool:
    """Return whether an energy is at least partly an estimate, given its source or sources (joined by plus signs).

    Simulated energy counts as an estimate.
    """
    return source is not None and not {"estimate", "simulated"}.isdisjoint(source.split("+"))


class Energy(NamedTuple):
    """A sum of readings; `energy_j` is None if any reading lacks it, or if measurements and estimates are mixed."""

    energy_j: float | None
    source: str | None
    scope: str | None
    components: str | None


UNMETERED = Energy(None, None, None, None)


def headline(readings: Sequence[EnergyReading]) -> Energy:
    """Return the headline energy of one window.

    This is the energy of the modules or, without modules, of the GPUs. If there are neither, it is the sum of all
    measurements or, if nothing was measured, of all estimates.
    """
    return _sum(of_headline(readings))


def of_headline(readings: Sequence[EnergyReading]) -> Sequence[EnergyReading]:
    """Return the readings that add up to the headline energy."""
    if len(readings) < 2:
        return readings
    # A module contains its GPU: if both were read, only the module counts.
    modules = [r for r in readings if r.component == "module"]
    gpus = modules or [r for r in readings if r.component == "gpu"]
    measured = [r for r in readings if r.is_measured]
    return gpus or measured or readings


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
        energy_j=total([r.energy_j for r in readings]) if len({r.is_measured for r in readings}) == 1 else None,
        source=joined(r.source for r in readings),
        scope=joined(r.scope for r in readings),
        components=joined(r.component for r in readings),
    )


def joined(words: Iterable[str]) -> str:
    """Return the distinct words, joined by plus signs."""
    return "+".join(dict.fromkeys(words))
