"""Collects what a report shows: rows, warnings, traces, distributions, and what differs between experiments."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lem.errors import LemError, ResultsError
from lem.record import CodedWarning, PowerRecord, ProcessRecord, RequestRecord
from lem.reports import charts
from lem.reports.charts import Chart, flat_config
from lem.results import campaign, parquet, schedule, schedule_answer, schedule_show
from lem.results.aggregate import catch_up, read
from lem.results.campaign import Answer
from lem.results.campaign_show import sentences
from lem.results.directory import ExperimentDir
from lem.results.jobs import CELLS
from lem.results.schedule import Start
from lem.results.schema import ExperimentRow
from lem.results.store import Store
from lem.results.tables import Tables, read_file
from lem.warning_codes import WARNINGS

# Up to the first number of experiments, each power trace has a chart of its own. With more experiments, at most the
# second number of traces share one chart.
MOST_TRACES = 4
MOST_SMALL_TRACES = 16
# With more experiments than this, their plans are not read, so the commands that run them again are not shown.
MOST_COMMANDS = 20_000
# A trace with more samples is thinned out, but not to fewer than this number.
MOST_SAMPLES = 3_000
# Columns of the table of experiments, with their headers and units.
COLUMNS = {
    "experiment_id": ("experiment", ""),
    "status": ("status", ""),
    "started_at": ("started", ""),
    "model": ("model", ""),
    "backend": ("backend", ""),
    "batch_size": ("batch", ""),
    "requests_completed": ("requests", ""),
    "output_tokens": ("output tokens", ""),
    "duration_s": ("duration", "s"),
    "output_tokens_per_s": ("output tokens/s", "token/s"),
    "latency_mean_s": ("mean latency", "s"),
    "ttft_mean_s": ("mean TTFT", "s"),
    "energy_j": ("energy", "J"),
    "energy_per_output_token_j": ("energy per output token", "J/token"),
    "average_power_w": ("average power", "W"),
    "co2e_g": ("CO2e", "g"),
    "energy_source": ("energy source", ""),
    "device": ("device", ""),
}
ENVIRONMENT = ("hostname", "device", "engine_version", "lem_version", "dtype", "slurm_node")


@dataclass(frozen=True)
class Trust:
    """A kind of warning in the report: how many experiments have it, what it means, and its remedy."""

    code: str
    count: int
    meaning: str
    remedy: str
    example: str


@dataclass(frozen=True)
class Setting:
    """A setting of the configuration or the environment, with the number of experiments that have each value."""

    key: str
    values: Sequence[tuple[str, int]]

    @property
    def differs(self) -> bool:
        """Whether experiments have different values."""
        return len(self.values) > 1


@dataclass(frozen=True)
class Content:
    """The content of a report."""

    title: str
    source: str
    rows: Sequence[ExperimentRow]
    trust: Sequence[Trust]
    charts: Sequence[Chart]
    settings: Sequence[Setting]
    # The command that runs an experiment again, keyed by its id; only for experiments whose files still exist.
    commands: Mapping[str, str]
    answer: Answer | None = None
    sentences: Sequence[str] = ()
    problems: Sequence[str] = field(default=())

    @property
    def failed(self) -> list[ExperimentRow]:
        """The rows of experiments that did not complete."""
        return [row for row in self.rows if row.status != "completed"]


def of_experiments(store: Store, ids: Sequence[str]) -> Content:
    """Return the content of a report on the given experiments or, if none are given, on all that have a row.

    Raises:
        ResultsError: an experiment does not exist or has no results, or no experiment has a row.
    """
    late = catch_up(store)
    if ids:
        rows = [_row(store, store.find(text)) for text in ids]
        return _content(store, ", ".join(row.experiment_id for row in rows), rows, late)
    rows, damaged = Tables(store).rows()
    if not rows:
        raise ResultsError(
            f"{store.root} has no experiments to report on; lem results list --all also lists experiments without rows."
        )
    title = "1 experiment" if len(rows) == 1 else f"{len(rows)} experiments"
    return _content(store, title, rows, [*late, *damaged])


def of_campaign(store: Store, name: str) -> Content:
    """Return the content of a report on a campaign, given its name or directory.

    Raises:
        ResultsError: there is no such campaign, or its files are damaged.
    """
    folder = campaign.folder_named(name, store)
    definition, store = campaign.read_definition(folder), campaign.store_of(folder)
    cells = campaign.read_cells(store, folder)
    found = campaign.answer(definition, cells)
    ids = [cell.experiment_id for cell in cells if cell.experiment_id]
    rows = [row for experiment_id in ids if (row := _known_row(store, experiment_id)) is not None]
    return _content(store, f"Campaign {definition.name}", rows, [], found)


def of_schedule(store: Store, text: str) -> Content:
    """Return the content of a report on a schedule, given its name, its id or its directory.

    Raises:
        ResultsError: there is no such schedule, or its file is damaged.
    """
    folder = Path(text)
    if not (folder / schedule.TABLE).is_file():
        folder = schedule.folder_of(store, schedule.load_schedule(store, text).name)
    manifest, store = schedule.read_manifest(folder), schedule.store_of(folder)
    found = schedule_answer.answer(store, manifest)
    rows = [row for run in found.runs for own in run.rows.values() for row in own]
    content = _content(store, f"Schedule {manifest.name}", rows, [], extra=charts.over_time(found))
    notes = [_trust_in(note) for note in found.warnings]
    return replace(
        content,
        trust=[*notes, *content.trust],
        sentences=list(schedule_show.sentences(found)),
        problems=[
            *(_without_result(run.start) for run in found.runs if run.start.status in schedule_answer.LOST),
            *content.problems,
        ],
    )


def _without_result(start: Start) -> str:
    reason = f": {start.error}" if start.error else ""
    status = "failed" if start.status == "failed" else f"was {start.status}"
    return f"Run {start.number} ({start.planned_at}) {status}{reason}."


def of_grid(folder: Path) -> Content:
    """Return the content of a report on a batch or sweep, given its directory or its list of experiments.

    Raises:
        ResultsError: the directory has no list of experiments, or no listed experiment has results.
    """
    folder = folder.parent if folder.name == CELLS else folder
    file = folder / CELLS
    try:
        entries = json.loads(file.read_bytes())
        places = [Path(entry["directory"]) for entry in entries if entry["directory"]]
    except (OSError, ValueError, TypeError, KeyError):
        raise ResultsError(
            f"--grid: {file} cannot be read; give the file whose path lem batch or a sweep prints when it ends "
            "(List of experiments: …), or its directory."
        ) from None
    rows = [row for place in places if (row := _known_row(Store(place.parent.parent), place.name)) is not None]
    if not rows:
        raise ResultsError(f"--grid: no experiment in {file} has results.")
    return _content(Store(places[0].parent.parent), f"Sweep {folder.name}", rows, [])


def _row(store: Store, directory: ExperimentDir) -> ExperimentRow:
    tables = Tables(store)
    at = tables.location(directory.id)
    return tables.row(directory.id, at) if at else read(directory, strict=False).row


def _known_row(store: Store, experiment_id: str) -> ExperimentRow | None:
    try:
        return _row(store, store.directory(experiment_id))
    except LemError:
        return None


def _content(
    store: Store,
    title: str,
    rows: Sequence[ExperimentRow],
    problems: Sequence[str],
    answer: Answer | None = None,
    extra: Sequence[Chart] = (),
) -> Content:
    completed = [row for row in rows if row.status == "completed"]
    names, found = _names(rows), list(problems)
    shown = [*extra, *_charts(store, completed, names, answer, found)]
    return Content(
        title=title,
        source=str(store.root.resolve()),
        rows=rows,
        trust=list(_trust(rows, answer)),
        charts=shown,
        settings=_settings(rows),
        commands=_commands(store, rows) if len(rows) <= MOST_COMMANDS else {},
        answer=answer,
        sentences=list(sentences(answer)) if answer else (),
        problems=found,
    )


def _commands(store: Store, rows: Sequence[ExperimentRow]) -> dict[str, str]:
    found = {}
    for row in rows:
        try:
            plan = store.directory(row.experiment_id).plan()
        except ResultsError:
            continue
        file = [plan.config_file] if plan.config_file else []
        found[row.experiment_id] = shlex.join(["lem", "experiment", *file, *plan.overrides])
    return found


def _names(rows: Sequence[ExperimentRow]) -> dict[str, str]:
    """Return a short name for each experiment: its arm and cycle in a campaign, otherwise its id."""
    return {
        row.experiment_id: f"{row.campaign_arm}, cycle {row.campaign_cycle}" if row.campaign_arm else row.experiment_id
        for row in rows
    }


def _trust_in(note: CodedWarning) -> Trust:
    kind = WARNINGS[note.code]
    return Trust(note.code, 1, kind.meaning, kind.remedy, note.text)


def _trust(rows: Sequence[ExperimentRow], answer: Answer | None) -> Iterator[Trust]:
    """Yield the campaign's warnings, and then the kinds of warning that the experiments have, most frequent first."""
    for note in answer.warnings if answer else ():
        yield _trust_in(note)
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for row in rows:
        for code, text in {text.partition(":")[0]: text for text in row.warnings}.items():
            counts[code] += 1
            examples.setdefault(code, f"{row.experiment_id}: {text.partition(':')[2].strip()}")
    for code, count in counts.most_common():
        kind = WARNINGS.get(code)
        meaning, remedy = (kind.meaning, kind.remedy) if kind else ("Another version of lem gave this warning.", "")
        yield Trust(code, count, meaning, remedy, examples[code])


def _charts(
    store: Store,
    rows: Sequence[ExperimentRow],
    names: Mapping[str, str],
    answer: Answer | None,
    problems: list[str],
) -> Iterator[Chart]:
    """Yield the charts; add a message to `problems` for each file that cannot be read."""
    if answer is not None and (chart := charts.forest(answer)):
        yield chart
        yield from charts.over_the_campaign(answer)
    yield from charts.energy_bars(rows, names)
    if len(rows) <= MOST_TRACES:
        for row in rows:
            if trace := _trace(store, row, names[row.experiment_id], problems, MOST_SAMPLES):
                yield charts.power_trace(trace)
    else:
        yield from charts.powers(rows)
        yield from _small_traces(store, rows, names, problems)
    if len(rows) <= charts.MOST_DISTRIBUTIONS:
        yield from _distributions(store, rows, names, problems)
    else:
        yield from charts.latencies(rows)
    if chart := charts.trade_off(rows, names):
        yield chart
    if answer is None and (chart := charts.heat_map(rows)):
        yield chart


def _trace(
    store: Store, row: ExperimentRow, name: str, problems: list[str], most_samples: int
) -> charts.PowerTrace | None:
    """Return the latest power trace of an experiment; None if there is none, or if a file is damaged."""
    directory = store.directory(row.experiment_id)
    try:
        traced = [
            (r, file)
            for r in _records(directory)
            if (file := directory.power_file(r.rank, r.cycle, r.attempt)).is_file()
        ]
        if not traced:
            return None
        record, file = max(traced, key=lambda each: (each[0].cycle, each[0].attempt))
        found = parquet.records(read_file(file), PowerRecord)
    except LemError as error:
        problems.append(str(error))
        return None
    samples = _thinned(found, most_samples)
    if not samples:
        return None
    window = record.phase("measured")
    where = f"{name}, cycle {record.cycle}" if row.cycles_planned > 1 else name
    return charts.PowerTrace(where, samples, _edges(samples, window.duration_s if window else None))


def _small_traces(
    store: Store, rows: Sequence[ExperimentRow], names: Mapping[str, str], problems: list[str]
) -> Iterator[Chart]:
    """Yield one chart with the traces of many experiments, or of some of them if there are too many."""
    traced = [row for row in rows if _has_trace(store.directory(row.experiment_id))]
    drawn = _spread_by_power(traced)
    most = MOST_SAMPLES // max(1, len(drawn))
    traces = [_trace(store, row, names[row.experiment_id], problems, most) for row in drawn]
    if found := [trace for trace in traces if trace is not None]:
        yield charts.power_traces(found, _about_traces(len(rows), len(traced), len(drawn)))


def _has_trace(directory: ExperimentDir) -> bool:
    try:
        return any(name.startswith("power_") for name in os.listdir(directory.path))
    except OSError:  # its raw files have been removed
        return False


def _spread_by_power(rows: Sequence[ExperimentRow]) -> list[ExperimentRow]:
    """Return at most `MOST_SMALL_TRACES` rows, spread evenly from the lowest to the highest average power."""
    if len(rows) <= MOST_SMALL_TRACES:
        return list(rows)
    by_power = sorted(rows, key=lambda row: row.average_power_w or 0.0)
    step = (len(rows) - 1) / (MOST_SMALL_TRACES - 1)
    chosen = {by_power[round(step * number)].experiment_id for number in range(MOST_SMALL_TRACES)}
    return [row for row in rows if row.experiment_id in chosen]


def _about_traces(experiments: int, traced: int, drawn: int) -> str:
    lacking = experiments - traced
    parts = []
    if drawn < traced:
        parts.append(
            f"Of {traced} experiments with a trace, {drawn} are drawn: those with the lowest and the highest average "
            f"power, and others at even steps in between. To choose others, name up to {MOST_SMALL_TRACES} "
            "experiments: lem results report ID ID …."
        )
    parts.append("All panels have the same scales, and the measured window is shaded.")
    if lacking:
        parts.append(f"Experiments without a trace: {lacking} of {experiments}.")
    return " ".join(parts)


def _records(directory: ExperimentDir) -> list[ProcessRecord]:
    return directory.records() if directory.path.is_dir() else []


def _thinned(found: Sequence[PowerRecord], most: int) -> list[dict[str, Any]]:
    """Return evenly spaced samples, plus evenly spaced samples among those that have a temperature.

    If there are at most `most` samples, all are kept; otherwise, the number kept is between `most` and about twice
    `most`. The same applies to the samples that have a temperature.
    """
    by_device: dict[str, list[PowerRecord]] = {}
    for each in found:
        by_device.setdefault(each.device, []).append(each)
    step = max(1, len(found) // most)
    warm_step = max(1, sum(each.temperature_c is not None for each in found) // most)
    return [
        {"t_s": each.t_s, "device": device, "power_w": each.power_w, "temperature_c": each.temperature_c}
        for device, own in by_device.items()
        for each in _spread(own, step, warm_step)
    ]


def _spread(own: Sequence[PowerRecord], step: int, warm_step: int) -> Iterator[PowerRecord]:
    """Yield every `step`th sample, plus every `warm_step`th of the samples that have a temperature."""
    warm = 0
    for place, each in enumerate(own):
        is_warm = each.temperature_c is not None
        if place % step == 0 or (is_warm and warm % warm_step == 0):
            yield each
        warm += is_warm


def _edges(samples: Sequence[Mapping[str, Any]], window_s: float | None) -> list[tuple[float, float, str]]:
    """Return the start, end and name of each phase of a trace; times are relative to the opening of the window."""
    first_s, last_s = min(each["t_s"] for each in samples), max(each["t_s"] for each in samples)
    before = [(first_s, 0.0, "before the window")] if first_s < 0 else []
    if not window_s:
        return before
    after = [(window_s, last_s, "after the window")] if last_s > window_s else []
    return [*before, (0.0, window_s, charts.WINDOW), *after]


def _distributions(
    store: Store, rows: Sequence[ExperimentRow], names: Mapping[str, str], problems: list[str]
) -> Iterator[Chart]:
    columns = {"latency_s": "Latency", "ttft_s": "Time to first token", "itl_s": "Inter-token latency"}
    values: dict[str, dict[str, list[float]]] = {column: {} for column in columns}
    for row in rows:
        for request in _requests(store, row.experiment_id, problems):
            own = names[row.experiment_id]
            for column in ("latency_s", "ttft_s"):
                if (value := getattr(request, column)) is not None:
                    values[column].setdefault(own, []).append(value)
            if request.itl_s:
                values["itl_s"].setdefault(own, []).extend(request.itl_s)
    for column, heading in columns.items():
        if chart := charts.distributions(heading, "s", values[column]):
            yield chart


def _requests(store: Store, experiment_id: str, problems: list[str]) -> list[Any]:
    """Return an experiment's request rows; empty if it has no rows, or if their file cannot be read."""
    at = Tables(store).location(experiment_id)
    if at is None:
        return []
    try:
        found = parquet.records(read_file(store.requests_table / at.file), RequestRecord)
    except LemError as error:
        problems.append(str(error))
        return []
    return [each for each in found if each.experiment_id == experiment_id]


def _settings(rows: Sequence[ExperimentRow]) -> list[Setting]:
    """Return the environment's and the configuration's settings; those that differ between experiments come first."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in ENVIRONMENT}
    for name in ENVIRONMENT:
        counts[name].update(str(getattr(row, name) or "–") for row in rows)
    # Thousands of experiments may share a configuration, so each configuration is read only once.
    examples = {row.config_json: row for row in rows}
    for text, number in Counter(row.config_json for row in rows).items():
        for key, value in flat_config(examples[text]).items():
            counts.setdefault(key, Counter())[value] += number
    for values in counts.values():
        if lacking := len(rows) - values.total():
            values["–"] += lacking
    found = [Setting(key, values.most_common()) for key, values in counts.items()]
    return sorted(found, key=lambda setting: not setting.differs)
