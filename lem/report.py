"""Tables for people and JSON for programs, of rows that others have made. Knows no file and no engine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lem.record import ExperimentRow, ProcessRecord
from lem.units import plain, quantity

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STATUS_STYLE = {"completed": "green", "failed": "red", "interrupted": "yellow", "pending": "cyan"}
# Tables that are piped are not to be cut at the width of a terminal that is not there.
WIDTH_WITHOUT_TERMINAL = 240
WIDE = 110
ESTIMATE = "≈"


def console(stderr: bool = False) -> Console:
    """Return a console on stdout or stderr; wide where there is no terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(stderr=stderr, width=width, highlight=False, soft_wrap=not stream.isatty())


def print_table(table: Table) -> None:
    """Print a table on stdout; without a terminal no line ends in the padding of its last column."""
    out = console()
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as captured:
        out.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


# ------------------------------------------------------------------ one experiment
def show_row(row: ExperimentRow) -> None:
    """Print what an experiment measured."""
    from rich.markup import escape
    from rich.table import Table

    style = STATUS_STYLE[row.status]
    table = Table(
        title=f"{row.experiment_id}  [{style}]{row.status}[/{style}]",
        title_justify="left",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _lines(row):
        table.add_row(name, escape(value))
    print_table(table)


def _lines(row: ExperimentRow) -> Iterable[tuple[str, str]]:
    if row.error:
        yield "Error", row.error
    yield "Model", _model(row)
    yield "Backend", " · ".join(filter(None, [row.backend, row.engine_version, row.device, row.dtype]))
    yield "Prompts", f"{row.requests_completed} of {row.requests_planned} from {row.dataset}, seed {row.seed}"
    yield "Batching", f"{row.batching_strategy}, up to {row.batch_size} · decoder {row.decoder}"
    yield "Tokens", f"{row.input_tokens} input, {row.output_tokens} output"
    yield "Duration", quantity(row.duration_s, "s")
    yield (
        "Throughput",
        (f"{plain(row.output_tokens_per_s, 'output tokens/s')} · {plain(row.requests_per_s, 'requests/s')}"),
    )
    yield (
        "Latency",
        (
            f"mean {quantity(row.latency_mean_s, 's')} · p50 {quantity(row.latency_p50_s, 's')} · "
            f"p95 {quantity(row.latency_p95_s, 's')} · p99 {quantity(row.latency_p99_s, 's')}"
        ),
    )
    if row.prefill_duration_s is not None:
        yield (
            "Prefill, decode",
            f"{_part(row.prefill_duration_s, row.prefill_energy_j)}, "
            + _part(row.decode_duration_s, row.decode_energy_j),
        )
    yield from _energy_lines(row)
    yield "Peak memory", _memory(row)
    utilisation = f" · {row.mfu:.1%} of the datasheet's peak (MFU)" if row.mfu is not None else ""
    yield "FLOPs", f"{quantity(row.flops, 'FLOP')} · {quantity(row.flops_per_s, 'FLOP/s')}{utilisation}"
    yield (
        "Outside",
        f"loading {quantity(row.load_duration_s, 's')}, warm-up {quantity(row.warmup_duration_s, 's')}",
    )
    for warning in row.warnings:
        yield "Warning", warning


def _model(row: ExperimentRow) -> str:
    size = f", {quantity(row.parameters, ' parameters', 3)}" if row.parameters else ""
    extras = [row.quantization, f"adapter {row.adapter}" if row.adapter else None]
    extras += ["random weights" if row.random_weights else None]
    return " — ".join([row.model + size, *filter(None, extras)])


def _energy_lines(row: ExperimentRow) -> Iterable[tuple[str, str]]:
    label = f" ({row.energy_components}, {row.energy_source}, {row.energy_scope})" if row.energy_components else ""
    yield "Energy", f"{_energy(row)} = {quantity(row.energy_wh, 'Wh')}{label}"
    yield "Average power", _marked(row, quantity(row.average_power_w, "W"))
    yield "Energy per output token", _marked(row, quantity(row.energy_per_output_token_j, "J/token"))
    if row.idle_power_loaded_w is not None:
        yield (
            "Idle power",
            (
                f"{_marked(row, quantity(row.idle_power_before_w, 'W'))} before loading, "
                f"{_marked(row, quantity(row.idle_power_loaded_w, 'W'))} loaded · "
                f"without it {_marked(row, quantity(row.energy_idle_adjusted_j, 'J'))}"
            ),
        )
    yield "Energy per request", _marked(row, quantity(row.energy_per_request_j, "J/request"))
    if row.co2e_g is not None:
        grid = f"{plain(row.carbon_intensity_g_per_kwh)} gCO2e/kWh, {row.carbon_intensity_source}"
        yield "CO2e", f"{_marked(row, quantity(row.co2e_g, 'gCO2e'))} ({grid})"
    else:
        yield "CO2e", "– (give energy.country_iso_code or energy.carbon_intensity_g_per_kwh)"


def _part(duration_s: float | None, energy_j: float | None) -> str:
    return quantity(duration_s, "s") + (f" ({quantity(energy_j, 'J')})" if energy_j is not None else "")


def _memory(row: ExperimentRow) -> str:
    if row.peak_memory_bytes is None:
        return "–"
    sizes = {"weights": row.weights_bytes, "key/value cache": row.kv_cache_bytes}
    parts = [f"{name} {size / 2**20:.4g} MiB" for name, size in sizes.items() if size is not None]
    return " · ".join([f"{row.peak_memory_bytes / 2**20:.4g} MiB ({row.peak_memory_scope})", *parts])


def show_records(records: Sequence[ProcessRecord]) -> None:
    """Print the raw records of an experiment's processes: phases and readings."""
    from rich.table import Table

    for record in records:
        table = Table(
            "phase", "duration", "component", "energy", "source", "scope", "device", "method",
            title=f"process {record.rank} of {record.world_size} on {record.hostname}: {record.status}",
            title_justify="left",
        )  # fmt: skip
        for phase in record.phases:
            _phase_rows(table, phase)
        print_table(table)
        if record.error:
            print(f"error in {record.error.phase or 'start-up'}: {record.error.message}")


def _phase_rows(table: Table, phase: Any) -> None:
    duration = quantity(phase.duration_s, "s")
    if not phase.energy:
        table.add_row(phase.name, duration)
    for i, r in enumerate(phase.energy):
        head = (phase.name, duration) if i == 0 else ("", "")
        table.add_row(*head, r.component, quantity(r.energy_j, "J"), r.source, r.scope, r.device, r.reason or r.method)


# ------------------------------------------------------------------ many experiments
def show_rows(rows: Sequence[ExperimentRow], pending: Sequence[str] = (), labels: Sequence[str] | None = None) -> None:
    """Print a line for each experiment: what it ran, or in a sweep the label that tells it from the others."""
    from rich.markup import escape
    from rich.table import Table

    wide = console().width >= WIDE
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("experiment", no_wrap=True)
    table.add_column("status", no_wrap=True)
    # In a narrow terminal words wrap; ids and numbers are never cut.
    table.add_column(
        "overrides" if labels else "model, backend, dataset, batching" if wide else "model", overflow="fold"
    )
    numbers = {"requests": _requests, "of": _components} if wide else {}
    numbers |= {"tokens/s": _speed, "energy": _energy, "per token": _energy_per_token}
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        style = STATUS_STYLE[row.status]
        what = labels[i] if labels else _what(row, wide)
        table.add_row(
            row.experiment_id,
            f"[{style}]{row.status}[/{style}]",
            escape(what),
            *(show(row) for show in numbers.values()),
        )
    for experiment_id in pending:
        table.add_row(experiment_id, "[cyan]pending[/cyan]")
    print_table(table)
    if any(row.energy_source == "estimate" for row in rows):
        print(f"{ESTIMATE} an estimate, not a measurement")
    for row in rows:
        if row.error:
            print(f"{row.experiment_id}: {row.error}")


def _what(row: ExperimentRow, wide: bool) -> str:
    model = f"{row.model} (random)" if row.random_weights else row.model
    return f"{model} {row.backend} {row.dataset} {row.batching_strategy}/{row.batch_size}" if wide else model


def _requests(row: ExperimentRow) -> str:
    return f"{row.requests_completed}/{row.requests_planned}"


def _components(row: ExperimentRow) -> str:
    return row.energy_components or "–"


def _speed(row: ExperimentRow) -> str:
    return plain(row.output_tokens_per_s)


def _energy(row: ExperimentRow) -> str:
    return _marked(row, quantity(row.energy_j, "J"))


def _energy_per_token(row: ExperimentRow) -> str:
    return _marked(row, quantity(row.energy_per_output_token_j, "J"))


def _marked(row: ExperimentRow, text: str) -> str:
    return f"{ESTIMATE}{text}" if row.energy_source == "estimate" and text[0].isdigit() else text


# ------------------------------------------------------------------ for programs
def row_dict(row: ExperimentRow) -> dict[str, Any]:
    """Return a row as plain data, its configuration unpacked."""
    values = asdict(row)
    text = values.pop("config_json")
    return values | {"config": json.loads(text) if text else None}


def as_json(value: Any) -> str:
    """Write plain data as JSON for a program to read."""
    return json.dumps(value, indent=2, ensure_ascii=False)
