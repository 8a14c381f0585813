"""The tables have one row per experiment, even if writers are killed or several processes write."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lem.errors import ResultsError
from lem.record import RequestRecord
from lem.results.aggregate import measured, read
from lem.results.parquet import check, columns, read_table, records, table, write_table
from lem.results.schema import CycleRow, ExperimentRow
from lem.results.store import Store
from lem.results.tables import NewRows, Tables
from tests.records import finished


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def several(store, count, first=0):
    at = datetime(2026, 1, 2, 3, 4, 5)
    return [read(finished(store, at + timedelta(seconds=first + i))) for i in range(count)]


def ids(store, name="experiments"):
    return sorted(pd.read_parquet(store.root / name)["experiment_id"])


def names(rows):
    return [one.row.experiment_id for one in rows]


def write(store, rows):
    with Tables(store).locked():
        new = NewRows(Tables(store).locations())
        new.add([measured(store.directory(name)) for name in names(rows)])
        Tables(store).write(new)


def test_one_experiment_has_a_file_of_its_name_and_several_share_one(store):
    (alone,) = several(store, 1)
    write(store, [alone])
    assert [file.name for file in store.experiments_table.iterdir()] == [f"{alone.row.experiment_id}.parquet"]
    together = several(store, 3, first=1)
    write(store, together)
    assert len(list(store.experiments_table.iterdir())) == 2
    assert ids(store) == ids(store, "cycles") == names([alone, *together])
    assert len(pd.read_parquet(store.requests_table)) == 4 * 3


def test_rows_are_found_in_either_kind_of_file(store):
    rows = several(store, 1) + several(store, 3, first=1)
    write(store, rows[:1])
    write(store, rows[1:])
    tables = Tables(store)
    for one in rows:
        at = tables.location(one.row.experiment_id)
        assert tables.row(one.row.experiment_id, at) == one.row
        assert tables.cycles(one.row.experiment_id, at) == one.cycles
    assert tables.location("exp_20200101_000000") is None
    assert list(tables.locations()) == names(rows)
    assert sorted(tables.rows()[0], key=lambda row: row.experiment_id) == [one.row for one in rows]


def test_rows_are_replaced_where_they_lie(store):
    rows = several(store, 4)
    write(store, rows[:3])
    write(store, rows[3:])
    before = sorted(store.experiments_table.iterdir())
    for one in (rows[1], rows[3]):
        write(store, [one])
    assert sorted(store.experiments_table.iterdir()) == before
    assert ids(store) == ids(store, "cycles") == names(rows)
    assert len(pd.read_parquet(store.requests_table)) == 4 * 3


def test_what_a_killed_writer_left_is_removed(store):
    rows = several(store, 3)
    write(store, rows[:1])
    # One was killed after two of the three tables, and one while it wrote the third.
    write_table(store.requests_table / "exp_20260102_030406-exp_20260102_030407-01234567.parquet",
                table(RequestRecord, [r for one in rows[1:] for r in one.requests]))  # fmt: skip
    write_table(store.cycles_table / f"{rows[1].row.experiment_id}.parquet", table(CycleRow, rows[1].cycles))
    scratch = store.experiments_table / ".exp_20260102_030406.parquet-ab_c1"
    scratch.write_text("half")
    (store.requests_table / "of-the-user.parquet").write_bytes(
        (store.requests_table / f"{ids(store)[0]}.parquet").read_bytes()
    )
    write(store, rows[1:])
    (store.requests_table / "of-the-user.parquet").unlink()
    assert ids(store) == ids(store, "cycles") == names(rows)
    assert len(pd.read_parquet(store.requests_table)) == 3 * 3
    assert not scratch.exists()


def test_a_damaged_file_is_named_and_hides_nothing_else(store):
    rows = several(store, 3)
    write(store, rows[:1])
    write(store, rows[1:])
    alone = store.experiments_table / f"{rows[0].row.experiment_id}.parquet"
    alone.write_bytes(alone.read_bytes()[:500])
    found, damaged = Tables(store).rows()
    assert [row.experiment_id for row in found] == names(rows[1:])
    assert len(damaged) == 1
    assert f"lem aggregate {rows[0].row.experiment_id} --force" in damaged[0]
    (together,) = store.experiments_table.glob("*-*.parquet")
    together.write_bytes(b"")
    with pytest.raises(ResultsError, match="remove the file, then run lem aggregate --all"):
        Tables(store).locations()


def test_files_of_older_versions_can_be_read(store):
    rows = several(store, 2)
    write(store, rows)
    (file,) = store.experiments_table.iterdir()
    old = pq.read_table(file)
    old = old.drop_columns(["energy_cv", "warnings"]).append_column("gone", old["hostname"])
    pq.write_table(old, file)
    found, damaged = Tables(store).rows()
    assert damaged == []
    assert (found[0].energy_cv, found[0].warnings, found[0].energy_j) == (None, [], rows[0].row.energy_j)
    write(store, rows[:1])
    assert ids(store) == names(rows)


def test_rows_survive_parquet(store):
    (one,) = several(store, 1)
    write(store, [one])
    file = f"{one.row.experiment_id}.parquet"
    assert records(read_table(store.experiments_table / file), ExperimentRow) == [one.row]
    assert records(read_table(store.cycles_table / file), CycleRow) == one.cycles
    assert records(read_table(store.requests_table / file), RequestRecord) == one.requests


def test_arrow_opens_files_itself(store, monkeypatch):
    """A thread of Arrow that releases parts of a Python file while the interpreter exits would abort the process."""
    (one,) = several(store, 1)
    write(store, [one])
    file, given, real = store.experiments_table / f"{one.row.experiment_id}.parquet", [], pq.ParquetFile
    monkeypatch.setattr(pq, "ParquetFile", lambda source: given.append(source) or real(source))
    read_table(file)
    check(file)
    assert [type(source) for source in given] == [pa.OSFile, pa.OSFile]


@pytest.mark.parametrize("read_it", [read_table, check])
def test_a_table_that_cannot_be_opened_is_named(tmp_path, read_it):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(OSError, match=re.escape(str(path))) as error:
            read_it(path)
        assert error.value.filename == str(path)


# ------------------------------------------------------------------ the schema
UNITS_IN_NAMES = {"_j": "J", "_s": "s", "_w": "W", "_wh": "Wh", "_g": "gCO2e", "_bytes": "B"}


@pytest.mark.parametrize("record_type", [ExperimentRow, CycleRow, RequestRecord])
def test_every_column_is_described_and_a_unit_in_the_name_is_the_unit_in_the_metadata(record_type):
    assert {column.name for column in columns(record_type)} == set(record_type.__struct_fields__)
    for column in columns(record_type):
        if column.name in ("experiment_id", "rank"):
            continue
        assert column.description, column.name
        for ending, unit in UNITS_IN_NAMES.items():
            if column.name.endswith(ending) and "_per_" not in column.name:
                assert column.unit == unit, column.name
        if column.python_type is float:
            assert column.unit, column.name
