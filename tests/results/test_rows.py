"""From records to rows: identities, nulls, the headline, and merging attempts, ranks and cycles."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import asdict, replace

from lem import warning_codes
from lem.record import (
    Carbon,
    CodedWarning,
    CpuLoad,
    Cut,
    DeviceState,
    EngineInfo,
    Environment,
    ErrorInfo,
    Flops,
    Memory,
    ModelInfo,
    Phase,
    Prefill,
    UnderWay,
)
from lem.results.aggregate import by_cycle, put_together
from lem.results.codec import excerpt_of
from lem.results.columns import quotients
from lem.results.cycles import MAXIMA, experiment_columns
from lem.results.directory import Part
from lem.results.merging import by_component, headline, merged, once_each, together
from lem.results.parquet import columns
from lem.results.rows import Cycle, as_rows, cycle_columns, rows_of
from lem.results.schema import CycleRow, ExperimentRow
from lem.results.statistics import summarize
from lem.spec.experiment import Traffic
from tests.records import GPU, failed, phases, plan, reading, record, request, requests

CPU = reading("cpu", "counter", 20.0, "package-0", "package")
ESTIMATED_CPU = reading("cpu", "estimate", 300.0, "cpu", "machine")
DRAM = reading("dram", "estimate", 5.0, "dram", "machine")


def row(*records, rows=None, **plan_values):
    cycle = Cycle(excerpt_of(plan(**plan_values)), 1, 1, records or [record()], requests() if rows is None else rows)
    (made,) = as_rows(ExperimentRow, cycle_columns([cycle]))
    return made


def over_cycles(rows, of):
    """Return an experiment's row, computed from its cycles'."""
    columns = {name: [getattr(each, name) for each in rows] for name in ExperimentRow.__struct_fields__}
    (made,) = as_rows(ExperimentRow, experiment_columns([len(rows)], [of.experiment.cycles], [0], columns))
    return made


def merge_parts(of, parts, attempts):
    return rows_of(put_together(excerpt_of(of), by_cycle(parts), attempts))


def codes(row):
    return [warning.partition(":")[0] for warning in row.warnings]


# ------------------------------------------------------------------ identities
def check_identities(row):
    """Every row of a cycle or an experiment satisfies the identities for which it has the numbers."""
    pairs = [
        (row.average_power_w, row.duration_s, row.energy_j),
        (row.energy_per_output_token_j, row.output_tokens_per_s, row.average_power_w),
        (row.energy_per_request_j, row.requests_per_s, row.average_power_w),
    ]
    for one, other, product in pairs:
        if one is not None and other is not None:
            assert one * other == pytest.approx(product)
    if row.prefill_duration_s is not None:
        idle_s = (row.idle_share or 0.0) * row.duration_s
        assert row.prefill_duration_s + row.decode_duration_s + idle_s == pytest.approx(row.duration_s)
    assert "identity_violated" not in codes(row)


def test_the_identities_hold():
    made = row(record(flops=Flops(1e9, "m"), carbon=Carbon(400.0, "test")))
    check_identities(made)
    assert (made.input_tokens, made.output_tokens) == (33, 60)
    assert made.output_tokens_per_s == pytest.approx(60 / 4.0)
    assert made.energy_per_request_j * made.requests_completed == pytest.approx(made.energy_j)
    assert made.energy_wh * 3600 == pytest.approx(made.energy_j)
    assert made.co2e_g == pytest.approx(100 / 3.6e6 * 400)
    assert made.flops_per_s == pytest.approx(1e9 / 4.0)
    assert made.flops_per_token == pytest.approx(1e9 / 93)
    assert (made.load_energy_j, made.warmup_energy_j) == (40.0, 10.0)


def test_every_column_has_a_value():
    assert set(asdict(row())) == set(ExperimentRow.__struct_fields__)
    assert ExperimentRow(**asdict(row())) == row()


def test_throughput_counts_output_tokens_only():
    many_inputs = [request(experiment_id="e", input_tokens=10_000)]
    assert row(rows=many_inputs, count=1).output_tokens_per_s == pytest.approx(20 / 4.0)


def test_latencies_are_those_of_the_requests():
    rows = [replace(r, latency_s=s) for r, s in zip(requests(), (1.0, 2.0, 6.0), strict=True)]
    made = row(rows=rows)
    assert (made.latency_mean_s, made.latency_p50_s) == (3.0, 2.0)
    assert made.latency_p95_s == pytest.approx(5.6)


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


def test_measured_and_estimated_readings_have_no_sum():
    mixed = [reading("cpu", "counter", 9.0, "package-0", "package"), reading("cpu", "estimate", 5.0, "cpu", "machine")]
    assert (by_component(mixed)["cpu"].energy_j, by_component(mixed)["cpu"].source) == (None, "counter+estimate")


def test_a_module_contains_its_gpu():
    readings = [reading(energy_j=80.0), reading("module", energy_j=100.0)]
    assert headline(readings).energy_j == 100.0
    assert by_component(readings)["gpu"].energy_j == 80.0


def test_one_unreadable_gpu_makes_the_sum_null_and_not_smaller():
    readings = [reading(energy_j=100.0), reading(device="GPU-1", energy_j=None, reason="it is lost")]
    made = row(record(energy=readings))
    assert made.energy_j is made.average_power_w is made.energy_per_output_token_j is made.co2e_g is None


def test_no_meter_means_null_everywhere():
    made = row(record(energy=()))
    assert made.energy_j is made.energy_wh is made.average_power_w is made.energy_per_request_j is None
    assert made.energy_source is None


def test_idle_power_and_what_is_left_without_it():
    before = (
        Phase("idle_before", 2.0, (reading(energy_j=20.0),)),
        Phase("load", 5.0, (reading(energy_j=40.0),)),
        Phase("idle_loaded", 2.0, (reading(energy_j=30.0),)),
    )
    made = row(record(phases=(*before, Phase("measured", 4.0, (reading(energy_j=100.0),)))))
    assert (made.idle_power_before_w, made.idle_power_loaded_w) == (10.0, 15.0)
    assert made.energy_idle_adjusted_j == pytest.approx(100 - 15 * 4)


def test_a_run_below_idle_is_negative_and_says_so():
    parts = (Phase("idle_loaded", 1.0, (reading(energy_j=50.0),)), Phase("measured", 4.0, (reading(energy_j=100.0),)))
    made = row(record(phases=parts))
    assert made.energy_idle_adjusted_j == pytest.approx(-100)
    assert "idle_adjusted_negative" in codes(made)


def test_prefill_and_decode_share_the_window():
    made = row(record(prefill=Prefill(1.0, 30.0, 2.0)))
    assert made.prefill_duration_s + made.decode_duration_s == made.duration_s
    assert made.prefill_energy_j + made.decode_energy_j == made.energy_j
    assert made.prefill_energy_uncertainty_j == 2.0


def arrived(rows, ends_s):
    """Return rows of requests that arrived when they began, and ended at these times."""
    return [replace(r, arrived_s=r.start_s, end_s=end_s) for r, end_s in zip(rows, ends_s, strict=True)]


def test_idle_time_belongs_to_neither_prefill_nor_decode():
    made = row(record(prefill=Prefill(1.0, 30.0, 2.0)), rows=arrived(requests(), (0.5, 1.5, 2.5)))
    assert made.idle_share == pytest.approx(2.5 / 4)
    assert made.decode_duration_s == pytest.approx(4.0 - 1.0 - 2.5)
    assert (made.energy_j, made.prefill_energy_j, made.decode_energy_j) == (100.0, 30.0, None)
    check_identities(made)


def test_idle_time_that_only_the_edges_of_the_window_leave_open_hides_no_energy():
    made = row(record(prefill=Prefill(1.0, 30.0, 2.0)), rows=arrived(requests(), (1.0, 2.0, 3.999)))
    assert 0 < made.idle_share < 0.001
    assert made.decode_duration_s == pytest.approx(2.999)
    assert made.decode_energy_j == 70.0
    check_identities(made)


def test_idle_time_is_left_out_of_decode_over_cycles_as_well():
    ends_s = [(0.5, 1.5, 2.5), (0.75, 1.75, 2.75)]
    of_cycles = [
        row(record(prefill=Prefill(1.0, 30.0), duration_s=duration_s), rows=arrived(requests(), ends), cycles=2)
        for ends, duration_s in zip(ends_s, (4.0, 5.0), strict=True)
    ]
    made = over_cycles(of_cycles, plan(cycles=2))
    assert made.idle_share == pytest.approx((2.5 / 4 + 2.75 / 5) / 2)
    assert made.decode_duration_s == pytest.approx(4.5 - 1.0 - made.idle_share * 4.5)
    assert made.decode_energy_j is None
    check_identities(made)


def test_decode_that_holds_idle_time_is_a_warning():
    columns_of_one = {name: [value] for name, value in asdict(row(record(prefill=Prefill(1.0)))).items()}
    assert warning_codes.of_rows(columns_of_one, [[record()]]) == [[]]
    (found,) = warning_codes.of_rows(columns_of_one | {"idle_share": [0.5]}, [[record()]])
    assert [(n.code, "idle" in n.text) for n in found] == [("identity_violated", True)]


def test_a_negative_decode_energy_is_reported_as_such():
    made = row(record(prefill=Prefill(1.0, 130.0, 50.0)))
    assert made.decode_energy_j == -30.0
    assert "decode_negative" in codes(made)


def gpus(*uuids):
    states = tuple(DeviceState(uuid) for uuid in uuids)
    return Environment("h", "os", "cpu", 8, 1, (), {}, devices_before=states)


@pytest.mark.parametrize(("uuids", "peaks"), [((), 1), (("GPU-a",), 1), (("GPU-a", "GPU-b"), 2)])
def test_utilisation_is_against_the_datasheets_peak_of_all_gpus_in_use(uuids, peaks):
    model = ModelInfo("m", None, "A", 1, False, 1, "bfloat16")
    engine = EngineInfo("pytorch", "1", "cuda:0", "NVIDIA H100 80GB HBM3", {})
    made = row(record(model=model, engine=engine, flops=Flops(4e14, "m"), environment=gpus(*uuids)))
    assert made.mfu == pytest.approx(4e14 / 4.0 / made.peak_flops_per_s)
    assert 0.9e15 < made.peak_flops_per_s / peaks < 1.0e15
    assert row(record(model=model, flops=Flops(4e14, "m"))).mfu is None


@pytest.mark.parametrize(
    ("model", "peak"),
    [
        ({"dtype": "bfloat16", "quantization": "fp8"}, 1978.9e12),
        ({"dtype": "bfloat16", "quantization": "awq"}, 989.4e12),
        ({"dtype": "float16", "quantization": "bitsandbytes 4-bit nf4", "arithmetic": "float32"}, 66.9e12),
        ({"dtype": "float16", "quantization": "bitsandbytes 8-bit", "arithmetic": "int8"}, None),
        ({"dtype": "bfloat16", "quantization": "compressed-tensors"}, None),
    ],
)
def test_utilisation_is_against_the_peak_of_the_arithmetic_or_null(model, peak):
    model = ModelInfo("m", None, "A", 1, False, 1, **model)
    engine = EngineInfo("vllm", "1", "cuda:0", "NVIDIA H100 80GB HBM3", {})
    made = row(record(model=model, engine=engine, flops=Flops(4e14, "m"), environment=gpus("GPU-a")))
    assert made.peak_flops_per_s == (None if peak is None else pytest.approx(peak))
    assert (made.mfu is None) == (peak is None)


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3 MIG 3g.40gb"])
def test_an_instance_of_a_gpu_has_no_utilisation_whatever_the_backend_calls_it(name):
    states = (DeviceState("GPU-a", mig=True),)
    made = row(
        record(
            model=ModelInfo("m", None, "A", 1, False, 1, "bfloat16"),
            engine=EngineInfo("vllm", "1", "cuda:0", name, {}),
            flops=Flops(4e14, "m"),
            environment=Environment("h", "os", "cpu", 8, 1, (), {}, devices_before=states),
        )
    )
    assert (made.peak_flops_per_s, made.mfu) == (None, None)
    assert made.flops_per_s == 1e14


@pytest.mark.parametrize("wrong", [{"output_tokens": 61}, {"input_tokens": 34}, {"requests_completed": 4}])
def test_numbers_that_do_not_agree_are_a_warning(wrong):
    assert "identity_violated" not in codes(row())
    assert "identity_violated" in codes(row(record(**wrong)))


# ------------------------------------------------------------------ doubts
def test_percentiles_of_few_requests_have_a_warning_that_all_cycles_share():
    made = row()
    assert any(w.startswith("few_samples: latency: 3 values, but p50 needs 5, p95 needs 59") for w in made.warnings)
    assert codes(over_cycles(cycles(1.0, 3.0), plan(cycles=2))).count("few_samples") == 1
    many = [request(request=i, batch=i, start_s=i * 0.01, end_s=i * 0.01 + 0.01) for i in range(299)]
    assert "few_samples" not in codes(row(record(many), rows=many, count=299))


def test_times_that_requests_of_a_batch_share_count_once():
    """However many requests a batch has, its latency is one measurement."""
    rows = [
        request(request=i, batch=i // 100, start_s=i // 100 * 0.5, end_s=i // 100 * 0.5 + 0.5, ttft_s=0.1,
                itl_s=[0.1] * (1 + i % 2), tpot_s=0.1)
        for i in range(400)
    ]  # fmt: skip
    made = row(record(rows), rows=rows, count=400)
    (text,) = [each for each in made.warnings if each.startswith("few_samples")]
    assert "latency, time to first token, time per output token: 4 values, but p50 needs 5" in text
    assert "inter-token latency: 8 values" in text
    assert made.latency_p50_s == 0.5
    apart = [replace(r, rank=r.request % 100) for r in rows]
    assert "few_samples" not in codes(row(record(apart), rows=apart, count=400))


def test_tokens_are_counted_where_percentiles_are_of_tokens():
    rows = [replace(r, ttft_s=0.1, tpot_s=0.02, itl_s=[0.02] * 150) for r in requests()]
    (text,) = [w for w in row(rows=rows).warnings if w.startswith("few_samples")]
    assert "time to first token, time per output token: 3 values" in text
    assert "inter-token" not in text  # 450 values


@pytest.mark.parametrize(("energy", "lacking"), [((CPU, DRAM), True), ((GPU, CPU), False), ((), None)])
def test_a_row_says_whether_the_gpu_is_in_its_energy(energy, lacking):
    made = row(record(energy=energy, environment=gpus("GPU-a")))
    assert made.energy_without_gpu is lacking


def busy(positions, rank=0, attempt=1, late_s=0.0):
    """Return requests of one second each, without a pause, from the opening of their window."""
    rows = requests(positions, rank=rank, attempt=attempt)
    return [replace(r, start_s=n * 1.0, end_s=n + 1.0 + late_s) for n, r in enumerate(rows)]


def doubts(*records, rows, **plan_values):
    return {"times_disagree", "window_unfilled"} & set(codes(row(*records, rows=rows, **plan_values)))


def test_a_window_that_one_process_opens_later_than_the_others_is_found():
    """The meter settles once more behind the barrier: a tick of 100 ms is missing from 2.25 s."""
    both = [*busy([0, 1]), *busy([2, 3], rank=1, late_s=0.245)]
    records = [record(both[:2], world_size=2, duration_s=2.245), record(both[2:], (), rank=1, world_size=2)]
    assert doubts(*records, rows=both, processes=2, count=4) == set()
    records[0] = record(both[:2], world_size=2, duration_s=2.147)
    assert doubts(*records, rows=both, processes=2, count=4) == {"times_disagree"}


def test_windows_of_attempts_fit_their_own_requests():
    parts = [(busy([0]), 1.0), (busy([1, 2], attempt=2), 2.0)]
    records = [record(rows, duration_s=s, attempt=n) for n, (rows, s) in enumerate(parts, start=1)]
    rows = [r for part, _ in parts for r in part]
    assert doubts(merged(records), rows=rows) == set()
    records[1] = record(parts[1][0], duration_s=1.5, attempt=2)
    assert doubts(merged(records), rows=rows) == {"times_disagree"}
    records[1] = record(parts[1][0], duration_s=3.0, attempt=2)
    assert doubts(merged(records), rows=rows) == {"window_unfilled"}


def test_a_window_that_waits_for_arrivals_need_not_be_filled():
    rows = [replace(r, arrived_s=r.start_s) for r in busy([0, 1, 2])]
    assert doubts(record(rows, duration_s=9.0), rows=rows) == set()


# ------------------------------------------------------------------ failures
def test_a_failed_run_has_a_row_with_its_error_and_no_rates():
    made = row(record(requests([0]), status="failed", error=ErrorInfo("E", "it broke", "measured")), rows=requests([0]))
    assert (made.status, made.error) == ("failed", "it broke")
    assert made.requests_completed == 1
    assert made.energy_j == 100.0
    assert made.output_tokens_per_s is made.energy_per_output_token_j is made.energy_per_request_j is None


def with_failures(*numbers):
    """Return the row of three requests of which these failed, the last with a different reason."""
    rows = requests()
    finished = [r for r in rows if r.request not in numbers]
    for number in numbers:
        rows[number] = failed(rows[number], "HTTP 500: out." if number == 2 else "HTTP 429: busy.")
    counts = {"requests_planned": 3, "requests_failed": len(numbers)}
    return row(record(finished, **counts), rows=rows)


def test_failed_requests_are_counted_and_enter_nothing_else():
    it, finished = with_failures(1), requests([0, 2])
    assert (it.status, it.requests_completed, it.requests_failed, it.error_rate) == ("completed", 2, 1, 1 / 3)
    assert it.input_tokens == sum(r.input_tokens for r in finished)
    assert it.output_tokens == sum(r.output_tokens for r in finished)
    assert it.latency_mean_s == sum(r.latency_s for r in finished) / 2
    assert it.requests_per_s == 2 / it.duration_s
    assert it.energy_per_request_j == it.energy_j / 2
    assert "requests_failed: 1 of 3 requests failed: HTTP 429: busy." in it.warnings
    assert "identity_violated" not in codes(it)


def test_the_most_frequent_reason_is_told_and_nothing_where_none_failed():
    texts = [text for text in with_failures(0, 1, 2).warnings if text.startswith("requests_failed")]
    assert texts == ["requests_failed: 3 of 3 requests failed: HTTP 429: busy. (2 times)"]
    assert (row().requests_failed, row().error_rate) == (0, 0.0)
    assert "requests_failed" not in codes(row())


def test_where_all_requests_failed_the_cycle_is_not_complete():
    it = with_failures(0, 1, 2)
    assert (it.status, it.requests_failed, it.error_rate) == ("interrupted", 3, 1.0)
    assert (it.latency_mean_s, it.output_tokens_per_s, it.energy_per_output_token_j) == (None, None, None)


def test_what_is_complete_is_complete_however_a_process_ended():
    made = row(record(status="interrupted", error=ErrorInfo("WorkerDied", "killed")))
    assert (made.status, made.error) == ("completed", None)


PER_UNIT = re.compile(r"(token|request|FLOP)/s|J/(token|request)")


def test_what_is_interrupted_has_no_rate_of_any_kind():
    rows = [replace(each, arrived_s=each.start_s, queue_s=0.0, ttft_s=0.1, itl_s=[0.1]) for each in requests([0, 1])]
    limited = Traffic(pattern="poisson", target_qps=1.0, ttft_limit_s=1.0)
    whole = row(record(flops=Flops(1e9, "m")), rows=[*rows, replace(rows[1], request=2)], traffic=limited)
    made = row(record(rows, flops=Flops(1e9, "m"), status="interrupted"), rows=rows, traffic=limited)
    rates = [column.name for column in columns(ExperimentRow) if PER_UNIT.fullmatch(column.unit or "")]
    rates = [name for name in rates if not re.search("^peak_|_(mean|sd|ci95_low|ci95_high)(_j)?$", name)]
    assert {"goodput_requests_per_s", "arrival_rate_per_s", "flops_per_s"} < set(rates)
    # Padded batches have no steady state.
    assert [name for name in rates if getattr(whole, name) is None and not name.startswith("steady_")] == []
    assert [name for name in rates if getattr(made, name) is not None] == []


# ------------------------------------------------------------------ repeated work
def cut(longest_s, requests=2, tokens=7, **more):
    return Cut(**{"lost_s": 0.5, "under_way": UnderWay(requests, tokens, 2 * longest_s, longest_s)} | more)


def test_what_was_done_twice_is_a_share_of_the_window_and_leaves_no_rate_if_it_is_large():
    first = record(requests([0]), duration_s=1.0, attempt=1, status="interrupted", cut=cut(0.5))
    second = record(requests([1, 2]), duration_s=3.0, attempt=2, energy=(reading(energy_j=11.0),))
    made = row(merged([first, second]))
    assert made.repeated_share == pytest.approx(0.5 / 4)
    assert (made.status, made.duration_s, made.energy_j, made.average_power_w) == ("completed", 4.0, 111.0, 111.0 / 4)
    for name in ("output_tokens_per_s", "requests_per_s", "energy_per_output_token_j", "energy_per_request_j"):
        assert getattr(made, name) is None, name
    (text,) = [each for each in made.warnings if each.startswith("work_repeated")]
    assert "2 with 7 output tokens. Up to 0.5 s (12.5% of the window)" in text


def test_a_small_share_leaves_the_rates_and_a_warning_that_names_it():
    first = record(requests([0]), duration_s=1.0, attempt=1, status="interrupted", cut=cut(0.04, tokens=None))
    made = row(merged([first, record(requests([1, 2]), duration_s=3.0, attempt=2)]))
    assert made.output_tokens_per_s == pytest.approx(60 / 4)
    (text,) = [each for each in made.warnings if each.startswith("work_repeated")]
    assert "ran again: 2. Up to 0.04 s (1.0% of the window)" in text


def test_several_cuts_add_up_and_one_warning_names_their_sum():
    both = [cut(0.5, energy_behind_s=0.25), cut(0.25, tokens=None, energy_behind_s=0.5)]
    text = CodedWarning("window_cut", "the window was interrupted 0.5 s after its last finished request.")
    first, second = (record(requests([i]), attempt=i + 1, cut=of, warnings=(text,)) for i, of in enumerate(both))
    one = merged([first, second, record(requests([2]), attempt=3)])
    assert one.cut == Cut(2, 1.0, 0.75, UnderWay(4, None, 1.5, 0.75))
    assert [each.text for each in one.warnings] == [
        "2 windows were interrupted a total of 1 s after their last finished requests, and each window ends at its "
        "last finished request; their energy was last read a total of 0.75 s before these ends."
    ]


def test_a_run_that_was_never_cut_has_done_nothing_twice():
    assert row(record()).repeated_share == 0.0


def test_the_mean_over_cycles_has_the_mean_share():
    once, twice = row(record()), row(merged([record(requests(), attempt=1, cut=cut(0.1)), record([], attempt=2)]))
    of = plan(cycles=2)
    made = over_cycles([once, twice], of)
    assert made.repeated_share == pytest.approx(twice.repeated_share / 2)
    assert made.output_tokens_per_s is not None


# ------------------------------------------------------------------ queues after an interruption
QUEUED = ("latency_mean_s", "latency_p99_s", "ttft_p50_s", "queue_mean_s", "idle_share", "goodput_requests_per_s")


def queued(of_cut, opened_s, pattern="poisson"):
    rows = [replace(each, arrived_s=each.start_s, queue_s=0.0, ttft_s=0.1, itl_s=[0.1]) for each in requests()]
    rows = [replace(each, attempt=1 + (each.request > 0)) for each in rows]
    traffic = Traffic(pattern=pattern, target_qps=1.0, ttft_limit_s=1.0)
    of = excerpt_of(plan(traffic=traffic))
    one = replace(record(rows), cut=of_cut)
    (made,) = as_rows(ExperimentRow, cycle_columns([Cycle(of, 1, 2, [one], rows, (), opened_s)]))
    return made


def test_a_queue_that_goes_on_where_it_was_cut_keeps_its_numbers():
    made = queued(Cut(1, 0.5), {1: 0.0, 2: 1.0})
    assert [name for name in QUEUED if getattr(made, name) is None] == []
    assert "queue_lost" not in codes(made)


@pytest.mark.parametrize(
    ("of_cut", "opened_s"),
    [(cut(0.001), {1: 0.0, 2: 1.0}), (Cut(1, 0.5), {1: 0.0, 2: None})],
    ids=["requests_waited_twice", "begun_with_an_empty_queue"],
)
def test_of_a_queue_that_an_interruption_changed_nothing_is_shown(of_cut, opened_s):
    made = queued(of_cut, opened_s)
    assert [name for name in QUEUED if getattr(made, name) is not None] == []
    assert "queue_lost" in codes(made)
    assert made.output_tokens_per_s is not None


# ------------------------------------------------------------------ ranks that are cut together
def cut_ranks(owner, other):
    """Return the records of two ranks of an attempt, given (window, finished of 2, Cut) for each."""
    made = []
    for rank, (duration_s, finished, of_cut) in enumerate((owner, other)):
        rows = requests(range(rank, 2 * finished, 2), rank=rank)
        values = {"rank": rank, "world_size": 2, "status": "interrupted", "requests_planned": 2, "cut": of_cut}
        if duration_s is None:
            values["phases"] = phases()[:2]
        made.append(replace(record(rows, duration_s=duration_s or 0.0, energy=() if rank else (GPU,)), **values))
    return made


def test_what_other_ranks_have_under_way_is_counted_up_to_the_owners_end():
    owner, other = together(cut_ranks((4.0, 1, Cut(1, 0.0, 0.0, UnderWay(1, None, 1.0, 1.0))), (1.5, 1, Cut(1, 2.5))))
    assert owner.phase("measured") == Phase("measured", 4.0, (GPU,))
    assert other.phase("measured").duration_s == 4.0
    assert other.cut.under_way == UnderWay(1, None, 2.5, 2.5)
    assert owner.cut.under_way == UnderWay(1, None, 1.0, 2.5)


def test_what_a_rank_finished_before_the_owner_had_finished_anything_has_time_but_no_energy():
    owner, other = together(cut_ranks((None, 0, None), (3.0, 1, Cut(1, 0.1))))
    window = owner.phase("measured")
    assert (window.duration_s, window.energy[0].energy_j) == (3.0, None)
    assert "stopped before" in window.energy[0].reason
    assert (owner.cut.under_way, other.phase("measured").duration_s) == (UnderWay(1, None, 3.0, 3.0), 3.0)


@pytest.mark.parametrize(("later_s", "energy_j"), [(4.05, 100.0), (5.0, None)])
def test_energy_that_was_read_long_before_another_ranks_last_request_is_null(later_s, energy_j):
    owner, _ = together(cut_ranks((4.0, 1, Cut(1, None, 0.01)), (later_s, 1, Cut(1, None))))
    window = owner.phase("measured")
    assert (window.duration_s, window.energy[0].energy_j) == (later_s, energy_j)
    assert owner.cut.energy_behind_s == pytest.approx(later_s - 4.0 + 0.01)


def test_an_attempt_in_which_no_rank_finished_anything_has_no_window():
    assert all(r.phase("measured") is None for r in together(cut_ranks((4.0, 0, Cut(1, 0.0)), (None, 0, None))))


def test_ranks_that_ended_well_are_left_as_they_are():
    records, _ = two_ranks()
    assert together(records) == records


# ------------------------------------------------------------------ ranks
def two_ranks(**second):
    both = [requests([0, 2]), requests([1], rank=1)]
    values = {"rank": 1, "world_size": 2, "energy": ()} | second
    return [record(both[0], world_size=2), record(both[1], **values)], [*both[0], *both[1]]


def test_energy_is_counted_once_however_many_ranks():
    records, rows = two_ranks(energy=(reading(energy_j=77.0),))
    made = row(*records, rows=rows, processes=2)
    assert (made.energy_j, made.output_tokens, made.status) == (100.0, 60, "completed")
    check_identities(made)


def test_the_window_is_the_owners():
    records, rows = two_ranks(duration_s=9.0)
    assert row(*records, rows=rows, processes=2).duration_s == 4.0


def test_without_the_owner_there_is_no_energy():
    records, rows = two_ranks(energy=(reading(energy_j=77.0),))
    made = row(records[1], rows=rows[2:], processes=2)
    assert made.energy_j is None
    assert made.duration_s == 4.0


def test_prefill_of_several_processes_is_their_mean_and_its_energy_is_not_known():
    records, rows = two_ranks(prefill=Prefill(3.0))
    made = row(replace(records[0], prefill=Prefill(1.0, 30.0, 2.0)), records[1], rows=rows, processes=2)
    assert (made.prefill_duration_s, made.decode_duration_s) == (2.0, 2.0)
    assert made.prefill_energy_j is made.decode_energy_j is None


@pytest.mark.parametrize(("machine", "processes", "busy"), [(2.0, (1.0, 1.0), False), (4.0, (1.0, 1.0), True)])
def test_the_other_processes_of_the_run_do_not_make_the_host_busy(machine, processes, busy):
    here = Environment("h", "os", "cpu", 8, 1, (), {})
    records, rows = two_ranks()
    loaded = [
        replace(r, cpu_load=CpuLoad(machine, own), environment=here) for r, own in zip(records, processes, strict=True)
    ]
    assert ("busy_host" in codes(row(*loaded, rows=rows, processes=2))) is busy


# ------------------------------------------------------------------ attempts
def test_windows_of_attempts_are_added_up_and_no_gap_between_them():
    first = record(requests([0]), duration_s=1.0, attempt=1, status="interrupted", error=ErrorInfo("Interrupted", "i"))
    second = record(requests([1, 2]), duration_s=3.0, attempt=2, energy=(reading(energy_j=11.0),))
    one = merged([first, second])
    made = row(one)
    assert (made.duration_s, made.energy_j, made.load_energy_j) == (4.0, 111.0, 40.0)
    assert (made.status, made.error) == ("completed", None)
    check_identities(made)


def test_of_the_attempts_peaks_of_memory_the_largest_counts():
    first, second = Memory(360, "process", 20), Memory(237, "process", 30)
    whole = merged([record(attempt=1, memory=first), record(attempt=2, memory=second)])
    assert whole.memory == Memory(360, "process", 30)
    assert merged([record(attempt=1, memory=None), record(attempt=2, memory=second)]).memory == second


def test_an_attempt_without_a_window_counts_for_nothing_but_its_error():
    first = record(requests([0]), attempt=1, status="interrupted")
    second = record([], attempt=2, status="failed", phases=phases()[:1], error=ErrorInfo("E", "out of memory"))
    one = merged([first, second])
    assert (one.status, one.error.message) == ("failed", "out of memory")
    assert (one.phase("measured").duration_s, one.requests_completed) == (4.0, 1)


def resumed(first, second, durations_s=(1.0, 3.0)):
    """Return the row of a cycle in two attempts that were metered like this."""
    one = record(requests([0]), first, durations_s[0], attempt=1, status="interrupted")
    return row(merged([one, record(requests([1, 2]), second, durations_s[1], attempt=2)]))


@pytest.mark.parametrize("later", [(), (ESTIMATED_CPU,), (replace(GPU, energy_j=None, reason="lost"),)])
def test_energy_that_an_attempt_lacks_makes_the_sum_null(later):
    made = resumed((GPU,), later)
    assert made.energy_j is made.gpu_energy_j is made.energy_per_output_token_j is made.average_power_w is None
    assert "energy_partial" in codes(made)
    assert any("gpu energy (counter) covers 1 of 4 s" in text for text in made.warnings)


@pytest.mark.parametrize("turned", [False, True])
def test_a_meter_that_changes_within_a_window_is_summed_from_neither(turned):
    readings = [(CPU, reading("dram", "counter", 5.0, "dram", "package")), (ESTIMATED_CPU, DRAM)]
    made = resumed(*(reversed(readings) if turned else readings))
    assert made.energy_j is made.cpu_energy_j is made.dram_energy_j is made.co2e_g is None
    assert codes(made).count("energy_partial") == 4
    check_identities(made)


def test_what_all_attempts_metered_alike_is_kept_beside_what_changed():
    made = resumed((CPU, DRAM), (ESTIMATED_CPU, DRAM))
    assert (made.energy_j, made.cpu_energy_j, made.dram_energy_j) == (None, None, 10.0)
    assert made.dram_energy_source == "estimate"


def test_what_was_read_of_a_part_is_kept_in_the_record():
    parts = [record(requests([0]), (CPU,), 1.0), record(requests([1, 2]), (ESTIMATED_CPU,), 3.0, attempt=2)]
    window = merged(parts).phase("measured")
    assert [(r.source, r.energy_j, r.covered_s) for r in window.energy] == [
        ("counter", 20.0, 1.0),
        ("estimate", 300.0, 3.0),
    ]
    assert [r.reason for r in window.usable()] == [
        "the reading covers only 1 of 4 s",
        "the reading covers only 3 of 4 s",
    ]


@pytest.mark.parametrize(("covered_s", "whole"), [(4.0, True), (3.91, True), (3.89, False), (0.0, False)])
def test_a_window_that_was_cut_has_only_energy_that_covers_it(covered_s, whole):
    cut = record(energy=(replace(GPU, covered_s=covered_s),), status="interrupted")
    made = row(cut)
    assert made.energy_j == (100.0 if whole else None)
    assert ("energy_partial" in codes(made)) is not whole


@pytest.mark.parametrize(("duration_s", "lacking_s"), [(1.0, 0.05), (5.0, 0.1), (10.0, 0.1), (60.0, 0.6)])
def test_what_may_be_lacking_is_a_tick_a_hundredth_and_never_more_than_a_sensors_error(duration_s, lacking_s):
    for more_s, whole in ((-1e-6, True), (1e-6, False)):
        energy = (replace(GPU, covered_s=duration_s - lacking_s - more_s),)
        assert (row(record(energy=energy, duration_s=duration_s)).energy_j is not None) is whole


def test_an_unmetered_hundredth_is_less_than_is_known_anyway():
    assert resumed((), (GPU,), (0.99, 99.01)).energy_j == 100.0
    assert resumed((), (GPU,), (1.01, 98.99)).energy_j is None


def test_idle_and_warm_up_count_only_if_they_were_metered_throughout():
    idle = Phase("idle_loaded", 2.0, (reading(energy_j=30.0, covered_s=1.0),))
    made = row(record(phases=(idle, Phase("measured", 4.0, (GPU,)))))
    assert (made.energy_j, made.idle_power_loaded_w, made.energy_idle_adjusted_j) == (100.0, None, None)


def test_a_counter_and_an_integral_are_both_measured():
    made = resumed((GPU,), (reading(source="integral", energy_j=11.0),))
    assert (made.energy_j, made.energy_source) == (111.0, "counter+integral")


def test_a_second_gpu_that_only_one_attempt_used_is_added():
    made = resumed((GPU,), (GPU, reading(energy_j=11.0, device="GPU-1")))
    assert made.energy_j == 211.0
    lost = reading(energy_j=None, device="GPU-1", reason="it is lost")
    assert resumed((GPU,), (GPU, lost)).energy_j is None


def test_attempts_on_different_gpus_are_added_up():
    other = reading(energy_j=11.0, device="GPU-1")
    one = merged([record(requests([0]), attempt=1), record(requests([1, 2]), attempt=2, energy=(other,))])
    assert row(one).energy_j == 111.0


def test_prefill_that_is_not_told_apart_is_null_everywhere_with_its_reason():
    unknown = Prefill(None, reason="others were decoding")
    made = row(record(prefill=unknown))
    assert (made.prefill_duration_s, made.prefill_energy_j, made.prefill_reason) == (None, None, "others were decoding")
    assert (made.decode_duration_s, made.decode_energy_j) == (None, None)
    one = merged([record(requests(), attempt=1, prefill=Prefill(1.0, 30.0, 2.0)), record(attempt=2, prefill=unknown)])
    assert one.prefill == unknown


def test_an_attempt_that_ran_nothing_does_not_hide_the_others_prefill():
    ran = record(requests(), attempt=1, prefill=Prefill(1.0, 30.0, 2.0), flops=Flops(5.0, "m"))
    one = merged([ran, record([], attempt=2, duration_s=0.1, flops=None)])
    assert (one.prefill, one.flops) == (Prefill(1.0, 30.0, 2.0), Flops(5.0, "m"))


ELSEWHERE = {"hostname": "b", "name": "NVIDIA A100-SXM4-80GB", "version": "5.24", "uuid": "GPU-b"}


def placed(rows, hostname="a", name="NVIDIA H100 80GB HBM3", version="5.23", uuid="GPU-a", **more):
    """Return a record of an attempt with an idle phase, on this machine."""
    return record(
        rows,
        hostname=hostname,
        model=ModelInfo("m", None, "A", 1, False, 1, "bfloat16"),
        engine=EngineInfo("pytorch", version, "cuda:0", name, {}),
        environment=gpus(uuid),
        flops=Flops(1e14, "m"),
        phases=(Phase("idle_loaded", 2.0, (reading(energy_j=20.0, device=uuid),)), *phases(energy=(GPU,))),
        **more,
    )


@pytest.mark.parametrize("changed", [["hostname"], ["name"], ["version"], ["uuid"], [*ELSEWHERE], []])
def test_a_cycle_that_was_resumed_elsewhere_says_so_and_has_no_number_of_one_machine_alone(changed):
    other = {each: ELSEWHERE[each] for each in changed}
    first, second = placed(requests([0])), placed(requests([1, 2]), attempt=2, **other)
    made = row(merged([first, second]))
    assert ("machine_changed" in codes(made)) == bool(changed)
    for each in set(changed) - {"uuid"}:
        column = {"name": "device", "version": "engine_version"}.get(each, each)
        assert getattr(made, column).endswith(f"+{ELSEWHERE[each]}")
    assert (made.mfu is None) == ("name" in changed)
    is_other_hardware = not {"name", "uuid"}.isdisjoint(changed)
    assert (made.energy_idle_adjusted_j is None) == (made.idle_power_loaded_w is None) == is_other_hardware
    assert made.energy_j == 200.0
    assert made.output_tokens_per_s == pytest.approx(60 / 8)


@pytest.mark.parametrize("changed", [["hostname"], ["name"], ["version"], []])
def test_cycles_that_ran_in_different_places_say_so(changed):
    other = {each: ELSEWHERE[each] for each in changed}
    each = [row(placed(requests())), row(placed(requests(), **other))]
    made = over_cycles(each, plan(cycles=2))
    assert codes(made).count("machine_changed") == bool(changed)
    assert (made.mfu is None) == (made.idle_power_loaded_w is None) == ("name" in changed)
    assert made.energy_j == 100.0


# ------------------------------------------------------------------ warnings
def test_a_warning_is_told_once_and_how_often():
    short = "short_window: the window is 0.2 s; 5 s is the least to trust."
    groups = [[short], [short.replace("0.2", "0.35")], []]
    assert once_each(groups, "cycle") == [f"{short} (and 1 more cycle)"]
    assert once_each([*groups, [short]], "cycle") == [f"{short} (and 2 more cycles)"]


def test_different_things_of_one_code_are_both_told():
    both = ["energy_missing: cpu: no access.", "energy_missing: dram: no access."]
    assert once_each([both, both[:1]], "process") == [f"{both[0]} (and 1 more process)", both[1]]


def test_devices_are_no_numbers():
    groups = [["throttled: GPU-1: heat."], ["throttled: GPU-2: heat."]]
    assert once_each(groups, "cycle") == ["throttled: GPU-1: heat.", "throttled: GPU-2: heat."]


def test_attempts_processes_and_cycles_do_not_repeat_a_warning():
    note = (CodedWarning("input_truncated", "3 of 9 prompts were cut."),)
    one = merged([record(requests([0]), attempt=1, warnings=note), record(requests([1, 2]), attempt=2, warnings=note)])
    cycle = row(one)
    assert codes(cycle).count("input_truncated") == 1
    assert codes(over_cycles([cycle, cycle, cycle], plan(cycles=3))).count("input_truncated") == 1


# ------------------------------------------------------------------ cycles
def cycles(*durations_s, tokens=(20, 20, 20, 20)):
    made = []
    for number, (duration_s, output_tokens) in enumerate(zip(durations_s, tokens, strict=False), start=1):
        rows = [replace(r, output_tokens=output_tokens) for r in requests(cycle=number)]
        energy = (reading(energy_j=100.0 * number),)
        made.append(row(record(rows, energy, duration_s, cycle=number), rows=rows))
    return made


def test_quantities_are_means_and_quotients_are_those_of_the_means():
    each = cycles(1.0, 3.0, 2.0)
    made = over_cycles(each, plan(cycles=3))
    assert (made.energy_j, made.duration_s, made.output_tokens) == (200.0, 2.0, 60)
    assert made.output_tokens_per_s == pytest.approx(30.0)
    assert made.output_tokens_per_s_mean == pytest.approx((60 + 20 + 30) / 3)
    check_identities(made)


def test_spreads_are_those_of_the_cycles_own_values():
    each = cycles(1.0, 3.0, 2.0)
    made = over_cycles(each, plan(cycles=3))
    names = {
        "energy_{}_j": "energy_j",
        "output_tokens_per_s_{}": "output_tokens_per_s",
        "latency_mean_{}_s": "latency_mean_s",
        "energy_per_output_token_{}_j": "energy_per_output_token_j",
    }
    for name, column in names.items():
        found = summarize([getattr(cycle, column) for cycle in each])
        for part in ("sd", "ci95_low", "ci95_high"):
            assert getattr(made, name.format(part)) == pytest.approx(getattr(found, part)), name
        assert getattr(made, name.format("cv").removesuffix("_j").removesuffix("_s")) == pytest.approx(found.cv)


def test_one_cycle_has_no_interval():
    made = over_cycles(cycles(2.0), plan())
    assert [value for name, value in asdict(made).items() if "_ci95_" in name or "_sd" in name] == [None] * 12
    assert "few_cycles" in codes(made)


def test_an_unfinished_cycle_is_left_out_and_told():
    whole = cycles(1.0, 3.0)
    broken = row(record(requests([0]), cycle=3, status="failed", error=ErrorInfo("E", "it broke")), rows=requests([0]))
    made = over_cycles([*whole, broken], plan(cycles=3))
    assert (made.status, made.error) == ("failed", "it broke")
    assert (made.cycles_completed, made.cycles_planned, made.duration_s) == (2, 3, 2.0)
    assert made.output_tokens_per_s == pytest.approx(30.0)


def test_cycles_that_have_not_begun_are_missing():
    made = over_cycles(cycles(1.0), plan(cycles=3))
    assert (made.status, made.cycles_completed) == ("interrupted", 1)


def test_counts_stay_whole_numbers_and_do_not_spoil_quotients():
    made = over_cycles(cycles(1.0, 1.0, tokens=(20, 21)), plan(cycles=2))
    assert made.output_tokens == 62  # 61.5, rounded to even
    assert made.output_tokens_per_s == pytest.approx(61.5)


def test_what_was_metered_differently_says_so():
    each = cycles(1.0, 1.0)
    each[1] = replace(each[1], energy_source="integral")
    assert over_cycles(each, plan(cycles=2)).energy_source == "counter+integral"


def of_kinds(*energies):
    """Return the row of an experiment whose cycles were metered like this."""
    each = [
        row(record(energy=energy, cycle=n, phases=phases(2.0, energy))) for n, energy in enumerate(energies, start=1)
    ]
    return over_cycles(each, plan(cycles=len(each)))


def test_measured_and_estimated_cycles_have_no_mean():
    made = of_kinds((CPU, DRAM), (ESTIMATED_CPU, DRAM), (CPU, DRAM))
    assert made.duration_s == 2.0
    headline = ("energy_j", "energy_wh", "average_power_w", "energy_per_output_token_j", "energy_per_request_j")
    spread = [name for name in ExperimentRow.__struct_fields__ if re.match("energy_.*(sd|cv|ci95|mean)", name)]
    assert {name: getattr(made, name) for name in (*headline, "cpu_energy_j", *spread)} == dict.fromkeys(
        (*headline, "cpu_energy_j", *spread)
    )
    assert made.dram_energy_j == 5.0
    assert made.output_tokens_per_s_sd == 0.0
    (text,) = [text for text in made.warnings if text.startswith("energy_mixed")]
    assert "(measured cpu package; estimated cpu+dram machine)" in text


def test_no_energy_or_power_is_averaged_over_measured_and_estimated_cycles():
    """Whatever column is added: only what has a kind of its own, and the same in both, has a mean."""
    metered = {column.name for column in columns(ExperimentRow) if column.unit in ("J", "W", "J/token", "J/request")}
    kinds = ("counter", "package"), ("estimate", "machine")
    each = [
        replace(
            row(), **dict.fromkeys(metered, 4.0), energy_source=source, energy_components="cpu", energy_scope=scope,
            gpu_energy_source=None, cpu_energy_source=source, dram_energy_source="estimate",
        )
        for source, scope in kinds
    ]  # fmt: skip
    made = over_cycles(each, plan(cycles=2))
    of_the_gpu = {"gpu_energy_j", "trace_energy_j", "prefill_energy_j", "prefill_energy_uncertainty_j"}
    assert {name for name in metered if getattr(made, name) is not None} == {"dram_energy_j", *of_the_gpu}
    assert made.steady_energy_j is made.steady_energy_per_output_token_j is None


def test_cycles_of_different_components_have_no_mean():
    made = of_kinds((CPU,), (CPU, reading("dram", "counter", 5.0, "dram", "package")))
    assert (made.energy_j, made.cpu_energy_j) == (None, 20.0)
    assert "energy_mixed" in codes(made)


def test_cycles_of_one_kind_have_a_mean():
    made = of_kinds((GPU,), (reading(source="integral", energy_j=110.0),))
    assert (made.energy_j, made.energy_source) == (105.0, "counter+integral")
    assert "energy_mixed" not in codes(made)


def test_one_cycle_without_energy_leaves_no_mean():
    made = of_kinds((CPU,), (replace(CPU, covered_s=0.5),))
    assert (made.energy_j, made.energy_cv) == (None, None)
    assert "energy_partial" in codes(made)


OF_THE_EXPERIMENT = {"cycles_planned", "cycles_completed", "resumed"}


def test_no_number_can_be_forgotten():
    numbers = [column.name for column in columns(ExperimentRow) if column.python_type in (int, float)]
    low, high = (replace(row(), **dict.fromkeys(numbers, value)) for value in (2, 4))
    made = over_cycles([low, high], plan(cycles=2))
    spreads = {name for name in numbers if re.search("_(sd|ci95_low|ci95_high)(_|$)|_cv$|_mean(_j)?$", name)}
    assert len(spreads) == 4 * 4 + 1 + 2  # and warmup_cv, and two means
    for name in (
        set(numbers)
        - OF_THE_EXPERIMENT
        - (spreads - {"warmup_cv"})
        - set(quotients({name: [value] for name, value in asdict(low).items()}, [True]))
    ):
        expected = 4.0 if name in MAXIMA else 3.0
        if name == "carbon_intensity_g_per_kwh":  # weighted by energy
            expected = (2 * 2 + 4 * 4) / (2 + 4)
        assert getattr(made, name) == pytest.approx(expected), name


def test_a_cycles_columns_are_among_the_experiments():
    of_cycles = set(CycleRow.__struct_fields__) - {"cycle", "attempts"}
    assert of_cycles <= set(ExperimentRow.__struct_fields__)


# ------------------------------------------------------------------ everything combined
@st.composite
def runs(draw):
    """Prompts shared over ranks and attempts in some cycles: the positions run by each (cycle, rank, attempt)."""
    count, ranks, number = draw(st.integers(1, 9)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    attempts = draw(st.integers(1, 3))
    durations_s = draw(st.lists(st.floats(0.1, 100), min_size=number * attempts, max_size=number * attempts))
    energies_j = draw(st.lists(st.floats(1, 1e4), min_size=number * attempts, max_size=number * attempts))
    of_prompt = draw(st.lists(st.integers(1, attempts), min_size=count * number, max_size=count * number))
    parts = []
    for cycle in range(1, number + 1):
        for attempt in range(1, attempts + 1):
            place = (cycle - 1) * attempts + attempt - 1
            for rank in range(ranks):
                mine = [i for i in range(rank, count, ranks) if of_prompt[(cycle - 1) * count + i] == attempt]
                rows = requests(mine, rank, cycle, attempt)
                energy = (reading(energy_j=energies_j[place]),) if rank == 0 else ()
                status = "completed" if attempt == attempts else "interrupted"
                it = record(
                    rows, energy, durations_s[place], rank=rank, world_size=ranks, cycle=cycle, attempt=attempt,
                    status=status, flops=Flops(float(len(rows)), "m"), prefill=Prefill(0.05) if rows else None,
                )  # fmt: skip
                parts.append(Part(it, rows))
    return count, ranks, number, parts


# Columns that tell how many processes took part, and those that depend on it: prefill is a mean over the processes.
OF_THE_SHARING = {
    "processes", "resumed", "warnings", "attempts", "prefill_duration_s", "decode_duration_s", "prefill_reason",
}  # fmt: skip


@given(runs())
def test_totals_are_those_of_the_same_requests_in_one_process(run):
    count, ranks, number, parts = run
    shared = merge_parts(plan(count, ranks, number), parts, 3)
    together = []
    for cycle in range(1, number + 1):
        mine = [part for part in parts if part.record.cycle == cycle]
        windows = [p.record.phase("measured") for p in mine if p.record.rank == 0]
        rows = [replace(r, rank=0, attempt=1) for p in mine for r in p.requests]
        energy = (reading(energy_j=sum(w.energy[0].energy_j for w in windows)),)
        it = record(rows, energy, sum(w.duration_s for w in windows), cycle=cycle, flops=Flops(float(count), "m"))
        together.append(Part(it, rows))
    alone = merge_parts(plan(count, 1, number), together, 1)
    for one, other in [(shared.row, alone.row), *zip(shared.cycles, alone.cycles, strict=True)]:
        for name in one.__struct_fields__:
            if name not in (*OF_THE_SHARING, "config_json"):
                value, expected = getattr(one, name), getattr(other, name)
                assert value == (pytest.approx(expected) if isinstance(expected, float) else expected), name
    check_identities(shared.row)
    assert sum(r.output_tokens for r in shared.requests) == sum(cycle.output_tokens for cycle in shared.cycles)
    assert sorted((r.cycle, r.request) for r in shared.requests) == [
        (cycle, i) for cycle in range(1, number + 1) for i in range(count)
    ]
    assert math.isclose(
        sum(cycle.energy_j for cycle in shared.cycles),
        sum(r.energy_j for p in parts for r in p.record.phase("measured").energy),
    )


# One meter counts 100 W, one estimates five times as much, and one reads nothing.
POWERS_W = {"counter": 100.0, "estimate": 500.0}


@st.composite
def attempts_at_a_window(draw):
    """Attempts of a few seconds, with a meter that may change, and with readings that may stop before the end."""
    made = []
    for attempt in range(1, draw(st.integers(1, 4)) + 1):
        duration_s = draw(st.floats(0.2, 50))
        kind = draw(st.sampled_from(["counter", "counter", "estimate", "none"]))
        behind_s = draw(st.sampled_from([0.0, 0.0, 0.05, 1.0, 40.0]))
        covered_s = max(0.0, duration_s - behind_s)
        power_w = POWERS_W.get(kind)
        known = {"energy_j": power_w * covered_s, "covered_s": covered_s} if power_w and covered_s else {}
        reading_of = reading("cpu", kind, **({"energy_j": None, "reason": "lost"} | known)) if power_w else None
        rows = requests([attempt - 1], attempt=attempt)
        made.append(record(rows, (reading_of,) if reading_of else (), duration_s, attempt=attempt))
    return made


@given(attempts_at_a_window())
def test_energy_that_is_shown_is_that_of_the_whole_window_and_of_one_kind(attempts):
    rows = [r for n in range(len(attempts)) for r in requests([n], attempt=n + 1)]
    made = row(merged(attempts), rows=rows, count=len(attempts))
    assert made.duration_s == pytest.approx(sum(a.phase("measured").duration_s for a in attempts))
    check_identities(made)
    if made.energy_j is None:
        lacks_all = all(r.energy_j is None for a in attempts for r in a.phase("measured").energy)
        assert lacks_all or "energy_partial" in codes(made)
        return
    right_j = POWERS_W[made.energy_source] * made.duration_s
    allowed_j = max(0.01 * right_j, min(0.05 * right_j, 0.1 * POWERS_W[made.energy_source]))
    assert right_j - allowed_j - 1e-6 <= made.energy_j <= right_j + 1e-6
