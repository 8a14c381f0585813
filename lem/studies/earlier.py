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
    "idle_power_before_w",
)  # fmt: skip
# One before the model is loaded, and one afterwards.
IDLE_PHASES = 2


def earlier_rows(store: Store, columns: Sequence[str] = ()) -> list[ExperimentRow]:
    """Return the rows of all completed experiments, with the columns in `COLUMNS` and the given columns."""
    rows, _ = Tables(store).rows(list(dict.fromkeys([*COLUMNS, *columns])))
    return [row for row in rows if row.status == "completed"]


def rows_like(experiment: Experiment, rows: Sequence[ExperimentRow]) -> list[ExperimentRow]:
    """Return the rows with the same configuration as `experiment`; the results directory may differ."""
    wanted = json.loads(json.dumps({key: value for key, value in to_plain(experiment).items() if key != "io"}))
    return [row for row in rows if _values(row.config_json) == wanted]


def mean_time_s(experiment: Experiment, rows: Sequence[ExperimentRow]) -> float | None:
    """Return the time of a run, in seconds, averaged over the earlier runs; None if there are none.

    The time includes the idle phases, loading, and the warm-up and the window of each cycle, but not the start of the
    processes.
    """
    if not rows:
        return None
    return sum(_time_s(experiment, row) for row in rows) / len(rows)


def _time_s(experiment: Experiment, row: ExperimentRow) -> float:
    # The columns of windows and warm-ups are means over the cycles.
    of_cycle_s = sum(filter(None, (row.duration_s, row.warmup_duration_s)))
    idle_s = 0.0 if row.idle_power_before_w is None else IDLE_PHASES * experiment.energy.idle_s
    return idle_s + (row.load_duration_s or 0.0) + experiment.cycles * of_cycle_s


def mean_energy_j(experiment: Experiment, rows: Sequence[ExperimentRow]) -> float | None:
    """Return the energy of all windows of a run, in joules, averaged over the earlier runs; None if it is unknown."""
    known_j = [row.energy_j for row in rows if row.energy_j is not None]
    return experiment.cycles * sum(known_j) / len(known_j) if known_j else None


def _values(config_json: str) -> object:
    try:
        values = json.loads(config_json)
    except ValueError:
        return None
    values.pop("io", None)
    return values
