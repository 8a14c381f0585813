"""Power traces: the integral over an exact window, and the sampling."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lem.energy.trace import RunningIntegral, Sampler, integral_j
from lem.record import PowerSample

S = 10**9


def samples(*points):
    return [PowerSample(int(t * S), "gpu", "GPU-0", power_w) for t, power_w in points]


def test_the_edges_of_a_window_lie_between_samples():
    # A ramp of 10 W/s: from 20 W at 2 s to 60 W at 6 s.
    ramp = samples((0, 0), (5, 50), (10, 100))
    assert integral_j(ramp, 2 * S, 6 * S) == pytest.approx(160)


def test_a_window_that_samples_do_not_reach_is_unknown():
    trace = samples((1, 10), (2, 10))
    assert integral_j(trace, int(0.5 * S), 2 * S) is None
    assert integral_j(trace, 1 * S, int(2.5 * S)) is None
    assert integral_j([], 0, S) is None


def test_a_span_between_two_samples_is_interpolated():
    assert integral_j(samples((0, 100), (1, 200)), S // 4, S // 2) == pytest.approx(0.25 * 137.5)


@given(
    st.lists(st.floats(0, 1000), min_size=3, max_size=30),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_windows_side_by_side_add_up(powers, one, two, three):
    trace = samples(*((i * 0.05, power_w) for i, power_w in enumerate(powers)))
    last_ns = trace[-1].t_ns
    a, b, c = sorted(int(share * last_ns) for share in (one, two, three))
    whole = integral_j(trace, a, c)
    assert whole == pytest.approx(integral_j(trace, a, b) + integral_j(trace, b, c), abs=1e-6)
    assert -1e-6 <= whole <= max(powers) * (c - a) / S + 1e-6


@given(st.lists(st.floats(0, 1000), min_size=4, max_size=30), st.floats(0, 0.9), st.integers(1, 29))
def test_the_running_integral_is_the_integral_up_to_the_last_sample(powers, start, steps):
    trace = samples(*((i * 0.05, power_w) for i, power_w in enumerate(powers)))
    given_out = iter(trace)
    sampler = Sampler(lambda: [next(given_out)], hz=1)
    start_ns = int(start * trace[-1].t_ns)
    running = RunningIntegral(sampler, 0, start_ns)
    for i in range(len(trace)):
        sampler.sample_now()
        if i % steps == 0 or i == len(trace) - 1:  # update only now and then
            joules = running.up_to_now()["GPU-0"]
            expected = integral_j(trace[: i + 1], start_ns, trace[i].t_ns) if trace[i].t_ns > start_ns else 0
            assert joules == pytest.approx(expected, abs=1e-9)


def test_a_device_without_a_sample_before_the_start_has_no_running_integral():
    late = iter(samples((1, 5), (2, 5)))
    sampler = Sampler(lambda: [next(late)], hz=1)
    running = RunningIntegral(sampler, 0, S // 2)
    for _ in range(2):
        sampler.sample_now()
    assert running.up_to_now() == {}


def test_the_sampler_keeps_its_rate_and_stops():
    sampler = Sampler(lambda: samples((time.monotonic(), 1.0)), hz=50)
    sampler.start()
    time.sleep(1.0)
    sampler.stop()
    taken = len(sampler.samples())
    assert 35 <= taken <= 55
    time.sleep(0.1)
    assert len(sampler.samples()) == taken
