"""The results of a schedule: its runs with their rows, how each metric varies over time, and reasons for doubt.

A schedule runs an experiment or a campaign; each arm of a campaign is examined separately. Only completed experiments
count. This module computes no statistics; `lem.results.variation` does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from lem.errors import LemError
from lem.record import CodedWarning, Environment
from lem.results.aggregate import catch_up, read
from lem.results.campaign import LENGTHS_DIFFER
from lem.results.campaign import MEASURES as OF_CAMPAIGNS
from lem.results.merging import is_estimated
from lem.results.schedule import ScheduleManifest, Start
from lem.results.schema import ExperimentRow
from lem.results.store import ID, Store
from lem.results.tables import Tables
from lem.results.variation import Point, Variation, judged, variations
from lem.warning_codes import warning

# The metrics of a schedule: their columns, units, and wording in sentences. The first one is the primary metric.
MEASURES = {**OF_CAMPAIGNS, "co2e_g": ("gCO2e", "emissions of a run")}
PRIMARY = "energy_per_output_token_j"
ENERGIES = ("energy_per_output_token_j", "energy_per_request_j", "average_power_w", "co2e_g")
# What must not change while a schedule is measured; each item is followed by the name of its column in the rows, or of
# its field in the environments.
OF_ROWS = {"host": "hostname", "device": "device", "engine": "engine_version", "lem": "lem_version"}
OF_ARMS = ("device", "engine")
OF_ENVIRONMENTS = {
    "processor": "cpu_model", "GPUs": "gpus", "driver": "driver_version", "CUDA": "cuda_version", "system": "os",
}  # fmt: skip

# The states of runs that have no complete result, and will have none unless the schedule is resumed.
LOST = ("failed", "skipped", "missed", "interrupted")
# The completed experiments of a run, by the names of the arms; a campaign has one for each of its cycles. A run of a
# plain experiment has one arm, named "".
ByArm = Mapping[str, Sequence[ExperimentRow]]


@dataclass(frozen=True)
class Run:
    """A planned start of a schedule, with its completed experiments."""

    start: Start
    rows: ByArm

    @property
    def at(self) -> datetime:
        """The planned local time, in the schedule's time zone."""
        return datetime.fromisoformat(self.start.planned_at).replace(tzinfo=None)

    def value(self, arm: str, measure: str) -> float | None:
        """Return an arm's value of a metric: the geometric mean over its experiments, or None if none has a value.

        The result is 0 if any value is 0 or less.
        """
        values = [value for row in self.rows.get(arm, ()) if (value := getattr(row, measure)) is not None]
        if not values or min(values) <= 0:  # a value of 0 has no logarithm
            return 0.0 if values else None
        return math.exp(math.fsum(map(math.log, values)) / len(values)) if len(values) > 1 else float(values[0])


@dataclass(frozen=True)
class Found:
    """How one metric of one arm varies; `arm` is empty if the schedule runs a plain experiment."""

    arm: str
    measure: str
    source: str | None
    by_time: Variation
    by_weekday: Variation

    @property
    def is_primary(self) -> bool:
        """Whether this is the primary metric, which the verdict is about."""
        return self.measure == PRIMARY


@dataclass(frozen=True)
class Answer:
    """The results of a schedule."""

    manifest: ScheduleManifest
    runs: Sequence[Run]
    arms: Sequence[str]
    found: Sequence[Found]
    warnings: Sequence[CodedWarning]


def answer(store: Store, manifest: ScheduleManifest) -> Answer:
    """Return the results of a schedule so far."""
    runs = _runs(store, manifest)
    arms = list(dict.fromkeys(arm for run in runs for arm in run.rows))
    measures = [
        measure
        for measure in MEASURES
        if measure == PRIMARY or any(run.value(arm, measure) is not None for run in runs for arm in arms)
    ]
    found = [each for measure in measures for each in _examined(runs, arms, measure)]
    return Answer(manifest, runs, arms, found, list(_doubts(store, manifest, runs, arms)))


# ------------------------------------------------------------------ runs
def _runs(store: Store, manifest: ScheduleManifest) -> list[Run]:
    rows = _rows(store, manifest)
    found: dict[int, dict[tuple[str, int | None], ExperimentRow]] = {start.number: {} for start in manifest.starts}
    planned = {start.number: start.planned_at for start in manifest.starts}
    gone = {start.number for start in manifest.starts if start.status in LOST}
    for row in sorted(rows, key=lambda row: row.experiment_id):
        # The planned time distinguishes this schedule from an earlier one of the same name whose files were removed.
        is_own = row.schedule_run in found and planned[row.schedule_run] == row.schedule_planned_at
        # An experiment that was completed later, by hand, was not measured at the time of its run.
        is_late = row.schedule_run in gone and row.campaign_arm is None
        if row.schedule_run is not None and is_own and row.status == "completed" and not is_late:
            found[row.schedule_run][row.campaign_arm or "", row.campaign_cycle] = (
                row  # the last one, if a cell was repeated
            )
    return [Run(start, _by_arm(found[start.number])) for start in manifest.starts]


def _by_arm(rows: Mapping[tuple[str, int | None], ExperimentRow]) -> ByArm:
    arms = dict.fromkeys(arm for arm, _ in rows)
    return {arm: [row for (of, _), row in rows.items() if of == arm] for arm in arms}


def _rows(store: Store, manifest: ScheduleManifest) -> list[ExperimentRow]:
    """Return the rows of the schedule's experiments, from the tables or, where these lack a row, from the records."""
    catch_up(store)
    rows, _ = Tables(store).rows()
    own = {row.experiment_id: row for row in rows if row.schedule == manifest.name}
    for start in manifest.starts:
        name = start.experiment_id
        if name is not None and name not in own and start.status == "done" and ID.fullmatch(name):
            try:
                own[name] = read(store.directory(name), strict=False).row
            except LemError:
                continue  # the run is then listed without a value
    return list(own.values())


# ------------------------------------------------------------------ variation
def _examined(runs: Sequence[Run], arms: Sequence[str], measure: str) -> Iterator[Found]:
    """For each arm, yield how a metric varies; the p-values are adjusted for the tests of all arms together."""
    found = [_variations(runs, arm, measure) for arm in arms or [""]]
    with_verdicts = iter(judged([each for pair in found for each in pair]))
    for arm in arms or [""]:
        sources = {row.energy_source for row in _of(runs, arm) if row.energy_source}
        source = "+".join(sorted(sources)) or None if measure in ENERGIES else None
        yield Found(arm, measure, source, next(with_verdicts), next(with_verdicts))


def _variations(runs: Sequence[Run], arm: str, measure: str) -> tuple[Variation, Variation]:
    reason = _why_unknown(runs, arm, measure)
    if reason is not None:
        return Variation("time of day", (), "cannot tell", reason), Variation("weekday", (), "cannot tell", reason)
    return variations([Point(run.at, value) for run in runs if (value := run.value(arm, measure)) is not None])


def _of(runs: Iterable[Run], arm: str) -> list[ExperimentRow]:
    return [row for run in runs for row in run.rows.get(arm, ())]


def _why_unknown(runs: Sequence[Run], arm: str, measure: str) -> str | None:
    """Return why a metric has no means, or None if it has means."""
    rows = _of(runs, arm)
    if not rows:
        return "no run has completed"
    values = [value for run in runs if (value := run.value(arm, measure)) is not None]
    if not values:
        return f"no run has a value for {measure}"
    if min(values) <= 0:
        return "a value is not positive, so it has no logarithm"
    if measure in ENERGIES and len(_kinds(rows)) > 1:
        return "the energy of the runs was obtained in different ways"
    return None


def _kinds(rows: Iterable[ExperimentRow]) -> set[tuple[bool, str | None, str | None]]:
    """Return the distinct kinds of energy in the rows: whether it is estimated, its components and its scope."""
    metered = (row for row in rows if row.energy_j is not None)
    return {(is_estimated(row.energy_source), row.energy_components, row.energy_scope) for row in metered}


# ------------------------------------------------------------------ reasons for doubt
def _doubts(
    store: Store, manifest: ScheduleManifest, runs: Sequence[Run], arms: Sequence[str]
) -> Iterator[CodedWarning]:
    """Yield warnings that readers of the answer need to know."""
    is_campaign = manifest.config.kind == "campaign"
    if text := lost(manifest.starts):
        those = "the means include only their completed cells" if is_campaign else "no mean includes them"
        yield warning("schedule_runs_missing", f"some runs have no complete result: {text}; {those}.")
    rows = [row for arm in arms for row in _of(runs, arm)]
    yield from _changes(store, runs)
    for arm in arms:
        yield from _of_arm(_of(runs, arm), arm)
    sources = {row.energy_source for row in rows if is_estimated(row.energy_source)}
    if sources:
        kind = "simulated" if sources == {"simulated"} else "an estimate"
        yield warning("schedule_estimate", f"the energy is {kind}, so its variation over time may not be real.")
    codes = Counter(text.partition(":")[0] for row in rows for text in dict.fromkeys(row.warnings))
    if notes := [f"{code} ({count} of {len(rows)})" for code, count in codes.most_common() if code != "few_cycles"]:
        yield warning("schedule_runs_warn", f"some experiments have warnings: {', '.join(notes)}.")


def lost(starts: Sequence[Start]) -> str:
    """Return the numbers of the runs that failed, were skipped, missed or interrupted, as text; empty if none."""
    parts = []
    for status in LOST:
        numbers = [start.number for start in starts if start.status == status]
        if numbers:
            parts.append(f"{status}: {spans(numbers)}")
    return "; ".join(parts)


def spans(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text, with consecutive ones joined: 1, 3–5."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and groups[-1][-1] == number - 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]}–{group[-1]}" for group in groups)


def _of_arm(rows: Sequence[ExperimentRow], arm: str) -> Iterator[CodedWarning]:
    """Warn if the runs of one arm are not true repeats, because their energy, prompts or output lengths differ."""
    of = f"of {arm} " if arm else ""
    if len(_kinds(rows)) > 1:
        metered = (row for row in rows if row.energy_j is not None)
        ways = ", ".join(
            dict.fromkeys(f"{row.energy_components} ({row.energy_source}, scope {row.energy_scope})" for row in metered)
        )
        yield warning("schedule_meters_differ", f"the energy {of}was obtained in different ways: {ways}.")
    if len({row.prompts_sha256 for row in rows}) > 1:
        yield warning("schedule_work_differs", f"the runs {of}did not all use the same prompts.")
    lengths = [row.output_tokens for row in rows]
    if lengths and max(lengths) > (1 + LENGTHS_DIFFER) * min(lengths):
        text = (
            f"the runs {of}did not generate the same number of output tokens: from {min(lengths)} to {max(lengths)} "
            "per experiment."
        )
        yield warning("schedule_work_differs", text)


def _changes(store: Store, runs: Sequence[Run]) -> Iterator[CodedWarning]:
    """Warn if the machine, the engine or the software changed from one run to the next."""
    found = []
    before: dict[str, str] = {}
    for run in runs:
        now = _surroundings(store, run.rows)
        found += [
            f"{what} from {before[what]} to {now[what]} at run {run.start.number}"
            for what in now
            if what in before and before[what] != now[what]
        ]
        before |= now
    if found:
        yield warning("schedule_environment_changed", f"the machine or its software changed: {', '.join(found)}.")


def _surroundings(store: Store, rows: ByArm) -> dict[str, str]:
    """Return the machine, devices and software that a run used; devices and engines are listed for each arm."""
    known: dict[str, str] = {}
    for arm, row in ((arm, row) for arm, of_arm in rows.items() for row in of_arm):
        for what, column in OF_ROWS.items():
            if value := getattr(row, column):
                known[f"{what} of {arm}" if arm and what in OF_ARMS else what] = str(value)
        here = _environment(store, row.experiment_id)
        for what, field in OF_ENVIRONMENTS.items() if here else ():
            if value := getattr(here, field):
                known[what] = ", ".join(value) if isinstance(value, tuple) else str(value)
        known |= here.versions if here else {}
    return known


def _environment(store: Store, experiment_id: str) -> Environment | None:
    """Return the environment of an experiment, from its records; None if no record has one."""
    try:
        records = store.directory(experiment_id).records()
    except LemError:
        return None
    return next((record.environment for record in records if record.environment is not None), None)
