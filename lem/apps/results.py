"""`lem results` and `lem aggregate`: reading a results directory back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lem import report
from lem.aggregate import aggregate, read_row
from lem.errors import ResultsError
from lem.record import ExperimentRow
from lem.store import ExperimentDir, Store, default_root, to_json


def store_at(results_dir: Path | None) -> Store:
    """Return the store at --results-dir, else the environment's, else results/."""
    return Store(results_dir or default_root())


def list_experiments(store: Store, *, everything: bool, as_json: bool = False) -> int:
    """Print a line for each aggregated experiment, and with `everything` for the others too."""
    ids = store.ids()
    rows, damaged = _rows(store, [name for name in ids if store.is_aggregated(name)])
    pending = [name for name in ids if not store.is_aggregated(name)] if everything else []
    if as_json:
        print(report.as_json([report.row_dict(row) for row in rows] + [_pending(name) for name in pending]))
    elif rows or pending:
        report.show_rows(rows, pending)
    else:
        print(f"No experiments in {store.root}.")
    for problem in damaged:
        report.console(stderr=True).print(problem, markup=False, style="red")
    return 1 if damaged else 0


def _pending(experiment_id: str) -> dict[str, str]:
    return {"experiment_id": experiment_id, "status": "pending"}


def _rows(store: Store, ids: Sequence[str]) -> tuple[list[ExperimentRow], list[str]]:
    """Read the rows; a damaged file is a sentence and hides nothing else."""
    from lem import parquet

    rows, damaged = [], []
    for name in ids:
        file = store.experiments_table / f"{name}.parquet"
        try:
            rows += parquet.read_rows(file, ExperimentRow)
        except (OSError, ValueError, TypeError) as error:
            damaged.append(f"{file} cannot be read ({error}); lem aggregate {name} --force makes it anew.")
    return rows, damaged


def show(store: Store, experiment_id: str, *, raw: bool, as_json: bool) -> int:
    """Print one experiment: its row, or with `raw` the records of its processes."""
    directory = store.find(experiment_id)
    if raw:
        _show_raw(directory, as_json)
        return 0
    row = _row(store, directory)
    if as_json:
        print(report.as_json(report.row_dict(row)))
    else:
        report.show_row(row)
    return 0


def _row(store: Store, directory: ExperimentDir) -> ExperimentRow:
    """Return the aggregated row, or for an experiment that has none yet what its records give."""
    if not store.is_aggregated(directory.id):
        return read_row(directory, strict=False)[0]
    rows, damaged = _rows(store, [directory.id])
    if damaged:
        raise ResultsError(damaged[0])
    return rows[0]


def _show_raw(directory: ExperimentDir, as_json: bool) -> None:
    records = directory.records()
    if not records:
        raise ResultsError(f"{directory.id} has no records yet.")
    if as_json:
        print("[" + ",\n".join(to_json(record) for record in records) + "]")
    else:
        report.show_records(records)


def aggregate_experiments(
    store: Store, experiment_id: str | None, *, everything: bool, force: bool, strict: bool
) -> int:
    """Write the rows of one experiment or of all that have none; 1 when any could not be aggregated."""
    if (experiment_id is None) == (not everything):
        raise ResultsError("Name one experiment, or give --all.")
    if everything:
        ids = [name for name in store.ids() if force or not store.is_aggregated(name)]
    else:
        ids = [store.find(experiment_id or "").id]
    failed = 0
    for name in ids:
        had_row = store.is_aggregated(name) and not force
        try:
            row = aggregate(store, store.find(name), strict=strict, force=force)
        except ResultsError as error:
            report.console(stderr=True).print(str(error), markup=False, style="red")
            failed += 1
        else:
            print(f"{name}: {row.status}{', has its row already' if had_row else ''}")
    if not ids:
        print("Nothing to aggregate.")
    return 1 if failed else 0
