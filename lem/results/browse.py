"""The commands that print the content of a results directory, and `lem aggregate`, which writes its tables."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from msgspec import structs

from lem.errors import ResultsError, RunError, did_you_mean, nearest
from lem.machine.collector import paused_collector
from lem.quantities import one_line, plain, quantity
from lem.record import DeviceState, Environment
from lem.results import show
from lem.results.aggregate import Aggregated, aggregate_all, catch_up, is_fresh, read
from lem.results.choosing import check_status
from lem.results.codec import to_json, to_plain
from lem.results.delete import finish as finish_deleting
from lem.results.directory import ExperimentDir
from lem.results.jobs import InJob
from lem.results.plan import FINISHED, State
from lem.results.rows import Rows
from lem.results.schema import CycleRow, ExperimentRow
from lem.results.show import NOT_MEASURED, STATUS_STYLE, WIDE, console, marked, print_table, say_estimates
from lem.results.store import ID, Store, age, default_root, results_flag, resume_command
from lem.results.tables import Tables


def store_at(results_dir: Path | None) -> Store:
    """Return the results directory given by --results-dir or, if that was not given, the default one.

    A deletion that was cut short earlier is finished first, unless the directory cannot be written to.
    """
    store = Store(results_dir or default_root())
    with suppress(OSError):
        finish_deleting(store)
    return store


# ------------------------------------------------------------------ list
@dataclass(frozen=True)
class Selection:
    """Which experiments to list, and in which order."""

    status: str | None = None
    model: str | None = None
    backend: str | None = None
    dataset: str | None = None
    campaign: str | None = None
    schedule: str | None = None
    since: str | None = None
    last: int | None = None
    sort: str | None = None
    reverse: bool = False

    def __post_init__(self) -> None:
        check_status(self.status)
        if self.sort is not None and self.sort not in ExperimentRow.__struct_fields__:
            close = did_you_mean(self.sort, ExperimentRow.__struct_fields__)
            raise ResultsError(
                f"--sort: there is no column '{self.sort}'.{close} docs/reference/results.md lists the columns."
            )
        self._first_id()

    def _first_id(self) -> str:
        """Return the lowest id that an experiment started at --since or later can have; empty without --since."""
        if self.since is None:
            return ""
        try:
            since = datetime.fromisoformat(self.since)
        except ValueError:
            text = f"--since: '{self.since}' is not a date; use a form such as 2026-01-31 or 2026-01-31T10:00."
            raise ResultsError(text) from None
        return f"exp_{since.astimezone() if since.tzinfo else since:%Y%m%d_%H%M%S}"

    def of(self, listed: Iterable[Listed]) -> list[Listed]:
        """Return the selected experiments in order."""
        first = self._first_id()
        chosen = [one for one in listed if one.experiment_id >= first and self._fits(one)]
        if self.last is not None:
            chosen = chosen[max(0, len(chosen) - self.last) :]
        if self.sort is not None:
            chosen = _sorted(chosen, self.sort, self.reverse)
        elif self.reverse:
            chosen.reverse()
        return chosen

    def _fits(self, one: Listed) -> bool:
        pairs = ((self.model, one.model), (self.backend, one.backend), (self.dataset, one.dataset))
        within = all(wanted is None or wanted.lower() in text.lower() for wanted, text in pairs)
        return within and self._is_of_study(one.row) and self.status in (None, one.status)

    def _is_of_study(self, row: ExperimentRow | None) -> bool:
        """Return whether a row belongs to the wanted campaign and schedule, if any."""
        wanted = {"campaign": self.campaign, "schedule": self.schedule}
        names = {column: name for column, name in wanted.items() if name is not None}
        return not names or (row is not None and all(getattr(row, column) == name for column, name in names.items()))


def _sorted(listed: Sequence[Listed], column: str, reverse: bool) -> list[Listed]:
    """Sort by a column of the rows; experiments without a value come last in either direction."""
    known = [one for one in listed if one.row and getattr(one.row, column) is not None]
    others = [one for one in listed if not one.row or getattr(one.row, column) is None]
    return sorted(known, key=lambda one: getattr(one.row, column), reverse=reverse) + others


def list_experiments(
    store: Store,
    selection: Selection,
    *,
    everything: bool,
    in_jobs: Mapping[Path, InJob] = MappingProxyType({}),
    as_json: bool = False,
) -> int:
    """Print a line for each selected experiment that has a row or a Slurm job.

    With `everything`, or if a status is selected, experiments that have neither are included.

    `in_jobs` maps the directories of unfinished experiments to their Slurm jobs. The result is 1 if a file could not be
    read, else 0.
    """
    late = catch_up(store)
    with paused_collector():
        damaged = _list(store, selection, everything or selection.status is not None, in_jobs, as_json)
    for problem in damaged:
        show.console(stderr=True).print(one_line(problem), markup=False, style="red")
    for text in [*late, *Tables(store).strangers()]:
        show.console(stderr=True).print(f"Warning: {one_line(text)}", markup=False, style="yellow")
    return 1 if damaged else 0


def _list(
    store: Store, selection: Selection, everything: bool, in_jobs: Mapping[Path, InJob], as_json: bool
) -> list[str]:
    """Print the list; return a message for each file that could not be read."""
    more = [*([selection.sort] if selection.sort else []), *(["campaign"] if selection.campaign else [])]
    more += ["schedule"] if selection.schedule else []
    of_table = dict.fromkeys((*COLUMNS, *more))
    rows, damaged = Tables(store).rows(None if as_json else list(of_table))
    ids = store.ids()
    raw, with_row = set(ids), {row.experiment_id for row in rows}
    of_ids = {directory.name: job for directory, job in in_jobs.items() if directory.parent == store.raw.resolve()}
    listed = [_with_row(store, row, row.experiment_id in raw, of_ids.get(row.experiment_id)) for row in rows]
    without_row = [name for name in ids if name not in with_row and (everything or name in of_ids)]
    listed += [_without_row(store.directory(name), of_ids.get(name)) for name in without_row]
    chosen = selection.of(sorted(listed, key=lambda one: age(one.experiment_id)))
    if as_json:
        _print_json(chosen)
    elif chosen:
        show_list(chosen)
    elif ids and not listed:
        print(f"No experiment in {store.root} has a row; use --all to list experiments without rows.")
    else:
        print(f"No {'matching ' if listed else ''}experiments in {store.root}.")
    return damaged


def _print_json(listed: Sequence[Listed]) -> None:
    """Print a JSON list one experiment at a time, because thousands of them in one string could take a gigabyte."""
    print("[")
    for i, one in enumerate(listed, start=1):
        print(show.as_json(_plain(one), indent=None) + ("," if i < len(listed) else ""))
    print("]")


def _with_row(store: Store, row: ExperimentRow, has_files: bool, job: InJob | None) -> Listed:
    listed = Listed(row.experiment_id, row.status, row.model, row.backend, row.dataset, row, row.error)
    if job is not None:
        return _with_job(listed, job)
    if row.status == "completed" or not has_files:
        return listed
    # The experiment may have been resumed since its row was written.
    state = store.directory(row.experiment_id).state()
    return replace(listed, status="running", detail=_where(state)) if state.status == "running" else listed


def _with_job(listed: Listed, job: InJob) -> Listed:
    return replace(listed, status="running" if job.is_running else "pending", detail=job.words, job=job)


def _without_row(directory: ExperimentDir, job: InJob | None) -> Listed:
    state = directory.state()
    status, detail = ("running", _where(state)) if state.status == "running" else (state.status, state.error)
    if state.status in FINISHED:
        status, detail = "completed", f"run lem aggregate {directory.id} to write its row"
    try:
        wanted = directory.plan().experiment
    except ResultsError as error:
        return Listed(directory.id, status, "", "", "", detail=str(error))
    found = Listed(directory.id, status, wanted.model or "", wanted.backend.name, wanted.dataset.name, detail=detail)
    return found if job is None or state.status in FINISHED else _with_job(found, job)


def _where(state: State) -> str:
    return f"is running as process {state.pid} on {state.host}"


def _plain(one: Listed) -> dict[str, Any]:
    if one.row is not None:
        return show.row_dict(one.row) | {"status": one.status}
    known = {name: value for name, value in asdict(one).items() if name not in ("row", "detail", "job")}
    job = {"slurm_job_id": one.job.job_id or None, "slurm_node": one.job.node or None} if one.job else {}
    return known | job | {"error": one.detail if one.status in ("failed", "interrupted") else None}


# ------------------------------------------------------------------ show
def show_experiment(store: Store, experiment_id: str, *, raw: bool, environment: bool, as_json: bool) -> int:
    """Print one experiment, with its environment if wanted; with `raw`, only the records of its processes. Return 0."""
    directory = _find(store, experiment_id)
    if raw:
        _show_raw(directory, as_json)
        return 0
    state = directory.state()
    rows = _rows(store, directory, state)
    around = _environment(directory)
    if as_json:
        print(show.as_json(_as_plain(directory, state, rows, around)))
        return 0
    if rows:
        show.show_row(rows.row)
        show_cycles(rows.row, rows.cycles)
    _show_state(store, directory, state, has_row=bool(rows))
    if environment:
        if around is None:
            raise ResultsError(f"{directory.id} has no recorded environment.")
        print()
        show.print_pairs(_environment_lines(around))
    return 0


def campaign_folder(store: Store, text: str) -> Path | None:
    """Return the directory of the campaign that a text names; None if it names no campaign or is an experiment's id."""
    from lem.results.campaign import DEFINITION, folder_named

    if ID.fullmatch(text) and store.directory(text).path.is_dir():
        return None
    try:
        folder = folder_named(text, store)
    except ResultsError:
        return None
    return folder if (folder / DEFINITION).is_file() else None


def show_campaign(folder: Path, *, raw: bool, environment: bool, as_json: bool) -> int:
    """Print the results of a campaign; return 0.

    Raises:
        ResultsError: its files are damaged, or an option was given that applies only to experiments.
    """
    from lem.results.campaign import answer, read_cells, read_definition, store_of
    from lem.results.campaign_show import as_plain, show_answer

    store = store_of(folder)
    _refuse_flags(store, folder.name, "campaign", raw=raw, environment=environment)
    found = answer(read_definition(folder), read_cells(store, folder))
    if as_json:
        print(show.as_json(as_plain(found)))
    else:
        show_answer(found)
    return 0


def _refuse_flags(store: Store, name: str, what: str, *, raw: bool, environment: bool) -> None:
    """Raise `ResultsError` if an option was given that applies only to experiments."""
    for flag in (flag for flag, is_given in (("--raw", raw), ("--environment", environment)) if is_given):
        raise ResultsError(
            f"{flag} applies to a single experiment, but '{name}' is a {what}. To list its experiments: "
            f"lem results list --{what} {name}{results_flag(store)}"
        )


def schedule_folder(store: Store, text: str) -> Path | None:
    """Return the directory of the schedule that a text names; None if it names no schedule or is an experiment's id.

    The text may be the schedule's name, its id or its directory.

    Raises:
        ResultsError: the text also names a campaign, or the schedule's file is damaged.
    """
    from lem.results import schedule

    if text and os.path.isfile(os.path.join(text, schedule.TABLE)):
        return Path(text).resolve()
    if ID.fullmatch(text) and store.directory(text).path.is_dir():
        return None
    try:
        folder = schedule.folder_of(store, schedule.load_schedule(store, text).name)
    except ResultsError:
        if text in schedule.names(store):  # its file is damaged
            raise
        return None
    if campaign := campaign_folder(store, text):
        raise ResultsError(
            f"'{text}' is the name of a schedule and of a campaign. Give the directory instead: {folder} or {campaign}."
        )
    return folder


def show_schedule(folder: Path, *, raw: bool, environment: bool, as_json: bool) -> int:
    """Print the results of a schedule; return 0.

    Raises:
        ResultsError: its file is damaged, or an option was given that applies only to experiments.
    """
    from lem.results.schedule import read_manifest, store_of
    from lem.results.schedule_answer import answer
    from lem.results.schedule_show import as_plain, show_answer

    store = store_of(folder)
    _refuse_flags(store, folder.name, "schedule", raw=raw, environment=environment)
    found = answer(store, read_manifest(folder))
    if as_json:
        print(show.as_json(as_plain(found)))
    else:
        show_answer(found)
    return 0


def _find(store: Store, text: str) -> ExperimentDir:
    """Find an experiment by its raw files or, if those have been removed, by its row."""
    try:
        return store.find(text)
    except ResultsError:
        names = [name for name in Tables(store).locations() if name.startswith(text)]
        if len(names) == 1:
            return store.directory(names[0])
        _refuse_near_studies(store, text, [*store.ids(), *names])
        raise


def _refuse_near_studies(store: Store, text: str, ids: Sequence[str]) -> None:
    """If no experiment matches and a campaign or schedule has a similar name, raise an error with the nearest names."""
    from lem.results import schedule
    from lem.results.campaign import names_in

    studies = [*names_in(store), *schedule.names(store)]
    close = nearest(text, [*ids, *studies])
    if text and not any(name.startswith(text) for name in ids) and not set(close).isdisjoint(studies):
        raise ResultsError(
            f"There is no experiment '{text}' and no campaign or schedule of that name in {store.root}. Nearest: "
            f"{', '.join(close)}."
        )


def _rows(store: Store, directory: ExperimentDir, state: State) -> Rows | None:
    """Return an experiment's rows: from the tables if they are up to date, otherwise from its records.

    None is returned if the records are needed but do not exist.
    """
    tables = Tables(store)
    at = tables.location(directory.id)
    if at and (not directory.path.is_dir() or is_fresh(tables, directory.id, at, state)):
        return Rows(tables.row(directory.id, at), tables.cycles(directory.id, at), [])
    if not directory.records():
        return None
    rows = read(directory, strict=False, mixed=True, state=state)
    return _at_work(rows) if state.status == "running" else rows


# Codes of warnings about an unfinished journal; they do not apply while the journal is still being written.
OF_A_JOURNAL = ("window_cut", "few_cycles", "short_window", "few_ticks", "energy_missing")


def _at_work(rows: Rows) -> Rows:
    """Return the rows of a running experiment, with its unfinished cycle marked as running rather than interrupted."""
    warnings = [text for text in rows.row.warnings if text.partition(":")[0] not in OF_A_JOURNAL]
    row = structs.replace(rows.row, status="running", error=None, warnings=warnings)
    cycles = [c if c.status == "completed" else structs.replace(c, status="running") for c in rows.cycles]
    return Rows(row, cycles, rows.requests)


def _environment(directory: ExperimentDir) -> Environment | None:
    records = directory.records() if directory.path.is_dir() else []
    return next((record.environment for record in records if record.environment), None)


def _as_plain(
    directory: ExperimentDir, state: State, rows: Rows | None, environment: Environment | None
) -> dict[str, Any]:
    row = show.row_dict(rows.row) if rows else {"experiment_id": directory.id, "status": state.status}
    return row | {
        "cycles": [show.columns_of(cycle) for cycle in rows.cycles] if rows else [],
        "state": to_plain(state) if directory.path.is_dir() else None,
        "environment": to_plain(environment) if environment else None,
    }


def _show_state(store: Store, directory: ExperimentDir, state: State, *, has_row: bool) -> None:
    """Print an experiment's state and, if it is neither running nor finished, the command that continues it.

    Nothing is printed if the experiment is finished and has a row, or if its raw files have been removed.
    """
    if not directory.path.is_dir() or (state.status in FINISHED and has_row):
        return
    if has_row:
        print()
    attempts = f" after {state.attempt} attempt{'s' if state.attempt > 1 else ''}" if state.attempt else ", not yet run"
    text = f" {_where(state)}" if state.status == "running" else f": {state.status}{attempts}"
    print(one_line(f"{directory.id}{text}."))
    if state.error and not has_row:
        print(one_line(state.error))
    if state.status not in ("running", *FINISHED):
        print(f"To continue: {resume_command(store, directory)}")


def _show_raw(directory: ExperimentDir, as_json: bool) -> None:
    records = directory.records()
    if not records:
        raise ResultsError(f"{directory.id} has no records yet.")
    if as_json:
        print("[" + ",\n".join(to_json(record) for record in records) + "]")
    else:
        show.show_records(records)


# ------------------------------------------------------------------ aggregate
def aggregate_experiments(
    store: Store, experiment_id: str | None, *, everything: bool, force: bool, strict: bool, mixed: bool
) -> int:
    """Write the rows of one experiment, or all missing and outdated rows.

    The result is 1 if anything failed or if the one experiment was skipped, else 0.
    """
    if (experiment_id is None) == (not everything):
        raise ResultsError("Give one experiment, or use --all.")
    ids = store.ids() if everything else [store.find(experiment_id or "").id]
    try:
        with paused_collector():
            found = aggregate_all(store, ids, strict=strict, force=force, mixed=mixed)
            kinds = Counter(_report(one, everything) for one in found)
    except OSError as error:
        raise RunError(
            f"The tables in {store.root} cannot be written ({error.strerror or error}). Measurements are safe in raw/. "
            "Free some space or make the directory writable, then run lem aggregate --all."
        ) from None
    if everything and kinds["fresh"]:
        print(f"Skipped because their rows are up to date: {kinds['fresh']}.")
    if not ids:
        print(f"No experiments in {store.root}.")
    return 1 if kinds["failed"] or (kinds["skipped"] and not everything) else 0


def _report(one: Aggregated, everything: bool) -> str:
    """Print an outcome, unless `everything` is set and the row was already up to date; return the outcome's kind."""
    if one.kind == "failed" or (one.kind == "skipped" and not everything):
        show.console(stderr=True).print(one_line(one.text), markup=False, style="red")
    elif not (one.kind == "fresh" and everything):
        print(one_line(one.text))
    return one.kind


# ------------------------------------------------------------------ tables for people
# A table with at least this many lines is printed line by line, because laying it out would take too long.
MANY = 500
NARROW_HEADERS = ("experiment", "status", "model", "tokens/s", "energy", "per token")
WIDE_HEADERS = (
    "experiment", "status", "model, backend, dataset, batching", "requests", "cycles", "of", "tokens/s", "energy",
    "per token",
)  # fmt: skip
# The columns that a list shows.
COLUMNS = (
    "experiment_id", "status", "error", "model", "random_weights", "backend", "dataset", "batching_strategy",
    "batch_size", "requests_completed", "requests_planned", "cycles_completed", "cycles_planned", "energy_source",
    "energy_components", "energy_without_gpu",
    *(f"{stem}{part}{unit}" for stem, unit in (("output_tokens_per_s", ""), ("energy", "_j"),
      ("energy_per_output_token", "_j")) for part in ("", "_ci95_low", "_ci95_high")),
)  # fmt: skip
NUMBERS = frozenset({"requests", "cycles", "of", "tokens/s", "energy", "per token", "duration", "latency", "attempts"})


@dataclass(frozen=True)
class Listed:
    """An experiment in a list: its status, a description of its configuration, and its row if it has one."""

    experiment_id: str
    status: str
    model: str
    backend: str
    dataset: str
    row: ExperimentRow | None = None
    detail: str | None = None
    job: InJob | None = None


def show_list(listed: Sequence[Listed]) -> None:
    """Print a line for each experiment, followed by notes on estimates, intervals and errors."""
    wide = console().width >= WIDE
    _print([*(WIDE_HEADERS if wide else NARROW_HEADERS)], [_cells(one, wide) for one in listed])
    say_estimates(one.row for one in listed if one.row)
    if any(one.row and one.row.cycles_completed > 1 for one in listed):
        print("± is half the width of the 95% interval over the cycles")
    for one in listed:
        if one.detail:
            print(one_line(f"{one.experiment_id}: {one.detail}"))


def _cells(one: Listed, wide: bool) -> list[str]:
    row = one.row
    model = f"{one.model} (random)" if row and row.random_weights else one.model
    if row is None:
        what = f"{model} {one.backend} {one.dataset}" if wide else model
        return [one.experiment_id, one.status, what, *[""] * (6 if wide else 3)]
    speed = _with_interval(row, "output_tokens_per_s", "", plain)
    energies = ("energy", "energy_per_output_token")
    energy, per_token = (marked(row, _with_interval(row, stem, "_j", _joules, wide)) for stem in energies)
    if not wide:
        return [one.experiment_id, one.status, model, speed, energy, per_token]
    what = f"{model} {row.backend} {row.dataset} {row.batching_strategy}/{row.batch_size}"
    requests = f"{row.requests_completed}/{row.requests_planned}"
    cycles = f"{row.cycles_completed}/{row.cycles_planned}"
    components = row.energy_components or NOT_MEASURED
    return [one.experiment_id, one.status, what, requests, cycles, components, speed, energy, per_token]


def _joules(value: float | None) -> str:
    return quantity(value, "J")


def _with_interval(
    row: ExperimentRow, stem: str, unit: str, write: Callable[[float | None], str], wide: bool = True
) -> str:
    """Return a value as text; if it has an interval and there is room, add half the interval's width in percent."""
    value = getattr(row, f"{stem}{unit}")
    low, high = getattr(row, f"{stem}_ci95_low{unit}"), getattr(row, f"{stem}_ci95_high{unit}")
    if not wide or None in (value, low, high) or not value:
        return write(value)
    share = 100 * (high - low) / 2 / abs(value)
    return f"{write(value)} ±{share:.0f}%" if share >= 10 else f"{write(value)} ±{share:.2g}%"


def _print(headers: list[str], lines: list[list[str]]) -> None:
    """Print a table: fitted to the terminal, or as plain lines if the table is long or stdout is not a terminal."""
    if sys.stdout.isatty() and len(lines) < MANY:
        _print_laid_out(headers, lines)
        return
    lines = [list(map(one_line, cells)) for cells in lines]
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
    # Lines are formatted with a template, because formatting each cell in Python would take longer than the rest.
    line = "  ".join(f"%{'' if h in NUMBERS else '-'}{width}s" for h, width in zip(headers, widths, strict=True))
    print("\n".join((line % tuple(cells)).rstrip() for cells in (headers, *lines)))


def _print_laid_out(headers: list[str], lines: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        # Words may wrap; ids and numbers are never cut.
        words = header.startswith("model")
        justify: Any = "right" if header in NUMBERS else "left"
        table.add_column(header, justify=justify, no_wrap=not words, overflow="fold")
    for cells in lines:
        table.add_row(*(_styled(header, show.cell(text)) for header, text in zip(headers, cells, strict=True)))
    print_table(table)


def _styled(header: str, cell: str) -> str:
    return f"[{STATUS_STYLE.get(cell, 'cyan')}]{cell}[/]" if header == "status" and cell else cell


def show_cycles(row: ExperimentRow, cycles: Sequence[CycleRow]) -> None:
    """Print a line for each cycle, then their mean, spread and interval; print nothing for a single cycle."""
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
        quantity(cycle.latency_mean_s, "s"),
        *(marked(cycle, _joules(value)) for value in (cycle.energy_j, cycle.energy_per_output_token_j)),
    ]  # fmt: skip


SPREAD_LABELS = {"mean": "mean", "sd": "sd", "cv": "CV", "ci95_low": "95% from", "ci95_high": "95% to"}


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
        written("energy", "_j", lambda value: marked(row, _joules(value))),
        written("energy_per_output_token", "_j", lambda value: marked(row, _joules(value))),
    ]  # fmt: skip


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
    yield "Commit", " ".join(filter(None, [here.git_commit, "with uncommitted changes" if here.git_dirty else ""]))
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
