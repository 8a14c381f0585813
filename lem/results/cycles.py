"""The row of an experiment from those of its cycles: means, and how far the cycles are apart.

Knows columns only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any, get_args, get_type_hints

from lem import warning_codes
from lem.record import Status
from lem.results.columns import Columns, of_each, quotients
from lem.results.merging import joined, once_each, told, total
from lem.results.schema import ExperimentRow
from lem.results.statistics import summarise

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
_COLUMNS = frozenset(ExperimentRow.__struct_fields__)


def experiment_columns(
    measured: Sequence[int], planned: Sequence[int], resumed: Sequence[int], of_cycles: Columns
) -> Columns:
    """Return a row for each experiment: means over its finished cycles, and their spread.

    Args:
        measured: how many cycles of each experiment have a row.
        planned: how many were to be run.
        resumed: how often it was continued.
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
        "cycles_planned": list(planned),
        "cycles_completed": completed,
        "resumed": list(resumed),
    }
    columns["warnings"] = [
        [
            *once_each([of_cycles["warnings"][i] for i in span], "cycle"),
            *map(told, warning_codes.of_experiment(cycles, times)),
        ]
        for span, cycles, times in zip(spans, completed, resumed, strict=True)
    ]
    return columns


def _spans(counts: Sequence[int]) -> list[range]:
    """Return where each experiment's cycles lie among all."""
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


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
            spreads[f"{stem}_{part}{unit}"] = of_each(found, part)
        spreads[f"{stem}_cv"] = of_each(found, "cv")
    return {name: values for name, values in spreads.items() if name in _COLUMNS}
