"""The simulated engine's times: exact on a virtual clock, and varied by exactly what its options say."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import replace

import pytest

from lem.backends import Encoded, make_backend
from lem.backends.simulated import Pace
from lem.spec.campaign import CampaignCell
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Batching, Experiment, Streaming
from lem.workload.traffic import Arrivals

AT_ONCE = SimulatedBackend(prefill_s_per_token=0.5, decode_s_per_token=2.0, sleep=False)
PROMPTS = [Encoded(0, (1, 2)), Encoded(1, (1, 2, 3)), Encoded(2, (1,))]
FIRST = CampaignCell("one", "quick", 1, 1, number=1, cells=6)


def backend(options=AT_ONCE, cell=None, **changes):
    made = make_backend(Experiment(model="any", backend=options, max_output_tokens=4, min_output_tokens=4, **changes))
    made.cell = cell
    made.start()
    return made


def spans_s(made, batches):
    """Return when each request began, and when it ended."""
    origin_ns = 1_000_000_000
    return {g.index: ((g.start_ns - origin_ns) / 1e9, (g.end_ns - origin_ns) / 1e9) for batch in batches for g in batch}


def work_s(options=AT_ONCE, cell=None, prompts=PROMPTS[:1], seed=42):
    """Return how long prompts take in one batch."""
    made = backend(options, cell, seed=seed, batching=Batching(batch_size=8))
    ((*done,),) = made.generate(prompts)
    return (done[0].end_ns - done[0].start_ns) / 1e9


# ------------------------------------------------------------------ virtual time
def test_times_are_exact_and_nobody_waits_for_them():
    began_s = time.monotonic()
    made = backend(batching=Batching(batch_size=2))
    spans = spans_s(made, made.generate(PROMPTS))
    # 5 input tokens and 4 steps, then 1 and 4.
    assert spans == {0: (0, 10.5), 1: (0, 10.5), 2: (10.5, 19.0)}
    assert time.monotonic() - began_s < 5


def test_requests_that_are_taken_in_while_others_run_have_exact_times():
    made = backend(batching=Batching(strategy="continuous", batch_size=2))
    spans = spans_s(made, made.generate(PROMPTS))
    # The third prompt takes the first free place, and its prefill lies before the fifth step.
    assert spans == {0: (0, 10.5), 1: (0, 10.5), 2: (10.5, 19.0)}


@pytest.mark.parametrize("strategy", ["static", "continuous"])
def test_requests_arrive_on_the_virtual_clock(strategy):
    made = backend(batching=Batching(strategy=strategy, batch_size=1))
    arrivals = Arrivals(PROMPTS, [0.0, 5.0, 1000.0], 1, made.clock.now_ns(), clock=made.clock)
    assert spans_s(made, made.serve(arrivals, 1)) == {0: (0, 9), 1: (9, 18.5), 2: (1000, 1008.5)}


def test_tokens_are_timed_on_the_virtual_clock():
    made = backend(streaming=Streaming(enabled=True))
    ((done,),) = made.generate(PROMPTS[:1])
    assert [chunk.at_ns - done.start_ns for chunk in done.chunks] == [3e9, 5e9, 7e9, 9e9]


def test_with_sleep_the_same_work_takes_real_time():
    quick = SimulatedBackend(prefill_s_per_token=0, decode_s_per_token=0.05)
    began_s = time.monotonic()
    assert work_s(quick) == pytest.approx(time.monotonic() - began_s, abs=0.1)
    assert time.monotonic() - began_s >= 0.2


# ------------------------------------------------------------------ noise
def cells(count):
    return [replace(FIRST, cycle=cycle) for cycle in range(1, count + 1)]


def test_noise_has_the_relative_deviation_that_is_asked_for_and_no_bias():
    for noise in (0.02, 0.3):
        options = replace(AT_ONCE, noise=noise)
        factors = [work_s(options, cell) / 9.0 for cell in cells(3000)]
        # Over 3000 draws the estimate of a deviation is good to about 1.3%; of a heavy tail, to less.
        assert statistics.stdev(factors) / statistics.fmean(factors) == pytest.approx(noise, rel=0.06)
        assert statistics.fmean(map(math.log, factors)) == pytest.approx(0, abs=3 * noise / math.sqrt(3000))


def test_noise_is_one_factor_for_all_of_an_experiment():
    made = backend(replace(AT_ONCE, noise=0.1), FIRST, streaming=Streaming(enabled=True))
    ((one,), (other,), _) = made.generate(PROMPTS)
    factor = (one.prefill_end_ns - one.start_ns) / 1e9
    assert factor != pytest.approx(1, rel=1e-3)
    assert (other.prefill_end_ns - other.start_ns) / 1.5e9 == pytest.approx(factor, rel=1e-8)
    assert (other.end_ns - other.prefill_end_ns) / 8e9 == pytest.approx(factor, rel=1e-8)


def test_the_same_seed_and_cell_give_the_same_noise_and_any_other_another():
    options = replace(AT_ONCE, noise=0.1)
    others = [replace(FIRST, cycle=2), replace(FIRST, arm="slow"), replace(FIRST, name="two"), None]
    assert work_s(options, FIRST) == work_s(options, FIRST)
    assert len({work_s(options, cell) for cell in (FIRST, *others)}) == 5
    assert work_s(options, FIRST, seed=1) != work_s(options, FIRST)
    # A retry, or another place in the order, is the same cell.
    assert work_s(options, replace(FIRST, position=2, number=4)) == work_s(options, FIRST)


def test_request_noise_is_a_factor_of_each_request_and_a_batch_has_their_mean():
    options = replace(AT_ONCE, request_noise=0.2)
    alone = [work_s(options, FIRST, [prompt]) for prompt in PROMPTS]
    factors = [one / (4 * 2 + 0.5 * len(p.token_ids)) for one, p in zip(alone, PROMPTS, strict=True)]
    assert len(set(factors)) == 3
    prefill_s = sum(0.5 * len(p.token_ids) * factor for p, factor in zip(PROMPTS, factors, strict=True))
    together = prefill_s + 8 * statistics.fmean(factors)
    assert work_s(options, FIRST, PROMPTS) == pytest.approx(together, rel=1e-8)
    many = [Pace(options, 1).step_s([Encoded(i, (1,))]) / 2 for i in range(3000)]
    assert statistics.stdev(many) / statistics.fmean(many) == pytest.approx(0.2, rel=0.06)


# ------------------------------------------------------------------ drift and carry-over
def test_drift_goes_evenly_from_the_first_cell_to_the_last():
    options = replace(AT_ONCE, drift=0.21)
    found = [work_s(options, replace(FIRST, number=number)) / 9 for number in range(1, 7)]
    assert found == pytest.approx([1.21 ** (i / 5) for i in range(6)], rel=1e-8)
    assert work_s(options) == 9
    assert [work_s(AT_ONCE, replace(FIRST, number=number)) for number in (1, 6)] == [9, 9]
    assert work_s(replace(AT_ONCE, drift=-0.5), replace(FIRST, number=6)) == 4.5


def test_a_share_of_the_predecessors_effect_is_carried_over():
    options, slower = replace(AT_ONCE, carry_over=0.5), replace(AT_ONCE, decode_s_per_token=8.0)
    assert work_s(options, replace(FIRST, simulated_before=slower)) == 9 * math.sqrt(8 / 2)
    assert work_s(options, replace(FIRST, simulated_before=AT_ONCE)) == 9
    assert work_s(AT_ONCE, replace(FIRST, simulated_before=slower)) == 9
    assert work_s(options, FIRST) == work_s(options) == 9
    instant = replace(AT_ONCE, decode_s_per_token=0.0)
    assert work_s(options, replace(FIRST, simulated_before=instant)) == 9


# ------------------------------------------------------------------ through the command
WANTED = (
    "experiment", "-m", "any", "--backend", "simulated", "-d", "sample", "-n", "6", "-y", "max_output_tokens=10",
    "min_output_tokens=10", "backend.sleep=false", "backend.prefill_s_per_token=0", "backend.decode_s_per_token=0.5",
    "energy=simulated", "energy.power_w=200",
)  # fmt: skip


@pytest.fixture
def row(lem, in_this_process):
    def run(*overrides):
        done = lem(*WANTED, *overrides, "--fresh")
        assert done.code == 0, done.err
        return json.loads(lem("results", "list", "--json", "--all").out)[-1]

    return run


def test_records_hold_the_simulated_times_and_energy_and_say_what_they_are(lem, row):
    found = row()
    assert (found["duration_s"], found["output_tokens"]) == (30.0, 60)
    assert (found["energy_j"], found["energy_per_output_token_j"]) == (6000.0, 100.0)
    assert (found["energy_source"], found["gpu_energy_source"]) == ("simulated", "simulated")
    assert (found["latency_mean_s"], found["idle_power_loaded_w"], found["load_duration_s"]) == (5.0, 200.0, 0.0)
    said = [text.partition(":")[0] for text in found["warnings"]]
    assert {"simulated", "energy_simulated"} <= set(said)
    assert "energy_estimated" not in said
    assert "busy_host" not in said
    shown = lem("results", "show", found["experiment_id"]).out
    assert "≈6 kJ" in shown
    assert "simulated, device" in shown


@pytest.mark.parametrize(
    ("overrides", "is_exact"),
    [((), True), (("backend.noise=0.1",), False), (("backend.request_noise=0.1",), False)],
    ids=["none", "noise", "request noise"],
)
def test_noise_reaches_the_records_and_the_seed_reproduces_it(row, overrides, is_exact):
    first, again, other = row(*overrides), row(*overrides), row(*overrides, "seed=1")
    assert (first["duration_s"], first["energy_j"]) == (again["duration_s"], again["energy_j"])
    assert (first["duration_s"] == 30.0) == is_exact
    assert (other["duration_s"] == first["duration_s"]) == is_exact
    assert first["energy_j"] == pytest.approx(200 * first["duration_s"], rel=1e-9)


def test_work_that_takes_no_time_at_all_has_no_rates(row):
    found = row("backend.decode_s_per_token=0")
    assert (found["duration_s"], found["energy_j"]) == (0.0, 0.0)
    assert found["output_tokens_per_s"] is None
    assert found["average_power_w"] is None


def test_a_run_that_fails_keeps_the_virtual_time_of_what_it_finished(lem, in_this_process):
    failed = lem(*WANTED, "backend.fail_at_request=4")
    assert failed.code != 0
    (kept,) = json.loads(lem("results", "list", "--json").out)
    assert (kept["status"], kept["requests_completed"], kept["duration_s"]) == ("failed", 4, 20.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backend.noise=-0.1", "backend.noise"),
        ("backend.noise=1.5", "backend.noise"),
        ("backend.request_noise=2", "backend.request_noise"),
        ("backend.drift=-1", "backend.drift"),
        ("backend.carry_over=1", "backend.carry_over"),
        ("backend.sleep=0", "backend.sleep"),
        ("energy.power_w=0", "energy.power_w"),
        ("energy=auto", "energy=auto reads a sensor, which needs real time; without sleep, time is only simulated."),
        (
            "num_processes=2",
            "2 processes would wait for each other, which needs real time; without sleep, time is only simulated.",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused(lem, override, message):
    done = lem(*WANTED, override)
    assert done.code == 2
    assert message in done.err
