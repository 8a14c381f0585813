"""Computes rows from the processes' records, merging ranks, for many experiments at once.

Throughput is output tokens divided by the window's wall-clock time. Rows are computed column by column, which for
thousands of cycles takes a fraction of the time that computing row by row would take. This module works only on
records; it knows nothing about files or about how anything was measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from operator import attrgetter
from types import MappingProxyType
from typing import Any, NamedTuple

from lem import warning_codes
from lem.record import (
    ENERGY_OWNER,
    CodedWarning,
    Component,
    EngineInfo,
    Environment,
    ModelInfo,
    Phase,
    ProcessRecord,
    RequestRecord,
    Status,
)
from lem.results.codec import PlanExcerpt
from lem.results.columns import REPEATED_MOST_SHARE, Columns, of_each, quotients, ratios, where
from lem.results.cycles import experiment_columns
from lem.results.latency import extent, of_tokens, sample_counts, samples, summaries, under_load
from lem.results.merging import UNMETERED, as_text, by_component, energy_j, headline, joined, once_each, total
from lem.results.parquet import defaults
from lem.results.peaks import Peak, arithmetic_dtype, peak_flops_per_s
from lem.results.schema import CycleRow, ExperimentRow, Measures
from lem.results.steady import Steady, places, steady_state
from lem.spec.schedule import ScheduleRun

# The reason why the prefill energy is null if several processes run.
SEVERAL = "several processes share the meter"
COMPONENTS: tuple[Component, ...] = ("gpu", "cpu", "dram")
# Columns that depend on how long requests waited in the queue.
QUEUED = re.compile(r"(latency|ttft|queue)_(.*_s|samples)|goodput_.*|idle_share")


@dataclass(frozen=True)
class Rows:
    """An experiment's rows, for the three tables."""

    row: ExperimentRow
    cycles: list[CycleRow]
    requests: list[RequestRecord]


class Cycle(NamedTuple):
    """The measurements of one cycle, over all processes and attempts.

    `records` has one record per process, ordered by rank, with the process's attempts merged; `requests` has the rows
    of all processes; `warnings` are the warnings that no record contains. `opened_s` maps each attempt with a window to
    the time at which the window opened, on the clock of the cycle's arrivals. The time is None if it is unknown. If
    only one process ran, in only one attempt, `opened_s` is empty.
    """

    plan: PlanExcerpt
    number: int
    attempts: int
    records: Sequence[ProcessRecord]
    requests: Sequence[RequestRecord]
    warnings: Sequence[CodedWarning] = ()
    opened_s: Mapping[int, float | None] = MappingProxyType({})

    @property
    def has_arrivals(self) -> bool:
        """Whether requests arrive over time, so that they may have to wait for their turn."""
        return self.plan.experiment.traffic.pattern != "closed"

    @property
    def has_lost_its_queue(self) -> bool:
        """Whether an interruption may have changed how long requests waited in the queue."""
        if len(self.opened_s) < 2 or not self.has_arrivals:  # never resumed, or without a queue
            return False
        repeated = any(record.cut is not None and record.cut.under_way.requests for record in self.records)
        return repeated or None in self.opened_s.values()


class Measured(NamedTuple):
    """The measurements of an experiment: the cycles that have a record, in order."""

    plan: PlanExcerpt
    cycles: Sequence[Cycle]
    resumed: int


@dataclass(frozen=True)
class Tabulated:
    """The rows of several experiments, for the three tables."""

    experiments: Columns
    cycles: Columns
    requests: list[RequestRecord]


def tabulate(measured: Sequence[Measured]) -> Tabulated:
    """Return the rows of several experiments."""
    cycles = [cycle for one in measured for cycle in one.cycles]
    of_cycles = cycle_columns(cycles)
    short = {name: of_cycles[name] for name in Measures.__struct_fields__}
    short["cycle"] = [cycle.number for cycle in cycles]
    short["attempts"] = [cycle.attempts for cycle in cycles]
    experiments = experiment_columns(
        [len(one.cycles) for one in measured],
        [one.plan.experiment.cycles for one in measured],
        [one.resumed for one in measured],
        of_cycles,
    )
    return Tabulated(experiments, short, [request for cycle in cycles for request in cycle.requests])


def rows_of(measured: Measured) -> Rows:
    """Return the rows of one experiment."""
    found = tabulate([measured])
    (row,) = as_rows(ExperimentRow, found.experiments)
    return Rows(row, as_rows(CycleRow, found.cycles), found.requests)


def as_rows(row_type: type[Any], columns: Columns) -> list[Any]:
    """Turn columns into rows."""
    names = row_type.__struct_fields__
    rows = zip(*(columns[name] for name in names), strict=True)
    return [row_type(**dict(zip(names, values, strict=True))) for values in rows]


# ------------------------------------------------------------------ cycles
# Columns that only some cycles fill, such as the columns for streaming; they are None in the other cycles.
_OPTIONAL = [name for name, value in defaults(ExperimentRow).items() if value is None]
_peak = cache(peak_flops_per_s)


def cycle_columns(cycles: Sequence[Cycle]) -> Columns:
    """Return all columns, with a value for each cycle, as if each cycle were an experiment with a single cycle."""
    records = [cycle.records for cycle in cycles]
    first = [of_cycle[0] for of_cycle in records]
    requests = [[r for r in cycle.requests if r.error is None] for cycle in cycles]
    complete = [bool(of_cycle) and _has_all(cycle) for of_cycle, cycle in zip(requests, cycles, strict=True)]
    columns: Columns = {name: [None] * len(cycles) for name in _OPTIONAL}
    columns |= {
        "status": ["completed" if done else _status(r) for done, r in zip(complete, records, strict=True)],
        "error": [None if done else _error(r) for done, r in zip(complete, records, strict=True)],
        "started_at": of_each(first, "started_at"),
        "lem_version": of_each(first, "lem_version"),
        "hostname": of_each(first, "hostname"),
        "slurm_job_id": of_each(first, "slurm_job_id"),
        "slurm_node": of_each(first, "slurm_node"),
        "processes": list(map(len, records)),
        "cycles_planned": [1] * len(cycles),
        "cycles_completed": list(map(int, complete)),
        "resumed": [0] * len(cycles),
        "requests_completed": list(map(len, requests)),
        "requests_failed": [len(c.requests) - len(rows) for c, rows in zip(cycles, requests, strict=True)],
        "input_tokens": [sum([r.input_tokens for r in rows]) for rows in requests],
        "output_tokens": [sum([r.output_tokens or 0 for r in rows]) for rows in requests],
    }
    columns |= _configured(cycles)
    columns |= _loaded(first)
    columns |= _timed_and_metered(records)
    columns |= _prefill(records) | _flops(records) | _memory(records)
    columns |= summaries("latency", [[r.latency_s for r in rows if r.latency_s is not None] for rows in requests])
    counts = list(map(sample_counts, requests))
    columns |= samples(counts)
    columns |= _repeated(records, columns["duration_s"])
    columns |= _streamed_and_queued(cycles, columns["duration_s"])
    columns |= _steady(cycles, complete, columns["energy_j"])
    columns |= quotients(columns, complete)
    _withhold(columns, cycles, complete)
    columns["warnings"] = _warnings(columns, cycles, requests, counts)
    return columns


def _has_all(cycle: Cycle) -> bool:
    """Return whether every request has finished or failed."""
    return len({r.request for r in cycle.requests}) == cycle.plan.prompts.count


def _error(records: Sequence[ProcessRecord]) -> str | None:
    """Return the error message, preferably from a failed process, because its failure stopped the others."""
    failed_first = sorted((r for r in records if r.error), key=lambda r: r.status != "failed")
    return next((r.error.message for r in failed_first if r.error), None)


def _status(records: Sequence[ProcessRecord]) -> Status:
    return "failed" if any(r.status == "failed" for r in records) else "interrupted"


def _configured(cycles: Sequence[Cycle]) -> Columns:
    plans = [cycle.plan for cycle in cycles]
    wanted, places = [plan.experiment for plan in plans], [plan.campaign for plan in plans]
    runs = [plan.schedule for plan in plans]
    return {
        "experiment_id": of_each(plans, "experiment_id"),
        "requests_planned": of_each(plans, "prompts.count"),
        "prompts_sha256": of_each(plans, "prompts.sha256"),
        "prompts_read": [plan.prompts.available + plan.prompts.dropped_empty for plan in plans],
        "prompts_empty": of_each(plans, "prompts.dropped_empty"),
        "prompts_cut": [len({r.request for r in cycle.requests if r.input_truncated}) for cycle in cycles],
        "config_json": of_each(plans, "config_json"),
        "overrides": of_each(plans, "overrides"),
        "model": [each.model or "" for each in wanted],
        "backend": [_backend(cycle) for cycle in cycles],
        "dataset": of_each(wanted, "dataset.name"),
        "decoder": of_each(wanted, "decoder.name"),
        "batching_strategy": of_each(wanted, "batching.strategy"),
        "batch_size": of_each(wanted, "batching.batch_size"),
        "max_output_tokens": of_each(wanted, "max_output_tokens"),
        "seed": of_each(wanted, "seed"),
        "campaign": of_each(places, "name"),
        "campaign_arm": of_each(places, "arm"),
        "campaign_cycle": of_each(places, "cycle"),
        "campaign_position": of_each(places, "position"),
        "schedule": of_each(runs, "schedule"),
        "schedule_run": of_each(runs, "number"),
        "schedule_planned_at": of_each(runs, "planned_at"),
        "schedule_started_at": of_each(runs, "started_at"),
        "schedule_late_s": [None if run is None else _late_s(run) for run in runs],
    }


def _late_s(run: ScheduleRun) -> float:
    """Return how long after its planned time a run of a schedule started."""
    planned, started = (datetime.fromisoformat(text) for text in (run.planned_at, run.started_at))
    return (started - planned).total_seconds()


def _backend(cycle: Cycle) -> str:
    """Return the name of the backend that ran; if the processes ran on different backends, all names, joined."""
    return joined(r.backend for r in cycle.records if r.backend) or cycle.plan.experiment.backend.name


def _loaded(records: Sequence[ProcessRecord]) -> Columns:
    models, engines = of_each(records, "model"), of_each(records, "engine")
    warmups, environments = of_each(records, "warmup"), of_each(records, "environment")
    peaks = list(map(_peak_of, engines, models, environments))
    gpus = [len({state.uuid for state in each.devices_before}) if each else 0 for each in environments]
    of_model = ("random_weights", "parameters", "dtype", "quantization", "adapter", "weights_bytes")
    return {
        **{name: of_each(models, name) for name in of_model},
        "engine_version": of_each(engines, "version"),
        "device": of_each(engines, "device_name"),
        "peak_flops_per_s": [p.flops_per_s * max(n, 1) if p else None for p, n in zip(peaks, gpus, strict=True)],
        "peak_flops_source": of_each(peaks, "source"),
        "warmup_prompts": of_each(warmups, "prompts"),
        "warmup_ended": of_each(warmups, "ended"),
        "warmup_cv": of_each(warmups, "cv"),
    }


def _peak_of(engine: EngineInfo | None, model: ModelInfo | None, environment: Environment | None) -> Peak | None:
    """Return a GPU's peak for the arithmetic's dtype; None if it is unknown or only part of the GPU was used."""
    if engine is None or model is None or not engine.device.startswith("cuda"):
        return None
    if environment is not None and any(state.mig for state in environment.devices_before):
        return None
    dtype = model.arithmetic or arithmetic_dtype(model.dtype, model.quantization)
    return None if dtype is None else _peak(engine.device_name, dtype)


def _timed_and_metered(records: Sequence[Sequence[ProcessRecord]]) -> Columns:
    """Return the metering process's durations and energies; all processes begin and end their phases together."""
    owners = [of_cycle[0] if of_cycle[0].rank == ENERGY_OWNER else None for of_cycle in records]
    phases: list[Mapping[str, Phase]] = [
        _longest(of_cycle) if owner is None else {phase.name: phase for phase in owner.phases}
        for owner, of_cycle in zip(owners, records, strict=True)
    ]
    metered = [of_cycle if owner else {} for owner, of_cycle in zip(owners, phases, strict=True)]
    readings = [of_cycle["measured"].usable() if "measured" in of_cycle else () for of_cycle in metered]
    heads = list(map(headline, readings))
    carbons = [
        owner.carbon if owner and head.energy_j is not None else None for owner, head in zip(owners, heads, strict=True)
    ]
    columns = {
        "duration_s": _durations_s(phases, "measured"),
        "load_duration_s": _durations_s(phases, "load"),
        "warmup_duration_s": _durations_s(phases, "warmup"),
        "energy_j": of_each(heads, "energy_j"),
        "energy_source": of_each(heads, "source"),
        "energy_scope": of_each(heads, "scope"),
        "energy_components": of_each(heads, "components"),
        "energy_without_gpu": [_lacks_gpu(of_cycle) for of_cycle in records],
        "load_energy_j": _energies_j(metered, "load"),
        "warmup_energy_j": _energies_j(metered, "warmup"),
        "idle_power_before_w": ratios(_energies_j(metered, "idle_before"), _durations_s(phases, "idle_before")),
        "idle_power_loaded_w": ratios(_energies_j(metered, "idle_loaded"), _durations_s(phases, "idle_loaded")),
        "trace_energy_j": [total([r.trace_energy_j for r in each if r.component == "gpu"]) for each in readings],
        "counter_tick_s": [
            max([r.resolution_s for r in each if r.source == "counter" and r.resolution_s], default=None)
            for each in readings
        ],
        "carbon_intensity_g_per_kwh": of_each(carbons, "intensity_g_per_kwh"),
        "carbon_intensity_source": of_each(carbons, "source"),
        "carbon_trace_sha256": of_each(carbons, "trace_sha256"),
    }
    of_components = list(map(by_component, readings))
    for component in COMPONENTS:
        energies = [each.get(component, UNMETERED) for each in of_components]
        columns[f"{component}_energy_j"] = of_each(energies, "energy_j")
        columns[f"{component}_energy_source"] = of_each(energies, "source")
    return columns


def _lacks_gpu(records: Sequence[ProcessRecord]) -> bool | None:
    """Return whether a GPU ran the model but its energy was not metered; None if nothing was metered."""
    window = records[0].phase("measured")
    return warning_codes.lacks_gpu(records[0]) if window and window.energy else None


def _durations_s(phases: Sequence[Mapping[str, Phase]], name: str) -> list[float | None]:
    return [each[name].duration_s if name in each else None for each in phases]


def _energies_j(phases: Sequence[Mapping[str, Phase]], name: str) -> list[float | None]:
    return [energy_j(each[name].usable()) if name in each else None for each in phases]


def _longest(records: Sequence[ProcessRecord]) -> dict[str, Phase]:
    """Return the longest phase of each name among all processes; needed if the metering process has no record."""
    longest: dict[str, Phase] = {}
    for phase in (phase for record in records for phase in record.phases):
        if phase.name not in longest or phase.duration_s > longest[phase.name].duration_s:
            longest[phase.name] = phase
    return longest


def _prefill(records: Sequence[Sequence[ProcessRecord]]) -> Columns:
    """Return the prefill's time and energy; with several processes, their mean time and no energy."""
    known = [[r.prefill for r in of_cycle if r.requests_completed] for of_cycle in records]
    parts = [[part for part in each if part is not None] for each in known]
    alone = [each[0] if len(each) == len(of) == 1 else None for each, of in zip(parts, known, strict=True)]
    durations_s = [
        total([p.duration_s for p in each]) if len(each) == len(of) else None
        for each, of in zip(parts, known, strict=True)
    ]
    return {
        "prefill_duration_s": [
            None if seconds is None else seconds / len(each) for seconds, each in zip(durations_s, parts, strict=True)
        ],
        "prefill_energy_j": of_each(alone, "energy_j"),
        "prefill_energy_uncertainty_j": of_each(alone, "uncertainty_j"),
        "prefill_reason": [
            SEVERAL if len(of) > 1 and part is None and each else joined(p.reason for p in each if p.reason) or None
            for part, each, of in zip(alone, parts, known, strict=True)
        ],
    }


def _flops(records: Sequence[Sequence[ProcessRecord]]) -> Columns:
    parts = [[r.flops for r in of_cycle if r.flops] for of_cycle in records]
    known = [each if len(each) == len(of) else [] for each, of in zip(parts, records, strict=True)]
    return {
        "flops": [sum([part.total for part in each]) if each else None for each in known],
        "flops_method": [each[0].method if each else None for each in known],
    }


def _memory(records: Sequence[Sequence[ProcessRecord]]) -> Columns:
    known = [[r.memory for r in of_cycle if r.memory] for of_cycle in records]
    peaks = [
        max([m for m in each if m.peak_bytes is not None], key=attrgetter("peak_bytes"), default=None) for each in known
    ]
    return {
        "peak_memory_bytes": of_each(peaks, "peak_bytes"),
        "peak_memory_scope": of_each(peaks, "scope"),
        "kv_cache_bytes": [max([m.kv_cache_bytes for m in each if m.kv_cache_bytes], default=None) for each in known],
    }


def _repeated(records: Sequence[Sequence[ProcessRecord]], durations_s: Sequence[float | None]) -> Columns:
    """Return the share of the windows' time that may have gone into requests that had to be run again."""
    longest_s = [max([r.cut.under_way.longest_s for r in of_cycle if r.cut], default=0.0) for of_cycle in records]
    return {"repeated_share": ratios(longest_s, durations_s)}


def _streamed_and_queued(cycles: Sequence[Cycle], durations_s: Sequence[float | None]) -> Columns:
    """Return the columns that have values only if tokens were timed or requests arrived over time."""
    found = [
        of_tokens(cycle.requests)
        | under_load(cycle.requests, duration_s, cycle.plan.experiment.traffic, cycle.opened_s)
        for cycle, duration_s in zip(cycles, durations_s, strict=True)
    ]
    return {name: [each.get(name) for each in found] for name in dict.fromkeys(name for each in found for name in each)}


def _steady(cycles: Sequence[Cycle], complete: Sequence[bool], energies_j: Sequence[float | None]) -> Columns:
    """Return the metrics of the steady state, for cycles that were finished in one attempt."""
    found = [
        _steady_state(cycle, is_metered=energy_j is not None) if done and cycle.attempts == 1 else None
        for cycle, done, energy_j in zip(cycles, complete, energies_j, strict=True)
    ]
    return {f"steady_{name}": of_each(found, name) for name in ("duration_s", "output_tokens", "energy_j")}


def _steady_state(cycle: Cycle, *, is_metered: bool) -> Steady | None:
    experiment, owner = cycle.plan.experiment, cycle.records[0]
    traffic = experiment.traffic
    taken = places(
        experiment.batching.strategy,
        experiment.batching.batch_size,
        traffic.pattern,
        None if traffic.concurrency is None else traffic.concurrency // max(len({r.rank for r in cycle.requests}), 1),
        by_client=experiment.backend.name == "openai",
    )
    if taken is None or any(r.error for r in cycle.requests):
        return None
    energy = owner.energy_so_far if owner.rank == ENERGY_OWNER and is_metered else ()
    return steady_state(cycle.requests, taken, energy, ends_at_readings=len(energy) > 0)


def _withhold(columns: Columns, cycles: Sequence[Cycle], complete: Sequence[bool]) -> None:
    """Set to null the values that an interruption makes wrong: any that depend on the queue or on the whole cycle."""
    keeps_queue = [not cycle.has_lost_its_queue for cycle in cycles]
    for name in () if all(keeps_queue) else filter(QUEUED.fullmatch, columns):
        columns[name] = where(keeps_queue, columns[name])
    is_once = [(share or 0.0) <= REPEATED_MOST_SHARE for share in columns["repeated_share"]]
    shown = [done and once for done, once in zip(complete, is_once, strict=True)]
    for name in ("arrival_rate_per_s", "goodput_requests_per_s"):
        columns[name] = where(shown, columns[name])
    # In an interrupted cycle, some requests arrived but have no row.
    has_all = [done or not cycle.has_arrivals for done, cycle in zip(complete, cycles, strict=True)]
    for name in ("idle_share", "decode_duration_s", "decode_energy_j"):
        columns[name] = where(has_all, columns[name])


def _warnings(
    columns: Columns,
    cycles: Sequence[Cycle],
    finished: Sequence[Sequence[RequestRecord]],
    counts: Sequence[Mapping[str, int]],
) -> list[list[str]]:
    """Return the warnings of each cycle, without duplicates, as `code: message`."""
    found = []
    of_rows = warning_codes.of_rows(columns, [cycle.records for cycle in cycles])
    parts = zip(cycles, finished, counts, of_rows, columns["duration_s"], strict=True)
    for cycle, done, of_samples, coded, duration_s in parts:
        if cycle.has_lost_its_queue:
            coded.append(warning_codes.warning("queue_lost", _why_queue_is_lost(cycle)))
        of_processes = once_each([list(map(as_text, record.warnings)) for record in cycle.records], "process")
        if len(done) < len(cycle.requests):
            coded += warning_codes.of_failures(cycle.requests)
        coded += warning_codes.of_samples(of_samples)
        if duration_s is not None and cycle.requests:
            coded += _of_times(cycle.requests, duration_s)
        coded += warning_codes.of_timed_tokens(done)
        texts = [*of_processes, *map(as_text, cycle.warnings), *map(as_text, coded)]
        found.append(list(dict.fromkeys(texts)))
    return found


def _of_times(requests: Sequence[RequestRecord], duration_s: float) -> Iterator[CodedWarning]:
    """Return the warnings about requests whose own times are inconsistent with the window's length."""
    filled = not any(map(attrgetter("arrived_s"), requests))  # without traffic, all arrive when the window opens
    return warning_codes.of_times(duration_s, *extent(requests), filled=filled)


def _why_queue_is_lost(cycle: Cycle) -> str:
    if None in cycle.opened_s.values():
        return "an attempt after an interruption began with an empty queue."
    return "requests that were in flight at an interruption waited again and were run again."
