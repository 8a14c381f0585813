"""Every warning can be provoked, and none is given without cause."""

from __future__ import annotations

import pytest
from msgspec.structs import asdict, replace

from lem import warning_codes
from lem.record import (
    CpuLoad,
    DeviceState,
    DeviceWindow,
    EnergyReading,
    EngineInfo,
    Environment,
    ForeignProcess,
    Phase,
    ProcessRecord,
    RequestRecord,
    WarmupInfo,
)
from lem.results.schema import ExperimentRow

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
    return [
        RequestRecord(
            experiment_id="e",
            rank=0,
            cycle=1,
            attempt=1,
            request=i,
            batch=i,
            input_tokens=5,
            output_tokens=10,
            input_truncated=False,
            finish_reason="length",
            start_s=0.0,
            end_s=latency_s,
            latency_s=latency_s,
        )
        for i, latency_s in enumerate(latencies_s)
    ]


def codes(made, latencies_s=(1.0,) * 10):
    return [note.code for note in warning_codes.of_record(made, requests(latencies_s))]


def test_a_good_measurement_has_no_warning():
    assert codes(record()) == []


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (record(duration_s=4.9), "short_window"),
        (record(duration_s=4.9), "few_ticks"),
        (record([replace(GPU, trace_energy_j=1051.0)]), "counter_trace_mismatch"),
        (record([replace(GPU, trace_energy_j=940.0)]), "counter_trace_mismatch"),
        (record([replace(GPU, source="estimate", component="cpu")]), "energy_estimated"),
        (record([replace(GPU, source="simulated", method="simulated: 100 W at all times")]), "energy_simulated"),
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
def test_each_cause_has_its_warning(made, code):
    assert code in codes(made)


def test_simulated_energy_is_not_called_an_estimate():
    assert "energy_estimated" not in codes(record([replace(GPU, source="simulated")]))


WINDOW = DeviceWindow("GPU-0", 20.0, throttled_s={}, reasons={}, foreign_processes=())


@pytest.mark.parametrize(
    ("during", "said"),
    [
        (
            {"throttled_s": {"power": 9.65, "thermal": 0.5}},
            ["GPU-0: clocks held down by power for 48%, thermal for 2% of the window."],
        ),
        ({"throttled_s": {"power": 20.5}}, ["GPU-0: clocks held down by power for 100% of the window."]),
        ({"throttled_s": {"power": 0.1}}, []),
        # The driver's own counts are better than samples; reasons that it does not count are sampled.
        (
            {"reasons": {"sw_power_cap": 0.5, "hw_slowdown": 0.25}},
            ["GPU-0: clocks held down by hw_slowdown for 25% of the window."],
        ),
        (
            {"reasons": {"sw_power_cap": 0.5}, "throttled_s": None},
            ["GPU-0: clocks held down by sw_power_cap for 50% of the window."],
        ),
        ({"reasons": {"applications_clocks_setting": 1.0}}, []),
        ({"reasons": None, "throttled_s": None}, []),
    ],
)
def test_throttling_is_that_of_the_window(during, said):
    made = record(devices_during=(replace(WINDOW, **during),))
    assert [w.text for w in warning_codes.of_record(made, []) if w.code == "throttled"] == said


def test_what_an_idle_gpu_says_counts_only_where_nothing_watched_the_window():
    slow = environment(after=replace(COOL, throttle_reasons=("hw_slowdown",)))
    assert "throttled" not in codes(record(environment=slow, devices_during=(WINDOW,)))
    assert "throttled" in codes(record(environment=slow, devices_during=(replace(WINDOW, uuid="GPU-1"),)))
    blind = replace(WINDOW, reasons=None, throttled_s=None)
    assert "throttled" in codes(record(environment=slow, devices_during=(blind,)))


def test_another_process_is_named_once_whenever_it_was_seen():
    visitor, stayer = ForeignProcess(7, None, None), ForeignProcess(8, None, "x")
    made = record(
        environment=environment(*(replace(COOL, foreign_processes=(stayer,)),) * 2),
        devices_during=(replace(WINDOW, foreign_processes=(visitor, stayer)),),
    )
    texts = [w.text for w in warning_codes.of_record(made, []) if w.code == "foreign_process"]
    assert texts == ["GPU-0: used by process 8 (x).", "GPU-0: used by process 7 (unnamed)."]


@pytest.mark.parametrize(
    ("ratio", "duration_s", "reach_s", "warns"),
    [
        (0.921, 3.6, 0.25, False),  # an H100, which updates its power ten times a second
        (0.87, 3.6, 0.25, True),
        (0.93, 20.0, 0.25, True),
        (0.945, 60.0, 0.25, True),
        (0.945, 20.0, 0.25, False),
        (0.88, 20.0, 1.25, True),
        (0.90, 10.0, 1.25, False),  # the mean of the last second
        (0.94, 3.6, None, True),
    ],
)
def test_counter_and_trace_may_differ_by_what_the_trace_misses_at_the_edges(ratio, duration_s, reach_s, warns):
    reading = replace(GPU, trace_energy_j=ratio * GPU.energy_j, trace_reach_s=reach_s)
    assert ("counter_trace_mismatch" in codes(record([reading], duration_s))) == warns


def test_a_limit_that_was_set_is_not_throttling():
    after = replace(COOL, throttle_reasons=("applications_clocks_setting",))
    assert "throttled" not in codes(record(environment=environment(after=after)))


def decoded(prefills_s, per_token_s):
    """Return batches of eleven output tokens each, with these prefill times and times per token after the first."""
    return [
        replace(
            made,
            output_tokens=11,
            prefill_s=prefill_s,
            latency_s=prefill_s + 10 * token_s,
            end_s=made.start_s + prefill_s + 10 * token_s,
        )
        for made, prefill_s, token_s in zip(requests([1.0] * len(prefills_s)), prefills_s, per_token_s, strict=True)
    ]


def test_prompts_of_different_lengths_are_not_variation_and_a_slower_decode_is():
    lengths = [0.1, 2.0, 0.1, 3.0, 0.5, 2.5]
    steady, slower = decoded(lengths, [0.05] * 6), decoded([0.5] * 6, [0.05, 0.05, 0.1, 0.05, 0.1, 0.05])
    assert "high_variation" not in [n.code for n in warning_codes.of_record(record(), steady)]
    assert "high_variation" in [n.code for n in warning_codes.of_record(record(), slower)]
    # Where prefill is unknown, it cannot be left out.
    unknown = [replace(r, prefill_s=None) for r in steady]
    assert "high_variation" in [n.code for n in warning_codes.of_record(record(), unknown)]


def test_batches_of_one_token_are_not_mixed_with_those_that_decode():
    one = [replace(r, batch=10 + r.batch, output_tokens=1) for r in decoded([2.0] * 3, [0.0] * 3)]
    assert "high_variation" not in [
        n.code for n in warning_codes.of_record(record(), decoded([2.0] * 6, [0.05] * 6) + one)
    ]


def row(**known):
    """Return a row in which only these values are known."""
    return ExperimentRow(**dict.fromkeys(ExperimentRow.__struct_fields__) | known)


@pytest.mark.parametrize(
    ("cycles", "resumed", "expected"),
    [(1, 0, ["few_cycles"]), (2, 0, []), (1, 1, ["few_cycles", "resumed"]), (3, 2, ["resumed"])],
)
def test_one_cycle_and_a_resumed_run_have_warnings(cycles, resumed, expected):
    assert [n.code for n in warning_codes.of_experiment(cycles, resumed)] == expected


class TestBelowIdle:
    def found(self, adjusted_j, tick_s=None):
        made = row(
            energy_j=100.0,
            energy_idle_adjusted_j=adjusted_j,
            idle_power_loaded_w=50.0,
            counter_tick_s=tick_s,
            output_tokens=0,
            input_tokens=0,
        )
        (found,) = warning_codes.of_rows({name: [value] for name, value in asdict(made).items()}, [[record()]])
        return [n.code for n in found]

    @pytest.mark.parametrize("adjusted_j", [20.0, 0.0, -0.01, -0.99])
    def test_a_hundredth_of_the_energy_is_noise(self, adjusted_j):
        assert "idle_adjusted_negative" not in self.found(adjusted_j)

    def test_more_is_not(self):
        assert "idle_adjusted_negative" in self.found(-1.01)

    def test_two_ticks_of_idle_power_are_noise_where_they_are_more(self):
        assert "idle_adjusted_negative" not in self.found(-9.9, tick_s=0.1)
        assert "idle_adjusted_negative" in self.found(-10.1, tick_s=0.1)
        assert "idle_adjusted_negative" in self.found(-1.01, tick_s=0.001)


def test_an_integral_says_how_late_its_samples_are():
    late = replace(GPU, source="integral", method="integral of power", trace_reach_s=1.25)
    (found,) = [
        each
        for each in warning_codes.of_record(record([late], 5.0), requests([1.0]))
        if each.code == "energy_integrated"
    ]
    assert found.text.endswith(
        "integral of power; the power samples lag behind the actual power by up to 1.25 s, which is 25% of the window."
    )


def test_an_integral_that_failed_is_missing_and_not_integrated():
    made = codes(record([replace(GPU, source="integral", energy_j=None, reason="it is lost")]))
    assert "energy_missing" in made
    assert "energy_integrated" not in made


def test_varying_batches_have_a_warning_and_long_ones_among_equals_do_not():
    assert "high_variation" in codes(record(), [1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    assert "high_variation" not in codes(record(), [1.0, 1.05, 1.0, 1.02, 1.0])
    longer = requests([1.0] * 9)
    longer.append(replace(longer[0], batch=9, output_tokens=40, latency_s=4.0, end_s=longer[0].start_s + 4.0))
    assert "high_variation" not in [n.code for n in warning_codes.of_record(record(), longer)]


def test_a_run_that_did_not_reach_its_window_has_no_warning():
    assert codes(record(phases=(Phase("load", 1.0),))) == []


@pytest.mark.parametrize(("percent", "least"), [(50, 5), (95, 59), (99, 299)])
def test_a_percentile_needs_enough_values_for_one_of_them_to_reach_it(percent, least):
    assert warning_codes.samples_needed(percent) == least
    assert 1 - (percent / 100) ** least >= 0.95 > 1 - (percent / 100) ** (least - 1)


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"latency": 299}, None),
        ({"latency": 298}, "latency: 298 values, but p99 needs 299."),
        ({"latency": 12}, "latency: 12 values, but p95 needs 59, p99 needs 299."),
        ({"latency": 1}, "latency: 1 value, but p50 needs 5, p95 needs 59, p99 needs 299."),
        (
            {"latency": 71, "time to first token": 71, "inter-token latency": 9000, "queueing": 4},
            "latency, time to first token: 71 values, but p99 needs 299; "
            "queueing: 4 values, but p50 needs 5, p95 needs 59, p99 needs 299.",
        ),
        ({}, None),
    ],
)
def test_percentiles_of_too_few_values_have_a_warning(counts, text):
    assert [n.text for n in warning_codes.of_samples(counts)] == ([text] if text else [])


class TestWithoutTheGpu:
    def found(self, *readings, **more):
        return "energy_without_gpu" in codes(record(readings, **more))

    CPU = replace(GPU, component="cpu", source="estimate")

    def test_a_meter_that_does_not_read_the_gpu_that_ran_the_model(self):
        assert self.found(self.CPU)
        assert self.found(self.CPU, replace(self.CPU, component="dram"))

    def test_the_engine_knows_of_a_gpu_where_the_driver_does_not_tell(self):
        engine = EngineInfo("pytorch", "1", "cuda:0", "NVIDIA H100 80GB HBM3", {})
        assert self.found(self.CPU, environment=None, engine=engine)
        assert not self.found(self.CPU, environment=None, engine=replace(engine, device="cpu"))

    def test_a_gpu_that_is_read_or_could_not_be_read_is_not_left_out(self):
        assert not self.found(GPU, self.CPU)
        assert not self.found(replace(GPU, energy_j=None, reason="it is lost"), self.CPU)
        assert not self.found(replace(GPU, component="module"))

    def test_without_a_gpu_none_is_missing(self):
        assert not self.found(self.CPU, environment=replace(environment(), devices_before=(), devices_after=()))

    def test_no_meter_is_another_matter(self):
        assert not self.found()

    def test_the_processes_that_meter_nothing_do_not_say_so(self):
        assert not self.found(self.CPU, rank=1)


class TestPower:
    """A row of 1,000 J in 20 s, that is, 50 W."""

    def found(self, limit_w, **more):
        before = replace(COOL, power_limit_w=limit_w)
        return "power_implausible" in codes(record(environment=environment(before=before), **more))

    @pytest.mark.parametrize(("limit_w", "implausible"), [(47.0, True), (47.7, False), (400.0, False), (None, False)])
    def test_a_gpu_does_not_draw_more_than_its_limit(self, limit_w, implausible):
        assert self.found(limit_w) is implausible

    def test_the_time_that_the_energy_covers_counts(self):
        assert self.found(400.0, readings=[replace(GPU, covered_s=2.0)])

    def test_a_peak_in_a_short_window_is_possible(self):
        assert not self.found(400.0, duration_s=1.0)

    def test_the_limit_is_that_of_the_same_gpu(self):
        assert not self.found(47.0, readings=[replace(GPU, device="GPU-1")])
        assert not self.found(47.0, readings=[replace(GPU, component="cpu", device="package-0")])


class TestTokensCountedTwice:
    def found(self, counters, **more):
        rows = {"input_tokens": 500, "output_tokens": 1000, "backend": "vllm"}
        made = record(counters=counters, **(rows | more))
        return [n.text for n in warning_codes.of_record(made, requests([1.0] * 10)) if n.code == "tokens_disagree"]

    @pytest.mark.parametrize("counters", [None, {}, {"preemptions": 0.0}, {"prompt_tokens": 500.0}])
    def test_what_agrees_or_is_not_counted_is_no_contradiction(self, counters):
        assert self.found(counters) == []
        assert self.found((counters or {}) | {"generation_tokens": 1009.0}) == []

    @pytest.mark.parametrize("output_tokens", [989.0, 1011.0, 0.0])
    def test_an_engine_that_counts_another_number(self, output_tokens):
        (text,) = self.found({"prompt_tokens": 500.0, "generation_tokens": output_tokens})
        assert text == f"the request rows have 1000 output tokens, but the engine counted {output_tokens:.0f}."

    @pytest.mark.parametrize("more", [{"backend": "openai"}, {"status": "interrupted"}])
    def test_more_tokens_may_be_those_of_others_or_of_requests_that_were_cut_off(self, more):
        assert self.found({"generation_tokens": 2000.0}, **more) == []
        assert len(self.found({"generation_tokens": 900.0}, **more)) == 1

    def test_what_was_preempted_is_computed_again(self):
        assert self.found({"prompt_tokens": 700.0, "preemptions": 3.0}) == []

    def test_each_token_has_its_time(self):
        timed = [replace(r, ttft_s=0.1, itl_s=[0.1] * 9) for r in requests([1.0] * 3)]
        assert list(warning_codes.of_timed_tokens(timed)) == []
        timed[1:] = [replace(r, itl_s=[0.1] * 8) for r in timed[1:]]
        (found,) = warning_codes.of_timed_tokens(timed)
        assert (
            found.text
            == "request 1 has 10 output tokens but 9 token times; the numbers also differ in 1 other request."
        )


class TestTimes:
    """A window of 20 s is checked against its requests' own times."""

    def found(self, first_s=0.0, last_s=20.0, busy_s=20.0, attempts=1, filled=True):
        made = warning_codes.of_times(20.0, first_s, last_s, busy_s, attempts=attempts, filled=filled)
        return [(n.code, n.text) for n in made]

    def test_what_fits(self):
        assert self.found() == []
        assert self.found(first_s=-0.19, last_s=20.19, busy_s=18.01) == []

    def test_a_window_that_opened_after_its_first_request_or_closed_before_its_last(self):
        assert self.found(first_s=-0.21) == [("times_disagree", "a request began 0.21 s before its window opened.")]
        assert self.found(last_s=20.5) == [
            ("times_disagree", "requests ended 0.5 s after their window, which was 20 s long.")
        ]

    def test_each_attempt_has_edges(self):
        assert self.found(last_s=20.24, attempts=5) == []

    def test_time_without_a_request(self):
        assert self.found(busy_s=17.9) == [("window_unfilled", "no request was running for 2.1 of 20 s.")]
        assert self.found(busy_s=1.0, filled=False) == []


def test_an_unknown_code_cannot_be_used():
    with pytest.raises(KeyError):
        warning_codes.warning("invented", "…")


def test_every_warning_says_what_it_means_and_what_to_do():
    for code, kind in warning_codes.WARNINGS.items():
        assert kind.meaning.endswith("."), code
        assert kind.remedy.endswith("."), code
