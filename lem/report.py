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
    yield from _energy_lines(row)
    yield "Peak memory", _memory(row)
    yield "FLOPs", f"{quantity(row.flops, 'FLOP')} · {quantity(row.flops_per_s, 'FLOP/s')}"
    yield (
        "Outside",
        f"loading {quantity(row.load_duration_s, 's')}, warm-up {quantity(row.warmup_duration_s, 's')}",
    )
    for note in row.notes:
        yield "Note", note


def _model(row: ExperimentRow) -> str:
    size = f", {quantity(row.parameters, ' parameters', 3)}" if row.parameters else ""
    return f"{row.model}{size}{' — random weights' if row.random_weights else ''}"


def _energy_lines(row: ExperimentRow) -> Iterable[tuple[str, str]]:
    label = f" ({row.energy_components}, {row.energy_source}, {row.energy_scope})" if row.energy_components else ""
    yield "Energy", f"{quantity(row.energy_j, 'J')} = {quantity(row.energy_wh, 'Wh')}{label}"
    yield "Average power", quantity(row.average_power_w, "W")
    yield "Energy per output token", quantity(row.energy_per_output_token_j, "J/token")
    yield "Energy per request", quantity(row.energy_per_request_j, "J/request")
    if row.co2e_g is not None:
        grid = f"{plain(row.carbon_intensity_g_per_kwh)} gCO2e/kWh, {row.carbon_intensity_source}"
        yield "CO2e", f"{quantity(row.co2e_g, 'gCO2e')} ({grid})"
    else:
        yield "CO2e", "– (give energy.country_iso_code or energy.carbon_intensity_g_per_kwh)"


def _memory(row: ExperimentRow) -> str:
    if row.peak_memory_bytes is None:
        return "–"
    return f"{row.peak_memory_bytes / 2**20:.4g} MiB ({row.peak_memory_scope})"


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
    """Print a line for each experiment; in a sweep with the label that tells it from the others."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("experiment", "status", "model", "backend", "dataset", "batch"):
        table.add_column(name, no_wrap=True)
    for name in ("requests", "tokens/s", "energy", "J/token"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("energy from", no_wrap=True)
    if labels:
        table.add_column("overrides", overflow="fold")
    for i, row in enumerate(rows):
        style = STATUS_STYLE[row.status]
        source = f"{row.energy_components} {row.energy_source}" if row.energy_components else "–"
        table.add_row(
            row.experiment_id,
            f"[{style}]{row.status}[/{style}]",
            escape(row.model) + (" (random)" if row.random_weights else ""),
            row.backend,
            escape(row.dataset),
            str(row.batch_size),
            f"{row.requests_completed}/{row.requests_planned}",
            plain(row.output_tokens_per_s),
            quantity(row.energy_j, "J"),
            quantity(row.energy_per_output_token_j, "J"),
            source,
            *([escape(labels[i])] if labels else []),
        )
    for experiment_id in pending:
        table.add_row(experiment_id, "[cyan]pending[/cyan]")
    print_table(table)
    for row in rows:
        if row.error:
            print(f"{row.experiment_id}: {row.error}")


# ------------------------------------------------------------------ for programs
def row_dict(row: ExperimentRow) -> dict[str, Any]:
    """Return a row as plain data, its configuration unpacked."""
    values = asdict(row)
    text = values.pop("config_json")
    return values | {"config": json.loads(text) if text else None}


def as_json(value: Any) -> str:
    """Write plain data as JSON for a program to read."""
    return json.dumps(value, indent=2, ensure_ascii=False)
