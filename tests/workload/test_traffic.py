"""Arrivals: their times, and serving them in turn."""

from __future__ import annotations

import statistics
import time

import pytest

from lem.errors import BadInput
from lem.spec.experiment import Traffic
from lem.workload.traffic import Arrivals, arrival_times_s, in_system_s, in_turn

MS = 1_000_000


def test_a_constant_rate():
    assert arrival_times_s(Traffic(pattern="constant", target_qps=4.0), 3, 1) == [0.0, 0.25, 0.5]


def test_poisson_gaps_have_the_mean_and_the_spread_of_the_exponential():
    times = arrival_times_s(Traffic(pattern="poisson", target_qps=10.0), 20_000, 7)
    gaps = [b - a for a, b in zip([0.0, *times], times, strict=False)]
    assert statistics.fmean(gaps) == pytest.approx(0.1, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.1, rel=0.03)


def test_the_seed_decides_and_a_longer_run_begins_like_a_shorter_one():
    traffic = Traffic(pattern="poisson", target_qps=10.0)
    assert arrival_times_s(traffic, 5, 1) == arrival_times_s(traffic, 50, 1)[:5]
    assert arrival_times_s(traffic, 5, 0) != arrival_times_s(traffic, 5, 1)


def test_a_trace_begins_at_its_first_arrival(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("t_s\n10.5\n10\n12\n")
    traffic = Traffic(pattern="trace", trace=str(file))
    assert arrival_times_s(traffic, 2, 0) == [0.0, 0.5]
    with pytest.raises(BadInput, match=r"fewer arrivals \(3\) than the run has requests \(4\)"):
        arrival_times_s(traffic, 4, 0)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a,b\n1,2\n", "no column t_s"),
        ("t_s\n1\nx\n", "cannot be read: line 3: 'x' is not a number"),
        ("t_s,who\n1,a\n,b\n", "line 3: '' is not a number"),
        ("who,t_s\na,1\nb\n", "line 3: '' is not a number"),
        ("t_s\nnan\n1\n", "line 2: nan is not a valid arrival time"),
        ("t_s\n1\n\ninf\n", "line 4: inf is not a valid arrival time"),
        ("t_s\n1\n-inf\n", "line 3: -inf is not a valid arrival time"),
        ("t_s\n5\n1e300\n", "line 3: 1e.300 s is more than 30 days after the first arrival .5 s on line 2"),
        ("t_s\n3\n-1e308\n1e308\n", "line 2: 3 s is more than 30 days after the first arrival"),
    ],
)
def test_a_broken_trace_is_a_sentence(tmp_path, text, why):
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(BadInput, match=why):
        arrival_times_s(Traffic(pattern="trace", trace=str(file)), 1, 0)


def test_times_of_a_clock_are_no_late_ones(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("t_s\n1767225600\n1767225600.5\n1769817600\n")  # the last is 30 days after the first
    assert arrival_times_s(Traffic(pattern="trace", trace=str(file)), 3, 0) == [0.0, 0.5, 30 * 86400]


def serve(arrivals, at_most, service_s):
    """Run with an engine that takes a fixed time per batch; return (taken, finished) for each batch."""
    begun = []

    def run(batch):
        begun.append((time.perf_counter_ns(), list(batch)))
        time.sleep(service_s)
        yield batch

    list(in_turn(arrivals, at_most, run))
    return begun


def test_requests_wait_while_the_engine_is_busy_and_the_engine_while_none_has_come():
    opened = time.perf_counter_ns()
    begun = serve(Arrivals("abc", [0.0, 0.01, 0.2], 1, opened), 8, 0.05)
    assert [batch for _, batch in begun] == [["a"], ["b"], ["c"]]
    began_ms = [(at - opened) / MS for at, _ in begun]
    assert began_ms[1] == pytest.approx(50, abs=20)
    assert began_ms[2] == pytest.approx(200, abs=20)


def test_what_has_arrived_in_the_meantime_is_taken_together():
    begun = serve(Arrivals("abcd", [0.0, 0.01, 0.02, 0.03], 1, time.perf_counter_ns()), 2, 0.05)
    assert [batch for _, batch in begun] == [["a"], ["b", "c"], ["d"]]


def test_with_a_fixed_concurrency_others_arrive_as_some_are_finished():
    begun = serve(Arrivals("abcde", None, 2, time.perf_counter_ns()), 8, 0.01)
    assert [batch for _, batch in begun] == [["a", "b"], ["c", "d"], ["e"]]


def test_those_in_a_system_of_fixed_size_arrived_when_others_ended():
    assert in_system_s(2, []) == [0.0, 0.0]
    assert in_system_s(2, [0.5]) == [0.0, 0.5]
    assert in_system_s(2, [0.75, 0.5, 1.0]) == [0.75, 1.0]


def test_what_arrived_before_the_window_is_there_from_its_opening_with_its_own_time():
    opened_ns = time.perf_counter_ns()
    arrivals = Arrivals("abc", [-0.5, 0.0, 9.0], 1, opened_ns)
    assert [(each.request, each.at_ns - opened_ns) for each in arrivals.take(opened_ns, 9)] == [
        ("a", -500 * MS),
        ("b", 0),
    ]
    arrivals = Arrivals("abc", None, 2, opened_ns, [-0.5, -0.25])
    assert [(each.request, each.at_ns - opened_ns) for each in arrivals.take(opened_ns, 9)] == [
        ("a", -500 * MS), ("b", -250 * MS)
    ]  # fmt: skip
