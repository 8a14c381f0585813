"""From records to rows: the identities, what is null, and what makes the headline."""

from __future__ import annotations

import json

import pandas as pd
import pyarrow.parquet as pq
import pytest

from lem.aggregate import aggregate, experiment_row, headline
from lem.errors import ResultsError
from lem.parquet import columns, read_rows, write_rows
from lem.plan import Plan, PromptsInfo
from lem.record import (
    Carbon,
    EnergyReading,
    EngineInfo,
    ErrorInfo,
    ExperimentRow,
    Flops,
    ModelInfo,
    Phase,
    Prefill,
    ProcessRecord,
    RequestRecord,
)
from lem.spec import Dataset, Experiment, SimulatedBackend
from lem.store import Store


def reading(component="gpu", source="counter", energy_j=100.0, device="GPU-0", scope="device", reason=None):
    return EnergyReading(component, source, scope, device, energy_j, "test", reason=reason)


GPU = reading()


def plan(count=3, processes=1, experiment_id="exp_20260102_030405"):
    experiment = Experiment(model="m", backend=SimulatedBackend(), dataset=Dataset(name="d", path="p"))
    prompts = PromptsInfo(count, "0" * 64, "p", None, "text", count, 0)
    return Plan(experiment_id, "2026-01-02T03:04:05+00:00", experiment, prompts, processes, ("seed=1",))


def requests(count=3, rank=0):
    return [
        RequestRecord("exp_20260102_030405", rank, i, i, 10 + i, 20, False, "length", i * 1.0, i + 0.5, 0.5)
        for i in range(count)
    ]


def record(energy=(GPU,), status="completed", rank=0, **more):
    values = {
        "format_version": 1,
        "lem_version": "0",
        "experiment_id": "exp_20260102_030405",
        "rank": rank,
        "world_size": 1,
        "status": status,
        "started_at": "2026-01-02T03:04:05+00:00",
        "hostname": "h",
        "phases": (
            Phase("load", 5.0, (reading(energy_j=40.0),)),
            Phase("warmup", 1.0, (reading(energy_j=10.0),)),
            Phase("measured", 4.0, tuple(energy)),
        ),
        "requests_planned": 3,
        "requests_completed": 3,
        "input_tokens": 33,
        "output_tokens": 60,
    }
    return ProcessRecord(**(values | more))


def row(*records, rows=None):
    return experiment_row(plan(), records or [record()], requests() if rows is None else rows)


# ------------------------------------------------------------------ identities
def test_the_identities_hold():
    made = row(record(flops=Flops(1e9, "m"), carbon=Carbon(400.0, "test")))
    assert made.output_tokens == 60
    assert made.input_tokens == 33
    assert made.output_tokens_per_s == pytest.approx(60 / 4.0)
    assert made.energy_j == pytest.approx(made.average_power_w * made.duration_s)
    assert made.energy_per_output_token_j == pytest.approx(made.average_power_w / made.output_tokens_per_s)
    assert made.energy_per_request_j * made.requests_completed == pytest.approx(made.energy_j)
    assert made.energy_wh * 3600 == pytest.approx(made.energy_j)
    assert made.co2e_g == pytest.approx(100 / 3.6e6 * 400)
    assert made.flops_per_s == pytest.approx(1e9 / 4.0)
    assert made.flops_per_token == pytest.approx(1e9 / 93)
    assert (made.load_energy_j, made.warmup_energy_j) == (40.0, 10.0)


def test_throughput_counts_output_tokens_only():
    many_inputs = [RequestRecord("e", 0, 0, 0, 10_000, 20, False, "length", 0, 1, 1)]
    assert row(rows=many_inputs).output_tokens_per_s == pytest.approx(20 / 4.0)


# ------------------------------------------------------------------ headline
def test_the_headline_is_the_sum_of_the_gpus_alone():
    energy = headline(
        [
            reading(device="GPU-0", energy_j=100.0),
            reading(device="GPU-1", energy_j=50.0),
            reading("cpu", "estimate", 7.0, "cpu", "machine"),
        ]
    )
    assert (energy.energy_j, energy.source, energy.components) == (150.0, "counter", "gpu")


def test_without_a_gpu_measured_components_come_before_estimates():
    energy = headline(
        [reading("cpu", "counter", 9.0, "cpu", "package"), reading("dram", "estimate", 5.0, "dram", "machine")]
    )
    assert (energy.energy_j, energy.source, energy.components) == (9.0, "counter", "cpu")


def test_estimates_are_summed_only_among_themselves_and_labelled():
    energy = headline(
        [reading("cpu", "estimate", 3.0, "cpu", "machine"), reading("dram", "estimate", 5.0, "dram", "machine")]
    )
    assert (energy.energy_j, energy.source, energy.components) == (8.0, "estimate", "cpu+dram")


def test_one_unreadable_gpu_makes_the_sum_null_and_not_smaller():
    readings = [reading(energy_j=100.0), reading(device="GPU-1", energy_j=None, reason="it is lost")]
    made = row(record(energy=readings))
    assert made.energy_j is None
    assert made.average_power_w is None
    assert made.energy_per_output_token_j is None
    assert made.co2e_g is None


def test_no_meter_means_null_everywhere():
    made = row(record(energy=()))
    assert made.energy_j is made.energy_wh is made.average_power_w is made.energy_per_request_j is None
    assert made.energy_source is None


def test_idle_power_and_what_is_left_without_it():
    phases = (
        Phase("idle_before", 2.0, (reading(energy_j=20.0),)),
        Phase("load", 5.0, (reading(energy_j=40.0),)),
        Phase("idle_loaded", 2.0, (reading(energy_j=30.0),)),
        Phase("measured", 4.0, (reading(energy_j=100.0),)),
    )
    made = row(record(phases=phases))
    assert (made.idle_power_before_w, made.idle_power_loaded_w) == (10.0, 15.0)
    assert made.energy_idle_adjusted_j == pytest.approx(100 - 15 * 4)


def test_a_run_below_idle_is_negative_and_says_so():
    phases = (Phase("idle_loaded", 1.0, (reading(energy_j=50.0),)), Phase("measured", 4.0, (reading(energy_j=100.0),)))
    made = row(record(phases=phases))
    assert made.energy_idle_adjusted_j == pytest.approx(-100)
    assert any(w.startswith("idle_adjusted_negative") for w in made.warnings)


def test_prefill_and_decode_share_the_window():
    made = row(record(prefill=Prefill(1.0, 30.0, 2.0)))
    assert made.prefill_duration_s + made.decode_duration_s == made.duration_s
    assert made.prefill_energy_j + made.decode_energy_j == made.energy_j
    assert made.prefill_energy_uncertainty_j == 2.0


def test_a_negative_decode_energy_is_reported_as_such():
    made = row(record(prefill=Prefill(1.0, 130.0, 50.0)))
    assert made.decode_energy_j == -30.0
    assert any(w.startswith("decode_negative") for w in made.warnings)


def test_utilisation_is_against_the_datasheets_peak_of_the_dtype():
    model = ModelInfo("m", None, "A", 1, False, 1, "bfloat16")
    engine = EngineInfo("pytorch", "1", "cuda:0", "NVIDIA H100 80GB HBM3", {})
    made = row(record(model=model, engine=engine, flops=Flops(4e14, "m")))
    assert made.mfu == pytest.approx(4e14 / 4.0 / made.peak_flops_per_s)
    assert 0.9e15 < made.peak_flops_per_s < 1.0e15
    assert row(record(model=model, flops=Flops(4e14, "m"))).mfu is None


def test_numbers_that_do_not_agree_are_a_warning():
    made = row(record(requests_completed=3, output_tokens=60, input_tokens=33))
    assert not any(w.startswith("identity_violated") for w in made.warnings)
    made = row(record(requests_completed=3, output_tokens=61, input_tokens=33))
    assert any(w.startswith("identity_violated: output tokens") for w in made.warnings)


def test_co2e_is_null_without_a_carbon_intensity():
    assert row().co2e_g is None


# ------------------------------------------------------------------ failures
def test_a_failed_run_has_a_row_with_its_error_and_no_rates():
    made = row(record(status="failed", error=ErrorInfo("E", "it broke", "measured")), rows=requests(1))
    assert (made.status, made.error) == ("failed", "it broke")
    assert made.requests_completed == 1
    assert made.energy_j == 100.0
    assert made.output_tokens_per_s is made.energy_per_output_token_j is made.energy_per_request_j is None


def test_energy_is_counted_once_however_many_ranks():
    made = experiment_row(plan(processes=2), [record(), record(rank=1)], requests() + requests(rank=1))
    assert made.energy_j == 100.0
    assert made.output_tokens == 120


# ------------------------------------------------------------------ files
@pytest.fixture
def written(tmp_path):
    store = Store(tmp_path)
    directory = store.claim()
    directory.write_plan(plan(experiment_id=directory.id), ["a", "b", "c"])
    directory.write_record(record())
    write_rows(directory.requests_file(0), RequestRecord, requests())
    return store, directory


def test_pandas_reads_the_folder_in_one_line_with_units_in_the_metadata(written):
    store, directory = written
    aggregate(store, directory)
    table = pd.read_parquet(store.experiments_table)
    assert list(table["experiment_id"]) == [directory.id]
    assert table["energy_j"].sum() == 100.0
    schema = pq.read_schema(store.experiments_table / f"{directory.id}.parquet")
    assert schema.field("energy_j").metadata[b"unit"] == b"J"
    assert schema.field("duration_s").metadata[b"unit"] == b"s"
    rows = pd.read_parquet(store.requests_table)
    assert rows["output_tokens"].sum() == table["output_tokens"].iloc[0]


def test_aggregating_again_changes_nothing_unless_forced(written):
    store, directory = written
    first = aggregate(store, directory)
    file = store.experiments_table / f"{directory.id}.parquet"
    before = file.stat().st_mtime_ns
    assert aggregate(store, directory) == first
    assert file.stat().st_mtime_ns == before
    assert aggregate(store, directory, force=True) == first
    assert file.stat().st_mtime_ns != before


def test_strict_names_the_missing_process(tmp_path):
    store = Store(tmp_path)
    directory = store.claim()
    directory.write_plan(plan(processes=3, experiment_id=directory.id), ["a"])
    directory.write_record(record())
    write_rows(directory.requests_file(0), RequestRecord, requests())
    with pytest.raises(ResultsError, match="no record of process 1, 2 of 3"):
        aggregate(store, directory)
    assert not store.is_aggregated(directory.id)
    assert aggregate(store, directory, strict=False).processes == 1


def test_rows_survive_parquet(written):
    store, directory = written
    made = aggregate(store, directory)
    assert read_rows(store.experiments_table / f"{directory.id}.parquet", ExperimentRow) == [made]
    assert json.loads(made.config_json)["model"] == "m"


# ------------------------------------------------------------------ the schema
UNITS_IN_NAMES = {"_j": "J", "_s": "s", "_w": "W", "_wh": "Wh", "_g": "gCO2e", "_bytes": "B"}


@pytest.mark.parametrize("record_type", [ExperimentRow, RequestRecord])
def test_every_column_is_described_and_a_unit_in_the_name_is_the_unit_in_the_metadata(record_type):
    for column in columns(record_type):
        if column.name in ("experiment_id", "rank"):
            continue
        assert column.description, column.name
        for ending, unit in UNITS_IN_NAMES.items():
            if column.name.endswith(ending) and "_per_" not in column.name:
                assert column.unit == unit, column.name
        if column.python_type is float:
            assert column.unit, column.name
