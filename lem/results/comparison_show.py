"""Shows comparisons as text, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lem.quantities import percent, plain, quantity
from lem.results import show
from lem.results.campaign import MEASURES
from lem.results.comparison import PREFIX, REASONS, Comparison, Limit, Outcome, Ratio, change
from lem.results.parquet import schema
from lem.results.schema import CycleRow

# A judged limit: the comparison, the limit, and the outcome with its reason.
Judged = tuple[Comparison, Limit, Outcome, str]
HEADS = ("metric", "baseline", "value", "ratio", "interval", "values")


def show_comparisons(found: Sequence[Comparison], judged: Sequence[Judged], allowed: Sequence[str]) -> None:
    """Print each comparison (the ratios, the objections and what differs), and then the outcome of each limit."""
    for number, each in enumerate(found):
        if number:
            print()
        show.say(title(each))
        _show_ratios(each)
        lines = [
            *(("Not comparable", text) for text in objections_of(each, allowed)),
            *(("Allowed", text) for text in _allowed_of(each, allowed)),
            *(("Note", f"{note.code}: {note.text}") for note in each.notes),
            *((f"Differs ({one.where})", f"{one.key}: {one.baseline} → {one.value}") for one in each.differences),
        ]
        if lines:
            print()
            show.print_pairs(lines)
    if judged:
        print()
        for line in outcomes(judged):
            show.say(line)


def title(comparison: Comparison) -> str:
    """Return a heading that names the two sides."""
    case = "" if comparison.case == comparison.side else f" ({comparison.case})"
    return f"{comparison.side}{case} compared with the baseline {comparison.baseline}"


def objections_of(comparison: Comparison, allowed: Sequence[str]) -> list[str]:
    """Return the objections that the user does not allow, as text."""
    return [
        f"{each.code.removeprefix(PREFIX)}: {each.text}"
        for each in comparison.objections
        if each.code.removeprefix(PREFIX) not in allowed
    ]


def _allowed_of(comparison: Comparison, allowed: Sequence[str]) -> list[str]:
    codes = {f"{PREFIX}{reason}" for reason in allowed}
    return [f"{each.code.removeprefix(PREFIX)}: {each.text}" for each in comparison.objections if each.code in codes]


def outcomes(judged: Sequence[Judged]) -> Iterator[str]:
    """Yield a sentence on the outcome of each limit in each comparison."""
    for comparison, limit, outcome, reason in judged:
        yield f"{limit.text}: {outcome} for {comparison.side} ({comparison.case}): {reason}."


def _show_ratios(comparison: Comparison) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in HEADS:
        table.add_column(head, justify="left" if head == "metric" else "right", no_wrap=True)
    for ratio in comparison.ratios:
        table.add_row(*(show.cell(text) for text in _cells(ratio)))
    show.print_table(table)
    for ratio in comparison.ratios:
        if ratio.reason:
            show.say(f"{ratio.metric}: {ratio.reason}.")


def _cells(ratio: Ratio) -> list[str]:
    unit, mark = unit_of(ratio.metric), show.ESTIMATE if ratio.is_estimate else ""
    counts = f"{ratio.baseline_count}, {ratio.count}" + ("" if ratio.basis is None else f" {ratio.basis}")
    return [
        ratio.metric,
        *(_valued(value, unit, mark) for value in (ratio.baseline_value, ratio.value)),
        show.NOT_MEASURED if ratio.ratio is None else f"{mark}{ratio.ratio:.4g} ({change(ratio.ratio)})",
        _interval(ratio),
        counts,
    ]


def _interval(ratio: Ratio) -> str:
    if ratio.ci_low is None or ratio.ci_high is None:
        return show.NOT_MEASURED
    return f"{ratio.ci_low:.4g} to {ratio.ci_high:.4g} ({percent(ratio.confidence)})"


def _valued(value: float | None, unit: str, mark: str) -> str:
    if value is None:
        return show.NOT_MEASURED
    # The units that are commonly written with a prefix, such as mJ.
    is_scaled = unit in ("J", "W", "s", "B") or unit.startswith("J/")
    return mark + (quantity(value, unit) if is_scaled else plain(value, unit))


def unit_of(metric: str) -> str:
    """Return the unit of a column, as the schema defines it."""
    if metric in MEASURES:
        return MEASURES[metric][0]
    return str((schema(CycleRow).field(metric).metadata or {}).get(b"unit", b"").decode())


def markdown(found: Sequence[Comparison], judged: Sequence[Judged], allowed: Sequence[str]) -> str:
    """Return the comparisons as Markdown, for a comment on a pull request."""
    return "\n".join(line for each in (_markdown(found, judged, allowed)) for line in each) + "\n"


def _markdown(found: Sequence[Comparison], judged: Sequence[Judged], allowed: Sequence[str]) -> Iterator[list[str]]:
    for each in found:
        yield [f"### {_escaped(title(each))}", "", _row(HEADS), _row(["---", *["---:"] * (len(HEADS) - 1)])]
        yield [_row([_escaped(cell) for cell in _cells(ratio)]) for ratio in each.ratios]
        yield ["", *(f"- **Not comparable**, {_escaped(text)}" for text in objections_of(each, allowed))]
        yield [f"- Allowed, {_escaped(text)}" for text in _allowed_of(each, allowed)]
        yield [f"- {_escaped(note.code)}: {_escaped(note.text)}" for note in each.notes]
        yield [
            f"- {one.where} {_escaped(one.key)}: {_escaped(one.baseline)} → {_escaped(one.value)}"
            for one in each.differences
        ]
        yield [""]
    yield [f"- {_escaped(line)}" for line in outcomes(judged)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Return the text on one line, escaping the characters that Markdown or HTML would interpret."""
    from html import escape

    line = " ".join(text.split())
    for character in "\\`*_[]|#":
        line = line.replace(character, f"\\{character}")
    return escape(line, quote=False)


def as_plain(found: Sequence[Comparison], judged: Sequence[Judged], allowed: Sequence[str]) -> dict[str, Any]:
    """Return the comparisons as plain data, for JSON."""
    return {
        "comparisons": [_comparison(each, allowed) for each in found],
        "limits": [
            {"limit": limit.text, "side": each.side, "case": each.case, "outcome": outcome, "reason": reason}
            for each, limit, outcome, reason in judged
        ],
        "allowed": [reason for reason in REASONS if reason in allowed],
    }


def _comparison(each: Comparison, allowed: Sequence[str]) -> Mapping[str, Any]:
    return {
        **asdict(each),
        "ratios": [
            asdict(ratio) | {"unit": unit_of(ratio.metric), "is_comparable": not each.against(ratio.metric, allowed)}
            for ratio in each.ratios
        ],
        "objections": [{"code": note.code, "text": note.text} for note in each.objections],
        "notes": [{"code": note.code, "text": note.text} for note in each.notes],
    }
