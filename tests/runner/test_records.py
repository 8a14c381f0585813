"""A record and its rows from plain values: no engine, no meter, no machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lem.backends.base import Encoded, Generation
from lem.record import (
    CodedWarning,
    EnergyReading,
    EngineInfo,
    Environment,
    ErrorInfo,
    Memory,
    Phase,
    PowerSample,
    Prefill,
)
from lem.results.journal import Checkpoint
from lem.results.plan import Plan, PromptsInfo
from lem.runner.records import EngineReport, Snapshot, WindowId, power_rows, prefill_of, process_record, request_row
from lem.runner.window import Measurement
from lem.spec.experiment import Batching, Dataset, Energy, Experiment
from lem.workload.flops import Architecture
from lem.workload.tokens import Chunk

S = 10**9
WINDOW = WindowId("exp", rank=0, cycle=2, attempt=3)
ENVIRONMENT = Environment("here", "Linux", "a CPU", 8, 2**34, (), {})
ENGINE = EngineReport(
    model=None,
    engine=EngineInfo("simulated", "1", "cpu", "a CPU", {}),
    memory=Memory(2**20, "process", kv_cache_bytes=1400),
    architecture=Architecture(body_weights=10, head_weights=0),
    warnings=(CodedWarning("simulated", "no model ran."),),
)


def plan(*, processes=1, replicas=1, count=4, batching=None, **changes):
    prompts = PromptsInfo(count, "", "builtin:sample", None, "text", count, 0)
    dataset = Dataset(path="builtin:sample", sample_size=4)
    experiment = Experiment(model="any", dataset=dataset, batching=batching or Batching())
    return Plan("exp", "", experiment, prompts, processes=processes, replicas=replicas, **changes)


def measured():
    """Return two batches of two requests: 3 and 5 prompt tokens, 2 output tokens; the window opened at 10 s."""
    into = Measurement(indices=[0, 1, 2, 3], phases=[Phase("load", 1.0)], window_opened_ns=10 * S)
    for index in range(4):
        start_ns = (11 + index // 2) * S
        generation = Generation(index, index // 2, (1, 2), "length", start_ns, start_ns + S // 2)
        into.add(generation, Encoded(index, (0,) * (3 + 2 * (index % 2)), truncated=index == 3))
    return into


def record_of(**changes):
    values = {
        "plan": plan(),
        "window": WINDOW,
        "started_at": "then",
        "measured": measured(),
        "environment": ENVIRONMENT,
    }
    return process_record(Snapshot(**values | changes))


def test_a_record_says_which_window_it_is_of_and_what_was_counted():
    record = record_of(engine=ENGINE)
    assert (record.experiment_id, record.rank, record.cycle, record.attempt) == ("exp", 0, 2, 3)
    assert (record.status, record.error, record.started_at) == ("completed", None, "then")
    assert (record.requests_planned, record.requests_completed) == (4, 4)
    assert (record.input_tokens, record.output_tokens) == (16, 8)
    assert record.environment == ENVIRONMENT
    assert record.phases == (Phase("load", 1.0),)


def test_before_the_model_is_loaded_a_record_says_nothing_of_the_engine():
    error = ErrorInfo("RunError", "no memory", "load")
    record = record_of(measured=Measurement(), status="failed", error=error)
    assert (record.status, record.error, record.warnings) == ("failed", error, ())
    assert record.model is record.engine is record.memory is record.flops is record.counters is None


def test_a_process_that_shares_the_prompts_of_another_counts_none():
    record = record_of(plan=plan(processes=2), window=WindowId("exp", 1, 1, 1), engine=ENGINE)
    assert (record.requests_planned, record.requests_completed, record.output_tokens) == (0, 0, 0)
    assert record.memory.kv_cache_bytes > 0


def test_readings_of_the_energy_are_kept_with_continuous_batching_and_thinned_out():
    def read(at_s, energy_j=None):
        gpu = EnergyReading("gpu", "counter", "device", "GPU-0", 50.0 * at_s if energy_j is None else energy_j, "test")
        return Checkpoint(at_s, energy=(gpu,), energy_at_s=at_s)

    into = measured()
    into.readings = [read(i / 10) for i in range(1, 251)]
    continuous = plan(batching=Batching(strategy="continuous", batch_size=2))
    kept = record_of(plan=continuous, measured=into).energy_so_far
    assert len(kept) == 84  # every third one
    assert all(each.energy_j == pytest.approx(50 * each.at_s) for each in kept)
    assert (kept[0].at_s, kept[-1].at_s) == (0.1, 25.0)
    into.readings = [Checkpoint(0.1, energy=()), *into.readings[:2]]
    assert [each.at_s for each in record_of(plan=continuous, measured=into).energy_so_far] == [0.1, 0.2]
    assert record_of(measured=into).energy_so_far == ()  # run batch by batch, there is no steady state


def test_flops_are_those_of_the_counted_requests():
    # 2 for each weight and each token that passes through it; the last output token never does.
    assert record_of(engine=ENGINE).flops.total == 2 * 10 * (16 + 8 - 4)


def test_warnings_are_the_engines_then_the_plans_and_those_of_the_window():
    cut = measured()
    cut.lost_s, cut.energy_behind_s = 1.5, 0.25
    warnings = record_of(engine=ENGINE, measured=cut, plan=plan(count=3, shared_with=2)).warnings
    assert [w.code for w in warnings] == [
        "simulated", "shared_hardware", "fewer_prompts", "window_cut", "input_truncated",
    ]  # fmt: skip
    assert "its last finished request, 1.5 s before the run was interrupted" in warnings[3].text
    assert "0.25 s before that request" in warnings[3].text


def generated(*times_s):
    """Return requests of one window, given (start, end of prefill, end)."""
    into = Measurement()
    for index, times in enumerate(times_s):
        start_ns, prefill_end_ns, end_ns = (round(t * S) for t in times)
        into.add(Generation(index, 0, (1,), "length", start_ns, end_ns, prefill_end_ns), Encoded(index, (1,)))
    return into.requests


def metered(reach_s=0.1, device="GPU-0"):
    """Return a window's reading of a device whose samples have this reach."""
    return (EnergyReading("gpu", "counter", "device", device, 1.0, "test", trace_reach_s=reach_s),)


def test_prefill_energy_is_the_traces_over_the_spans_and_unknown_where_that_does_not_reach():
    requests = generated((11, 12, 14))
    trace = [PowerSample(t * S, "gpu", "GPU-0", 50.0) for t in range(10, 14)]
    assert prefill_of(requests, trace, metered()) == Prefill(1.0, 50.0, 0.0)
    for samples, readings in ((trace[2:], metered()), ((), metered()), (trace, ()), (trace, metered(None))):
        unknown = prefill_of(requests, samples, readings)
        assert (unknown.duration_s, unknown.energy_j, unknown.uncertainty_j) == (1.0, None, None)
        assert "power trace" in unknown.reason
    assert prefill_of(measured().requests, trace, metered()) is None


@pytest.mark.parametrize(
    ("reach_s", "spans", "known"),
    [(0.1, 1, True), (0.2, 1, True), (0.25, 1, False), (1.2, 1, False), (0.1, 2, True), (0.15, 2, False)],
)
def test_prefill_energy_needs_spans_that_are_long_against_what_the_sensor_averages(reach_s, spans, known):
    # One second in total; 700 W while prompts are processed, 100 W otherwise.
    length_s = 1.0 / spans
    requests = generated(*((10 + 2 * i, 10 + 2 * i + length_s, 11.5 + 2 * i) for i in range(spans)))
    trace = [
        PowerSample(round((9 + k / 20) * S), "gpu", "GPU-0", 700.0 if ((k / 20 - 1) % 2) < length_s else 100.0)
        for k in range(140)
    ]
    found = prefill_of(requests, trace, metered(reach_s))
    assert (found.energy_j is not None) == known
    assert (found.reason is None) == known
    if known:
        assert found.uncertainty_j == pytest.approx(2 * spans * reach_s * 600)
        assert abs(found.energy_j - 700) < found.uncertainty_j


def test_what_a_sensor_that_averages_shifts_lies_within_the_bound():
    # A prefill of 8 s at 700 W, then 100 W, as reported by the mean of the last second.
    def mean_w(t):
        return 100 + 600 * max(0.0, min(t, 18) - max(t - 1, 10)) if t > 10 else 100

    trace = [PowerSample(round(t * S), "gpu", "GPU-0", mean_w(t)) for t in (8 + k / 20 for k in range(400))]
    found = prefill_of(generated((10, 18, 25)), trace, metered(1.25))
    assert found.energy_j == pytest.approx(8 * 700 - 300, rel=0.01)
    assert 300 < found.uncertainty_j <= 2 * 1.25 * 600


def test_prefill_is_unknown_where_requests_overlap_and_says_why():
    # As in continuous batching, the second request is taken in while the first decodes.
    for requests in (generated((0, 1, 5), (3, 4, 6)), generated((0, 1, 5), (0, 2, 6))):
        found = prefill_of(requests, (), ())
        assert (found.duration_s, found.energy_j, found.uncertainty_j) == (None, None, None)
        assert "decoding" in found.reason
    # Requests of one batch share their prefill, and batches follow each other.
    assert prefill_of(generated((0, 1, 5), (0, 1, 5), (5, 7, 9)), (), ()).duration_s == 3


def test_latency_begins_with_the_arrival_and_the_queue_is_unknown_where_the_start_is():
    times = {"start_ns": 12 * S, "end_ns": 15 * S, "arrived_ns": 11 * S, "chunks": (Chunk(13 * S, 1), Chunk(15 * S, 1))}
    into = Measurement(window_opened_ns=10 * S)
    for said in (True, False):
        into.add(Generation(0, 0, (1, 2), "stop", start_is_known=said, **times), Encoded(0, (1,)))
    known, unknown = (request_row(WINDOW, request) for request in into.requests)
    assert (known.arrived_s, known.queue_s, known.latency_s, known.ttft_s) == (1.0, 1.0, 4.0, 2.0)
    assert (known.itl_s, known.tpot_s, known.itl_spread) == ([2.0], 2.0, False)
    assert (unknown.queue_s, unknown.latency_s) == (None, 4.0)


def test_times_of_a_power_trace_are_relative_to_the_opening():
    samples = [PowerSample(t * S, "gpu", "GPU-0", 50.0) for t in (9, 12)]
    rows = list(power_rows(WINDOW, 10 * S, samples))
    assert [row.t_s for row in rows] == pytest.approx([-1.0, 2.0])
    assert {(row.rank, row.cycle, row.attempt) for row in rows} == {(0, 2, 3)}


def test_the_hours_of_a_window_are_weighted_by_the_power_trace_of_its_headline(tmp_path):
    """The window runs at 100 W for 10 s before a full hour and at 300 W for 10 s after it."""
    grid = tmp_path / "grid.csv"
    grid.write_text("time,g/kWh\n1970-01-01T00:00Z,100\n1970-01-01T01:00Z,500\n")
    known = plan()
    known = replace(known, experiment=replace(known.experiment, energy=Energy(carbon_trace=str(grid))))
    gpu = EnergyReading("gpu", "counter", "device", "GPU-0", 4000.0, "test")
    into = measured()
    into.window_opened_unix_s = 3590.0
    into.phases = [Phase("measured", 20.0, (gpu,))]
    watts = [(9, 100.0), (20, 100.0), (20, 300.0), (31, 300.0)]
    trace = [PowerSample(t * S, "gpu", "GPU-0", power_w) for t, power_w in watts]
    other = [PowerSample(t * S, "gpu", "GPU-1", 900.0) for t in (9, 31)]

    def carbon_of(**changes):
        return record_of(plan=known, window=WindowId("exp", 0, 1, 1), measured=into, engine=ENGINE, **changes).carbon

    found = carbon_of(trace=sorted([*trace, *other], key=lambda sample: sample.t_ns))
    assert found.intensity_g_per_kwh == pytest.approx(0.25 * 100 + 0.75 * 500)
    assert found.source == "energy.carbon_trace grid.csv, weighted by energy"
    # A trace that does not cover the window has no energy for its parts.
    assert carbon_of(trace=trace[1:]).intensity_g_per_kwh == pytest.approx(0.5 * 100 + 0.5 * 500)
    grid.unlink()
    record = record_of(plan=known, window=WindowId("exp", 0, 1, 1), measured=into, engine=ENGINE)
    assert record.carbon is None
    assert "carbon_unknown" in {note.code for note in record.warnings}
    into.window_opened_unix_s = None  # as if the window had not opened
    assert carbon_of() is None
