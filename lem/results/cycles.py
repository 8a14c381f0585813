"""Computes an experiment's row from its cycles' rows: means, and the spread over the cycles.

This module works only on columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

from lem import warning_codes
from lem.record import CodedWarning, Status
from lem.results.columns import Columns, of_each, quotients, where
from lem.results.merging import as_text, is_estimated, joined, once_each, total, weighted
from lem.results.parquet import columns
from lem.results.schema import ExperimentRow
from lem.results.statistics import summarize

# The quantities that have columns for their spread over the cycles, with the stem and unit suffix of those columns.
SPREADS = {
    "energy_j": ("energy", "_j"),
    "output_tokens_per_s": ("output_tokens_per_s", ""),
    "latency_mean_s": ("latency_mean", "_s"),
    "energy_per_output_token_j": ("energy_per_output_token", "_j"),
}
# For these columns, an experiment's value is the largest of its cycles' values.
MAXIMA = ("peak_memory_bytes", "kv_cache_bytes")
# Columns that say how a number was obtained; if the cycles differ in one, all of its values are listed.
LABELS = re.compile(r".*_(source|scope|components|method|reason|job_id|node|trace_sha256)")

# Energies, with the columns that state their kind: only energies of the same kind are averaged.
KINDS = {
    **dict.fromkeys(
        (
            "energy_j", "steady_energy_j", "load_energy_j", "warmup_energy_j", "idle_power_before_w",
            "idle_power_loaded_w",
        ),
        ("energy_source", "energy_components", "energy_scope"),
    ),
    **{f"{component}_energy_j": (f"{component}_energy_source",) for component in ("gpu", "cpu", "dram")},
}  # fmt: skip
# Properties of a device, which are averaged only over cycles on the same device.
OF_THE_DEVICE = ("peak_flops_per_s", "idle_power_before_w", "idle_power_loaded_w")
# Columns that say where a cycle ran; a run that was resumed elsewhere has several values.
PLACES = {"hostname": "host", "device": "device", "engine_version": "engine"}

_TYPES = {column.name: column.python_type for column in columns(ExperimentRow)}
# By default, every number is averaged over the cycles, so that no new column can be forgotten. A value common to all
# cycles stays as it is.
MEANS = [name for name, of in _TYPES.items() if of in (int, float) and name not in MAXIMA]
_LABELS = [name for name, of in _TYPES.items() if of is str and LABELS.fullmatch(name)]


def experiment_columns(
    measured: Sequence[int], planned: Sequence[int], resumed: Sequence[int], of_cycles: Columns
) -> Columns:
    """Return the columns of experiments: means over their finished cycles, and the spread of the cycles.

    Args:
        measured: the number of each experiment's cycles that have a row.
        planned: the number of cycles planned for each experiment.
        resumed: the number of times each experiment was resumed.
        of_cycles: the columns of all experiments' cycles, in order.
    """
    spans = _spans(measured)
    finished = [_completed(span, of_cycles["status"]) for span in spans]
    made = _chosen([(done or span)[0] for done, span in zip(finished, spans, strict=True)], of_cycles)
    several = {place: done for place, done in enumerate(finished) if len(done) > 1}
    if several:
        for name, values in _averaged(list(several.values()), of_cycles).items():
            for place, value in zip(several, values, strict=True):
                made[name][place] = value
    completed = list(map(len, finished))
    complete = [one == other for one, other in zip(planned, completed, strict=True)]
    statuses, errors = of_cycles["status"], of_cycles["error"]
    return made | {
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
        "warnings": [
            [
                *once_each([of_cycles["warnings"][i] for i in span], "cycle"),
                *map(as_text, _about_the_whole(done, times, of_cycles)),
            ]
            for span, done, times in zip(spans, finished, resumed, strict=True)
        ],
    }


def _about_the_whole(done: Sequence[int], resumed: int, of_cycles: Columns) -> list[CodedWarning]:
    """Return the warnings about an experiment as a whole, given the indices of its finished cycles."""
    if len(done) < 2:  # one cycle has one kind of energy and one place
        return list(warning_codes.of_experiment(len(done), resumed))
    kinds = _kinds(done, of_cycles, KINDS["energy_j"])
    return [
        *warning_codes.of_experiment(len(done), resumed, kinds),
        *warning_codes.of_places(_places(done, of_cycles)),
    ]


def _spans(counts: Sequence[int]) -> list[range]:
    """Return the indices of each experiment's cycles in the list of all cycles."""
    ends = list(accumulate(counts))
    return [range(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _completed(span: range, statuses: Sequence[Status]) -> Sequence[int]:
    """Return the indices of the completed cycles in a span."""
    if statuses[span.start : span.stop].count("completed") == len(span):
        return span
    return [i for i in span if statuses[i] == "completed"]


def _at(places: Sequence[int], values: Sequence[Any]) -> list[Any]:
    """Return the values at the given indices."""
    if isinstance(places, range):
        return list(values[places.start : places.stop])
    return [values[i] for i in places]


def _chosen(places: Sequence[int], of_cycles: Columns) -> Columns:
    """Return the columns restricted to the given indices; if these are all indices, the lists are not copied."""
    if len(places) == len(of_cycles["status"]):
        return dict(of_cycles)
    return {name: _at(places, values) for name, values in of_cycles.items()}


def _worst(statuses: Sequence[Status]) -> Status:
    return "failed" if "failed" in statuses else "interrupted"


def _averaged(groups: Sequence[Sequence[int]], of_cycles: Columns) -> Columns:
    """Return the columns of each group of cycles: means, quotients of the means, and the spread of the cycles."""

    def over(some: Iterable[str], summed_up: Callable[[Sequence[Any]], Any]) -> Columns:
        return {name: _of_groups(summed_up, groups, of_cycles[name]) for name in some}

    made = over(MEANS, _mean)
    are_alike = {
        labels: [len(_kinds(group, of_cycles, labels)) < 2 for group in groups] for labels in set(KINDS.values())
    }
    made |= {name: where(are_alike[labels], made[name]) for name, labels in KINDS.items()}
    is_one_device = [len(set(_at(group, of_cycles["device"]))) == 1 for group in groups]
    made |= {name: where(is_one_device, made[name]) for name in OF_THE_DEVICE}
    made["carbon_intensity_g_per_kwh"] = [_intensity(group, of_cycles) for group in groups]
    made |= quotients(made, [True] * len(groups))
    made |= over(MAXIMA, _largest) | over(_LABELS, lambda values: joined(filter(None, values)) or None)
    made |= over(PLACES, lambda values: joined(filter(None, values)) or None)
    for name in (name for name in made if _TYPES[name] is int):
        made[name] = [None if value is None else round(value) for value in made[name]]
    return made | _spreads(groups, of_cycles, are_alike[KINDS["energy_j"]])


def _intensity(group: Sequence[int], of_cycles: Columns) -> float | None:
    """Return the mean carbon intensity of cycles.

    The mean is weighted by energy, so that mean energy times mean intensity is the mean CO2e.
    """
    values = _at(group, of_cycles["carbon_intensity_g_per_kwh"])
    if values.count(values[0]) == len(values):
        return values[0] if isinstance(values[0], float) else None
    return None if None in values else weighted(values, _at(group, of_cycles["energy_j"]))


def _kinds(group: Sequence[int], of_cycles: Columns, labels: Sequence[str]) -> list[str]:
    """Return the distinct kinds of energy in the given cycles; a cycle without energy has none.

    Energy from counters, from integrals of sampled power and from replayed traces is all of the same kind, "measured".
    """
    found = dict.fromkeys(zip(*(_at(group, of_cycles[name]) for name in labels), strict=True))
    known = [(is_estimated(source), *others) for source, *others in found if source is not None]
    names = (" ".join(filter(None, ["estimated" if first else "measured", *others])) for first, *others in known)
    return list(dict.fromkeys(names))


def _places(group: Sequence[int], of_cycles: Columns) -> dict[str, list[str]]:
    """Return where the given cycles ran: the distinct values of each column that names a place."""
    return {what: list(dict.fromkeys(filter(None, _at(group, of_cycles[name])))) for name, what in PLACES.items()}


def _of_groups(
    summed_up: Callable[[Sequence[Any]], Any], groups: Sequence[Sequence[int]], values: Sequence[Any]
) -> list[Any]:
    """Apply a function to each group of values; if all values are equal (for example None), call it only once."""
    if values[0] == values[-1] and values.count(values[0]) == len(values):
        return [summed_up(values[:1])] * len(groups)
    return [summed_up(_at(group, values)) for group in groups]


def _mean(values: Sequence[float | None]) -> float | None:
    if values.count(values[0]) == len(values):
        return values[0]
    of_all = total(values)
    return None if of_all is None else of_all / len(values)


def _largest(values: Sequence[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _spreads(groups: Sequence[Sequence[int]], of_cycles: Columns, have_one_energy: Sequence[bool]) -> Columns:
    """Return the spread of each group's cycles; `have_one_energy` marks groups with one kind of energy."""
    spreads: Columns = {}
    for name, (stem, unit) in SPREADS.items():
        values = [_at(group, of_cycles[name]) for group in groups]
        shown = have_one_energy if "energy" in stem else [True] * len(groups)
        found = [
            summarize(each) if show and None not in each else None for each, show in zip(values, shown, strict=True)
        ]
        for part in ("mean", "sd", "ci95_low", "ci95_high"):
            spreads[f"{stem}_{part}{unit}"] = of_each(found, part)
        spreads[f"{stem}_cv"] = of_each(found, "cv")
    return {name: values for name, values in spreads.items() if name in _TYPES}
