"""Other programs read the tables as folders of Parquet files: pandas, DuckDB and `lem.load` find the same values."""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import lem as library
from lem.record import ErrorInfo
from lem.results.aggregate import aggregate
from lem.results.parquet import names, read_table, write_table
from lem.results.schema import CycleRow, ExperimentRow
from lem.results.store import Store
from tests import records
from tests.records import experiment, finished, record

AT = datetime(2026, 1, 2, 3, 4, 5)
# Columns that the older of two versions did not have: a number, a whole number, a text, a truth value and a list.
NEWER = {
    "experiments": ["energy_sd_j", "campaign_cycle", "slurm_node", "overrides", "steady_energy_j"],
    "cycles": ["steady_energy_j", "attempts"],
    "requests": ["itl_s", "itl_spread", "error"],
}
# What each reader has to find in `experiments`; None where nothing was measured.
WANTED = {
    "status": ["failed", "completed", "completed"],
    "energy_j": [None, 100.0, 100.0],
    "output_tokens_per_s": [None, 15.0, 15.0],
    "output_tokens": [0, 60, 60],
    "peak_memory_bytes": [None, None, None],
    "error": ["no model", None, None],
}


def failed(store: Store, at: datetime) -> str:
    """Write an experiment that failed before anything was measured; return its id."""
    directory = experiment(store, at)
    how: dict[str, Any] = {"status": "failed", "error": ErrorInfo("X", "no model", "load"), "phases": ()}
    how |= {"window_opened_unix_s": None, "requests_planned": 3, "config_sha256": directory.plan().config_sha256}
    records.put(directory, record([], **how), [])
    directory.write_state(directory.state().now("failed", "no model"))
    return directory.id


def made_older(store: Store, experiment_id: str) -> None:
    """Make the files of an experiment look as if an older version had written them."""
    for table, columns in NEWER.items():
        file = store.root / table / f"{experiment_id}.parquet"
        write_table(file, read_table(file).drop_columns(columns))


@pytest.fixture(params=["old first", "old last", "one version"])
def store(request, tmp_path):
    """Three experiments, each with a file of its own; the first failed, and in most cases one file is older."""
    store = Store(tmp_path / "results")
    ids = [failed(store, AT), *(finished(store, AT + timedelta(seconds=i)).id for i in (1, 2))]
    for experiment_id in ids:
        aggregate(store, store.directory(experiment_id), strict=False)
    if request.param != "one version":
        made_older(store, ids[0] if request.param == "old first" else ids[2])
    return store


def plain(values) -> list[Any]:
    return [None if value is None or (isinstance(value, float) and math.isnan(value)) else value for value in values]


def found(rows: pd.DataFrame) -> dict[str, list[Any]]:
    ordered = rows.sort_values("experiment_id")
    return {name: plain(ordered[name].tolist()) for name in WANTED}


def test_the_first_file_has_nothing_but_nulls_in_the_columns_of_measurements(store):
    first = pq.read_table(sorted(store.experiments_table.iterdir())[0])
    assert first["status"].to_pylist() == ["failed"]
    for name in ("energy_j", "duration_s", "output_tokens_per_s", "latency_mean_s", "peak_memory_bytes"):
        assert first[name].to_pylist() == [None]
        assert first.schema.field(name).type in (pa.float64(), pa.int64())  # not the type null, which others inherit


def test_pandas_reads_the_folder(store):
    whole = pd.read_parquet(store.experiments_table)
    assert found(whole) == WANTED
    assert whole["energy_j"].dtype == "float64"
    assert pd.read_parquet(store.cycles_table)["energy_j"].tolist()[-2:] == [100.0, 100.0]
    requests = pd.read_parquet(store.requests_table)
    assert requests["latency_s"].tolist() == [0.5] * 6
    assert requests["output_tokens"].sum() == 120


def test_duckdb_reads_the_folder(store):
    duckdb = pytest.importorskip("duckdb", reason="DuckDB is not installed")

    def read(table: str) -> Any:
        source = f"read_parquet('{store.root / table}/*.parquet', union_by_name = true)"
        return duckdb.sql(f"SELECT * FROM {source} ORDER BY experiment_id").to_arrow_table()

    whole = read("experiments")
    assert {name: whole[name].to_pylist() for name in WANTED} == WANTED
    assert set(whole.column_names) == set(names(ExperimentRow))
    assert read("cycles")["energy_j"].to_pylist()[-2:] == [100.0, 100.0]
    assert sum(read("requests")["output_tokens"].to_pylist()) == 120


def test_lem_load_reads_all_columns_of_this_version(store):
    frames = library.load(store.root)
    assert found(frames.experiments) == WANTED
    assert list(frames.experiments.columns) == names(ExperimentRow)
    assert list(frames.cycles.columns) == names(CycleRow)
    assert frames.requests["latency_s"].tolist() == [0.5] * 6
    assert frames.experiments["energy_sd_j"].isna().all()
    assert frames.experiments["overrides"].map(list).tolist()[1] in ([], ["seed=1"])
    assert library.units(frames.experiments)["energy_sd_j"] == "J"


def test_aggregating_again_gives_all_files_the_columns_of_this_version(lem, store):
    """Afterwards, pandas finds all columns and DuckDB needs no option."""
    assert lem("aggregate", "--all", "--force", "--no-strict", "-o", str(store.root)).code == 0
    assert list(pd.read_parquet(store.experiments_table).columns) == names(ExperimentRow)
    assert found(pd.read_parquet(store.experiments_table)) == WANTED
    for file in store.experiments_table.iterdir():
        assert pq.read_schema(file).names == names(ExperimentRow)
