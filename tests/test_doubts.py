"""Every doubt can be provoked, and none is raised without cause."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lem import doubts
from lem.record import (
    CpuLoad,
    DeviceState,
    EnergyReading,
    Environment,
    ForeignProcess,
    Phase,
    ProcessRecord,
    RequestRecord,
    WarmupInfo,
)

GPU = EnergyReading("gpu", "counter", "device", "GPU-0", 1000.0, "counter", resolution_s=0.1, trace_energy_j=1005.0)
COOL = DeviceState("GPU-0", temperature_c=50, throttle_reasons=(), foreign_processes=())


def environment(before=COOL, after=COOL):
    return Environment("h", "os", "cpu", 8, 1, ("GPU-0",), {}, devices_before=(before,), devices_after=(after,))


def record(readings=(GPU,), duration_s=20.0, **more):
    values = {
        "format_version": 1,
        "lem_version": "0",
        "experiment_id": "e",
        "rank": 0,
        "world_size": 1,
        "status": "completed",
        "started_at": "",
        "hostname": "h",
        "phases": (Phase("measured", duration_s, tuple(readings)),),
        "environment": environment(),
        "cpu_load": CpuLoad(1.2, 1.0),
        "warmup": WarmupInfo(10, "fixed", None),
    }
    return ProcessRecord(**(values | more))


def requests(latencies_s):
    return [RequestRecord("e", 0, i, i, 5, 10, False, "length", 0.0, s, s) for i, s in enumerate(latencies_s)]


def codes(made, latencies_s=(1.0,) * 10):
    return [note.code for note in doubts.of_record(made, requests(latencies_s))]


def test_a_sound_measurement_is_doubted_only_for_being_one():
    assert codes(record()) == ["few_cycles"]


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (record(duration_s=4.9), "short_window"),
        (record(duration_s=4.9), "few_ticks"),
        (record([replace(GPU, trace_energy_j=1051.0)]), "counter_trace_mismatch"),
        (record([replace(GPU, trace_energy_j=940.0)]), "counter_trace_mismatch"),
        (record([replace(GPU, source="estimate", component="cpu")]), "energy_estimated"),
        (record([replace(GPU, energy_j=None, reason="it is lost")]), "energy_missing"),
        (record([]), "energy_missing"),
        (record([replace(GPU, scope="shared_device")]), "energy_shared"),
        (record([replace(GPU, source="integral")]), "energy_integrated"),
        (record(environment=environment(after=replace(COOL, temperature_c=61))), "temperature_drift"),
        (record(environment=environment(after=replace(COOL, throttle_reasons=("sw_power_cap",)))), "throttled"),
        (
            record(environment=environment(before=replace(COOL, foreign_processes=(ForeignProcess(7, None, "x"),)))),
            "foreign_process",
        ),
        (record(cpu_load=CpuLoad(2.0, 1.0)), "busy_host"),
        (record(warmup=WarmupInfo(200, "max_prompts", 0.5)), "warmup_not_steady"),
        (record(warmup=WarmupInfo(200, "max_s", None)), "warmup_not_steady"),
    ],
)
def test_each_cause_is_doubted(made, code):
    assert code in codes(made)


def test_a_limit_that_somebody_set_is_no_throttling():
    after = replace(COOL, throttle_reasons=("applications_clocks_setting",))
    assert "throttled" not in codes(record(environment=environment(after=after)))


def test_varying_batches_are_doubted_and_long_ones_among_equals_are_not():
    assert "high_variation" in codes(record(), [1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    assert "high_variation" not in codes(record(), [1.0, 1.05, 1.0, 1.02, 1.0])
    longer = requests([1.0] * 9)
    longer.append(replace(longer[0], batch=9, output_tokens=40, latency_s=4.0))
    assert "high_variation" not in [n.code for n in doubts.of_record(record(), longer)]


def test_a_run_that_did_not_get_to_its_window_has_nothing_to_doubt():
    assert codes(record(phases=(Phase("load", 1.0),))) == []


def test_an_unknown_code_cannot_be_used():
    with pytest.raises(KeyError):
        doubts.note("invented", "…")


def test_every_doubt_says_what_it_means_and_what_to_do():
    for code, doubt in doubts.CATALOGUE.items():
        assert doubt.meaning.endswith("."), code
        assert doubt.remedy.endswith("."), code
