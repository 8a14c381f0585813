"""Shows rows as tables for people and as JSON for programs. This module knows nothing about files or engines."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from lem.quantities import one_line, plain, printable, quantity
from lem.record import ProcessRecord
from lem.results.merging import is_estimated
from lem.results.parquet import names
from lem.results.schema import ExperimentRow, Measures

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

STATUS_STYLE = {"completed": "green", "failed": "red", "interrupted": "yellow", "pending": "cyan"}
# Without a terminal, lines are neither cut nor wrapped.
WIDTH_WITHOUT_TERMINAL = 100_000
WIDE = 110
# Text wrapped to less than this width is hard to read.
LEAST_TEXT_WIDTH = 30
# Times that have a mean and percentiles: the label of each one's line, and the prefix of its columns.
PERCENTILES = {
    "Latency": "latency",
    "Time to first token": "ttft",
    "Inter-token latency": "itl",
    "Time per output token": "tpot",
}
# Names of the quantities that have percentiles, by the prefix of their columns.
SAMPLE_NAMES = {"latency": "latency", "ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "queue": "queue"}
# The indent of lines below a heading.
INDENT = 2
NOT_MEASURED = "–"
NO_BREAK = "\u00a0"
ESTIMATE = "≈"
WITHOUT_GPU = "without the GPU"


@cache
def _console_class() -> type[Console]:
    """Return a console class that escapes control characters, both in strings before layout and in the output."""
    from rich.console import Console

    class PrintableConsole(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(printable(text), **options)

        def render(self, renderable: Any, options: Any = None) -> Iterator[Any]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    return PrintableConsole


def console(stderr: bool = False) -> Console:
    """Return a console on stdout or stderr that escapes control characters and, without a terminal, does not wrap."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH_WITHOUT_TERMINAL
    return _console_class()(stderr=stderr, width=width, highlight=False, emoji=False, soft_wrap=not stream.isatty())


def terminal_width() -> int | None:
    """Return the width of the terminal on stdout; None if there is none."""
    return console().width if sys.stdout.isatty() else None


def say(text: str) -> None:
    """Print a text on one line, or broken between words if the terminal is narrower than the text.

    A number stays on one line with its percent sign, as do the parts of `p = 0.01`.
    """
    from rich.cells import cell_len

    line, width = one_line(text), terminal_width()
    if width is None:
        print(line)
        return
    kept = re.sub(r" %|(?<=\bp) = ", lambda match: match[0].replace(" ", NO_BREAK), line)
    for part in filled(kept.split(" "), " ", width, cell_len):
        print(part.replace(NO_BREAK, " "))


def filled(parts: Iterable[str], separator: str, width: int, cells: Callable[[str], int]) -> Iterator[str]:
    """Join parts into lines no longer than `width`, unless a single part is wider than that.

    Args:
        parts: the parts, which are not divided.
        separator: the text between two parts; at the end of a line, its trailing spaces are dropped.
        width: the width of a line, in columns.
        cells: returns the number of columns of a text.
    """
    line = ""
    for part in parts:
        longer = f"{line}{separator}{part}" if line else part
        if line and cells(longer) > width:
            yield f"{line}{separator}".rstrip(" ")
            longer = part
        line = longer
    if line:
        yield line


def cell(text: str) -> str:
    """Return a text as one line that rich shows literally, with its markup and control characters escaped."""
    from rich.markup import escape

    return escape(one_line(text))


def print_table(table: Table) -> None:
    """Print a table without borders, or its rows as paragraphs if the table would fit only with words cut."""
    out = console()
    if not _fitted(table, out.width):
        _print_paragraphs(table, out)
        return
    if out.is_terminal:
        out.print(table)
        return
    with out.capture() as captured:
        out.print(table)
    # The padding of the last column is stripped; no-break spaces are needed only for the layout.
    print("\n".join(line.rstrip() for line in captured.get().replace(NO_BREAK, " ").splitlines()))


def _fitted(table: Table, width: int) -> bool:
    """Give each column the width of its longest word and a share of the rest; return False if there is no room."""
    from rich.text import Text

    columns = []
    for column in table.columns:
        cells = [Text.from_markup(str(text), emoji=False) for text in (column.header, *column.cells)]
        most = max(text.cell_len for text in cells)
        word = max(part.cell_len for text in cells for part in text.split(" "))
        least = most if column.no_wrap else max(word, min(most, column.min_width or 0))
        columns.append((most - least, least, column))
    edge = 0 if table.pad_edge else table.padding[1]
    spare = width + edge - sum(least + sum(table.padding[1::2]) for _, least, _ in columns)
    if spare < 0:
        return False
    for i, (wanted, least, column) in enumerate(sorted(columns, key=lambda known: known[0])):
        more = min(wanted, spare // (len(columns) - i))
        column.width = least + more
        spare -= more
    return True


def _print_paragraphs(table: Table, out: Console) -> None:
    """Print each row's first cell, and below it the other cells with their headers, broken between words."""
    from rich.padding import Padding
    from rich.text import Text

    headers = [column.header for column in table.columns][1:]
    for head, *cells in zip(*(column.cells for column in table.columns), strict=True):
        if not table.show_header:
            out.print(f"[bold]{head}:[/bold] {' '.join(map(str, cells))}", overflow="fold")
            continue
        known = zip(headers, cells, strict=True)
        details = [f"{header}: {text}" for header, text in known if text not in ("", NOT_MEASURED)]
        out.print(head, overflow="fold")
        # If the separator ends a line, its dot stays there and needs two more columns.
        for line in filled(details, " · ", out.width - INDENT - 2, lambda text: Text.from_markup(text).cell_len):
            out.print(Padding(line, (0, 0, 0, INDENT), expand=False), overflow="fold")


# ------------------------------------------------------------------ one experiment
def show_row(row: ExperimentRow) -> None:
    """Print an experiment's measurements, leaving out everything that was not measured."""
    console().print(f"{cell(row.experiment_id)}  {_status(row.status)}", soft_wrap=True)
    print_pairs(_lines(row))


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names with their texts, one pair per line, leaving out empty texts."""
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold", min_width=LEAST_TEXT_WIDTH)
    for name, text in pairs:
        if text:
            table.add_row(name, cell(text))
    print_table(table)


def _lines(row: ExperimentRow) -> Iterator[tuple[str, str]]:
    """Yield names and texts; a text is empty if its value was not measured."""
    yield "Error", row.error or ""
    yield "Model", _model(row)
    yield "Backend", " · ".join(filter(None, [row.backend, row.engine_version, row.device, row.dtype]))
    yield "Prompts", _prompts(row)
    if row.requests_failed:
        count = f"{row.requests_failed} request{'s' * (row.requests_failed != 1)} ({row.error_rate or 0.0:.2%})"
        yield "Failed", f"{count}, excluded from tokens, latencies and throughput"
    yield "Batching", f"{row.batching_strategy}, up to {row.batch_size} · decoder {row.decoder}"
    yield "Tokens", f"{row.input_tokens} input, {row.output_tokens} output"
    yield from _time_lines(row)
    yield from _energy_lines(row)
    yield "Steady state", _steady(row)
    yield "Peak memory", _memory(row)
    utilization = "" if row.mfu is None else f"{_percent(row.mfu)} of the datasheet's peak (MFU)"
    yield "FLOPs", _listed(_known(row.flops, "FLOP"), _known(row.flops_per_s, "FLOP/s"), utilization)
    yield (
        "Outside",
        _listed(_known(row.load_duration_s, "s", "loading "), _known(row.warmup_duration_s, "s", "warm-up ")),
    )
    for warning in row.warnings:
        yield "Warning", warning


def _prompts(row: ExperimentRow) -> str:
    used = f"{row.requests_completed} of {row.requests_planned} from {row.dataset}, seed {row.seed}"
    if row.prompts_read is None:
        return used
    return f"{used} · {row.prompts_read} read, {row.prompts_empty} empty and dropped, {row.prompts_cut} cut"


def _time_lines(row: ExperimentRow) -> Iterator[tuple[str, str]]:
    yield "Duration", _known(row.duration_s, "s")
    speeds = {"output tokens/s": row.output_tokens_per_s, "requests/s": row.requests_per_s}
    yield "Throughput", _listed(*(plain(speed, unit) for unit, speed in speeds.items() if speed is not None))
    for label, stem in PERCENTILES.items():
        yield label, _spread(row, stem, ("mean", "p50", "p95", "p99"))
    yield "Sample sizes", _sample_sizes(row)
    if row.prefill_duration_s is not None:
        yield (
            "Prefill, decode",
            f"{_part(row.prefill_duration_s, row.prefill_energy_j)}, "
            + _part(row.decode_duration_s, row.decode_energy_j),
        )
    elif row.prefill_reason is not None:
        yield "Prefill, decode", f"not separable: {row.prefill_reason}"
    yield from _traffic_lines(row)


def _traffic_lines(row: ExperimentRow) -> Iterator[tuple[str, str]]:
    idle = "" if row.idle_share is None else f"idle {100 * row.idle_share:.1f}% of the window"
    arrived = "" if row.arrival_rate_per_s is None else plain(row.arrival_rate_per_s, "requests/s")
    yield "Arrivals", _listed(arrived, idle)
    yield "Queueing", _spread(row, "queue", ("mean", "p95", "p99"))
    if row.goodput_requests_per_s is not None:
        yield "Goodput", f"{plain(row.goodput_requests_per_s, 'requests/s')} with {_limits(row)}"


def _spread(row: ExperimentRow, stem: str, of: Iterable[str]) -> str:
    """Return a mean and percentiles in seconds; with three digits each, four values fit into 80 columns."""
    values = {name: getattr(row, f"{stem}_{name}_s") for name in of}
    return _listed(*("" if s is None else f"{name} {quantity(s, 's', 3)}" for name, s in values.items()))


def _sample_sizes(row: ExperimentRow) -> str:
    """Return, as text, how many values each set of percentiles is computed from."""
    counts = {stem: getattr(row, f"{stem}_samples") for stem in SAMPLE_NAMES}
    return _listed(*(f"{SAMPLE_NAMES[stem]} {count}" for stem, count in counts.items() if count is not None))


def _limits(row: ExperimentRow) -> str:
    """Return the configured limits within which a request counts as good."""
    traffic = json.loads(row.config_json or "{}").get("traffic", {})
    limits = {"TTFT": traffic.get("ttft_limit_s"), "mean ITL": traffic.get("itl_limit_s")}
    return " and ".join(f"{name} up to {quantity(s, 's')}" for name, s in limits.items() if s is not None)


def _known(value: float | None, unit: str, before: str = "") -> str:
    """Return a measured value as text, or an empty string if it was not measured."""
    return "" if value is None else before + quantity(value, unit)


def _percent(share: float) -> str:
    """Return a share as a percentage, to two significant digits or, from 10% up, as a whole number."""
    percent = 100 * share
    return f"{percent:.0f}%" if abs(percent) >= 10 else f"{percent:.2g}%"


def _listed(*texts: str) -> str:
    return " · ".join(filter(None, texts))


def _model(row: ExperimentRow) -> str:
    size = f", {quantity(row.parameters, ' parameters', 3)}" if row.parameters else ""
    extras = [row.quantization, f"adapter {row.adapter}" if row.adapter else None]
    extras += ["random weights" if row.random_weights else None]
    return " — ".join([row.model + size, *filter(None, extras)])


def _energy_lines(row: ExperimentRow) -> Iterator[tuple[str, str]]:
    if row.energy_j is None:
        yield "Energy", "not measured"
        return
    parts = [row.energy_components, row.energy_source, row.energy_scope, WITHOUT_GPU if row.energy_without_gpu else ""]
    label = f" ({', '.join(filter(None, parts))})" if row.energy_components else ""
    yield "Energy", f"{_energy(row)} = {quantity(row.energy_wh, 'Wh')}{label}"
    yield "Average power", marked(row, quantity(row.average_power_w, "W"))
    yield "Energy per output token", marked(row, quantity(row.energy_per_output_token_j, "J/token"))
    if row.idle_power_loaded_w is not None:
        yield (
            "Idle power",
            (
                f"{marked(row, quantity(row.idle_power_before_w, 'W'))} before loading, "
                f"{marked(row, quantity(row.idle_power_loaded_w, 'W'))} loaded · "
                f"idle-adjusted energy {marked(row, quantity(row.energy_idle_adjusted_j, 'J'))}"
            ),
        )
    yield "Energy per request", marked(row, quantity(row.energy_per_request_j, "J/request"))
    if row.co2e_g is not None:
        grid = f"{plain(row.carbon_intensity_g_per_kwh)} gCO2e/kWh, {row.carbon_intensity_source}"
        yield "CO2e", f"{marked(row, quantity(row.co2e_g, 'gCO2e'))} ({grid})"
    else:
        is_traced = any(text.startswith("carbon_unknown:") for text in row.warnings)
        remedy = "see the warning" if is_traced else "set energy.country_iso_code or energy.carbon_intensity_g_per_kwh"
        yield "CO2e", f"{NOT_MEASURED} ({remedy})"


def _steady(row: ExperimentRow) -> str:
    """Return the metrics of the steady state as text; empty if there was none."""
    if row.steady_duration_s is None:
        return ""
    speed, cost = row.steady_output_tokens_per_s, row.steady_energy_per_output_token_j
    return _listed(
        f"{quantity(row.steady_duration_s, 's')} with all slots taken",
        "" if speed is None else plain(speed, "output tokens/s"),
        "" if cost is None else marked(row, quantity(cost, "J/token")),
        "" if cost is None else marked(row, quantity(row.steady_average_power_w, "W")),
    )


def _part(duration_s: float | None, energy_j: float | None) -> str:
    return quantity(duration_s, "s") + (f" ({quantity(energy_j, 'J')})" if energy_j is not None else "")


def _memory(row: ExperimentRow) -> str:
    if row.peak_memory_bytes is None:
        return ""
    sizes = {"weights": row.weights_bytes, "key/value cache": row.kv_cache_bytes}
    parts = [f"{name} {size / 2**20:.4g} MiB" for name, size in sizes.items() if size is not None]
    return " · ".join([f"{row.peak_memory_bytes / 2**20:.4g} MiB ({row.peak_memory_scope})", *parts])


def show_records(records: Sequence[ProcessRecord]) -> None:
    """Print the raw records of an experiment's processes: phases and readings."""
    from rich.table import Table

    for record in records:
        where = f"process {record.rank} of {record.world_size}, cycle {record.cycle}, attempt {record.attempt}"
        how = f"{record.status}, {record.requests_completed} requests"
        print(one_line(f"{where}, on {record.hostname or 'no machine'}: {how}"))
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for header in ("phase", "duration", "component", "energy", "source", "scope", "device", "method"):
            table.add_column(header, overflow="fold")
        for phase in record.phases:
            _phase_rows(table, phase)
        if record.phases:
            print_table(table)
        if record.error:
            print(one_line(f"error in {record.error.phase or 'start-up'}: {record.error.message}"))
        for warning in record.warnings:
            print(one_line(f"warning: {warning.code}: {warning.text}"))


def _phase_rows(table: Table, phase: Any) -> None:
    duration = quantity(phase.duration_s, "s")
    if not phase.energy:
        table.add_row(phase.name, duration)
    for i, r in enumerate(phase.energy):
        head = (phase.name, duration) if i == 0 else ("", "")
        covers = "" if phase.is_covered_by(r) else f"; covers {quantity(r.seconds_of(phase.duration_s), 's')}"
        how = r.reason or f"{r.method}{covers}"
        texts = (r.component, quantity(r.energy_j, "J"), r.source, r.scope, r.device, how)
        table.add_row(*map(cell, (*head, *texts)))


# ------------------------------------------------------------------ many experiments
def _status(status: str) -> str:
    style = STATUS_STYLE.get(status, "dim")
    return f"[{style}]{cell(status)}[/{style}]"


def say_estimates(rows: Iterable[ExperimentRow]) -> None:
    """Explain the mark for estimates if any row has one, and list the rows whose energy does not include the GPU."""
    rows = list(rows)
    if any(is_estimated(row.energy_source) for row in rows):
        print(f"{ESTIMATE} an estimate, not a measurement")
    if lacking := [row.experiment_id for row in rows if row.energy_without_gpu and row.energy_j is not None]:
        print(f"the GPU that ran the model is missing from the energy of {', '.join(lacking)}")


@dataclass(frozen=True)
class SweepLine:
    """The outcome of one cell of a sweep, with a row if anything was measured."""

    label: str
    status: str
    experiment_id: str | None = None
    row: ExperimentRow | None = None
    error: str | None = None


def show_sweep(lines: Sequence[SweepLine], head: str) -> None:
    """Print a line for each cell of a sweep, in order, then the errors; `head` is the label column's header."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(head, overflow="fold")
    for name in ("experiment", "status"):
        table.add_column(name, no_wrap=True)
    for name in ("tokens/s", "J/token"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        speed, cost = NOT_MEASURED, NOT_MEASURED
        if row := line.row:
            speed, cost = plain(row.output_tokens_per_s), marked(row, plain(row.energy_per_output_token_j))
        table.add_row(cell(line.label), line.experiment_id or NOT_MEASURED, _status(line.status), speed, cost)
    print_table(table)
    say_estimates(line.row for line in lines if line.row)
    for line in lines:
        if line.error:
            print(one_line(f"{line.label}: {line.error}"))


def _energy(row: ExperimentRow) -> str:
    return marked(row, quantity(row.energy_j, "J"))


def marked(row: Measures, text: str) -> str:
    """Return the text of a value computed from a row's energy, marked if any part of that energy is an estimate."""
    return f"{ESTIMATE}{text}" if is_estimated(row.energy_source) and text != NOT_MEASURED else text


# ------------------------------------------------------------------ for programs
def columns_of(row: Measures) -> dict[str, Any]:
    """Return a row's values, in the order of its table's columns."""
    return {name: getattr(row, name) for name in names(type(row))}


def row_dict(row: ExperimentRow) -> dict[str, Any]:
    """Return a row as plain data, with its configuration as nested data."""
    values = columns_of(row)
    text = values.pop("config_json")
    return values | {"config": json.loads(text) if text else None}


def as_json(value: Any, indent: int | None = 2) -> str:
    """Return plain data as JSON, escaping characters that stdout cannot encode; non-finite numbers become null."""
    ascii_only = not (sys.stdout.encoding or "utf").lower().startswith("utf")
    try:
        return json.dumps(value, indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=ascii_only)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
