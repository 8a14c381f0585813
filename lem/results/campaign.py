"""A campaign's files and its results: each arm's means, and its comparison with the baseline.

    <results>/campaigns/<name>/   campaign.json: the definition, written before the first cell
                                  experiments.json: the state of each cell, in order
                                  arms.parquet, pairs.parquet: the results
                                  plan/: the configuration of each cell, for Hydra

Each cell is one replicate, so the cycles that its experiment runs in one process are averaged. This module does not
know how a cell is run.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

from msgspec import Struct

from lem import __version__, quantities
from lem.errors import LemError, ResultsError, nearest
from lem.record import CodedWarning
from lem.results import compare, parquet
from lem.results.aggregate import read
from lem.results.carryover import CarryOver, Ran, carry_over
from lem.results.codec import from_json
from lem.results.directory import ExperimentDir
from lem.results.merging import is_estimated
from lem.results.nodes import Block, Spread, spread
from lem.results.schema import ExperimentRow
from lem.results.statistics import CONFIDENCE, detectable_errors, line_through, summarize
from lem.results.stopping import ANALYSES, Rule, is_narrow, rule_of
from lem.results.store import ID, Store, results_flag
from lem.spec.campaign import NAME, Campaign, square_size, whole_squares
from lem.spec.experiment import Experiment
from lem.warning_codes import warning

FOLDER, DEFINITION, CELLS = "campaigns", "campaign.json", "experiments.json"
FORMAT_VERSION = 1
# The status of a cell that was not run because an adaptive campaign stopped before it.
NOT_NEEDED = "not needed"
# The metrics by which arms are compared: their columns, units, and wording in sentences.
MEASURES = {
    "energy_per_output_token_j": ("J/token", "energy per output token"),
    "energy_per_request_j": ("J/request", "energy per request"),
    "output_tokens_per_s": ("token/s", "output tokens per second"),
    "latency_mean_s": ("s", "mean latency"),
    "ttft_mean_s": ("s", "mean time to first token"),
    "average_power_w": ("W", "average power"),
}
# If mean output lengths differ by more than this share, the arms do different work.
LENGTHS_DIFFER = 0.01
# A trend or an effect of position is reported if its p-value is below this.
SUSPICIOUS = 0.05
# The separator between the names of several nodes in one value of a column.
SEVERAL = "+"

# The cells of a campaign, by cycle and arm.
Found = Mapping[tuple[int, str], "CellEntry"]


@dataclass(frozen=True)
class Arm:
    """A configuration to compare; its name distinguishes it from other arms."""

    name: str
    experiment: Experiment
    config_file: str | None = None


@dataclass(frozen=True)
class Machine:
    """The properties of the machine and its software that must stay the same while a campaign is measured."""

    hostname: str
    driver_version: str | None
    gpus: tuple[str, ...]
    versions: dict[str, str]
    git_commit: str | None


@dataclass(frozen=True)
class Definition:
    """The definition of a campaign.

    `prompts_sha256` has the digest of each cycle's prompts, in cycle order. `nominal_level` is the level of an adaptive
    campaign's intervals, as calibrated when the campaign began; None if it is not adaptive. `working_dir` is the
    directory in which the campaign was started; paths in the arms' configurations may be relative to it.
    """

    campaign: Campaign
    arms: tuple[Arm, ...]
    prompts_sha256: tuple[str, ...]
    machine: Machine
    overrides: tuple[str, ...] = ()
    nominal_level: float | None = None
    working_dir: str | None = None
    lem_version: str = __version__
    format_version: int = FORMAT_VERSION

    @property
    def name(self) -> str:
        """The campaign's name."""
        assert self.campaign.name is not None
        return self.campaign.name

    @property
    def baseline(self) -> str:
        """The arm with which the others are compared."""
        return self.campaign.baseline or self.arms[0].name

    @property
    def rule(self) -> Rule | None:
        """The stopping rule, with the nominal level at the campaign's start; None if the campaign is not adaptive."""
        return rule_of(self.campaign, len(self.arms), self.nominal_level)


@dataclass(frozen=True)
class CellEntry:
    """The state of a cell of a campaign, and its experiment's row if it has completed."""

    arm: str
    cycle: int
    position: int
    experiment_id: str | None
    status: str
    row: ExperimentRow | None = None
    # Whether the cell was skipped because its arm had been given up.
    given_up: bool = False
    # Why the cell has no result: how its experiment failed, or why its arm had been given up.
    error: str | None = None


class ArmRow(Struct, frozen=True, kw_only=True):
    """One metric of one arm of a campaign: its mean over the arm's cells, with a 95% interval (Student's t)."""

    campaign: Annotated[str, "Name of the campaign."]
    arm: Annotated[str, "Name of the arm."]
    is_baseline: Annotated[bool, "Whether the other arms are compared with this one."]
    cells_completed: Annotated[int, "Number of completed cells."]
    cells_planned: Annotated[
        int,
        "Number of cells planned for the arm; in an adaptive campaign, only those in cycles that have begun or "
        "must be measured.",
    ]
    measure: Annotated[str, "Column of the experiments table that is averaged."]
    unit: Annotated[str, "Unit of the mean and its interval."]
    is_primary: Annotated[bool, "Whether this is the primary metric, which decides the comparison."]
    source: Annotated[
        str | None, "Source of the energy: counter, integral, estimate, replay or simulated; null without energy."
    ]
    mean: Annotated[
        float | None, "Mean over the completed cells; null if there are none, or if one of them lacks a value."
    ]
    ci95_low: Annotated[float | None, "95% interval of the mean, lower end; null with fewer than two cells."]
    ci95_high: Annotated[float | None, "95% interval of the mean, upper end."]
    reason: Annotated[str | None, "Why there is no mean; null if there is one."]


class PairRow(Struct, frozen=True, kw_only=True):
    """The comparison of an arm with the baseline: the ratio of one metric, from pairs of cells in the same cycle."""

    campaign: Annotated[str, "Name of the campaign."]
    arm: Annotated[str, "Name of the arm."]
    baseline: Annotated[str, "Name of the baseline arm."]
    measure: Annotated[str, "Column of the experiments table that is compared."]
    is_primary: Annotated[bool, "Whether this is the primary metric, which decides the comparison."]
    cycles: Annotated[int, "Number of cycles in which both the arm and the baseline have a value."]
    ratio: Annotated[float | None, quantities.RATIO, "The arm's value divided by the baseline's (geometric mean)."]
    ci_low: Annotated[
        float | None, quantities.RATIO, "Interval of the ratio, lower end; null with fewer than two cycles."
    ]
    ci_high: Annotated[float | None, quantities.RATIO, "Interval of the ratio, upper end."]
    confidence: Annotated[
        float,
        quantities.RATIO,
        "Nominal level of this interval, chosen so that the intervals of all pairs hold jointly at 95%, even if an "
        "adaptive campaign stops early.",
    ]
    p_value: Annotated[
        float | None,
        quantities.RATIO,
        "P-value for the hypothesis that the ratio is 1; null in an adaptive campaign, because it is not calibrated "
        "for stopping early.",
    ]
    p_adjusted: Annotated[float | None, quantities.RATIO, "p_value adjusted for the number of pairs (Holm)."]
    verdict: Annotated[str, "less, more, the same, or cannot tell."]
    cycles_needed: Annotated[
        int | None,
        'Cycles needed for a power of 80%, if the verdict is "cannot tell"; null otherwise, with fewer than two '
        "cycles, or if more cycles would hardly help.",
    ]


@dataclass(frozen=True)
class Answer:
    """The results of a campaign.

    `carry_over` is None if the effects of predecessors cannot be estimated. `spread` is None unless cycles ran on
    several nodes of a cluster.
    """

    definition: Definition
    cells: list[CellEntry]
    arms: list[ArmRow]
    pairs: list[PairRow]
    warnings: list[CodedWarning]
    carry_over: CarryOver | None = None
    spread: Spread | None = None
    # Whether no further cycle will be measured; False while an adaptive campaign is unfinished.
    ended: bool = True

    @property
    def cycles(self) -> int:
        """The number of the last cycle that has begun or is certain to be measured."""
        return _last_cycle(self.definition, self.cells)

    @property
    def is_complete(self) -> bool:
        """Whether every arm has been compared with the baseline by the primary metric."""
        compared = {pair.arm for pair in self.pairs if pair.is_primary and pair.ratio is not None}
        return all(arm.name in compared for arm in self.definition.arms if arm.name != self.definition.baseline)

    @property
    def cycles_begun(self) -> int:
        """The number of the last cycle in which a cell has begun; 0 if no cell has begun."""
        return max(_begun(self.cells), default=0)


# ------------------------------------------------------------------ files
def folder_of(store: Store, name: str) -> Path:
    """Return a campaign's directory, whether or not it exists."""
    return store.root / FOLDER / name


def folder_named(text: str, store: Store) -> Path:
    """Return the directory of a campaign, given the directory or a name; the campaign need not exist yet.

    Raises:
        ResultsError: the text is neither the directory of a campaign nor a possible name.
    """
    # Not Path.is_file, which raises if the text is too long for a path.
    if text and os.path.isfile(os.path.join(text, DEFINITION)):
        return Path(text).resolve()
    if not re.fullmatch(NAME, text):
        raise ResultsError(f"'{text}' is neither the name nor the directory of a campaign.")
    return folder_of(store, text)


def store_of(folder: Path) -> Store:
    """Return the results directory that contains a campaign's directory."""
    return Store(folder.resolve().parent.parent)


def names_in(store: Store) -> list[str]:
    """Return the names of the campaigns in a results directory."""
    return sorted(file.parent.name for file in (store.root / FOLDER).glob(f"*/{DEFINITION}"))


def read_definition(folder: Path) -> Definition:
    """Read the definition of a campaign.

    Raises:
        ResultsError: the campaign does not exist, or its file is damaged.
    """
    file = folder / DEFINITION
    try:
        kept = from_json(Definition, file.read_bytes())
        if kept.campaign.name != folder.name or not kept.arms:
            raise ValueError("it belongs to another campaign, or has no arms")
        return kept
    except FileNotFoundError:
        close = nearest(folder.name, [path.parent.name for path in folder.parent.glob(f"*/{DEFINITION}")])
        hint = f" Nearest: {', '.join(close)}." if close else ""
        raise ResultsError(f"There is no campaign '{folder.name}' in {folder.parent.parent}.{hint}") from None
    except (OSError, ValueError) as error:
        raise ResultsError(f"{file} is damaged ({error}); restore it from a copy.") from None


def read_entries(folder: Path) -> list[dict[str, Any]]:
    """Read the list of a campaign's cells, in order, as plain data.

    Raises:
        ResultsError: the file is missing or damaged.
    """
    file = folder / CELLS
    try:
        entries: list[dict[str, Any]] = json.loads(file.read_bytes())
        if not all(_is_entry(entry) for entry in entries):
            raise ValueError("it does not list a campaign's cells")
        return entries
    except FileNotFoundError:
        raise ResultsError(f"{file} is missing. {_to_rebuild(folder)}") from None
    except OSError as error:
        raise ResultsError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (ValueError, TypeError) as error:
        raise ResultsError(f"{file} is damaged ({error}). {_to_rebuild(folder)}") from None


def _is_entry(entry: Any) -> bool:
    """Return whether a cell's entry, as read from the file, has values of the right types."""
    place = entry.get("campaign") if isinstance(entry, dict) else None
    if not isinstance(place, dict) or not {"experiment_id", "status"} <= entry.keys():
        return False
    has_place = isinstance(place.get("arm"), str) and all(isinstance(place.get(k), int) for k in ("cycle", "position"))
    experiment_id = entry["experiment_id"]
    return (
        has_place
        and isinstance(entry["status"], str)
        and isinstance(entry.get("error"), str | None)
        and (experiment_id is None or (isinstance(experiment_id, str) and ID.fullmatch(experiment_id) is not None))
    )


def _to_rebuild(folder: Path) -> str:
    command = f"lem campaign --resume {folder.name}{results_flag(store_of(folder))}"
    return f"To rebuild it from the experiments, and to run the cells that have no result: {command}"


def read_cells(store: Store, folder: Path) -> list[CellEntry]:
    """Read the states of a campaign's cells, in order, with the rows of completed cells.

    Raises:
        ResultsError: the file is missing or damaged.
    """
    return [_cell(store, entry) for entry in read_entries(folder)]


def _cell(store: Store, entry: dict[str, Any]) -> CellEntry:
    place, experiment_id, status = entry["campaign"], entry["experiment_id"], entry["status"]
    row = _row(store.directory(experiment_id)) if experiment_id and status == "completed" else None
    error = entry.get("error")
    is_given_up = status == "not run" and bool(error)
    return CellEntry(place["arm"], place["cycle"], place["position"], experiment_id, status, row, is_given_up, error)


def _row(directory: ExperimentDir) -> ExperimentRow | None:
    try:
        row = read(directory, strict=False).row
    except LemError:
        return None
    return row if row.status == "completed" else None


# ------------------------------------------------------------------ the results
def answer(definition: Definition, cells: Sequence[CellEntry]) -> Answer:
    """Return the results of the completed cells."""
    names = [arm.name for arm in definition.arms]
    last = _last_cycle(definition, cells)
    reached = [cell for cell in cells if cell.cycle <= last]
    found = {(cell.cycle, cell.arm): cell for cell in reached}
    measures = [
        measure
        for measure in MEASURES
        if measure == definition.campaign.primary or any(_value(cell, measure) is not None for cell in reached)
    ]
    arms = [_arm_row(definition, name, measure, reached) for name in names for measure in measures]
    comparable = _comparable(definition, found)
    pairs = [row for measure in MEASURES for row in _pair_rows(definition, measure, comparable)]
    carried = _carried_over(definition, names, reached)
    spread_of_nodes = _spread(definition, names, comparable)
    doubts = [
        *_doubts(definition, names, found),
        *_of_nodes(definition, names, found, spread_of_nodes),
        *_of_predecessors(definition, names, carried),
        *_wide(definition, cells, pairs),
    ]
    return Answer(definition, reached, arms, pairs, doubts, carried, spread_of_nodes, has_ended(cells))


def _last_cycle(definition: Definition, cells: Sequence[CellEntry]) -> int:
    """Return the last planned cycle or, in an adaptive campaign, the last one that has begun or must be measured."""
    rule = definition.rule
    if rule is None:
        return definition.campaign.cycles
    return max([rule.least, *_begun(cells)])


def _begun(cells: Sequence[CellEntry]) -> list[int]:
    """Return the cycle of each cell that has begun."""
    return [cell.cycle for cell in cells if cell.status not in ("not run", NOT_NEEDED)]


def has_ended(cells: Sequence[CellEntry]) -> bool:
    """Return whether a campaign will measure no further cycle, because it stopped early or its last cycle is over."""
    last = max((cell.cycle for cell in cells), default=0)
    return any(cell.status == NOT_NEEDED for cell in cells) or all(
        cell.status in ("completed", "failed") or cell.given_up for cell in cells if cell.cycle == last
    )


def is_enough(definition: Definition, cells: Sequence[CellEntry], cycle: int, given_up: Collection[str]) -> bool:
    """Return whether an adaptive campaign may stop after a cycle, because its intervals are narrow enough.

    The answer depends only on the cells up to that cycle and on the arms given up, so interrupting a campaign does not
    change the answer.

    Args:
        definition: the campaign.
        cells: the state of its cells.
        cycle: the last cycle to consider.
        given_up: arms that are no longer measured; their ratios, and ratios to them, cannot become more precise and do
            not count.
    """
    rule = definition.rule
    if rule is None or cycle not in rule.looks:
        return False
    found = _comparable(definition, {(cell.cycle, cell.arm): cell for cell in cells if cell.cycle <= cycle})
    compared = {pair.arm: pair for pair in _pair_rows(definition, definition.campaign.primary, found)}
    left = [arm.name for arm in definition.arms if arm.name not in (definition.baseline, *given_up)]
    if definition.baseline in given_up:
        left = []
    return is_narrow((half_width(compared[arm]) if arm in compared else None for arm in left), rule.half_width)


def half_width(pair: PairRow) -> float | None:
    """Return half the width of a ratio's interval, divided by the ratio; None if there is no interval."""
    if pair.ratio is None or pair.ci_low is None or pair.ci_high is None:
        return None
    return (pair.ci_high - pair.ci_low) / 2 / pair.ratio


def _wide(definition: Definition, cells: Sequence[CellEntry], pairs: Sequence[PairRow]) -> Iterator[CodedWarning]:
    """Warn if an adaptive campaign reached its maximum number of cycles before its intervals were narrow enough."""
    rule = definition.rule
    if rule is None or not has_ended(cells):
        return
    found = {pair.arm: half_width(pair) for pair in pairs if pair.is_primary}
    wide = [
        f"{arm} has no interval" if half is None else f"{arm} ±{quantities.percent(half)}"
        for arm, half in found.items()
        if not is_narrow([half], rule.half_width)
    ]
    if wide and not any(cell.status == NOT_NEEDED for cell in cells):
        yield warning(
            "campaign_limit_reached",
            f"the limit of {rule.most} cycles was reached, but not every interval is as narrow as "
            f"±{quantities.percent(rule.half_width)}: {', '.join(wide)}.",
        )


def write_answer(folder: Path, found: Answer) -> None:
    """Write the tables of a campaign's arms and pairs."""
    parquet.write_rows(folder / "arms.parquet", ArmRow, found.arms)
    parquet.write_rows(folder / "pairs.parquet", PairRow, found.pairs)


def _arm_row(definition: Definition, name: str, measure: str, cells: Sequence[CellEntry]) -> ArmRow:
    own = [cell for cell in cells if cell.arm == name]
    rows = [cell.row for cell in own if cell.row is not None]
    sources = dict.fromkeys(row.energy_source for row in rows if row.energy_source)
    values = [getattr(row, measure) for row in rows]
    summary = summarize([] if None in values else values)
    return ArmRow(
        campaign=definition.name,
        arm=name,
        is_baseline=name == definition.baseline,
        cells_completed=len(rows),
        cells_planned=len(own),
        measure=measure,
        unit=MEASURES[measure][0],
        is_primary=measure == definition.campaign.primary,
        source="+".join(sources) or None,
        mean=summary.mean,
        ci95_low=summary.ci95_low,
        ci95_high=summary.ci95_high,
        reason=_why_no_mean(own, measure) if summary.mean is None else None,
    )


def _why_no_mean(cells: Sequence[CellEntry], measure: str) -> str:
    """Return why an arm has no mean for a metric, given the arm's cells."""
    values = [_value(cell, measure) for cell in cells if cell.row is not None]
    if values:
        lacking, count = values.count(None), len(values)
        some = f"{lacking} of {count} completed cells {'lacks' if lacking == 1 else 'lack'}"
        which = "no completed cell has" if lacking == count else some
        return f"{which} a value for {measure}"
    failed = [cell.error or "no reason was recorded" for cell in cells if cell.status == "failed"]
    given_up = next((cell.error for cell in cells if cell.given_up and cell.error), None)
    if not failed:
        return "none of its cells has completed"
    how = f"{len(failed)} of its {len(cells)} cells failed"
    if given_up:  # such as "quick was abandoned after 3 failures in a row."
        how = given_up.removeprefix(f"{cells[0].arm} was ").rstrip(".")
    return f"{how}; the last failure: {failed[-1].rstrip('.')}"


def _pair_rows(definition: Definition, measure: str, found: Found) -> Iterator[PairRow]:
    campaign, names = definition.campaign, [arm.name for arm in definition.arms]
    cycles = range(1, max((cycle for cycle, _ in found), default=0) + 1)
    values = [[_value(found.get((cycle, name)), measure) for name in names] for cycle in cycles]
    if not any(value for row in values for value in row):
        return
    analysis = ANALYSES[campaign.structure]
    positions = None
    if analysis != "paired":
        positions = [[found[cycle, name].position for name in names] for cycle in cycles]
    rule = definition.rule
    compared = compare.contrasts(
        values,
        baseline=names.index(definition.baseline),
        analysis=analysis,
        positions=positions,
        confidence=CONFIDENCE if rule is None else rule.level,
        margin=campaign.margin,
    )
    for name, contrast in zip(names, compared, strict=True):
        if contrast is not None:
            yield PairRow(
                campaign=definition.name,
                arm=name,
                baseline=definition.baseline,
                measure=measure,
                is_primary=measure == definition.campaign.primary,
                cycles=contrast.cycles,
                ratio=contrast.ratio,
                ci_low=contrast.ci_low,
                ci_high=contrast.ci_high,
                confidence=contrast.confidence,
                p_value=contrast.p_value if rule is None else None,
                p_adjusted=contrast.p_adjusted if rule is None else None,
                verdict=contrast.verdict,
                cycles_needed=contrast.cycles_needed,
            )


def _value(cell: CellEntry | None, measure: str) -> float | None:
    return None if cell is None or cell.row is None else getattr(cell.row, measure)


# ------------------------------------------------------------------ nodes of a cluster
def _node_and_board(row: ExperimentRow) -> tuple[str, str]:
    return row.slurm_node or row.hostname or "", row.device or ""


def _apart(definition: Definition, found: Found) -> set[tuple[int, str]]:
    """Return the cells that ran on a different node or board from their cycle's baseline, or on several nodes.

    If the baseline has no result in a cycle, another cell of the cycle takes its place. Cells of one cycle run on
    different nodes if a job was requeued in the middle of its cycle and started again on another node. In a grouped
    campaign, each arm is one job, so no cycle has a node of its own, and the result is empty.
    """
    if definition.campaign.structure == "grouped":
        return set()
    rows = {key: cell.row for key, cell in found.items() if cell.row is not None}
    in_jobs = {cycle for (cycle, _), row in rows.items() if row.slurm_node}
    places = {key: _node_and_board(row) for key, row in rows.items() if key[0] in in_jobs}
    of_cycle: dict[int, tuple[str, str]] = {}
    for (cycle, arm), place in places.items():
        if arm == definition.baseline or cycle not in of_cycle:
            of_cycle[cycle] = place
    return {key for key, place in places.items() if place != of_cycle[key[0]] or SEVERAL in place[0]}


def _comparable(definition: Definition, found: Found) -> Found:
    """Return the cells, with the rows removed from those that cannot be compared with the rest of their cycle."""
    apart = _apart(definition, found)
    return {key: replace(cell, row=None) if key in apart else cell for key, cell in found.items()}


def _spread(definition: Definition, names: Sequence[str], comparable: Found) -> Spread | None:
    """Return how much nodes and boards differ in the primary metric; None unless cycles ran on several nodes."""
    campaign = definition.campaign
    if campaign.structure == "grouped":
        return None
    blocks = []
    for cycle in sorted({cycle for cycle, _ in comparable}):
        cells = [comparable.get((cycle, name)) for name in names]
        row = next((cell.row for cell in cells if cell and cell.row and cell.row.slurm_node), None)
        if row is None:
            continue
        values = [_value(cell, campaign.primary) for cell in cells]
        logs = tuple(math.log(value) if value else math.nan for value in values)
        blocks.append(Block(*_node_and_board(row), logs, tuple(cell.position if cell else 0 for cell in cells)))
    if len({block.node for block in blocks}) < 2:
        return None
    return spread(blocks, names.index(definition.baseline), ANALYSES[campaign.structure])


def _of_nodes(
    definition: Definition, names: Sequence[str], found: Found, spread_of_nodes: Spread | None
) -> Iterator[CodedWarning]:
    """Warn about cells on a different node from the rest of their cycle, and about ratios that differ between nodes."""
    apart = sorted(_apart(definition, found))
    if apart:
        parts = [f"{arm} in cycle {cycle} ({row.slurm_node})" for cycle, arm in apart if (row := found[cycle, arm].row)]
        text = (
            "cells did not run on the same node as the rest of their cycle, or ran on several nodes, so the pairs that "
            f"contain them are left out: {', '.join(parts)}."
        )
        yield warning("campaign_cycle_moved", text)
    for test in spread_of_nodes.interactions if spread_of_nodes else ():
        if test.p_adjusted < SUSPICIOUS:
            text = (
                f"the ratio of {names[test.arm]} to {definition.baseline} differs between {test.by}s (F-test, p = "
                f"{test.p_adjusted:.2g}), so its interval applies to the {test.by}s of this campaign only, not to "
                "others."
            )
            yield warning("campaign_nodes_interact", text)


# ------------------------------------------------------------------ reasons for doubt
def _doubts(definition: Definition, names: Sequence[str], found: Found) -> Iterator[CodedWarning]:
    """Yield warnings that a reader of the comparison must know about."""
    campaign, rows = definition.campaign, [cell.row for cell in found.values() if cell.row is not None]
    yield from about_order(campaign, len(names))
    missing = [cell for cell in found.values() if cell.row is None]
    if missing:
        have = "has" if len(missing) == 1 else "have"
        text = f"{len(missing)} of {len(found)} cells {have} no result, so pairs that need such a cell are missing."
        yield warning("campaign_cells_missing", text)
    yield from _different(campaign, names, found)
    yield from _moved(campaign, names, found)
    codes = Counter(text.partition(":")[0] for row in rows for text in dict.fromkeys(row.warnings))
    if notes := [f"{code} ({count} of {len(rows)})" for code, count in codes.most_common() if code != "few_cycles"]:
        yield warning("campaign_cells_warn", f"some cells have warnings: {', '.join(notes)}.")


def about_order(campaign: Campaign, arms: int) -> Iterator[CodedWarning]:
    """Warn about an order that is the same in each cycle or is not balanced; no measurements are needed."""
    if campaign.structure in ("interleaved", "grouped"):
        text = (
            f"the order is {campaign.structure}, and therefore the same in each cycle, so a drift can look like a "
            "difference between arms."
        )
        yield warning("campaign_fixed_order", text)
    size = square_size(arms)
    if campaign.structure == "latin" and campaign.until_ci is None and campaign.cycles % size:
        above = whole_squares(campaign.cycles, size)
        nearest = [str(cycles) for cycles in (above - size, above) if cycles > 0]
        text = (
            f"the number of cycles ({campaign.cycles}) is not a multiple of {size}, so positions and predecessors are "
            f"not balanced; {' or '.join(nearest)} cycles would balance them."
        )
        yield warning("campaign_unbalanced", text)


def _places_differ(campaign: Campaign, rows: Sequence[ExperimentRow]) -> Iterator[CodedWarning]:
    """Warn if cells ran on different machines or devices, unless that is intended.

    On a cluster, each cycle is a job, except in grouped campaigns. These jobs may run on different nodes. With
    `across_nodes`, the nodes may have different types of device.
    """
    has_jobs = campaign.structure != "grouped" and all(row.slurm_node for row in rows)
    places = {"the machine": "hostname", "the device": "device"}
    if has_jobs:
        places = {} if campaign.across_nodes else {"the device": "device"}
    for what, of in places.items():
        values = dict.fromkeys(str(getattr(row, of)) for row in rows if getattr(row, of))
        if len(values) > 1:
            yield warning("campaign_boards_differ", f"{what} differs between cells: {', '.join(values)}.")


def _different(campaign: Campaign, names: Sequence[str], found: Found) -> Iterator[CodedWarning]:
    """Warn about unintended differences between cells, such as different machines or prompts."""
    rows = {name: [c.row for (_, arm), c in found.items() if arm == name and c.row is not None] for name in names}
    everything = [row for own in rows.values() for row in own]
    yield from _places_differ(campaign, everything)
    engines = dict.fromkeys(
        f"{row.backend} ({row.engine_version})" if row.engine_version else row.backend for row in everything
    )
    if len(engines) > 1:
        yield warning("campaign_engines_differ", f"the engine differs between cells: {', '.join(engines)}.")
    for what, of in (
        ("source differs", "energy_source"),
        ("scope differs", "energy_scope"),
        ("components differ", "energy_components"),
    ):
        values = dict.fromkeys(str(getattr(row, of)) for row in everything)
        if len(values) > 1:
            text = f"the energy's {what} between cells: {', '.join(values)}."
            yield warning("campaign_meters_differ", text)
    sources = {row.energy_source for row in everything if is_estimated(row.energy_source)}
    if "simulated" in sources:
        yield warning("campaign_estimate", "the energy is simulated, so its ratios are simulated too.")
    if sources - {"simulated"}:
        yield warning("campaign_estimate", "the energy is an estimate, so its ratios are estimates too.")
    cycles = {cycle for cycle, _ in found}
    of_cycles = [[cell.row for (number, _), cell in found.items() if number == cycle and cell.row] for cycle in cycles]
    if any(len({row.prompts_sha256 for row in each}) > 1 for each in of_cycles):
        yield warning("campaign_prompts_differ", "in at least one cycle, the arms did not run the same prompts.")
    lengths = {name: sum(r.output_tokens for r in own) / len(own) for name, own in rows.items() if own}
    if lengths and max(lengths.values()) > (1 + LENGTHS_DIFFER) * min(lengths.values()):
        words = ", ".join(f"{name} {length:.6g}" for name, length in lengths.items())
        text = f"the arms did not generate the same number of output tokens per cell: {words}."
        yield warning("campaign_lengths_differ", text)


def _moved(campaign: Campaign, names: Sequence[str], found: Found) -> Iterator[CodedWarning]:
    """Warn about a trend over the campaign, and about an effect of the position within the cycles."""
    known = [(cell, math.log(value)) for cell in found.values() if (value := _value(cell, campaign.primary))]
    known = [(cell, value) for cell, value in known if cell.row is not None]
    what = MEASURES[campaign.primary][1]
    if len({cell.row.slurm_node for cell, _ in known if cell.row}) > 1:
        # Cycles on several nodes may overlap, and the nodes' clocks may differ, so there is no order for a trend.
        left, used = _without_arms_and_cycles(known, names)
    else:
        known.sort(key=lambda each: each[0].row.started_at if each[0].row else "")
        left, used = _without_arms(known, names), len(names)
        if trend := _change([float(i) for i in range(len(known))], left, used):
            yield warning("campaign_trend", f"{what} changes by {trend} over the campaign.")
    if moved := _change([float(cell.position) for cell, _ in known], left, used):
        yield warning("campaign_position", f"{what} changes by {moved} from the first to the last position in a cycle.")


def _carried_over(definition: Definition, names: Sequence[str], cells: Sequence[CellEntry]) -> CarryOver | None:
    """Return the effects of predecessors on the primary metric; None if these effects cannot be estimated.

    A cell is used if the cell before it in the plan also has a result, and no third cell with a result began between
    the two. On a cluster, the two cells must also belong to the same job.
    """
    campaign = definition.campaign
    if campaign.structure not in ("shuffled", "latin"):
        return None
    begun: dict[str, list[CellEntry]] = {}
    for cell in cells:
        if cell.row is not None:
            begun.setdefault(cell.row.slurm_job_id or "", []).append(cell)
    # Times are compared only within a job, because the clocks of nodes may differ.
    in_order = [sorted(own, key=lambda cell: cell.row.started_at if cell.row else "") for own in begun.values()]
    follows = {id(after): before for own in in_order for before, after in pairwise(own)}
    known = [
        Ran(cell.cycle, cell.position, names.index(cell.arm), names.index(before.arm), math.log(value))
        for before, cell in pairwise(cells)
        if follows.get(id(cell)) is before and (value := _value(cell, campaign.primary))
    ]
    return carry_over(known, len(names), names.index(definition.baseline))


def _of_predecessors(definition: Definition, names: Sequence[str], found: CarryOver | None) -> Iterator[CodedWarning]:
    """Warn if a cell's value depends on the arm that ran just before it."""
    if found is None or found.p_value >= SUSPICIOUS:
        return
    what = MEASURES[definition.campaign.primary][1]
    level = quantities.percent(1 - (1 - CONFIDENCE) / len(found.after))
    parts = [
        f"after {names[each.arm]} it is {each.ratio:.4g} times as high as after {definition.baseline} ({level} "
        f"interval {each.ci_low:.4g}–{each.ci_high:.4g})"
        for each in found.after
    ]
    yield warning(
        "campaign_carry_over", f"{what} depends on the preceding arm: {', '.join(parts)} (p = {found.p_value:.2g})."
    )


def _without_arms(known: Sequence[tuple[CellEntry, float]], names: Sequence[str]) -> list[float]:
    """Return the logarithm of each cell's value, minus the mean of its arm's logarithms."""
    own = {name: [value for cell, value in known if cell.arm == name] for name in names}
    means = {name: math.fsum(values) / len(values) for name, values in own.items() if values}
    return [value - means[cell.arm] for cell, value in known]


def _without_arms_and_cycles(known: Sequence[tuple[CellEntry, float]], names: Sequence[str]) -> tuple[list[float], int]:
    """Fit the effects of arms and cycles by least squares; return the residuals and the degrees of freedom used."""
    import numpy as np

    cycles = sorted({cell.cycle for cell, _ in known})
    of_arm = np.eye(len(names))[[names.index(cell.arm) for cell, _ in known]]
    of_cycle = np.eye(len(cycles))[[cycles.index(cell.cycle) for cell, _ in known]]
    design, logs = np.hstack([of_arm, of_cycle]), np.array([value for _, value in known])
    left = logs - design @ (np.linalg.pinv(design) @ logs)
    return left.tolist(), int(np.linalg.matrix_rank(design))


def _change(places: Sequence[float], values: Sequence[float], used: int) -> str | None:
    """Return, as text, how far a line through the values rises or falls over the positions; None if not significant.

    The effects of arms (and of cycles, if they ran on several nodes) have already been removed from the values. `used`
    is the number of degrees of freedom that this took.
    """
    line = line_through(places, values, used)
    if line is None or line.p_value >= SUSPICIOUS:
        return None
    return f"{math.expm1(line.slope * (max(places) - min(places))):+.1%} (p = {line.p_value:.2g})"


# ------------------------------------------------------------------ the power of a campaign
def detectable_ratio(sd_log: float, cycles: int, degrees_of_freedom: int, pairs: int = 1) -> float:
    """Return the smallest ratio above 1 that a campaign of `cycles` cycles detects with a power of 80%.

    `sd_log` is the standard deviation of the logarithm of a cell's value. With several pairs, the intervals are wide
    enough to hold jointly at 95% (Bonferroni).
    """
    errors = detectable_errors(1 - (1 - CONFIDENCE) / pairs, compare.POWER, degrees_of_freedom)
    return math.exp(errors * math.sqrt(2) * sd_log / math.sqrt(cycles))
