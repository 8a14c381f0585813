"""`lem results export`: what is written can be read back, and is equal, in every format."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pty
import subprocess
import sys
from datetime import datetime, timedelta

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs
from pyarrow import csv as arrow_csv

from lem.record import ErrorInfo
from lem.results import foreign, parquet
from lem.results.aggregate import aggregate_all
from lem.results.browse import Selection
from lem.results.export import as_json, export
from lem.results.schema import ExperimentRow
from lem.results.store import Store
from lem.results.tables import KINDS, Tables, file_name
from tests import records
from tests.records import experiment, finished, record, requests

NASTY = [
    "",
    "a,b",
    'say "hi"',
    "two\nlines",
    "carriage\r\nreturn",
    "tab\t",
    "🚀 é 大",
    "m" * 300,
    "=1+1",
    "NULL",
    "nan",
]
FLOATS = [0.0, -0.0, 1e-300, 0.1 + 0.2, 1e30, math.nan, math.inf, -math.inf]


IDS = ["exp_20260102_030405", "exp_20260102_030406"]
# The number of rows of each experiment in each table.
COUNTS = {"experiments": 1, "cycles": 2, "requests": 3}


@st.composite
def tables(draw):
    """Draw the three tables of two experiments, in which a few values of each type fill all columns of that type."""
    texts = [*NASTY, *draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=3))]
    floats = [*FLOATS, *draw(st.lists(st.floats(), max_size=3))]
    values = {
        str: texts,
        bool: [True, False],
        int: [0, 2**63 - 1, -(2**63), draw(st.integers(-(2**63), 2**63 - 1))],
        float: floats,
        list[str]: [[], texts[:3], texts[3:], ["NaN"]],
        list[float]: [[], floats, [math.nan], [0.5]],
    }
    shift = draw(st.integers(0, 20))

    def row(kind, experiment_id, number):
        found = {}
        for place, column in enumerate(parquet.columns(kind), start=shift + 7 * number):
            known = [*values[column.python_type], *([None] if column.nullable else [])]
            found[column.name] = known[place % len(known)]
        return kind(**found | {"experiment_id": experiment_id})

    return {
        name: parquet.table(kind, [row(kind, each, number) for each in IDS for number in range(COUNTS[name])])
        for name, kind in KINDS.items()
    }


def put(root, drawn):
    """Write tables into a results directory, in one file for both experiments."""
    for name, rows in drawn.items():
        parquet.write_table(root / name / file_name(IDS), rows)
    return Store(root)


def comparable(value):
    """Return a value that equals itself even if it has NaN in it."""
    if isinstance(value, float):
        return repr(value)
    return [comparable(each) for each in value] if isinstance(value, list) else value


def same(table, others):
    return [{k: comparable(v) for k, v in row.items()} for row in table.to_pylist()] == [
        {k: comparable(v) for k, v in row.items()} for row in others
    ]


def read_csv(file):
    """Read a CSV file back as the docs say."""
    units = json.loads(file.with_name(f"{file.name}.units.json").read_text())
    kinds = {"int64": pa.int64(), "double": pa.float64(), "bool": pa.bool_()}
    found = arrow_csv.read_csv(
        file,
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(
            column_types={name: kinds.get(c["type"], pa.string()) for name, c in units["columns"].items()},
            null_values=[""], strings_can_be_null=True, quoted_strings_can_be_null=False,
        ),
    )  # fmt: skip
    kinds = {name: column["type"] for name, column in units["columns"].items()}
    return [{name: from_text(value, kinds[name]) for name, value in row.items()} for row in found.to_pylist()]


def from_text(value, kind):
    if not kind.startswith("list") or value is None:
        return value
    return [TEXTS.get(each, each) if kind.endswith("double>") else each for each in json.loads(value)]


TEXTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def read_json(file):
    found = json.loads(file.read_text())
    kinds = {name: column["type"] for name, column in found["columns"].items()}

    def restored(name, value):
        if kinds[name] == "double" and isinstance(value, str):
            return TEXTS[value]
        if kinds[name].endswith("double>") and value is not None:
            return [TEXTS.get(each, each) for each in value]
        return value

    return [{name: restored(name, value) for name, value in row.items()} for row in found["rows"]]


READ = {"csv": read_csv, "json": read_json, "parquet": lambda file: pq.ParquetFile(file).read().to_pylist()}


@settings(max_examples=4)
@given(tables())
def test_what_is_exported_is_read_back_equal(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("results")
    store = put(folder, drawn)
    for kind, read in READ.items():
        for name in KINDS:
            file = folder / f"{name}.{kind}"
            assert export(store, Selection(), [], kind=kind, table=name, output=file, force=False) == 0
            assert same(drawn[name], read(file))


def read_ai_energy_score(file):
    """Read the CSV file; numbers and truth values are restored, and a null and an empty text are both None."""
    with file.open(encoding="utf-8", newline="") as text:
        rows = list(csv.DictReader(text))
    assert rows[0].keys() == dict.fromkeys(foreign.AI_ENERGY_SCORE_COLUMNS).keys()
    return [{name: value or None for name, value in row.items()} for row in rows]


def as_csv_text(value):
    """Return a value as the CSV file of AI Energy Score holds it."""
    return None if value in (None, "") else str(value)


def in_fractions(row):
    """Return a row of ML.ENERGY with floats where its file has floats."""
    floats = {name for name, kind in foreign.ML_ENERGY_COLUMNS.items() if kind == "float"}
    made = foreign.ml_energy(row)
    return {name: float(value) if name in floats and value is not None else value for name, value in made.items()}


@settings(max_examples=4)
@given(tables())
def test_other_projects_shapes_are_read_back_equal(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("results")
    store = put(folder, drawn)
    rows = drawn["experiments"].to_pylist()
    for kind in foreign.SHAPES:
        assert export(store, Selection(), [], kind=kind, table="experiments", output=folder / kind, force=False) == 0
    found = read_ai_energy_score(folder / "aienergyscore")
    assert found == [{name: as_csv_text(value) for name, value in foreign.ai_energy_score(row).items()} for row in rows]
    for name, column in (("model_name", "model"), ("error_message", "error"), ("avg_total_time", "latency_mean_s")):
        assert [row[name] for row in found] == [as_csv_text(row[column]) for row in rows]
    whole = pq.ParquetFile(folder / "mlenergy").read()
    assert same(whole, [dict.fromkeys(foreign.ML_ENERGY_COLUMNS) | in_fractions(row) for row in rows])
    assert whole["model_id"].to_pylist() == [row["model"] for row in rows]
    assert whole["total_output_tokens"].to_pylist() == [float(row["output_tokens"]) for row in rows]


def test_the_hostile_values_are_among_the_rows_that_are_exported():
    """So that the two tests above try what they are there for."""
    assert any(len(text) == 300 for text in NASTY)
    for part in (",", "\n", '"', "🚀"):
        assert any(part in text for text in NASTY)
    assert [value for value in FLOATS if not math.isfinite(value)]


# ------------------------------------------------------------------ the command
@pytest.fixture
def store(tmp_path):
    """Three experiments with rows, the last of which failed; they share one file."""
    store = Store(tmp_path / "results")
    at = datetime(2026, 1, 2, 3, 4, 5)
    for i in range(2):
        finished(store, at + timedelta(seconds=i))
    failed = experiment(store, at + timedelta(seconds=2))
    how = {"status": "failed", "error": ErrorInfo("X", "no, it\nfailed", "measured")}
    records.put(failed, record(requests([0]), **how, config_sha256=failed.plan().config_sha256), requests([0]))
    failed.write_state(failed.state().now("failed", "no"))
    assert all(one.kind == "written" for one in aggregate_all(store, store.ids(), strict=False))
    return store


def test_csv_on_stdout_has_a_row_for_each_experiment_with_every_column(lem, store):
    done = lem("results", "export")
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert (done.code, done.err) == (0, "")
    assert list(rows[0]) == list(parquet.names(ExperimentRow))
    assert [row["experiment_id"] for row in rows] == store.ids()
    assert rows[2]["status"] == "failed"
    assert rows[2]["error"].endswith("no, it\nfailed")
    assert rows[2]["output_tokens_per_s"] == ""


def test_filters_ids_and_order(lem, store):
    def ids(*arguments):
        done = lem("results", "export", "--format", "json", *arguments)
        assert done.code == 0
        return [row["experiment_id"] for row in json.loads(done.out)["rows"]]

    first, second, third = store.ids()
    assert ids("--status", "failed") == [third]
    assert ids(second, first) == [first, second]
    assert ids("--reverse") == [third, second, first]
    assert ids("--last", "1") == [third]
    assert ids("--table", "requests", second) == [second] * 3
    assert ids("--campaign", "none") == []


def test_the_format_is_that_of_the_files_name(lem, store, tmp_path):
    for name in ("runs.csv", "runs.json", "runs.parquet"):
        assert lem("results", "export", "--output", name).out == f"{name}: 3 rows of 3 experiments\n"
    whole = pd.read_parquet(tmp_path / "runs.parquet")
    assert whole.equals(pd.read_parquet(store.experiments_table))
    units = json.loads((tmp_path / "runs.csv.units.json").read_text())["columns"]
    assert units == json.loads((tmp_path / "runs.json").read_text())["columns"]
    assert units["energy_j"]["unit"] == "J"
    assert pq.read_schema(tmp_path / "runs.parquet").field("energy_j").metadata[b"unit"] == b"J"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--format", "cvs"], "--format: 'cvs' is not one of csv, json, parquet, aienergyscore, mlenergy. Did you"),
        (["--table", "rows"], "--table: 'rows' is not one of experiments, cycles, requests."),
        (["--format", "parquet"], "--format parquet needs a file: add --output FILE."),
        (
            ["--format", "aienergyscore", "--table", "cycles"],
            "--table cycles: the format aienergyscore has one row for",
        ),
        (["--output", "there.csv"], "there.csv already exists; use --force to replace it."),
        (["--output", "/dev/null", "--force"], "--output: /dev/null is not a plain file"),
        (["--output", "results"], "--output: results is a directory"),
        (["--status", "fialed"], "--status: 'fialed' is not one of"),
        (["exp_2026"], "'exp_2026' matches 3 experiments"),
        (["nothing"], "There is no experiment 'nothing' in"),
        (["-o", "nowhere"], "No experiment in nowhere has a row; lem aggregate --all writes the rows."),
    ],
)
def test_bad_input_is_one_sentence(lem, store, tmp_path, arguments, error):
    (tmp_path / "there.csv").write_text("mine")
    done = lem("results", "export", *arguments)
    assert done.code == 2
    assert done.err.startswith(f"Error: {error}")
    assert done.err.count("\n") == 1
    assert (tmp_path / "there.csv").read_text() == "mine"


def test_an_experiment_without_a_row_is_named(lem, store):
    late = finished(store, datetime(2026, 1, 3))
    assert lem("results", "export", late.id).err == (
        f"Error: {late.id} has no row to export; lem aggregate {late.id} writes it.\n"
    )


def test_a_damaged_file_is_named_and_the_rest_exported(lem, store):
    late = finished(store, datetime(2026, 1, 3))
    assert lem("aggregate", late.id).code == 0
    (file,) = store.experiments_table.glob("*-*.parquet")
    file.write_bytes(b"PAR1 is not all")
    done = lem("results", "export", "--format", "json")
    assert done.code == 1
    assert [row["experiment_id"] for row in json.loads(done.out)["rows"]] == [late.id]
    assert file.name in done.err


def test_a_terminal_gets_escapes_and_a_pipe_the_bytes_as_they_are(lem, store, tmp_path):
    paint = "\x1b[31mred"
    rows = parquet.table(ExperimentRow, [structs.replace(Tables(store).rows()[0][0], model=paint)])
    other = Store(tmp_path / "other")
    for name in KINDS:
        parquet.write_table(other.root / name / "exp_20260102_030405.parquet", rows if name == "experiments" else
                            parquet.schema(KINDS[name]).empty_table())  # fmt: skip
    assert paint in lem("results", "export", "-o", "other").out
    command = [sys.executable, "-m", "lem", "results", "export", "-o", str(other.root)]
    leader, follower = pty.openpty()
    subprocess.run(command, stdout=follower, check=True)
    os.close(follower)
    assert b"\\u001b[31mred" in os.read(leader, 1 << 16)
    os.close(leader)


# ------------------------------------------------------------------ other projects' shapes
def test_ai_energy_score_has_its_columns_and_says_why_it_is_not_comparable(lem, store):
    done = lem("results", "export", "--format", "aienergyscore", store.ids()[0])
    (row,) = csv.DictReader(io.StringIO(done.out))
    assert "not comparable" in done.err
    # As in results_aggregator.py of AI Energy Score.
    assert list(row)[:21] == [
        "model_name", "model_class", "task", "reasoning_state", "total_prompts", "successful_prompts", "failed_prompts",
        "total_duration_seconds", "avg_total_time", "avg_time_to_first_token", "total_tokens", "total_prompt_tokens",
        "total_completion_tokens", "throughput_tokens_per_second", "gpu_energy_wh", "wh_per_1000_queries",
        "co2_emissions_g", "tokens_per_joule", "avg_energy_per_prompt_wh", "timestamp", "error_message",
    ]  # fmt: skip
    # 100 J for three requests with 33 input tokens and 60 output tokens, in 4 s
    assert float(row["gpu_energy_wh"]) == pytest.approx(100 / 3600)
    assert float(row["wh_per_1000_queries"]) == pytest.approx(1000 * 100 / 3600 / 3)
    assert float(row["tokens_per_joule"]) == pytest.approx(93 / 100)
    assert float(row["throughput_tokens_per_second"]) == pytest.approx(93 / 4)
    assert row["lem_comparable"] == "False"
    assert "the number of completed cycles is 1, not 10" in row["lem_not_comparable_because"]
    assert row["reasoning_state"] == ""


def test_ratios_of_a_run_that_failed_are_null(lem, store):
    done = lem("results", "export", "--format", "aienergyscore", "--status", "failed")
    (row,) = csv.DictReader(io.StringIO(done.out))
    assert row["successful_prompts"] == "1"
    assert row["wh_per_1000_queries"] == row["tokens_per_joule"] == row["throughput_tokens_per_second"] == ""


def plain(store, **values):
    return structs.asdict(structs.replace(Tables(store).rows()[0][0], **values))


def test_only_what_differs_from_the_protocol_is_named(store):
    config = json.dumps({"dataset": {"path": foreign.PROMPTS}})
    like = plain(
        store, device="NVIDIA H100 80GB HBM3", config_json=config, requests_planned=1000, dtype="float16",
        cycles_completed=10,
    )  # fmt: skip
    assert foreign.not_ai_energy_score(like) == ["the window does not include the preprocessing of the prompts"]
    for change in (
        {"device": "NVIDIA H100 NVL"}, {"device": "NVIDIA H100 80GB HBM3 MIG 1g.10gb"}, {"device": None},
        {"batch_size": 8}, {"dtype": "float32"}, {"gpu_energy_source": "estimate"}, {"config_json": "{}"},
        {"requests_planned": 999}, {"status": "failed"},
    ):  # fmt: skip
        assert len(foreign.not_ai_energy_score(like | change)) == 2


def test_ml_energy_has_its_columns_in_its_units(lem, store, tmp_path):
    row = foreign.ml_energy(plain(
        store, device="NVIDIA H100 80GB HBM3", steady_duration_s=40.0, steady_energy_j=8000.0,
        steady_output_tokens=2000, steady_output_tokens_per_s=50.0, energy_components="gpu", itl_p50_s=0.02,
    ))  # fmt: skip
    assert row["gpu_model"] == "H100"
    assert row["energy_per_token_joules"] == 4.0
    assert row["energy_per_request_joules"] == 80.0  # 20 tokens each
    assert row["avg_power_watts"] == 200.0
    assert row["median_itl_ms"] == row["p50_itl_ms"] == 20.0
    assert (row["is_stable"], row["unstable_reason"]) == (True, "")
    assert row["lem_comparable"] is False
    assert lem("results", "export", "--format", "mlenergy", "--output", "llm.parquet").code == 0
    found = pq.read_table(tmp_path / "llm.parquet")
    assert found.column_names == list(foreign.ML_ENERGY_COLUMNS)
    assert found["is_stable"].to_pylist() == [False] * 3


def test_numbers_that_are_not_finite_are_texts_in_json():
    assert as_json({"a": [math.nan, 1.5], "b": -math.inf}) == '{"a": ["NaN", 1.5], "b": "-Infinity"}'
