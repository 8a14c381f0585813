"""Finds earlier runs of the same configuration, from which the time and energy of a study are estimated."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lem.results.codec import to_plain
from lem.results.schema import ExperimentRow
from lem.results.store import Store
from lem.results.tables import Tables
from lem.spec.experiment import Experiment

COLUMNS = (
    "experiment_id", "config_json", "status", "duration_s", "load_duration_s", "warmup_duration_s", "energy_j",
)  # fmt: skip


def earlier_rows(store: Store, columns: Sequence[str] = ()) -> list[ExperimentRow]:
    """Return the rows of all completed experiments, with the columns in `COLUMNS` and the given columns."""
    rows, _ = Tables(store).rows(list(dict.fromkeys([*COLUMNS, *columns])))
    return [row for row in rows if row.status == "completed"]


def rows_like(experiment: Experiment, rows: Sequence[ExperimentRow]) -> list[ExperimentRow]:
    """Return the rows of experiments with the same configuration; the results directory may differ."""
    wanted = json.loads(json.dumps({key: value for key, value in to_plain(experiment).items() if key != "io"}))
    return [row for row in rows if _values(row.config_json) == wanted]


def mean_time_s(rows: Sequence[ExperimentRow]) -> float | None:
    """Return the mean time, in seconds, of loading, warm-up and the window of one cycle; None without rows."""
    each_s = [sum(filter(None, (r.duration_s, r.load_duration_s, r.warmup_duration_s))) for r in rows]
    return sum(each_s) / len(each_s) if each_s else None


def _values(config_json: str) -> object:
    try:
        values = json.loads(config_json)
    except ValueError:
        return None
    values.pop("io", None)
    return values
