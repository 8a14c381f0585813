"""What `lem results` prints: lists of experiments, cycles with their spread, environments. Knows no file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lem.record import CycleRow, DeviceState, Environment, ExperimentRow
from lem.report import ESTIMATE, NOT_MEASURED, STATUS_STYLE, WIDE, console, print_table
from lem.units import plain, quantity

# From here on a table is printed line by line: laying it out for a terminal takes longer than all the rest.
MANY = 500
NARROW_HEADERS = ("experiment", "status", "model", "tokens/s", "energy", "per token")
WIDE_HEADERS = (
    "experiment", "status", "model, backend, dataset, batching", "requests", "cycles", "of", "tokens/s", "energy",
    "per token",
)  # fmt: skip
# The columns of rows that a list is made from.
COLUMNS = (
    "experiment_id", "status", "error", "model", "random_weights", "backend", "dataset", "batching_strategy",
    "batch_size", "requests_completed", "requests_planned", "cycles_completed", "cycles_planned", "energy_source",
    "energy_components",
    *(f"{stem}{part}{unit}" for stem, unit in (("output_tokens_per_s", ""), ("energy", "_j"),
      ("energy_per_output_token", "_j")) for part in ("", "_ci95_low", "_ci95_high")),
)  # fmt: skip
NUMBERS = frozenset({"requests", "cycles", "of", "tokens/s", "energy", "per token", "duration", "latency", "attempts"})


@dataclass(frozen=True)
class Entry:
    """An experiment in a list: where it stands, what it runs, and its row if it has one."""

    experiment_id: str
    status: str
    model: str
    backend: str
    dataset: str
    row: ExperimentRow | None = None
    detail: str | None = None


# ------------------------------------------------------------------ many experiments
def show_entries(entries: Sequence[Entry]) -> None:
    """Print a line for each experiment, then what there is to say about some of them."""
    wide = console().width >= WIDE
    headers = WIDE_HEADERS if wide else NARROW_HEADERS
    _print([*headers], [_cells(entry, wide) for entry in entries])
    if any(entry.row and entry.row.energy_source == "estimate" for entry in entries):
        print(f"{ESTIMATE} an estimate, not a measurement")
    if any(entry.row and entry.row.cycles_completed > 1 for entry in entries):
        print("± half of the 95 % interval over the cycles")
    for entry in entries:
        if entry.detail:
            print(f"{entry.experiment_id}: {entry.detail}")


def _cells(entry: Entry, wide: bool) -> list[str]:
    row = entry.row
    model = f"{entry.model} (random)" if row and row.random_weights else entry.model
    if row is None:
        what = f"{model} {entry.backend} {entry.dataset}" if wide else model
        return [entry.experiment_id, entry.status, what, *[""] * (6 if wide else 3)]
    speed = _with_interval(row, "output_tokens_per_s", "", plain)
    energies = ("energy", "energy_per_output_token")
    energy, per_token = (_marked(row, _with_interval(row, stem, "_j", _joules, wide)) for stem in energies)
    if not wide:
        return [entry.experiment_id, entry.status, model, speed, energy, per_token]
    what = f"{model} {row.backend} {row.dataset} {row.batching_strategy}/{row.batch_size}"
    requests = f"{row.requests_completed}/{row.requests_planned}"
    cycles = f"{row.cycles_completed}/{row.cycles_planned}"
    components = row.energy_components or NOT_MEASURED
    return [entry.experiment_id, entry.status, what, requests, cycles, components, speed, energy, per_token]


def _joules(value: float | None) -> str:
    return quantity(value, "J")


def _with_interval(
    row: ExperimentRow, stem: str, unit: str, write: Callable[[float | None], str], wide: bool = True
) -> str:
    """Write a value, with the half of its interval as a share of it where there is one and room for it."""
    value = getattr(row, f"{stem}{unit}")
    low, high = getattr(row, f"{stem}_ci95_low{unit}"), getattr(row, f"{stem}_ci95_high{unit}")
    if not wide or None in (value, low, high) or not value:
        return write(value)
    share = 100 * (high - low) / 2 / abs(value)
    return f"{write(value)} ±{share:.0f}%" if share >= 10 else f"{write(value)} ±{share:.2g}%"


def _marked(row: ExperimentRow, text: str) -> str:
    return f"{ESTIMATE}{text}" if row.energy_source == "estimate" and text != NOT_MEASURED else text


def _print(headers: list[str], lines: list[list[str]]) -> None:
    """Print a table: laid out for the terminal, or where that is none or the table is long, line by line."""
    if sys.stdout.isatty() and len(lines) < MANY:
        _print_laid_out(headers, lines)
        return
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
    # As a template: a step in Python for each cell would take longer than the rest.
    line = "  ".join(f"%{'' if h in NUMBERS else '-'}{width}s" for h, width in zip(headers, widths, strict=True))
    print("\n".join((line % tuple(cells)).rstrip() for cells in (headers, *lines)))


def _print_laid_out(headers: list[str], lines: list[list[str]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        # Words may wrap; ids and numbers are never cut.
        words = header.startswith("model")
        justify: Any = "right" if header in NUMBERS else "left"
        table.add_column(header, justify=justify, no_wrap=not words, overflow="fold")
    for cells in lines:
        table.add_row(*(_styled(header, escape(cell)) for header, cell in zip(headers, cells, strict=True)))
    print_table(table)


def _styled(header: str, cell: str) -> str:
    return f"[{STATUS_STYLE.get(cell, 'cyan')}]{cell}[/]" if header == "status" and cell else cell


# ------------------------------------------------------------------ one experiment
def show_cycles(row: ExperimentRow, cycles: Sequence[CycleRow]) -> None:
    """Print a line for each cycle, then their mean, spread and interval; nothing for a single cycle."""
    if row.cycles_planned == 1:
        return
    several = any(cycle.attempts > 1 for cycle in cycles)
    headers = ["cycle", "status", *(["attempts"] if several else []), "duration", "tokens/s", "latency", "energy"]
    lines = [_cycle_cells(cycle, several) for cycle in cycles]
    if row.cycles_completed > 1:
        lines += [_spread_cells(row, part, several) for part in ("mean", "sd", "cv", "ci95_low", "ci95_high")]
    print()
    _print([*headers, "per token"], lines)


def _cycle_cells(cycle: CycleRow, several: bool) -> list[str]:
    attempts = [str(cycle.attempts)] if several else []
    return [
        str(cycle.cycle), cycle.status, *attempts, quantity(cycle.duration_s, "s"), plain(cycle.output_tokens_per_s),
        quantity(cycle.latency_mean_s, "s"), _joules(cycle.energy_j), _joules(cycle.energy_per_output_token_j),
    ]  # fmt: skip


SPREAD_LABELS = {"mean": "mean", "sd": "sd", "cv": "CV", "ci95_low": "95 % from", "ci95_high": "95 % to"}


def _spread_cells(row: ExperimentRow, part: str, several: bool) -> list[str]:
    def of(stem: str, unit: str) -> float | None:
        names = [f"{stem}_{part}{unit if part != 'cv' else ''}", f"{stem}{unit}"]
        value: float | None = getattr(row, names[0] if hasattr(row, names[0]) else names[1])
        return value

    def written(stem: str, unit: str, write: Callable[[float | None], str]) -> str:
        value = of(stem, unit)
        return (NOT_MEASURED if value is None else f"{value:.2%}") if part == "cv" else write(value)

    duration = [quantity(row.duration_s, "s") if part == "mean" else ""]
    return [
        SPREAD_LABELS[part], "", *([""] if several else []), *duration,
        written("output_tokens_per_s", "", plain),
        written("latency_mean", "_s", lambda value: quantity(value, "s")),
        written("energy", "_j", _joules),
        written("energy_per_output_token", "_j", _joules),
    ]  # fmt: skip


def show_environment(environment: Environment) -> None:
    """Print the machine and the software that an experiment ran on."""
    from rich.markup import escape
    from rich.table import Table

    print()
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold", min_width=30)
    for name, text in _environment_lines(environment):
        if text:
            table.add_row(name, escape(text))
    print_table(table)


def _environment_lines(here: Environment) -> Iterator[tuple[str, str]]:
    yield "Host", here.hostname
    yield "System", " · ".join(filter(None, [here.os, here.container]))
    governor = f", governor {here.cpu_governor}" if here.cpu_governor else ""
    yield "Processor", f"{here.cpu_model}, {here.cpu_threads} threads{governor}"
    yield "Memory", f"{here.memory_bytes / 2**30:.4g} GiB"
    for gpu in here.gpus:
        yield "GPU", gpu
    driver = [f"driver {here.driver_version}" if here.driver_version else ""]
    yield "Driver", " · ".join(filter(None, [*driver, f"CUDA {here.cuda_version}" if here.cuda_version else ""]))
    yield "Software", ", ".join(f"{name} {version}" for name, version in here.versions.items())
    yield "Commit", " ".join(filter(None, [here.git_commit, "with changes" if here.git_dirty else ""]))
    yield "SLURM", ", ".join(f"{name}={value}" for name, value in here.slurm.items())
    for when, states in (("before", here.devices_before), ("after", here.devices_after)):
        for state in states:
            yield f"GPU {when}", _device(state)


def _device(state: DeviceState) -> str:
    known = {
        "°C": state.temperature_c,
        "MHz SM": state.sm_clock_mhz,
        "MHz memory": state.memory_clock_mhz,
        "W limit": state.power_limit_w,
    }
    texts = [f"{value:g} {unit}" for unit, value in known.items() if value is not None]
    return " · ".join([state.uuid, *texts, *(state.throttle_reasons or ())])
