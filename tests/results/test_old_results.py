"""A results directory of version 0.1.0 is read with the same numbers, and its unfinished experiments can be resumed."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest

WRITTEN = Path(__file__).parent / "written_by_0_1_0"
IDS = [path.name for path in sorted((WRITTEN / "results" / "raw").iterdir())]
INTERRUPTED, KILLED = "exp_20261126_020403", "exp_20261126_020408"
# Warnings that 0.1.0 did not have, and that its results deserve.
NEW = {"few_samples"}
# What it did not look for in the journal of a killed process.
NEW_OF_KILLED = {"short_window"}
ORDER = {
    "experiments": ("experiment_id",),
    "cycles": ("experiment_id", "cycle"),
    "requests": ("experiment_id", "cycle", "request"),
}


@pytest.fixture
def results(tmp_path):
    """A copy of the directory that looks as if it was written on this machine."""
    shutil.copytree(WRITTEN / "results", tmp_path / "results")
    shutil.copy(WRITTEN / "trace.csv", tmp_path)
    file = tmp_path / "results" / "raw" / KILLED / "state.json"
    # No process has an id as large as this.
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host": socket.gethostname(), "pid": 2**22 + 1}))
    return tmp_path / "results"


def expected(name):
    return json.loads((WRITTEN / "expected" / f"{name}.json").read_text())


def coded(warnings):
    """Return the codes of warnings, because their messages may be reworded."""
    return [each["code"] if isinstance(each, dict) else each.partition(":")[0] for each in warnings]


def known_then(rows, before):
    """Return the rows without columns that 0.1.0 did not have, and the rows that it wrote: column names and values."""
    assert len(rows) == len(before)
    kept = [_without_new(row, old) for row, old in zip(rows, before, strict=True)]
    assert [list(row) for row in kept] == [list(old) for old in before]
    return zip(kept, before, strict=True)


def _without_new(value, old):
    """Return a value without the fields, at any depth, that 0.1.0 did not have."""
    if isinstance(value, dict) and isinstance(old, dict):
        return {name: _without_new(each, old[name]) for name, each in value.items() if name in old}
    if isinstance(value, list) and isinstance(old, list) and len(value) == len(old):
        return [_without_new(*pair) for pair in zip(value, old, strict=True)]
    return value


def test_it_holds_one_of_each_kind(results):
    statuses = [row["status"] for row in expected("list")]
    assert statuses == ["completed", "interrupted", "interrupted", "failed", "completed", "completed"]
    assert not list((results / "raw" / KILLED).glob("process_*")), "its journal has to stand in"


def test_the_list_is_the_same(lem, results):
    listed, before = json.loads(lem("results", "list", "--all", "--json").out), expected("list")
    # The failed one had no row, which listing has written since: more columns, in their own order.
    for row, old in zip(listed, before, strict=True):
        then = _without_new(row, old)
        assert then | {"error": bool(then["error"])} == old | {"error": bool(old["error"])}


@pytest.mark.parametrize("experiment_id", IDS)
def test_the_records_are_the_same(lem, results, experiment_id):
    records = json.loads(lem("results", "show", experiment_id, "--raw", "--json").out)
    before = expected("raw")[experiment_id]
    for record, old in known_then(records, before):
        warnings = [code for code in coded(record["warnings"]) if code not in new(experiment_id, set())]
        assert record | {"warnings": warnings} == old | {"warnings": coded(old["warnings"])}


def test_the_rows_are_the_same_when_they_are_computed_again(lem, results):
    assert lem("aggregate", "--all", "--force", "--no-strict").code == 0
    for table, keys in ORDER.items():
        rows = pq.read_table(results / table).sort_by([(key, "ascending") for key in keys]).to_pylist()
        before = expected(table)
        for row, old in known_then(rows, before):
            if table != "requests":
                row["warnings"], old["warnings"] = coded(row["warnings"]), coded(old["warnings"])
                known = new(row["experiment_id"], NEW)
                row["warnings"] = [code for code in row["warnings"] if code not in known]
            assert row == old


def new(experiment_id, of_all):
    return of_all | NEW_OF_KILLED if experiment_id == KILLED else of_all


@pytest.mark.parametrize(("experiment_id", "cycles"), [(INTERRUPTED, 2), (KILLED, 1)])
def test_an_unfinished_experiment_can_be_resumed(lem, results, experiment_id, cycles):
    done = lem("experiment", "--resume", experiment_id, "-y")
    assert done.code == 0, done.err
    row = json.loads(lem("results", "show", experiment_id, "--json").out)
    assert (row["status"], row["requests_completed"], row["resumed"]) == ("completed", 6, 1)
    assert [cycle["requests_completed"] for cycle in row["cycles"]] == [6] * cycles
    assert "resumed" in coded(row["warnings"])
    file = results / "requests" / f"{experiment_id}.parquet"
    requests = pq.read_table(file, columns=["cycle", "request", "attempt"]).to_pylist()
    assert sorted((r["cycle"], r["request"]) for r in requests) == [(c + 1, i) for c in range(cycles) for i in range(6)]
    before = [r for r in expected("requests") if r["experiment_id"] == experiment_id]
    assert len([r for r in requests if r["attempt"] == 1]) == len(before)
