"""From raw records to rows: one row for an experiment, one for each request. Idempotent.

Throughput is output tokens over the wall-clock window. The headline energy is the GPUs' when it was read from
them, else the sum over the components that were measured, else the sum of the estimates; never a mix. Knows the
records and the store, not how anything was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lem import doubts
from lem.errors import ResultsError
from lem.peaks import peak_flops_per_s
from lem.plan import Plan
from lem.record import (
    Carbon,
    Component,
    EnergyReading,
    ExperimentRow,
    PhaseName,
    ProcessRecord,
    RequestRecord,
    Status,
)
from lem.store import ExperimentDir, Store, to_json
from lem.units import J_PER_KWH, J_PER_WH

MEASURED_SOURCES = ("counter", "integral", "replay")


# ------------------------------------------------------------------ energy
@dataclass(frozen=True)
class Energy:
    """A sum of readings of one kind of source; `energy_j` is None when any of them is."""

    energy_j: float | None
    source: str
    scope: str
    components: str


def headline(readings: Sequence[EnergyReading]) -> Energy | None:
    """Return the headline energy of one window, or None when no meter watched it."""
    gpus = [r for r in readings if r.component in ("gpu", "module")]
    measured = [r for r in readings if r.source in MEASURED_SOURCES]
    return _sum(gpus or measured or list(readings))


def of_component(readings: Sequence[EnergyReading], component: Component) -> Energy | None:
    """Return the energy of one component in one window, or None when no meter watched it."""
    return _sum([r for r in readings if r.component == component])


def _sum(readings: Sequence[EnergyReading]) -> Energy | None:
    if not readings:
        return None
    known = [r.energy_j for r in readings if r.energy_j is not None]
    return Energy(
        energy_j=sum(known) if len(known) == len(readings) else None,
        source="+".join(_distinct(r.source for r in readings)),
        scope="+".join(_distinct(r.scope for r in readings)),
        components="+".join(_distinct(r.component for r in readings)),
    )


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


# ------------------------------------------------------------------ the row
def experiment_row(plan: Plan, records: Sequence[ProcessRecord], requests: Sequence[RequestRecord]) -> ExperimentRow:
    """Put an experiment's row together from its records, at least one, and its request rows."""
    owner = records[0]  # the lowest rank meters the node; the others report tokens and times only
    status = _status(records)
    complete = status == "completed"
    output_tokens = sum(r.output_tokens for r in requests)
    duration_s = _duration_s(records, "measured")
    row = ExperimentRow(
        experiment_id=plan.experiment_id,
        status=status,
        error=next((r.error.message for r in records if r.error), None),
        started_at=owner.started_at,
        lem_version=owner.lem_version,
        hostname=owner.hostname,
        processes=len(records),
        requests_planned=plan.prompts.count,
        requests_completed=len(requests),
        input_tokens=sum(r.input_tokens for r in requests),
        output_tokens=output_tokens,
        duration_s=duration_s,
        **_configured(plan),
        **_loaded(owner),
        **_rates(len(requests), output_tokens, duration_s if complete else None),
        **_latencies([r.latency_s for r in requests]),
        **_phases(records),
        **_energies(owner, len(requests), output_tokens, duration_s, complete),
        **_parts(owner, duration_s),
        **_warmup(owner),
        **_flops(records, requests, duration_s if complete else None),
        **_memory(records),
        overrides=list(plan.overrides),
        config_json=to_json(plan.experiment),
    )
    return replace(row, warnings=_warnings(row, records))


def _status(records: Sequence[ProcessRecord]) -> Status:
    for status in ("failed", "interrupted"):
        if any(r.status == status for r in records):
            return status
    return "completed"


def _duration_s(records: Sequence[ProcessRecord], name: PhaseName) -> float | None:
    phases = [phase for record in records if (phase := record.phase(name))]
    return max((phase.duration_s for phase in phases), default=None)


def _configured(plan: Plan) -> dict[str, Any]:
    wanted = plan.experiment
    return {
        "model": wanted.model or "",
        "backend": wanted.backend.name,
        "dataset": wanted.dataset.name,
        "prompts_sha256": plan.prompts.sha256,
        "decoder": wanted.decoder.name,
        "batching_strategy": wanted.batching.strategy,
        "batch_size": wanted.batching.batch_size,
        "max_output_tokens": wanted.max_output_tokens,
        "seed": wanted.seed,
    }


def _loaded(record: ProcessRecord) -> dict[str, Any]:
    model, engine = record.model, record.engine
    return {
        "random_weights": model.random_weights if model else None,
        "parameters": model.parameters if model else None,
        "dtype": model.dtype if model else None,
        "quantization": model.quantization if model else None,
        "adapter": model.adapter if model else None,
        "weights_bytes": model.weights_bytes if model else None,
        "engine_version": engine.version if engine else None,
        "device": engine.device_name if engine else None,
    }


def _rates(requests: int, output_tokens: int, duration_s: float | None) -> dict[str, Any]:
    return {
        "output_tokens_per_s": _ratio(output_tokens, duration_s),
        "requests_per_s": _ratio(requests, duration_s),
    }


def _latencies(latencies_s: Sequence[float]) -> dict[str, Any]:
    names = {"latency_p50_s": 50, "latency_p95_s": 95, "latency_p99_s": 99}
    if not latencies_s:
        return dict.fromkeys(["latency_mean_s", *names])
    import numpy as np

    points = {name: float(np.percentile(latencies_s, q)) for name, q in names.items()}
    return {"latency_mean_s": float(np.mean(latencies_s)), **points}


def _phases(records: Sequence[ProcessRecord]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    names: tuple[PhaseName, ...] = ("load", "warmup")
    for name in names:
        phase = records[0].phase(name)
        energy = headline(phase.energy) if phase else None
        row[f"{name}_duration_s"] = _duration_s(records, name)
        row[f"{name}_energy_j"] = energy.energy_j if energy else None
    return row


def _energies(
    owner: ProcessRecord, requests: int, output_tokens: int, duration_s: float | None, complete: bool
) -> dict[str, Any]:
    window = owner.phase("measured")
    readings = window.energy if window else ()
    head = headline(readings)
    row: dict[str, Any] = {}
    components: tuple[Component, ...] = ("gpu", "cpu", "dram")
    for component in components:
        energy = of_component(readings, component)
        row[f"{component}_energy_j"] = energy.energy_j if energy else None
        row[f"{component}_energy_source"] = energy.source if energy else None
    energy_j = head.energy_j if head else None
    # What a broken-off run took is kept, but it belongs to no number of tokens.
    whole_j = energy_j if complete else None
    return row | {
        "energy_j": energy_j,
        "energy_source": head.source if head else None,
        "energy_scope": head.scope if head else None,
        "energy_components": head.components if head else None,
        "energy_wh": None if energy_j is None else energy_j / J_PER_WH,
        "average_power_w": _ratio(energy_j, duration_s),
        "energy_per_output_token_j": _ratio(whole_j, output_tokens),
        "energy_per_request_j": _ratio(whole_j, requests),
        **_carbon(owner.carbon, energy_j),
    }


def _carbon(carbon: Carbon | None, energy_j: float | None) -> dict[str, Any]:
    known = carbon is not None and energy_j is not None
    return {
        "co2e_g": energy_j / J_PER_KWH * carbon.intensity_g_per_kwh if carbon and energy_j is not None else None,
        "carbon_intensity_g_per_kwh": carbon.intensity_g_per_kwh if carbon and known else None,
        "carbon_intensity_source": carbon.source if carbon and known else None,
    }


def _flops(
    records: Sequence[ProcessRecord], requests: Sequence[RequestRecord], duration_s: float | None
) -> dict[str, Any]:
    parts = [r.flops for r in records if r.flops]
    total = sum(part.total for part in parts) if len(parts) == len(records) else None
    tokens = sum(r.input_tokens + r.output_tokens for r in requests)
    return {
        "flops": total,
        "flops_per_token": _ratio(total, tokens),
        "flops_per_s": _ratio(total, duration_s),
        "flops_method": parts[0].method if total is not None else None,
        **_utilisation(records, _ratio(total, duration_s)),
    }


def _utilisation(records: Sequence[ProcessRecord], flops_per_s: float | None) -> dict[str, Any]:
    """Return model FLOPs utilisation against the datasheet's peak; the dtype counts, not the quantized weights."""
    owner = records[0]
    peak = None
    if owner.engine and owner.model and owner.engine.device.startswith("cuda"):
        peak = peak_flops_per_s(owner.engine.device_name, owner.model.dtype)
    return {
        "peak_flops_per_s": peak.flops_per_s if peak else None,
        "peak_flops_source": peak.source if peak else None,
        "mfu": _ratio(flops_per_s, peak.flops_per_s) if peak else None,
    }


def _parts(owner: ProcessRecord, duration_s: float | None) -> dict[str, Any]:
    """Return idle power, idle-adjusted energy, the trace beside the counter, and prefill against decode."""
    window = owner.phase("measured")
    readings = window.energy if window else ()
    head = headline(readings)
    energy_j = head.energy_j if head else None
    idle_w = {name: _idle_power_w(owner, name) for name in ("idle_before", "idle_loaded")}
    adjusted = _product(idle_w["idle_loaded"], duration_s)
    traces = [r.trace_energy_j for r in readings if r.component == "gpu"]
    prefill = owner.prefill
    return {
        "idle_power_before_w": idle_w["idle_before"],
        "idle_power_loaded_w": idle_w["idle_loaded"],
        "energy_idle_adjusted_j": _difference(energy_j, adjusted),
        "trace_energy_j": sum(t for t in traces if t is not None) if traces and None not in traces else None,
        "counter_tick_s": max(
            (r.resolution_s for r in readings if r.source == "counter" and r.resolution_s), default=None
        ),
        "prefill_duration_s": prefill.duration_s if prefill else None,
        "decode_duration_s": _difference(duration_s, prefill.duration_s if prefill else None),
        "prefill_energy_j": prefill.energy_j if prefill else None,
        "decode_energy_j": _difference(energy_j, prefill.energy_j if prefill else None),
        "prefill_energy_uncertainty_j": prefill.uncertainty_j if prefill else None,
    }


def _idle_power_w(owner: ProcessRecord, name: Any) -> float | None:
    phase = owner.phase(name)
    energy = headline(phase.energy) if phase else None
    return _ratio(energy.energy_j, phase.duration_s) if energy and phase else None


def _warmup(owner: ProcessRecord) -> dict[str, Any]:
    warmup = owner.warmup
    return {
        "warmup_prompts": warmup.prompts if warmup else None,
        "warmup_ended": warmup.ended if warmup else None,
        "warmup_cv": warmup.cv if warmup else None,
    }


def _memory(records: Sequence[ProcessRecord]) -> dict[str, Any]:
    known = [r.memory for r in records if r.memory and r.memory.peak_bytes is not None]
    peak = max(known, key=lambda memory: memory.peak_bytes or 0, default=None)
    return {
        "peak_memory_bytes": peak.peak_bytes if peak else None,
        "peak_memory_scope": peak.scope if peak else None,
        "kv_cache_bytes": max(
            (r.memory.kv_cache_bytes for r in records if r.memory and r.memory.kv_cache_bytes), default=None
        ),
    }


def _warnings(row: ExperimentRow, records: Sequence[ProcessRecord]) -> list[str]:
    """Return what is to be doubted, each once, as `code: sentence`."""
    notes = [note for record in records for note in record.warnings] + doubts.of_row(row, records)
    return _distinct(f"{note.code}: {note.text}" for note in notes)


def _product(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one * other


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _ratio(value: float | None, by: float | None) -> float | None:
    return None if value is None or not by else value / by


# ------------------------------------------------------------------ files
def read_row(directory: ExperimentDir, *, strict: bool = True) -> tuple[ExperimentRow, list[RequestRecord]]:
    """Read an experiment's raw files and return its rows, writing nothing.

    Raises:
        ResultsError: no record, a damaged one, or, when strict, fewer than the plan expects.
    """
    plan, records = directory.plan(), directory.records()
    missing = sorted(set(range(plan.processes)) - {r.rank for r in records})
    if not records or (missing and strict):
        ranks = ", ".join(map(str, missing))
        raise ResultsError(f"{directory.id} is incomplete: no record of process {ranks} of {plan.processes}.")
    requests: list[RequestRecord] = []
    for record in records:
        requests += _request_rows(directory, record)
    return experiment_row(plan, records, requests), requests


def _request_rows(directory: ExperimentDir, record: ProcessRecord) -> list[RequestRecord]:
    """Read a process's request rows; they must be there, as many as its record counts."""
    file = directory.requests_file(record.rank)
    if not record.requests_completed and not file.exists():
        return []
    rows = _read(file, RequestRecord)
    if len(rows) != record.requests_completed:
        raise ResultsError(f"{file} has {len(rows)} rows, its process's record counts {record.requests_completed}.")
    return rows


def _read(file: Path, record_type: type[Any]) -> list[Any]:
    from lem import parquet

    try:
        return parquet.read_rows(file, record_type)
    except (OSError, ValueError, TypeError) as error:
        raise ResultsError(f"{file} cannot be read: {' '.join(str(error).split())[:200]}.") from None


def aggregate(store: Store, directory: ExperimentDir, *, strict: bool = True, force: bool = False) -> ExperimentRow:
    """Write an experiment's row and its request rows to the tables, once; return the row.

    An experiment that has its row already is left alone unless `force`.
    """
    from lem import parquet

    file = store.experiments_table / f"{directory.id}.parquet"
    if file.is_file() and not force:
        rows = _read(file, ExperimentRow)
        if not rows:
            raise ResultsError(f"{file} is empty; lem aggregate {directory.id} --force makes it anew.")
        row: ExperimentRow = rows[0]
        return row
    row, requests = read_row(directory, strict=strict)
    # The experiment's row comes last: where it stands, its requests stand as well.
    parquet.write_rows(store.requests_table / f"{directory.id}.parquet", RequestRecord, requests)
    parquet.write_rows(file, ExperimentRow, [row])
    return row
