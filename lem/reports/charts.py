"""The charts of a report, as Vega-Lite specifications in plain data, each with its numbers as a table.

A chart knows its values, but not what the page looks like; `lem/reports/assets/page.js` sets widths, fonts and most
colors. Field names never contain text from users, because Vega would read it as an expression.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lem.results.campaign import MEASURES, Answer
from lem.results.comparison import config_of
from lem.results.merging import is_estimated
from lem.results.schedule_answer import Answer as ScheduleAnswer
from lem.results.schema import ExperimentRow
from lem.results.variation import Variation

Spec = dict[str, Any]
# Above these numbers of experiments, a chart with a bar or a cell for each of them would be unreadable.
MOST_BARS = 40
MOST_CELLS = 2_500
# A distribution is drawn through this many of its quantiles.
QUANTILES = 200
MOST_DISTRIBUTIONS = 8  # as many as there are colors
# The space at the ends of a forest plot's scale, as a factor.
FOREST_MARGIN = 1.03
# The space on either side of values that are all equal, as a factor.
EQUAL_MARGIN = 1.05
PRIMARY = "energy_per_output_token_j"
COMPONENTS = {"gpu_energy_j": "GPU", "cpu_energy_j": "CPU", "dram_energy_j": "DRAM"}
LATENCIES = {"latency": "latency", "ttft": "time to first token", "itl": "inter-token latency"}
PHASES = {"load_energy_j": "loading", "warmup_energy_j": "warm-up", "energy_j": "window"}
BARS = (
    ("energy-by-component", "Energy of the window by component", COMPONENTS),
    ("energy-by-phase", "Energy by phase", PHASES),
)


# Distinguishable with all common kinds of color blindness (Okabe and Ito 2008).
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8a8a8a", "#b8a900")
# The height of a bar with the space around it, and of a cell of a heat map, in pixels.
STEP_PX = 24
CELL_PX = 48
# The width of a panel that is one of many in a chart.
PANEL_PX = 180
# The name that the measured phase has in a trace.
WINDOW = "window"


@dataclass(frozen=True)
class Chart:
    """A chart: its heading, a sentence that describes it to readers who cannot see it, its specification and table.

    `headers` and `lines` are the table with the values that the chart shows. `key` names the files of the
    plot; it is the same in every report that has the plot.
    """

    key: str
    heading: str
    alt: str
    spec: Spec
    headers: Sequence[str]
    lines: Sequence[Sequence[object]]
    note: str = ""


class PowerTrace(NamedTuple):
    """The power trace of an experiment, for a chart.

    `samples` have `t_s`, `device`, `power_w` and `temperature_c`; most have no temperature. `edges` has the start, the
    end and the name of each phase.
    """

    name: str
    samples: Sequence[Mapping[str, Any]]
    edges: Sequence[tuple[float, float, str]]


def energy_bars(rows: Sequence[ExperimentRow], names: Mapping[str, str]) -> list[Chart]:
    """Return the charts of energy by component and by phase: as bars or, for many experiments, as distributions."""
    if len(rows) > MOST_BARS:
        return [
            chart
            for key, heading, columns in BARS
            for chart in _over_experiments(key, heading, "energy", "J", rows, columns)
        ]
    found = []
    for key, heading, columns in BARS:
        values = [
            {"name": names[row.experiment_id], "part": part, "joules": value, "kind": _kind(row), "place": i}
            for row in rows
            for i, (column, part) in enumerate(columns.items())
            if (value := getattr(row, column)) is not None
        ]
        if not values:
            continue
        spec = {
            "data": {"values": values},
            "mark": {"type": "bar", "tooltip": True},
            "height": STEP_PX * len({names[row.experiment_id] for row in rows}),
            "encoding": {
                "y": _category("name", [names[row.experiment_id] for row in rows]),
                "x": {"field": "joules", "type": "quantitative", "title": "energy (J)"},
                "color": {"field": "part", "type": "nominal", "title": None, "sort": list(columns.values())},
                "order": {"field": "place", "type": "quantitative"},
            },
        }
        total, shown = sum(float(each["joules"]) for each in values), len({each["name"] for each in values})
        found.append(
            Chart(
                key,
                heading,
                f"Stacked bars, one per experiment ({shown}), {total:.4g} J in total.",
                spec,
                ("experiment", "part", "energy (J)", "source"),
                [(each["name"], each["part"], each["joules"], each["kind"]) for each in values],
                _about_bars(rows, columns),
            )
        )
    return found


def _about_bars(rows: Sequence[ExperimentRow], columns: Mapping[str, str]) -> str:
    estimates = "The energies of some experiments are estimates. " if any(map(_is_estimate, rows)) else ""
    if rows and all(map(_is_estimate, rows)):
        estimates = "All of these energies are estimates. "
    what = "The headline energy of each phase. " if columns is PHASES else ""
    return f"{estimates}{what}With several cycles, the window's energy is the mean over them."


def _is_estimate(row: ExperimentRow) -> bool:
    return is_estimated(row.energy_source)


def _kind(row: ExperimentRow) -> str:
    return "estimate" if is_estimated(row.energy_source) else row.energy_source or "unknown"


def power_trace(trace: PowerTrace) -> Chart:
    """Return the chart of a power trace, with the temperature if it was measured."""
    name, samples, edges = trace
    phases = [{"from_s": start, "to_s": end, "phase": phase} for start, end, phase in edges]
    warm = [each for each in samples if each.get("temperature_c") is not None]
    several = len({each["device"] for each in samples}) > 1
    layers: list[Spec] = [
        {
            "data": {"values": phases},
            "mark": {"type": "rect", "opacity": 0.12},
            "encoding": {
                "x": {"field": "from_s", "type": "quantitative"},
                "x2": {"field": "to_s"},
                "color": {
                    "field": "phase",
                    "type": "nominal",
                    "title": "phase",
                    "sort": [phase for *_, phase in edges],
                    "legend": {"symbolOpacity": 0.6},
                },
            },
        },
        _over_the_window("power_w", "power (W)", {"strokeWidth": 1}, samples, several),
    ]
    independent = {"color": "independent"}
    text = f"Line of {len(samples)} samples: power from {_range(samples, 'power_w')} W"
    note = "The temperature was not measured."
    if warm:
        dashed = {"strokeWidth": 1.5, "strokeDash": [4, 3], **({} if several else {"color": COLORS[5]})}
        layers.append(_over_the_window("temperature_c", "temperature (°C), dashed", dashed, warm, several))
        independent["y"] = "independent"
        text += f" and temperature from {_range(warm, 'temperature_c')} °C"
        note = "The solid line is the power, the dashed line the temperature, which is read less often."
    columns = ("t_s", "device", "power_w", *(("temperature_c",) if warm else ()))
    return Chart(
        f"power-{name}",
        f"Power and temperature of {name}" if warm else f"Power of {name}",
        f"{text}, with the phases behind it.",
        {"layer": layers, "resolve": {"scale": independent}},
        ("time (s)", "device", "power (W)", *(("temperature (°C)",) if warm else ())),
        [tuple(each[column] for column in columns) for each in samples],
        note,
    )


def power_traces(traces: Sequence[PowerTrace], note: str) -> Chart:
    """Return one chart with a small panel for each power trace."""
    windows = [
        {"name": trace.name, "from_s": start, "to_s": end}
        for trace in traces
        for start, end, phase in trace.edges
        if phase == WINDOW
    ]
    samples = [
        {"name": trace.name, **{key: each[key] for key in ("t_s", "device", "power_w")}}
        for trace in traces
        for each in trace.samples
    ]
    devices = {each["device"] for each in samples}
    line = _line("power_w", "power (W)", {"strokeWidth": 1}, several=1 < len(devices) <= len(COLORS))
    # There is room for a short title and a few ticks.
    line["encoding"]["x"]["title"] = "time (s)"
    line["encoding"]["y"]["axis"] = {"tickCount": 3}
    shade = {
        "transform": [{"filter": "isValid(datum.to_s)"}],
        "mark": {"type": "rect", "opacity": 0.12},
        "encoding": {"x": {"field": "from_s", "type": "quantitative"}, "x2": {"field": "to_s"}},
    }
    spec = {
        "data": {"values": [*windows, *samples]},
        "facet": {
            "field": "name", "type": "nominal", "title": None, "sort": [trace.name for trace in traces],
            "header": {"labelLimit": PANEL_PX},
        },
        "spec": {
            "height": PANEL_PX // 2,
            "layer": [shade, {"transform": [{"filter": "isValid(datum.power_w)"}], **line}],
        },
    }  # fmt: skip
    return Chart(
        "power-traces",
        f"Power of {len(traces)} experiment{'s' if len(traces) != 1 else ''}",
        f"One panel for each experiment ({len(traces)}): power from {_range(samples, 'power_w')} W.",
        spec,
        ("experiment", "time (s)", "device", "power (W)"),
        [tuple(each.values()) for each in samples],
        note,
    )


def _over_the_window(column: str, title: str, mark: Spec, samples: Sequence[Mapping[str, Any]], several: bool) -> Spec:
    """Return a layer that plots a column against the time since the window opened, with one line for each device."""
    values = [{key: each[key] for key in ("t_s", "device", column)} for each in samples]
    return {"data": {"values": values}, **_line(column, title, mark, several=several)}


def _line(column: str, title: str, mark: Spec, *, several: bool) -> Spec:
    """Return the mark and the encoding of lines that show a column against the time since the window opened."""
    return {
        "mark": {"type": "line", **mark},
        "encoding": {
            "x": {"field": "t_s", "type": "quantitative", "title": "time since the window opened (s)"},
            "y": {"field": column, "type": "quantitative", "title": title, "scale": {"zero": column == "power_w"}},
            "color" if several else "detail": {"field": "device", "type": "nominal"},
        },
    }


def _range(samples: Sequence[Mapping[str, Any]], column: str) -> str:
    values = [float(each[column]) for each in samples]
    return f"{min(values):.4g} to {max(values):.4g}"


def powers(rows: Sequence[ExperimentRow]) -> list[Chart]:
    """Return a chart of how average power is distributed over experiments; none if fewer than two powers are known."""
    columns = {"average_power_w": "average over the window"}
    return _over_experiments("power", "Power", "power", "W", rows, columns)


def latencies(rows: Sequence[ExperimentRow]) -> list[Chart]:
    """Return, for each kind of latency, a chart of how its mean is distributed over many experiments."""
    found = []
    for stem, name in LATENCIES.items():
        label = f"mean {name}"
        found += _over_experiments(
            f"distribution-{label}", label.capitalize(), label, "s", rows, {f"{stem}_mean_s": label}
        )
    return found


def _over_experiments(
    key: str, heading: str, quantity: str, unit: str, rows: Sequence[ExperimentRow], columns: Mapping[str, str]
) -> list[Chart]:
    """Return one chart of how columns are distributed over experiments; no chart if no column has two values."""
    values = {
        name: [value for row in rows if (value := getattr(row, column)) is not None] for column, name in columns.items()
    }
    chart = _cumulative(key, f"{heading}, over the experiments", quantity, unit, values, "values")
    return [] if chart is None else [chart]


def distributions(heading: str, unit: str, values: Mapping[str, Sequence[float]]) -> Chart | None:
    """Return a chart of cumulative distributions, one line per name with several values; None if there are no lines."""
    quantity = heading.lower()
    return _cumulative(f"distribution-{heading}", f"Distribution of {quantity}", quantity, unit, values, "experiment")


def _cumulative(
    key: str, heading: str, quantity: str, unit: str, values: Mapping[str, Sequence[float]], named: str
) -> Chart | None:
    known = {name: sorted(own) for name, own in values.items() if len(own) > 1}
    if not known:
        return None
    points = [
        {"name": name, "share": share, "value": value}
        for name, own in known.items()
        for share, value in _quantiles(own)
    ]
    scale = _scale((point["value"] for point in points), zero=True)
    spec = {
        "data": {"values": points},
        "mark": {"type": "line", "interpolate": "step-after", "tooltip": True},
        "encoding": {
            "x": {"field": "value", "type": "quantitative", "title": f"{quantity} ({unit})", "scale": scale},
            "y": {"field": "share", "type": "quantitative", "title": "share of values", "axis": {"format": "%"}},
            "color": {"field": "name", "type": "nominal", "title": None},
        },
    }
    lines = [
        (name, len(own), *(own[min(len(own) - 1, math.ceil(p * len(own)) - 1)] for p in (0.5, 0.95, 0.99)))
        for name, own in known.items()
    ]
    text = "; ".join(f"{name}: median {line[2]:.4g} {unit}" for name, line in zip(known, lines, strict=True))
    headers = (named, "number of values", f"p50 ({unit})", f"p95 ({unit})", f"p99 ({unit})")
    return Chart(key, heading, f"Cumulative distribution. {text}.", spec, headers, lines)


def _quantiles(ordered: Sequence[float]) -> list[tuple[float, float]]:
    count = len(ordered)
    places = sorted({round(i * (count - 1) / (QUANTILES - 1)) for i in range(QUANTILES)})
    return [((place + 1) / count, ordered[place]) for place in places]


def trade_off(rows: Sequence[ExperimentRow], names: Mapping[str, str]) -> Chart | None:
    """Return a chart of energy per token against throughput; None if no experiment has a value for both."""
    known = [row for row in rows if row.output_tokens_per_s and row.energy_per_output_token_j]
    if not known:
        return None
    front = {row.experiment_id for row in _pareto(known)}
    values = [
        {
            "name": names[row.experiment_id],
            "speed": row.output_tokens_per_s,
            "speed_low": row.output_tokens_per_s_ci95_low,
            "speed_high": row.output_tokens_per_s_ci95_high,
            "cost": row.energy_per_output_token_j,
            "cost_low": row.energy_per_output_token_ci95_low_j,
            "cost_high": row.energy_per_output_token_ci95_high_j,
            "model": row.model,
            "kind": _kind(row),
            "front": row.experiment_id in front,
        }
        for row in known
    ]
    speeds, costs = (
        _scale(each[f"{name}{end}"] for each in values for end in ("", "_low", "_high")) for name in ("speed", "cost")
    )
    x = {"field": "speed", "type": "quantitative", "title": "output tokens/s", "scale": speeds}
    y = {"field": "cost", "type": "quantitative", "title": "energy per output token (J/token)", "scale": costs}
    bars: list[Spec] = []
    if any(each["cost_low"] is not None for each in values):
        bars = [
            {"mark": "rule", "encoding": {"x": x, "y": {**y, "field": "cost_low"}, "y2": {"field": "cost_high"}}},
            {"mark": "rule", "encoding": {"y": y, "x": {**x, "field": "speed_low"}, "x2": {"field": "speed_high"}}},
        ]
    spec = {
        "data": {"values": values},
        "layer": [
            *bars,
            {
                "transform": [{"filter": {"field": "front", "equal": True}}],
                "mark": {"type": "line", "strokeDash": [4, 3], "opacity": 0.6},
                "encoding": {"x": x, "y": y, "order": {"field": "speed", "type": "quantitative"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 60, "tooltip": True},
                "encoding": {
                    "x": x,
                    "y": y,
                    "size": {"condition": {"test": {"field": "front", "equal": True}, "value": 120}, "value": 50},
                    "color": {"field": "model", "type": "nominal", "title": "model"},
                    "shape": {"field": "kind", "type": "nominal", "title": "energy"},
                },
            },
        ],
    }
    return Chart(
        "throughput-and-energy",
        "Throughput and energy per token",
        f"Experiments as points: {len(known)}; on the Pareto front: {len(front)}. An experiment is on the front if "
        "no other is equal or better in both throughput and energy per token.",
        spec,
        (
            "experiment", "output tokens/s", "95% from", "95% to", "J/token", "95% from", "95% to", "energy",
            "on the Pareto front",
        ),
        [
            (
                each["name"], each["speed"], each["speed_low"], each["speed_high"], each["cost"], each["cost_low"],
                each["cost_high"], each["kind"], "yes" if each["front"] else "no",
            )
            for each in values
        ],
        "The dashed line joins the experiments on the Pareto front, whose points are larger. The intervals, where "
        "shown, are computed over the cycles of an experiment.",
    )  # fmt: skip


def _pareto(rows: Iterable[ExperimentRow]) -> list[ExperimentRow]:
    """Return the Pareto front of throughput and energy per token.

    A row is on the front if no other row is better in one of the two and at least as good in the other. Of rows with
    equal values, only the first is returned.
    """
    best = math.inf
    front = []
    for row in sorted(rows, key=lambda each: (-(each.output_tokens_per_s or 0), each.energy_per_output_token_j or 0)):
        if (row.energy_per_output_token_j or math.inf) < best:
            best = row.energy_per_output_token_j or math.inf
            front.append(row)
    return front


def heat_map(rows: Sequence[ExperimentRow]) -> Chart | None:
    """Return a heat map of the energy per token or, if no energy is known, of throughput.

    None is returned unless exactly two settings vary and there are from 4 to `MOST_CELLS` experiments, at least one of
    which has a value.
    """
    if not 4 <= len(rows) <= MOST_CELLS:
        return None
    configs = [flat_config(row) for row in rows]
    varying = varying_keys(configs)
    if len(varying) != 2:
        return None
    metric = PRIMARY if any(getattr(row, PRIMARY) is not None for row in rows) else "output_tokens_per_s"
    unit, words = MEASURES[metric]
    cells: dict[tuple[str, str], list[float]] = {}
    for row, config in zip(rows, configs, strict=True):
        if (value := getattr(row, metric)) is not None:
            cells.setdefault((config.get(varying[0], "–"), config.get(varying[1], "–")), []).append(value)
    if not cells:
        return None
    means = {key: sum(own) / len(own) for key, own in cells.items()}
    values = [{"one": one, "two": two, "value": mean} for (one, two), mean in means.items()]
    places = {
        "x": {**_category("one", _ordered(one for one, _ in means)), "title": varying[0], "axis": {"labelAngle": 0}},
        "y": {**_category("two", _ordered(two for _, two in means)), "title": varying[1]},
    }
    spec = {
        "data": {"values": values},
        "height": CELL_PX * len({two for _, two in means}),
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {**places, "color": {"field": "value", "type": "quantitative", "title": f"{words} ({unit})"}},
    }
    return Chart(
        "heat-map",
        f"{words.capitalize()} by {varying[0]} and {varying[1]}",
        f"Heat map with {len(values)} cells, from {min(means.values()):.4g} to {max(means.values()):.4g} {unit}.",
        spec,
        (varying[0], varying[1], f"{words} ({unit})"),
        [(each["one"], each["two"], each["value"]) for each in values],
    )


def varying_keys(configs: Sequence[Mapping[str, str]]) -> list[str]:
    """Return the keys whose values differ between configurations."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if len({config.get(key) for config in configs}) > 1]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def flat_config(row: ExperimentRow) -> dict[str, str]:
    """Return the values of an experiment's configuration as strings, keyed by dotted path."""
    return _flat(config_of(row))


def forest(answer: Answer) -> Chart | None:
    """Return the forest plot of a campaign, with each arm's ratio to the baseline; None if there are no ratios."""
    pairs = [pair for pair in answer.pairs if pair.is_primary and pair.ratio is not None]
    if not pairs:
        return None
    words = MEASURES[answer.definition.campaign.primary][1]
    values = [{"arm": p.arm, "ratio": p.ratio, "low": p.ci_low, "high": p.ci_high, "verdict": p.verdict} for p in pairs]
    ends = [1.0, *(end for p in pairs for end in (p.ratio, p.ci_low, p.ci_high) if end)]
    y = _category("arm", [pair.arm for pair in pairs])
    x = {
        "type": "quantitative",
        "title": f"{words}, relative to {answer.definition.baseline}",
        "scale": {"type": "log", "domain": [min(ends) / FOREST_MARGIN, max(ends) * FOREST_MARGIN], "nice": False},
    }
    spec = {
        "height": STEP_PX * len(pairs),
        "layer": [
            {
                "data": {"values": [{"one": 1}]},
                "mark": {"type": "rule", "strokeDash": [2, 2]},
                "encoding": {"x": {"field": "one", **x}},
            },
            {
                "data": {"values": values},
                "mark": {"type": "rule", "strokeWidth": 3},
                "encoding": {"y": y, "x": {"field": "low", **x}, "x2": {"field": "high"}},
            },
            {
                "data": {"values": values},
                "mark": {"type": "point", "filled": True, "size": 80, "tooltip": True},
                "encoding": {"y": y, "x": {"field": "ratio", **x}},
            },
        ],
    }
    return Chart(
        "forest",
        f"{words.capitalize()} of each arm, relative to {answer.definition.baseline}",
        "; ".join(f"{p.arm}: {p.ratio:.4g} times the baseline ({p.verdict})" for p in pairs) + ".",
        spec,
        ("arm", "ratio", "from", "to", "confidence", "cycles", "p (Holm)", "verdict"),
        [(p.arm, p.ratio, p.ci_low, p.ci_high, p.confidence, p.cycles, p.p_adjusted, p.verdict) for p in pairs],
    )


def over_the_campaign(answer: Answer) -> list[Chart]:
    """Return the charts of a campaign's cells by position in the cycle, and in the order of measurement."""
    primary = answer.definition.campaign.primary
    unit, words = MEASURES[primary]
    known = [(c, getattr(c.row, primary)) for c in answer.cells if c.row is not None and getattr(c.row, primary)]
    if not known:
        return []
    known.sort(key=lambda each: each[0].row.started_at if each[0].row else "")
    scale = _scale(value for _, value in known)
    values = [
        {"arm": cell.arm, "cycle": cell.cycle, "position": cell.position, "order": order, "value": value}
        for order, (cell, value) in enumerate(known, start=1)
    ]
    found = []
    for key, heading, field, kind, title in (
        ("position", "Position in the cycle", "position", "ordinal", "position in the cycle"),
        ("drift", "Drift over the campaign", "order", "quantitative", "order of measurement"),
    ):
        spec = {
            "data": {"values": values},
            "mark": {"type": "point", "filled": True, "tooltip": True},
            "encoding": {
                "x": {"field": field, "type": kind, "title": title, "axis": {"labelAngle": 0}},
                "y": {"field": "value", "type": "quantitative", "title": f"{words} ({unit})", "scale": scale},
                "color": {"field": "arm", "type": "nominal", "title": "arm"},
            },
        }
        found.append(
            Chart(
                key,
                heading,
                f"{len(values)} cells as points, by {title}.",
                spec,
                ("arm", "cycle", "position", "order", f"{words} ({unit})"),
                [(v["arm"], v["cycle"], v["position"], v["order"], v["value"]) for v in values],
            )
        )
    return found


def over_time(answer: ScheduleAnswer) -> list[Chart]:
    """Return the charts of a schedule: the primary metric of each run, and its means by time of day and by weekday."""
    unit, words = MEASURES[PRIMARY]
    values = [
        # The browser is told that the local time is UTC, so that it shows the time unchanged.
        {"at": f"{run.at.isoformat()}Z", "arm": arm or "runs", "value": own}
        for run in answer.runs
        for arm in answer.arms
        if (own := run.value(arm, PRIMARY))
    ]
    if not values:
        return []
    value = {"type": "quantitative", "title": f"{words} ({unit})"}
    zone = answer.manifest.time_zone
    several = len(answer.arms) > 1
    spec = {
        "data": {"values": values},
        "mark": {"type": "line", "point": True, "tooltip": True},
        "encoding": {
            "x": {"field": "at", "type": "temporal", "scale": {"type": "utc"}, "title": f"planned start ({zone})"},
            "y": {"field": "value", **value, "scale": _scale(each["value"] for each in values)},
            "color": {"field": "arm", "type": "nominal", "title": "arm" if several else None},
        },
    }
    lines = [(str(each["at"]).removesuffix("Z").replace("T", " "), each["arm"], each["value"]) for each in values]
    headers = (f"planned start ({zone})", "arm", f"{words} ({unit})")
    heading = f"{words.capitalize()} over time"
    found = [Chart("over-time", heading, f"{len(values)} values, by planned start.", spec, headers, lines)]
    for primary in (each for each in answer.found if each.is_primary):
        for variation in (primary.by_time, primary.by_weekday):
            if len(variation.levels) > 1:
                found.append(_by_level(variation, primary.arm, value))
    return found


def _by_level(variation: Variation, arm: str, value: Spec) -> Chart:
    """Return the chart of a schedule's means by time of day or by weekday, with their intervals."""
    levels = variation.levels
    values = [{"level": each.name, "mean": each.mean, "low": each.ci95_low, "high": each.ci95_high} for each in levels]
    x = {**_category("level", [each.name for each in levels]), "title": variation.factor, "axis": {"labelAngle": 0}}
    value = {**value, "scale": _scale(each[end] for each in values for end in ("mean", "low", "high"))}
    spec = {
        "data": {"values": values},
        "layer": [
            {"mark": "rule", "encoding": {"x": x, "y": {"field": "low", **value}, "y2": {"field": "high"}}},
            {
                "mark": {"type": "point", "filled": True, "size": 60, "tooltip": True},
                "encoding": {"x": x, "y": {"field": "mean", **value}},
            },
        ],
    }
    of_arm = f" of {arm}" if arm else ""
    return Chart(
        f"by-{variation.factor}-{arm}",
        f"Means by {variation.factor}{of_arm}",
        f"{len(levels)} means; verdict: {variation.verdict}.",
        spec,
        (variation.factor, "runs", "days", "mean", "95% from", "95% to"),
        [(each.name, each.runs, each.days, each.mean, each.ci95_low, each.ci95_high) for each in levels],
        "Geometric means, with Student's t-intervals over the days.",
    )


def _scale(values: Iterable[Any], *, zero: bool = False) -> Spec:
    """Return a scale for values, which includes 0 if `zero` is set.

    If all values are equal and not 0, the scale is a narrow range around this value, whether or not `zero` is set.
    """
    known = {float(value) for value in values if value is not None}
    if len(known) != 1 or 0 in known:
        return {"zero": zero}
    (only,) = known
    return {"zero": False, "domain": sorted((only / EQUAL_MARGIN, only * EQUAL_MARGIN)), "nice": False}


def _category(field: str, order: Sequence[str]) -> Spec:
    return {"field": field, "type": "nominal", "title": None, "sort": list(dict.fromkeys(order)),
            "axis": {"labelLimit": 260}}  # fmt: skip


def _ordered(texts: Iterable[str]) -> list[str]:
    """Return distinct strings in numerical order or, if they are not all numbers, in alphabetical order."""
    distinct = set(texts)
    try:
        return sorted(distinct, key=float)
    except ValueError:
        return sorted(distinct)
