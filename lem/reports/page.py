"""Writes the content of a report as a self-contained HTML page.

Everything that comes from users (models, prompts, names, errors) is escaped as text or embedded as JSON data. The page
needs no network and blocks access to it: its content security policy names the digests of its own scripts.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any

from lem import __version__
from lem.quantities import printable
from lem.reports.charts import COLORS, Chart
from lem.reports.content import COLUMNS, Content, Setting, Trust
from lem.results.merging import is_estimated
from lem.results.schema import ExperimentRow
from lem.results.show import ESTIMATE, NOT_MEASURED

# The rows of longer tables are added by the page's script, a screenful at a time.
MOST_ROWS = 500
# Longer tables of a chart's values are left out when the page is printed.
MOST_PRINTED = 200
# A text in a table is not wrapped if it is at most this long.
SHORT = 32
NAMED = ' class="name"'
SCRIPTS = ("vega.min.js", "vega-lite.min.js", "page.js")
# The entries of the list of what was measured, each with the columns that it shows.
MEASURED = {
    "model": ("model",),
    "backend": ("backend", "engine_version"),
    "device": ("device",),
    "prompts": ("dataset",),
    "energy": ("energy_source", "energy_scope"),
}
MOST_NAMED = 12
ENERGY = ("energy_j", "energy_per_output_token_j", "average_power_w", "co2e_g")


def page(content: Content, created_at: str) -> str:
    """Return a report as HTML; `created_at` is shown as the time at which it was made."""
    scripts = [_asset(name) for name in SCRIPTS]
    policy = " ".join(
        (
            "default-src 'none';",
            f"script-src 'unsafe-eval' {' '.join(map(_digest, scripts))};",  # Vega compiles its expressions
            "style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
        )
    )
    body = "\n".join(_sections(content, created_at))
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{_text(content.title)} – lem</title>",
            f"<style>{_asset('page.css')}</style>",
            "</head>",
            "<body>",
            body,
            f'<script type="application/json" id="content">{embedded(_data(content))}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body>",
            "</html>",
            "",
        )
    )


def embedded(value: object) -> str:
    """Return plain data as JSON that is safe inside a script element, whatever its strings contain."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:  # some number is not finite
        text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def _data(content: Content) -> dict[str, Any]:
    return {
        "charts": [{"spec": chart.spec, "alt": chart.alt} for chart in content.charts],
        "colors": COLORS,
        "columns": [[head, unit] for head, unit in COLUMNS.values()],
        "rows": [[_value(row, name) for name in COLUMNS] for row in content.rows],
        "estimated": [i for i, row in enumerate(content.rows) if is_estimated(row.energy_source)],
        "energy": [i for i, name in enumerate(COLUMNS) if name in ENERGY],
        "commands": [content.commands.get(row.experiment_id) for row in content.rows],
    }


def _value(row: ExperimentRow, name: str) -> Any:
    value = getattr(row, name)
    return value[:16].replace("T", " ") if name == "started_at" else value


# ------------------------------------------------------------------ sections
def _sections(content: Content, created_at: str) -> Iterator[str]:
    yield "<header>"
    yield f"<h1>{_text(content.title)}</h1>"
    done, failed = len(content.rows) - len(content.failed), len(content.failed)
    parts = [f"{done} completed", *([f"{failed} not completed"] if failed else []), _period(content.rows)]
    yield f"<p>{_text(' · '.join(filter(None, parts)))}</p>"
    yield f'<p class="quiet">{_text(content.source)} · made by lem {__version__}, {_text(created_at)}</p>'
    yield "</header>"
    yield "<main>"
    yield from _measured(content.rows)
    yield from _trust(content)
    if content.sentences:
        yield '<section id="answer"><h2>Answer</h2>'
        yield from (f"<p>{_text(sentence)}</p>" for sentence in content.sentences)
        yield "</section>"
    for number, chart in enumerate(content.charts):
        yield from _chart(number, chart)
    yield from _experiments(content)
    yield from _settings(content.settings)
    yield "</main>"


def _period(rows: Sequence[ExperimentRow]) -> str:
    starts = sorted(row.started_at for row in rows if row.started_at)
    if not starts:
        return ""
    return starts[0][:16].replace("T", " ") + (f" to {starts[-1][:16].replace('T', ' ')}" if len(starts) > 1 else "")


def _measured(rows: Sequence[ExperimentRow]) -> Iterator[str]:
    """Yield the section that lists what was measured, and with what."""
    yield '<section id="measured"><h2>What was measured</h2><dl>'
    for name, columns in MEASURED.items():
        found = Counter(" ".join(filter(None, (getattr(row, each) for each in columns))) for row in rows)
        found.pop("", None)
        if found:
            yield f"<dt>{name}</dt><dd>{_text(_counted(found.most_common()))}</dd>"
    cycles = sum(row.cycles_completed for row in rows)
    yield f"<dt>amount</dt><dd>experiments: {len(rows)}, finished cycles: {cycles}</dd>"
    yield "</dl></section>"


def _counted(values: Sequence[tuple[str, int]]) -> str:
    """Return values as text, with counts if there are several values; if there are many, only the first are named."""
    if len(values) == 1:
        return values[0][0]
    more = len(values) - MOST_NAMED
    shown = ", ".join(f"{value} ({count})" for value, count in values[:MOST_NAMED])
    return f"{shown}, and {more} more" if more > 0 else shown


def _trust(content: Content) -> Iterator[str]:
    yield '<section id="trust"><h2>How far to trust these numbers</h2>'
    for problem in content.problems:
        yield f'<p class="warning">{_text(problem)}</p>'
    estimated = sum(is_estimated(row.energy_source) for row in content.rows)
    if estimated:
        yield (
            f"<p>{ESTIMATE} marks an estimate. The energy of {estimated} of {len(content.rows)} experiments is "
            "estimated or simulated, not measured.</p>"
        )
    if content.trust:
        yield from _table(
            ("warning", "count", "meaning", "remedy", "example"), [_trust_line(each) for each in content.trust]
        )
    else:
        yield "<p>There are no warnings.</p>"
    if content.failed:
        yield "<h3>Experiments that did not complete</h3>"
        yield from _table(
            ("experiment", "status", "reason"),
            [(row.experiment_id, row.status, row.error or "–") for row in content.failed],
        )
    yield "</section>"


def _trust_line(trust: Trust) -> tuple[str, int, str, str, str]:
    return trust.code, trust.count, trust.meaning, trust.remedy, trust.example


def _experiments(content: Content) -> Iterator[str]:
    yield '<section id="experiments"><h2>Experiments</h2>'
    yield (
        '<p class="controls"><label>Filter <input id="filter" type="search" autocomplete="off"></label> '
        '<span id="shown" role="status"></span></p>'
    )
    heads = [f"{head} ({unit})" if unit else head for head, unit in COLUMNS.values()]
    rows = content.rows if len(content.rows) <= MOST_ROWS else ()
    yield '<p class="on-paper" id="on-paper" hidden></p>'
    lines = [[_cell(row, name) for name in COLUMNS] for row in rows]
    yield from _table(heads, lines, identity="table", sortable=True)
    if not rows:
        yield '<p><button id="more" type="button">Show more</button></p>'
    yield "</section>"


def _cell(row: ExperimentRow, name: str) -> object:
    value = _value(row, name)
    if name in ENERGY and value is not None and is_estimated(row.energy_source):
        return f"{ESTIMATE}{_number(value)}"
    return value


def _chart(number: int, chart: Chart) -> Iterator[str]:
    yield f'<section class="chart" aria-labelledby="chart{number}"><h2 id="chart{number}">{_text(chart.heading)}</h2>'
    yield f'<div class="plot" data-chart="{number}" role="img" aria-label="{_text(chart.alt)}"></div>'
    if chart.note:
        yield f'<p class="quiet">{_text(chart.note)}</p>'
    is_printed = len(chart.lines) <= MOST_PRINTED
    if not is_printed:
        not_printed = f"The table of the values ({len(chart.lines)} rows) is not printed; the page shows it on screen."
        yield f'<p class="on-paper">{not_printed}</p>'
    printed = ' class="printed"' if is_printed else ""
    count = "1 row" if len(chart.lines) == 1 else f"{len(chart.lines)} rows"
    yield f"<details{printed}><summary>The values as a table ({count})</summary>"
    yield from _table(chart.headers, chart.lines)
    yield "</details></section>"


def _settings(settings: Sequence[Setting]) -> Iterator[str]:
    yield '<section id="settings"><h2>Environment and configuration</h2>'
    differing = [each for each in settings if each.differs]
    if differing:
        yield "<p>These values differ between the experiments:</p>"
        yield from _table(("setting", "values"), [_setting_line(each) for each in differing], mark=True)
    same = [each for each in settings if not each.differs]
    yield f'<details class="printed"><summary>The same in all experiments ({len(same)} settings)</summary>'
    yield from _table(("setting", "value"), [(each.key, each.values[0][0]) for each in same])
    yield "</details></section>"


def _setting_line(setting: Setting) -> tuple[str, str]:
    return setting.key, _counted(setting.values)


# ------------------------------------------------------------------ pieces
def _table(
    heads: Sequence[str],
    lines: Iterable[Sequence[object]],
    *,
    identity: str = "",
    sortable: bool = False,
    mark: bool = False,
) -> Iterator[str]:
    named = f' id="{identity}"' if identity else ""
    yield f'<div class="scroll" tabindex="0" role="region" aria-label="Table"><table{named}>'
    cells = [
        f'<th scope="col"><button type="button">{_text(head)}</button></th>'
        if sortable
        else f'<th scope="col">{_text(head)}</th>'
        for head in heads
    ]
    yield f"<thead><tr>{''.join(cells)}</tr></thead><tbody>"
    row = '<tr class="differs">' if mark else "<tr>"
    for line in lines:
        yield row + "".join(map(_td, line)) + "</tr>"
    yield "</tbody></table></div>"


def _td(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = NOT_MEASURED if value is None else str(value)
        # Short texts stay on one line; long ones, such as sentences and the names of some models, are wrapped.
        return f"<td{NAMED if len(text) <= SHORT else ''}>{_text(text)}</td>"
    return f'<td class="number">{_number(value)}</td>'


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.5g}"


def _text(text: str) -> str:
    """Return a text with markup and control characters escaped."""
    return escape(printable(text))


@cache
def _asset(name: str) -> str:
    return resources.files("lem.reports").joinpath("assets", name).read_text("utf-8")


@cache
def _digest(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
