"""Divides each side of `lem results compare` (experiment, campaign or results directory) into cases."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lem.errors import LemError, ResultsError
from lem.results import campaign
from lem.results.aggregate import catch_up, is_fresh, read
from lem.results.comparison import Case, Comparison, Measured, Side, comparisons, config_of, metric_named
from lem.results.directory import ExperimentDir
from lem.results.schema import ExperimentRow
from lem.results.store import ID, Store, one_of
from lem.results.tables import Tables
from lem.spec.paths import expanded

# If a case of a results directory has more experiments than this, the environments of the rest are not read, to save
# time.
MOST_ENVIRONMENTS = 50


def compare(
    baseline: str | Path, *others: str | Path, results_dir: str | Path = "results", metrics: Sequence[str] = ()
) -> list[Comparison]:
    """Compare results that were measured at different times, as `lem results compare` does.

    This continues the example of `lem.run`:

    >>> import lem
    >>> comparison, = lem.compare("results", "results")
    >>> comparison.ratio("output_tokens_per_s").ratio
    1.0
    >>> comparison.objections
    []

    Args:
        baseline: the id of an experiment, the name or directory of a campaign, or a results directory.
        others: what to compare with the baseline, at least one, each like `baseline`.
        results_dir: the results directory in which ids and names are looked up.
        metrics: columns to compare in addition to those that a campaign reports.

    Returns:
        A comparison for each case that one of `others` has in common with the baseline. A case is an arm of a campaign,
        a configuration in a results directory, or a single experiment. If the two sides have a single case each, these
        are compared even if they differ. `ratios` has a ratio for each metric, without a unit: the side's value divided
        by the baseline's. Each ratio's `value` and `baseline_value` have the unit of the metric's column in the table
        `experiments`. `objections` lists the reasons why the case is not comparable, each with a code.

    Raises:
        ResultsError: a side cannot be found or has no completed experiment, no case can be compared with a case of the
            baseline, or a metric is not a column that can be compared.
    """
    if not others:
        raise ResultsError("A comparison needs at least two sides; give a baseline and something to compare with it.")
    store = Store(results_dir)
    wanted = [metric_named(name, "metrics") for name in metrics]
    return comparisons([side(store, str(each)) for each in (baseline, *others)], wanted)


def side(store: Store, text: str) -> Side:
    """Return the side that a text names: an experiment's id, a campaign's name or directory, or a results directory.

    Raises:
        ResultsError: the text names none of these, or the side has no completed experiment.
    """
    folder = expanded(text)
    if (folder / campaign.DEFINITION).is_file():
        found = _of_campaign(folder.resolve(), text)
    elif folder.is_dir() and any((folder / name).is_dir() for name in ("experiments", "raw")):
        found = _of_directory(Store(folder), text)
    elif not ID.fullmatch(text) and (campaign.folder_of(store, text) / campaign.DEFINITION).is_file():
        found = _of_campaign(campaign.folder_of(store, text), text)
    else:
        found = _of_experiment(store, text)
    if not found.cases:
        raise ResultsError(f"{text} has no completed experiment to compare.")
    return found


def _of_experiment(store: Store, text: str) -> Side:
    catch_up(store)
    try:
        directory = store.find(text)
    except ResultsError:
        ids = {*store.ids(), *Tables(store).locations()}
        if not any(text and name.startswith(text) for name in ids):
            raise ResultsError(
                f"There is no experiment, campaign or results directory '{text}' (results directory: {store.root}); "
                "lem results list shows the ids."
            ) from None
        directory = store.directory(one_of(text, sorted(ids), store.root))
    found = _measured(store, directory)
    if found.row.status != "completed":
        raise ResultsError(
            f"{found.row.experiment_id} has the status {found.row.status}; only completed experiments can be compared."
        )
    return Side(text, [Case(_key(found.row), found.row.experiment_id, [found])])


def _of_campaign(folder: Path, text: str) -> Side:
    definition, store = campaign.read_definition(folder), campaign.store_of(folder)
    cells = campaign.read_cells(store, folder)
    cases = []
    for arm in definition.arms:
        rows = [cell.row for cell in cells if cell.arm == arm.name and cell.row is not None]
        if rows:
            measured = [Measured(row, (), _environment(store.directory(row.experiment_id))) for row in rows]
            cases.append(Case(f"arm {arm.name}", arm.name, measured))
    return Side(text, cases, sum(cell.row is None for cell in cells))


def _of_directory(store: Store, text: str) -> Side:
    catch_up(store)
    rows, damaged = Tables(store).rows()
    if damaged:
        raise ResultsError(*damaged)
    groups: dict[str, list[ExperimentRow]] = {}
    for row in rows:
        if row.status == "completed":
            groups.setdefault(_key(row), []).append(row)
    several = len({_label(own[0]) for own in groups.values()}) < len(groups)
    cases = []
    for key, own in groups.items():
        label = _label(own[0]) + (f" ({own[0].experiment_id})" if several else "")
        measured = [
            Measured(
                row,
                _cycles_of(store, row, len(own)),
                _environment(store.directory(row.experiment_id)) if number < MOST_ENVIRONMENTS else None,
            )
            for number, row in enumerate(own)
        ]
        cases.append(Case(key, label, measured))
    return Side(text, cases, sum(row.status != "completed" for row in rows))


def _cycles_of(store: Store, row: ExperimentRow, together: int) -> Sequence[Any]:
    """Return the rows of an experiment's cycles, or nothing if they are not needed.

    The rows are needed only if the experiment has several cycles and is the only one of its case (`together` is 1).
    """
    tables = Tables(store)
    at = tables.location(row.experiment_id) if together == 1 and row.cycles_completed > 1 else None
    return tables.cycles(row.experiment_id, at) if at else ()


def _measured(store: Store, directory: ExperimentDir) -> Measured:
    tables = Tables(store)
    at = tables.location(directory.id)
    if at and (not directory.path.is_dir() or is_fresh(tables, directory.id, at, directory.state())):
        row, cycles = tables.row(directory.id, at), tables.cycles(directory.id, at)
    else:
        rows = read(directory, strict=False)
        row, cycles = rows.row, rows.cycles
    return Measured(row, cycles, _environment(directory))


def _environment(directory: ExperimentDir) -> Any:
    if not os.path.isdir(directory.path):
        return None
    try:
        return next((record.environment for record in directory.records() if record.environment), None)
    except LemError:
        return None


def _key(row: ExperimentRow) -> str:
    return json.dumps(config_of(row), sort_keys=True)


def _label(row: ExperimentRow) -> str:
    return f"{row.model}, {row.backend}, batch {row.batch_size}, {row.dataset}, {row.requests_planned} requests"
