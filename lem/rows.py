"""From the records of processes to rows: attempts are merged, ranks put together, cycles averaged.

Throughput is output tokens over the wall-clock window. The headline energy is the GPUs' when it was read from
them, else the sum over the components that were measured, else the sum of the estimates; never a mix. What is a
quotient of two columns is formed in one place for cycles and experiments, so that J = W·t, J/token = W/(tokens/s) and
their like hold in every row. Knows records only: no file, and not how anything was measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple, get_args, get_type_hints

from lem import doubts
from lem.codec import to_compact_json
from lem.latency import of_tokens, summary, under_load
from lem.peaks import peak_flops_per_s
from lem.plan import Plan
from lem.record import (
    ENERGY_OWNER,
    Component,
    CycleRow,
    EnergyReading,
    ExperimentRow,
    Flops,
    Memory,
    Note,
    Phase,
    Prefill,
    ProcessRecord,
    RequestRecord,
    Status,
    made,
)
from lem.statistics import summarise
from lem.units import J_PER_KWH, J_PER_WH

MEASURED_SOURCES = ("counter", "integral", "replay")
COMPONENTS: tuple[Component, ...] = ("gpu", "cpu", "dram")
NOT_IN_ALL = "it was not metered in every attempt at the cycle"


@dataclass(frozen=True)
class Rows:
    """An experiment's rows, for the three tables."""

    row: ExperimentRow
    cycles: list[CycleRow]
    requests: list[RequestRecord]


# ------------------------------------------------------------------ energy
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


def _energy_j(readings: Sequence[EnergyReading]) -> float | None:
    return readings[0].energy_j if len(readings) == 1 else headline(readings).energy_j


def of_component(readings: Sequence[EnergyReading], component: Component) -> Energy:
    """Return the energy of one component in one window; nothing in it where no meter watched that."""
    return _sum([r for r in readings if r.component == component])


def _sum(readings: Sequence[EnergyReading]) -> Energy:
    if not readings:
        return UNMETERED
    if len(readings) == 1:
        return Energy(readings[0].energy_j, readings[0].source, readings[0].scope, readings[0].component)
    return Energy(
        energy_j=_total([r.energy_j for r in readings]),
        source=_joined(r.source for r in readings),
        scope=_joined(r.scope for r in readings),
        components=_joined(r.component for r in readings),
    )


def _joined(words: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(words))


# ------------------------------------------------------------------ attempts of a process at one cycle
def merged(records: Sequence[ProcessRecord]) -> ProcessRecord:
    """Put a process's attempts at one cycle together, in order: windows follow each other and never span a gap.

    An attempt without a window counts for nothing, but if it is the last one, its status and its error stand.
    """
    counted = [r for r in records if r.phase("measured")] or [records[-1]]
    if len(records) == 1:
        return records[0]
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
        warnings=_merged_notes(counted),
    )


def _merged_phases(records: Sequence[ProcessRecord]) -> tuple[Phase, ...]:
    """Return the phases before the window as the first attempt had them, and all windows as one."""
    phases = [phase for phase in records[0].phases if phase.name != "measured"]
    windows = [window for r in records if (window := r.phase("measured"))]
    if not windows:
        return tuple(phases)
    return (*phases, Phase("measured", sum(w.duration_s for w in windows), _merged_readings(windows)))


def _merged_readings(windows: Sequence[Phase]) -> tuple[EnergyReading, ...]:
    """Add the readings of each device up; a component that one window lacks has no energy."""
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
        energy_j=_total([r.energy_j for r in readings]),
        trace_energy_j=_total([r.trace_energy_j for r in readings]),
        reason=next((r.reason for r in readings if r.reason), None),
    )


def _merged_memory(parts: Sequence[Memory | None]) -> Memory | None:
    """Return the largest peak of all attempts, and the largest cache."""
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
    uncertainty_j = _total([p.uncertainty_j for p in known])
    return Prefill(sum(p.duration_s for p in known), _total([p.energy_j for p in known]), uncertainty_j)


def _merged_notes(records: Sequence[ProcessRecord]) -> tuple[Note, ...]:
    texts = once_each([[_told(note) for note in r.warnings] for r in records], "attempt")
    return tuple(Note(code, text) for code, _, text in (text.partition(": ") for text in texts))


# ------------------------------------------------------------------ the processes of one cycle
def cycle_row(
    plan: Plan, records: Sequence[ProcessRecord], requests: Sequence[RequestRecord], notes: Sequence[Note] = ()
) -> ExperimentRow:
    """Put one cycle's row together from the records of its processes, at least one, each with its attempts merged.

    Args:
        plan: what was to be run.
        records: one for each process, by rank.
        requests: the rows of all of them.
        notes: what else there is to doubt.
    """
    first, owner = records[0], next((r for r in records if r.rank == ENERGY_OWNER), None)
    complete = len({request.request for request in requests}) == plan.prompts.count
    values = {
        "experiment_id": plan.experiment_id,
        "status": "completed" if complete else _status(records),
        "error": None if complete else _error(records),
        "started_at": first.started_at,
        "lem_version": first.lem_version,
        "hostname": first.hostname,
        "processes": len(records),
        "cycles_planned": 1,
        "cycles_completed": int(complete),
        "resumed": 0,
        "requests_planned": plan.prompts.count,
        "requests_completed": len(requests),
        "input_tokens": sum(r.input_tokens for r in requests),
        "output_tokens": sum(r.output_tokens for r in requests),
        **_configured(plan, records),
        **_loaded(first),
        **summary("latency", (r.latency_s for r in requests)),
        **of_tokens(requests),
        **_timed_and_metered(records, owner),
        **_prefill(records),
        **_flops(records),
        **_memory(records),
    }
    values |= under_load(requests, values["duration_s"], plan.experiment.traffic)
    values |= quotients(values, complete)
    values["warnings"] = []
    row = made(ExperimentRow, LEFT_OUT | values)
    row.warnings.extend(_warnings(row, records, notes))
    return row


def _error(records: Sequence[ProcessRecord]) -> str | None:
    """Return what went wrong; where one process failed, the others were stopped for its sake."""
    told = sorted((r for r in records if r.error), key=lambda r: r.status != "failed")
    return next((r.error.message for r in told if r.error), None)


def _status(records: Sequence[ProcessRecord]) -> Status:
    return "failed" if any(r.status == "failed" for r in records) else "interrupted"


def _configured(plan: Plan, records: Sequence[ProcessRecord]) -> dict[str, Any]:
    wanted = plan.experiment
    return {
        "model": wanted.model or "",
        # More than one only where the user allowed that.
        "backend": _joined(r.backend for r in records if r.backend) or wanted.backend.name,
        "dataset": wanted.dataset.name,
        "prompts_sha256": plan.prompts.sha256,
        "decoder": wanted.decoder.name,
        "batching_strategy": wanted.batching.strategy,
        "batch_size": wanted.batching.batch_size,
        "max_output_tokens": wanted.max_output_tokens,
        "seed": wanted.seed,
    }


_peak = cache(peak_flops_per_s)


def _loaded(record: ProcessRecord) -> dict[str, Any]:
    model, engine, warmup, environment = record.model, record.engine, record.warmup, record.environment
    peak = None
    if engine and model and model.dtype and engine.device.startswith("cuda"):
        # The dtype counts, not the quantized weights.
        peak = _peak(engine.device_name, model.dtype)
    gpus = len({state.uuid for state in environment.devices_before}) if environment else 0
    return {
        "random_weights": model.random_weights if model else None,
        "parameters": model.parameters if model else None,
        "dtype": model.dtype if model else None,
        "quantization": model.quantization if model else None,
        "adapter": model.adapter if model else None,
        "weights_bytes": model.weights_bytes if model else None,
        "engine_version": engine.version if engine else None,
        "device": engine.device_name if engine else None,
        "peak_flops_per_s": peak.flops_per_s * max(gpus, 1) if peak else None,
        "peak_flops_source": peak.source if peak else None,
        "warmup_prompts": warmup.prompts if warmup else None,
        "warmup_ended": warmup.ended if warmup else None,
        "warmup_cv": warmup.cv if warmup else None,
    }


def _timed_and_metered(records: Sequence[ProcessRecord], owner: ProcessRecord | None) -> dict[str, Any]:
    """Return durations and energies: the owner's, for phases begin and end together; none is metered twice."""
    phases: dict[str, Phase] = {phase.name: phase for phase in owner.phases} if owner else _longest(records)
    durations_s = {name: phase.duration_s for name, phase in phases.items()}
    energies_j = {name: _energy_j(phase.energy) for name, phase in phases.items()} if owner else {}
    readings = phases["measured"].energy if owner and "measured" in phases else ()
    head = headline(readings)
    carbon = owner.carbon if owner and head.energy_j is not None else None
    ticks_s = [r.resolution_s for r in readings if r.source == "counter" and r.resolution_s]
    row: dict[str, Any] = {
        "duration_s": durations_s.get("measured"),
        "load_duration_s": durations_s.get("load"),
        "warmup_duration_s": durations_s.get("warmup"),
        "energy_j": head.energy_j,
        "energy_source": head.source,
        "energy_scope": head.scope,
        "energy_components": head.components,
        "load_energy_j": energies_j.get("load"),
        "warmup_energy_j": energies_j.get("warmup"),
        "idle_power_before_w": _ratio(energies_j.get("idle_before"), durations_s.get("idle_before")),
        "idle_power_loaded_w": _ratio(energies_j.get("idle_loaded"), durations_s.get("idle_loaded")),
        "trace_energy_j": _total([r.trace_energy_j for r in readings if r.component == "gpu"]),
        "counter_tick_s": max(ticks_s, default=None),
        "carbon_intensity_g_per_kwh": carbon.intensity_g_per_kwh if carbon else None,
        "carbon_intensity_source": carbon.source if carbon else None,
    }
    for component in COMPONENTS:
        energy = of_component(readings, component)
        row[f"{component}_energy_j"], row[f"{component}_energy_source"] = energy.energy_j, energy.source
    return row


def _longest(records: Sequence[ProcessRecord]) -> dict[str, Phase]:
    """Return the longest phase of each name, where there is no record of the owner."""
    longest: dict[str, Phase] = {}
    for phase in (phase for record in records for phase in record.phases):
        if phase.name not in longest or phase.duration_s > longest[phase.name].duration_s:
            longest[phase.name] = phase
    return longest


def _prefill(records: Sequence[ProcessRecord]) -> dict[str, Any]:
    """Return the prefill's share of the window: of several processes the mean, whose energy cannot be told apart."""
    known = [r.prefill for r in records if r.requests_completed]
    parts = [part for part in known if part is not None]
    duration_s = sum(p.duration_s for p in parts) / len(parts) if parts and len(parts) == len(known) else None
    alone = parts[0] if len(known) == len(parts) == 1 else None
    return {
        "prefill_duration_s": duration_s,
        "prefill_energy_j": alone.energy_j if alone else None,
        "prefill_energy_uncertainty_j": alone.uncertainty_j if alone else None,
    }


def _flops(records: Sequence[ProcessRecord]) -> dict[str, Any]:
    parts = [r.flops for r in records if r.flops]
    known = len(parts) == len(records)
    return {
        "flops": sum(part.total for part in parts) if known else None,
        "flops_method": parts[0].method if known else None,
    }


def _memory(records: Sequence[ProcessRecord]) -> dict[str, Any]:
    known = [r.memory for r in records if r.memory]
    peak = max((m for m in known if m.peak_bytes is not None), key=lambda m: m.peak_bytes or 0, default=None)
    return {
        "peak_memory_bytes": peak.peak_bytes if peak else None,
        "peak_memory_scope": peak.scope if peak else None,
        "kv_cache_bytes": max((m.kv_cache_bytes for m in known if m.kv_cache_bytes), default=None),
    }


# ------------------------------------------------------------------ what follows from other columns
def quotients(of: dict[str, Any], complete: bool) -> dict[str, Any]:
    """Return the columns that follow from others.

    What a broken-off run took is kept, but it belongs to no number of tokens: rates are null there.
    """
    energy_j, duration_s, tokens, requests = (
        of[name] for name in ("energy_j", "duration_s", "output_tokens", "requests_completed")
    )
    whole_j, whole_s = (energy_j, duration_s) if complete else (None, None)
    flops_per_s = _ratio(of["flops"], whole_s)
    return {
        "output_tokens_per_s": _ratio(tokens, whole_s),
        "requests_per_s": _ratio(requests, whole_s),
        "energy_wh": _ratio(energy_j, J_PER_WH),
        "average_power_w": _ratio(energy_j, duration_s),
        "energy_per_output_token_j": _ratio(whole_j, tokens),
        "energy_per_request_j": _ratio(whole_j, requests),
        "energy_idle_adjusted_j": _difference(energy_j, _product(of["idle_power_loaded_w"], duration_s)),
        "co2e_g": _product(_ratio(energy_j, J_PER_KWH), of["carbon_intensity_g_per_kwh"]),
        "decode_duration_s": _difference(duration_s, of["prefill_duration_s"]),
        "decode_energy_j": _difference(energy_j, of["prefill_energy_j"]),
        "flops_per_token": _ratio(of["flops"], of["input_tokens"] + tokens),
        "flops_per_s": flops_per_s,
        "mfu": _ratio(flops_per_s, of["peak_flops_per_s"]),
    }


def _product(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


def _total(values: Sequence[float | None]) -> float | None:
    """Return the sum, or None where there is nothing or where anything is not known."""
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


# ------------------------------------------------------------------ warnings
# A number that stands by itself: not the end of a device's name or id.
_NUMBER = re.compile(r"(?<![\w-])\d[\d.]*(e[+-]?\d+)?")
_AND_MORE = re.compile(r" \(and \d+ more \w+\)$")


def _told(note: Note) -> str:
    return f"{note.code}: {note.text}"


def _warnings(row: ExperimentRow, records: Sequence[ProcessRecord], notes: Sequence[Note]) -> list[str]:
    """Return what is to be doubted about a cycle, each once, as `code: sentence`."""
    of_processes = once_each([[_told(note) for note in record.warnings] for record in records], "process")
    return list(dict.fromkeys([*of_processes, *map(_told, notes), *map(_told, doubts.of_row(row, records))]))


def once_each(groups: Sequence[Sequence[str]], what: str) -> list[str]:
    """Return the warnings of several groups, once where they differ in their numbers only.

    Args:
        groups: warnings of the attempts, the processes or the cycles.
        what: what a group is of, such as cycle.
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


# ------------------------------------------------------------------ cycles
# The quantities whose spread over the cycles has columns of its own: the columns' stem, and their unit's suffix.
SPREADS = {
    "energy_j": ("energy", "_j"),
    "output_tokens_per_s": ("output_tokens_per_s", ""),
    "latency_mean_s": ("latency_mean", "_s"),
    "energy_per_output_token_j": ("energy_per_output_token", "_j"),
}
# Of these the largest counts.
MAXIMA = ("peak_memory_bytes", "kv_cache_bytes")
# What says how a number was had: where cycles differ in it, all of it is said.
LABELS = re.compile(r".*_(source|scope|components|method)")


def _columns_of(*types: type) -> list[str]:
    hints = get_type_hints(ExperimentRow)
    return [name for name, hint in hints.items() if set(types) & {hint, *get_args(hint)}]


# Every number is averaged over the cycles, so that no column can be forgotten; what is the same in all stays so.
MEANS = [name for name in _columns_of(int, float) if name not in MAXIMA]
_WHOLE = _columns_of(int)
_TOLD = [name for name in _columns_of(str) if LABELS.fullmatch(name)]
_COLUMNS = frozenset(f.name for f in fields(ExperimentRow))
_SHARED = [f.name for f in fields(CycleRow) if f.name in _COLUMNS]
_shared = itemgetter(*_SHARED)
# What is the experiment's, not a cycle's.
LEFT_OUT: dict[str, Any] = {f.name: None for f in fields(ExperimentRow) if f.default is None}
LEFT_OUT |= {"overrides": [], "config_json": ""}


def over_cycles(rows: Sequence[ExperimentRow], plan: Plan, resumed: int = 0) -> ExperimentRow:
    """Return an experiment's row from those of its cycles: means over the finished ones, and their spread.

    Args:
        rows: those of the cycles that have any record, in order.
        plan: what was to be run.
        resumed: how often it was resumed.
    """
    finished = [row for row in rows if row.status == "completed"]
    values = dict(vars((finished or rows)[0]))
    if len(finished) > 1:
        values |= _averaged(finished)
    complete = len(finished) == plan.experiment.cycles
    values |= {
        "status": "completed" if complete else _worst(rows),
        "error": None if complete else next((row.error for row in rows if row.error), None),
        "started_at": rows[0].started_at,
        "cycles_planned": plan.experiment.cycles,
        "cycles_completed": len(finished),
        "resumed": resumed,
        "overrides": list(plan.overrides),
        "config_json": to_compact_json(plan.experiment),
        "warnings": once_each([row.warnings for row in rows], "cycle"),
    }
    row = made(ExperimentRow, values)
    row.warnings.extend(map(_told, doubts.of_experiment(row)))
    return row


def _worst(rows: Sequence[ExperimentRow]) -> Status:
    return "failed" if any(row.status == "failed" for row in rows) else "interrupted"


def _averaged(rows: Sequence[ExperimentRow]) -> dict[str, Any]:
    """Return what several cycles give: means, quotients of the means, and the spread of the cycles' own values."""
    means = {name: _mean([getattr(row, name) for row in rows]) for name in MEANS}
    largest = {name: max((v for row in rows if (v := getattr(row, name)) is not None), default=None) for name in MAXIMA}
    told = {name: _joined(v for row in rows if (v := getattr(row, name))) or None for name in _TOLD}
    values = means | quotients(means, True) | largest | told | _spreads(rows)
    return values | {name: None if values[name] is None else round(values[name]) for name in _WHOLE}


def _mean(values: Sequence[float | None]) -> float | None:
    if all(value == values[0] for value in values):
        return values[0]
    total = _total(values)
    return None if total is None else total / len(values)


def _spreads(rows: Sequence[ExperimentRow]) -> dict[str, Any]:
    spreads: dict[str, Any] = {}
    for name, (stem, unit) in SPREADS.items():
        values = [getattr(row, name) for row in rows]
        if None not in values:
            found = summarise(values)
            spreads |= {
                f"{stem}_{part}{unit}": getattr(found, part) for part in ("mean", "sd", "ci95_low", "ci95_high")
            }
            spreads[f"{stem}_cv"] = found.cv
    return {name: value for name, value in spreads.items() if name in _COLUMNS}


def short(row: ExperimentRow, cycle: int, attempts: int) -> CycleRow:
    """Return a cycle's row for the table of cycles, from what `cycle_row` gave."""
    values = dict(zip(_SHARED, _shared(vars(row)), strict=True))
    values["cycle"], values["attempts"] = cycle, attempts
    return made(CycleRow, values)
