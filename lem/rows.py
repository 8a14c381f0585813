"""From the records of processes to rows: ranks put together, cycles averaged, of many experiments at once.

Throughput is output tokens over the wall-clock window. What is a quotient of two columns is formed in one place for
cycles and experiments, so that J = W·t, J/token = W/(tokens/s) and their like hold in every row.

Rows are made column by column: a column of thousands of cycles takes a fraction of the time that thousands of rows take
to be put together value by value. Knows records only: no file, and not how anything was measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple, get_args, get_type_hints

from lem import doubts
from lem.brief import BriefPlan, whole
from lem.headline import UNMETERED, by_component, energy_j, headline, joined
from lem.latency import of_tokens, summaries, under_load
from lem.merging import once_each, told, total
from lem.peaks import peak_flops_per_s
from lem.record import (
    ENERGY_OWNER,
    Component,
    CycleRow,
    ExperimentRow,
    Note,
    Phase,
    ProcessRecord,
    RequestRecord,
    Status,
    made,
)
from lem.statistics import summarise
from lem.units import J_PER_KWH, J_PER_WH

COMPONENTS: tuple[Component, ...] = ("gpu", "cpu", "dram")

# Columns by name; all of the same length.
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Rows:
    """An experiment's rows, for the three tables."""

    row: ExperimentRow
    cycles: list[CycleRow]
    requests: list[RequestRecord]


class Cycle(NamedTuple):
    """What one cycle measured, over all processes and attempts.

    `records` holds one for each process, at least one, by rank, each with its attempts merged; `requests` the rows of
    all of them; `notes` what else there is to doubt.
    """

    plan: BriefPlan
    number: int
    attempts: int
    records: Sequence[ProcessRecord]
    requests: Sequence[RequestRecord]
    notes: Sequence[Note] = ()


class Measured(NamedTuple):
    """What an experiment measured: its cycles that have any record, in order."""

    plan: BriefPlan
    cycles: Sequence[Cycle]
    resumed: int


@dataclass(frozen=True)
class Tabulated:
    """The rows of several experiments, for the three tables, by columns."""

    experiments: Columns
    cycles: Columns
    requests: Columns


def tabulate(measured: Sequence[Measured]) -> Tabulated:
    """Return the rows of experiments."""
    cycles = [cycle for one in measured for cycle in one.cycles]
    of_cycles = cycle_columns(cycles)
    short = {name: of_cycles[name] for name in _SHARED}
    short["cycle"] = [cycle.number for cycle in cycles]
    short["attempts"] = [cycle.attempts for cycle in cycles]
    return Tabulated(experiment_columns(measured, of_cycles), short, _request_columns(cycles))


def rows_of(measured: Measured) -> Rows:
    """Return the rows of one experiment."""
    found = tabulate([measured])
    (row,) = as_rows(ExperimentRow, found.experiments)
    return Rows(row, as_rows(CycleRow, found.cycles), [whole(r) for cycle in measured.cycles for r in cycle.requests])


def as_rows(row_type: type[Any], columns: Columns) -> list[Any]:
    """Return columns as rows."""
    names = [f.name for f in fields(row_type)]
    return [
        made(row_type, dict(zip(names, values, strict=True)))
        for values in zip(*(columns[name] for name in names), strict=True)
    ]


def _request_columns(cycles: Sequence[Cycle]) -> Columns:
    requests = [request for cycle in cycles for request in cycle.requests]
    return {f.name: list(map(attrgetter(f.name), requests)) for f in fields(RequestRecord)}


# ------------------------------------------------------------------ cycles
# Columns that only some cycles fill, such as those of streaming; None in the others.
_OPTIONAL = [f.name for f in fields(ExperimentRow) if f.default is None]
_peak = cache(peak_flops_per_s)


def cycle_columns(cycles: Sequence[Cycle]) -> Columns:
    """Return all columns of a row for each cycle, as if each were an experiment."""
    records = [cycle.records for cycle in cycles]
    first = [of_cycle[0] for of_cycle in records]
    requests = [cycle.requests for cycle in cycles]
    complete = [len({r.request for r in c.requests}) == c.plan.prompts.count for c in cycles]
    columns: Columns = {name: [None] * len(cycles) for name in _OPTIONAL}
    columns |= {
        "status": ["completed" if done else _status(r) for done, r in zip(complete, records, strict=True)],
        "error": [None if done else _error(r) for done, r in zip(complete, records, strict=True)],
        "started_at": _each(first, "started_at"),
        "lem_version": _each(first, "lem_version"),
        "hostname": _each(first, "hostname"),
        "processes": list(map(len, records)),
        "cycles_planned": [1] * len(cycles),
        "cycles_completed": list(map(int, complete)),
        "resumed": [0] * len(cycles),
        "requests_completed": list(map(len, requests)),
        "input_tokens": [sum([r.input_tokens for r in rows]) for rows in requests],
        "output_tokens": [sum([r.output_tokens for r in rows]) for rows in requests],
    }
    columns |= _configured(cycles)
    columns |= _loaded(first)
    columns |= _timed_and_metered(records)
    columns |= _prefill(records) | _flops(records) | _memory(records)
    columns |= summaries("latency", [[r.latency_s for r in rows] for rows in requests])
    columns |= _streamed_and_queued(cycles, columns["duration_s"])
    columns |= quotients(columns, complete)
    columns["warnings"] = _warnings(columns, cycles)
    return columns


def _each(objects: Iterable[Any], name: str) -> list[Any]:
    """Return an attribute of each object, None where there is no object."""
    value = attrgetter(name)
    return [None if each is None else value(each) for each in objects]


def _error(records: Sequence[ProcessRecord]) -> str | None:
    """Return what went wrong; where one process failed, the others were stopped for its sake."""
    failed_first = sorted((r for r in records if r.error), key=lambda r: r.status != "failed")
    return next((r.error.message for r in failed_first if r.error), None)


def _status(records: Sequence[ProcessRecord]) -> Status:
    return "failed" if any(r.status == "failed" for r in records) else "interrupted"


def _configured(cycles: Sequence[Cycle]) -> Columns:
    plans = [cycle.plan for cycle in cycles]
    wanted = [plan.experiment for plan in plans]
    return {
        "experiment_id": _each(plans, "experiment_id"),
        "requests_planned": _each(plans, "prompts.count"),
        "prompts_sha256": _each(plans, "prompts.sha256"),
        "config_json": _each(plans, "config_json"),
        "overrides": _each(plans, "overrides"),
        "model": [each.model or "" for each in wanted],
        "backend": [_backend(cycle) for cycle in cycles],
        "dataset": _each(wanted, "dataset.name"),
        "decoder": _each(wanted, "decoder.name"),
        "batching_strategy": _each(wanted, "batching.strategy"),
        "batch_size": _each(wanted, "batching.batch_size"),
        "max_output_tokens": _each(wanted, "max_output_tokens"),
        "seed": _each(wanted, "seed"),
    }


def _backend(cycle: Cycle) -> str:
    """Return the backend that ran; more than one only where the user allowed that."""
    return joined(r.backend for r in cycle.records if r.backend) or cycle.plan.experiment.backend.name


def _loaded(records: Sequence[ProcessRecord]) -> Columns:
    models, engines = _each(records, "model"), _each(records, "engine")
    warmups, environments = _each(records, "warmup"), _each(records, "environment")
    peaks = [
        # The dtype counts, not the quantized weights.
        _peak(engine.device_name, model.dtype)
        if engine and model and model.dtype and engine.device.startswith("cuda")
        else None
        for engine, model in zip(engines, models, strict=True)
    ]
    gpus = [len({state.uuid for state in each.devices_before}) if each else 0 for each in environments]
    of_model = ("random_weights", "parameters", "dtype", "quantization", "adapter", "weights_bytes")
    return {
        **{name: _each(models, name) for name in of_model},
        "engine_version": _each(engines, "version"),
        "device": _each(engines, "device_name"),
        "peak_flops_per_s": [p.flops_per_s * max(n, 1) if p else None for p, n in zip(peaks, gpus, strict=True)],
        "peak_flops_source": _each(peaks, "source"),
        "warmup_prompts": _each(warmups, "prompts"),
        "warmup_ended": _each(warmups, "ended"),
        "warmup_cv": _each(warmups, "cv"),
    }


def _timed_and_metered(records: Sequence[Sequence[ProcessRecord]]) -> Columns:
    """Return durations and energies: the owner's, for phases begin and end together; none is metered twice."""
    owners = [of_cycle[0] if of_cycle[0].rank == ENERGY_OWNER else None for of_cycle in records]
    phases: list[Mapping[str, Phase]] = [
        _longest(of_cycle) if owner is None else {phase.name: phase for phase in owner.phases}
        for owner, of_cycle in zip(owners, records, strict=True)
    ]
    metered = [of_cycle if owner else {} for owner, of_cycle in zip(owners, phases, strict=True)]
    readings = [of_cycle["measured"].energy if "measured" in of_cycle else () for of_cycle in metered]
    heads = list(map(headline, readings))
    carbons = [
        owner.carbon if owner and head.energy_j is not None else None for owner, head in zip(owners, heads, strict=True)
    ]
    columns = {
        "duration_s": _durations_s(phases, "measured"),
        "load_duration_s": _durations_s(phases, "load"),
        "warmup_duration_s": _durations_s(phases, "warmup"),
        "energy_j": _each(heads, "energy_j"),
        "energy_source": _each(heads, "source"),
        "energy_scope": _each(heads, "scope"),
        "energy_components": _each(heads, "components"),
        "load_energy_j": _energies_j(metered, "load"),
        "warmup_energy_j": _energies_j(metered, "warmup"),
        "idle_power_before_w": _ratios(_energies_j(metered, "idle_before"), _durations_s(phases, "idle_before")),
        "idle_power_loaded_w": _ratios(_energies_j(metered, "idle_loaded"), _durations_s(phases, "idle_loaded")),
        "trace_energy_j": [total([r.trace_energy_j for r in each if r.component == "gpu"]) for each in readings],
        "counter_tick_s": [
            max([r.resolution_s for r in each if r.source == "counter" and r.resolution_s], default=None)
            for each in readings
        ],
        "carbon_intensity_g_per_kwh": _each(carbons, "intensity_g_per_kwh"),
        "carbon_intensity_source": _each(carbons, "source"),
    }
    of_components = list(map(by_component, readings))
    for component in COMPONENTS:
        energies = [each.get(component, UNMETERED) for each in of_components]
        columns[f"{component}_energy_j"] = _each(energies, "energy_j")
        columns[f"{component}_energy_source"] = _each(energies, "source")
    return columns


def _durations_s(phases: Sequence[Mapping[str, Phase]], name: str) -> list[float | None]:
    return [each[name].duration_s if name in each else None for each in phases]


def _energies_j(phases: Sequence[Mapping[str, Phase]], name: str) -> list[float | None]:
    return [energy_j(each[name].energy) if name in each else None for each in phases]


def _longest(records: Sequence[ProcessRecord]) -> dict[str, Phase]:
    """Return the longest phase of each name, where there is no record of the owner."""
    longest: dict[str, Phase] = {}
    for phase in (phase for record in records for phase in record.phases):
        if phase.name not in longest or phase.duration_s > longest[phase.name].duration_s:
            longest[phase.name] = phase
    return longest


def _prefill(records: Sequence[Sequence[ProcessRecord]]) -> Columns:
    """Return the prefill's share of the window: of several processes the mean, whose energy cannot be told apart."""
    known = [[r.prefill for r in of_cycle if r.requests_completed] for of_cycle in records]
    parts = [[part for part in each if part is not None] for each in known]
    alone = [each[0] if len(each) == len(of) == 1 else None for each, of in zip(parts, known, strict=True)]
    return {
        "prefill_duration_s": [
            sum([p.duration_s for p in each]) / len(each) if each and len(each) == len(of) else None
            for each, of in zip(parts, known, strict=True)
        ],
        "prefill_energy_j": _each(alone, "energy_j"),
        "prefill_energy_uncertainty_j": _each(alone, "uncertainty_j"),
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
        max([m for m in each if m.peak_bytes is not None], key=lambda m: m.peak_bytes or 0, default=None)
        for each in known
    ]
    return {
        "peak_memory_bytes": _each(peaks, "peak_bytes"),
        "peak_memory_scope": _each(peaks, "scope"),
        "kv_cache_bytes": [max([m.kv_cache_bytes for m in each if m.kv_cache_bytes], default=None) for each in known],
    }


def _streamed_and_queued(cycles: Sequence[Cycle], durations_s: Sequence[float | None]) -> Columns:
    """Return what only streaming, or traffic, tells."""
    found = [
        of_tokens(cycle.requests) | under_load(cycle.requests, duration_s, cycle.plan.experiment.traffic)
        for cycle, duration_s in zip(cycles, durations_s, strict=True)
    ]
    return {name: [each.get(name) for each in found] for name in dict.fromkeys(name for each in found for name in each)}


def _warnings(columns: Columns, cycles: Sequence[Cycle]) -> list[list[str]]:
    """Return what is to be doubted about each cycle, each once, as `code: sentence`."""
    of_rows = doubts.of_rows(columns, [cycle.records for cycle in cycles])
    return [
        list(dict.fromkeys([*_of_processes(cycle.records), *map(told, cycle.notes), *map(told, notes)]))
        for cycle, notes in zip(cycles, of_rows, strict=True)
    ]


def _of_processes(records: Sequence[ProcessRecord]) -> list[str]:
    return once_each([list(map(told, record.warnings)) for record in records], "process")


# ------------------------------------------------------------------ what follows from other columns
def quotients(of: Columns, complete: Sequence[bool]) -> Columns:
    """Return the columns that follow from others.

    What a broken-off run took is kept, but it belongs to no number of tokens: rates are null there.
    """
    energy_j, duration_s, tokens, requests = (
        of[name] for name in ("energy_j", "duration_s", "output_tokens", "requests_completed")
    )
    whole_j = [value if done else None for value, done in zip(energy_j, complete, strict=True)]
    whole_s = [value if done else None for value, done in zip(duration_s, complete, strict=True)]
    all_tokens = [one + other for one, other in zip(of["input_tokens"], tokens, strict=True)]
    flops_per_s = _ratios(of["flops"], whole_s)
    energy_kwh = [None if value is None else value / J_PER_KWH for value in energy_j]
    return {
        "output_tokens_per_s": _ratios(tokens, whole_s),
        "requests_per_s": _ratios(requests, whole_s),
        "energy_wh": [None if value is None else value / J_PER_WH for value in energy_j],
        "average_power_w": _ratios(energy_j, duration_s),
        "energy_per_output_token_j": _ratios(whole_j, tokens),
        "energy_per_request_j": _ratios(whole_j, requests),
        "energy_idle_adjusted_j": _differences(energy_j, _products(of["idle_power_loaded_w"], duration_s)),
        "co2e_g": _products(energy_kwh, of["carbon_intensity_g_per_kwh"]),
        "decode_duration_s": _differences(duration_s, of["prefill_duration_s"]),
        "decode_energy_j": _differences(energy_j, of["prefill_energy_j"]),
        "flops_per_token": _ratios(of["flops"], all_tokens),
        "flops_per_s": flops_per_s,
        "mfu": _ratios(flops_per_s, of["peak_flops_per_s"]),
    }


Values = Sequence[float | None]


def _products(ones: Values, others: Values) -> list[float | None]:
    return [None if a is None or b is None else a * b for a, b in zip(ones, others, strict=True)]


def _differences(ones: Values, others: Values) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(ones, others, strict=True)]


def _ratios(values: Values, by: Values) -> list[float | None]:
    return [None if a is None or not b else a / b for a, b in zip(values, by, strict=True)]


# ------------------------------------------------------------------ experiments
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
_WHOLE = frozenset(_columns_of(int))
_TOLD = [name for name in _columns_of(str) if LABELS.fullmatch(name)]
_COLUMNS = frozenset(f.name for f in fields(ExperimentRow))
_SHARED = [f.name for f in fields(CycleRow) if f.name in _COLUMNS]


def experiment_columns(measured: Sequence[Measured], of_cycles: Columns) -> Columns:
    """Return a row for each experiment: means over its finished cycles, and their spread.

    Args:
        measured: the experiments.
        of_cycles: the columns of all their cycles, in order.
    """
    spans = _spans(measured)
    finished = [_completed(span, of_cycles["status"]) for span in spans]
    columns = _chosen([(done or span)[0] for done, span in zip(finished, spans, strict=True)], of_cycles)
    several = {place: done for place, done in enumerate(finished) if len(done) > 1}
    if several:
        for name, values in _averaged(list(several.values()), of_cycles).items():
            for place, value in zip(several, values, strict=True):
                columns[name][place] = value
    planned = [one.plan.experiment.cycles for one in measured]
    completed = list(map(len, finished))
    complete = [one == other for one, other in zip(planned, completed, strict=True)]
    statuses, errors = of_cycles["status"], of_cycles["error"]
    columns |= {
        "status": [
            "completed" if done else _worst([statuses[i] for i in span])
            for done, span in zip(complete, spans, strict=True)
        ],
        "error": [
            None if done else next((errors[i] for i in span if errors[i]), None)
            for done, span in zip(complete, spans, strict=True)
        ],
        "started_at": [of_cycles["started_at"][span[0]] for span in spans],
        "cycles_planned": planned,
        "cycles_completed": completed,
        "resumed": [one.resumed for one in measured],
    }
    columns["warnings"] = [
        [
            *once_each([of_cycles["warnings"][i] for i in span], "cycle"),
            *map(told, doubts.of_experiment(cycles, one.resumed)),
        ]
        for span, cycles, one in zip(spans, completed, measured, strict=True)
    ]
    return columns


def _spans(measured: Sequence[Measured]) -> list[range]:
    """Return where each experiment's cycles lie among all."""
    spans, begin = [], 0
    for one in measured:
        spans.append(range(begin, begin + len(one.cycles)))
        begin += len(one.cycles)
    return spans


def _completed(span: range, statuses: Sequence[Status]) -> Sequence[int]:
    """Return the places in a span that say "completed"."""
    if statuses[span.start : span.stop].count("completed") == len(span):
        return span
    return [i for i in span if statuses[i] == "completed"]


def _at(places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """Return the values at some places."""
    if isinstance(places, range):
        return list(values[places.start : places.stop])
    return [values[i] for i in places]


def _chosen(places: Sequence[int], columns: Columns) -> Columns:
    """Return columns with the values at some places only; the same lists where those are all places."""
    if len(places) == len(columns["status"]):
        return dict(columns)
    return {name: _at(places, values) for name, values in columns.items()}


def _worst(statuses: Sequence[Status]) -> Status:
    return "failed" if "failed" in statuses else "interrupted"


def _averaged(groups: Sequence[Sequence[int]], of_cycles: Columns) -> Columns:
    """Return what several cycles give: means, quotients of the means, and the spread of the cycles' own values."""

    def over(names: Iterable[str], summed_up: Callable[[Sequence[Any]], Any]) -> Columns:
        return {name: _of_groups(summed_up, groups, of_cycles[name]) for name in names}

    columns = over(MEANS, _mean)
    columns |= quotients(columns, [True] * len(groups))
    columns |= over(MAXIMA, _largest) | over(_TOLD, lambda values: joined(filter(None, values)) or None)
    for name in _WHOLE & columns.keys():
        columns[name] = [None if value is None else round(value) for value in columns[name]]
    return columns | _spreads(groups, of_cycles)


def _of_groups(
    summed_up: Callable[[Sequence[Any]], Any], groups: Sequence[Sequence[int]], values: Sequence[Any]
) -> list[Any]:
    """Return what the values of each group give, which is one thing where all are the same, as where there are none."""
    if values[0] == values[-1] and values.count(values[0]) == len(values):
        return [summed_up(values[:1])] * len(groups)
    return [summed_up(_at(group, values)) for group in groups]


def _mean(values: Sequence[float | None]) -> float | None:
    if values.count(values[0]) == len(values):
        return values[0]
    whole = total(values)
    return None if whole is None else whole / len(values)


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _spreads(groups: Sequence[Sequence[int]], of_cycles: Columns) -> Columns:
    spreads: Columns = {}
    for name, (stem, unit) in SPREADS.items():
        values = [_at(group, of_cycles[name]) for group in groups]
        found = [None if None in each else summarise(each) for each in values]
        for part in ("mean", "sd", "ci95_low", "ci95_high"):
            spreads[f"{stem}_{part}{unit}"] = _each(found, part)
        spreads[f"{stem}_cv"] = _each(found, "cv")
    return {name: values for name, values in spreads.items() if name in _COLUMNS}
