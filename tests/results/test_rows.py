"""From records to rows: the identities, what is null, what makes the headline; attempts, ranks and cycles together."""

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
    DeviceState,
    EngineInfo,
    Environment,
    ErrorInfo,
    Flops,
    Memory,
    ModelInfo,
    Phase,
    Prefill,
)
from lem.results.aggregate import by_cycle, put_together
from lem.results.codec import excerpt_of
from lem.results.columns import quotients
from lem.results.cycles import MAXIMA, experiment_columns
from lem.results.directory import Part
from lem.results.merging import by_component, headline, merged, once_each
from lem.results.parquet import columns
from lem.results.rows import Cycle, as_rows, cycle_columns, rows_of
from lem.results.schema import CycleRow, ExperimentRow
from lem.results.statistics import summarise
from tests.records import phases, plan, reading, record, request, requests


def row(*records, rows=None, **plan_values):
    cycle = Cycle(excerpt_of(plan(**plan_values)), 1, 1, records or [record()], requests() if rows is None else rows)
    (made,) = as_rows(ExperimentRow, cycle_columns([cycle]))
    return made


def over_cycles(rows, of):
    """Return an experiment's row from its cycles'."""
    columns = {name: [getattr(each, name) for each in rows] for name in ExperimentRow.__struct_fields__}
    (made,) = as_rows(ExperimentRow, experiment_columns([len(rows)], [of.experiment.cycles], [0], columns))
    return made


def merge_parts(of, parts, attempts):
    return rows_of(put_together(excerpt_of(of), by_cycle(parts), attempts))


def codes(row):
    return [warning.partition(":")[0] for warning in row.warnings]


# ------------------------------------------------------------------ identities
def check_identities(row):
    """Every row keeps them, a cycle's and an experiment's, as far as it has the numbers."""
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


# ------------------------------------------------------------------ failures
def test_a_failed_run_has_a_row_with_its_error_and_no_rates():
    made = row(record(requests([0]), status="failed", error=ErrorInfo("E", "it broke", "measured")), rows=requests([0]))
    assert (made.status, made.error) == ("failed", "it broke")
    assert made.requests_completed == 1
    assert made.energy_j == 100.0
    assert made.output_tokens_per_s is made.energy_per_output_token_j is made.energy_per_request_j is None


def test_what_is_complete_is_complete_however_a_process_ended():
    made = row(record(status="interrupted", error=ErrorInfo("WorkerDied", "killed")))
    assert (made.status, made.error) == ("completed", None)


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


@pytest.mark.parametrize("later", [(), (reading("cpu", "estimate", 5.0, "cpu", "machine"),)])
def test_energy_that_an_attempt_lacks_makes_the_sum_null(later):
    one = merged([record(requests([0]), attempt=1), record(requests([1, 2]), attempt=2, energy=later)])
    assert row(one).energy_j is None


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
        found = summarise([getattr(cycle, column) for cycle in each])
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
        assert getattr(made, name) == (4 if name in MAXIMA else 3), name


def test_a_cycles_columns_are_among_the_experiments():
    of_cycles = set(CycleRow.__struct_fields__) - {"cycle", "attempts"}
    assert of_cycles <= set(ExperimentRow.__struct_fields__)


# ------------------------------------------------------------------ all together
@st.composite
def runs(draw):
    """Prompts shared over ranks and attempts in some cycles: for each (cycle, rank, attempt) the positions it ran."""
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


# What says how many took part, and what that changes: percentiles are of the same requests, prefill is a mean.
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
