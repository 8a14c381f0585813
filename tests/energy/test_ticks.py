"""A counter that advances in ticks, read by calls that take time: its value at the edges of a window."""

from __future__ import annotations

import random
import statistics
from types import SimpleNamespace

import pytest

from lem.energy import ticks
from lem.energy.ticks import Counter, Edge
from lem.quantities import NS_PER_S

IDLE_W, BUSY_W = 100.0, 700.0


class Machine:
    """A clock that only sleeping and reading advance, and a counter of a load that runs from one time to another."""

    def __init__(self, tick_s=0.1, phase_s=0.0, call_s=0.0, jitter_s=0.0, seed=1):
        self.now_s, self.tick_s, self.phase_s, self.call_s = 100.0, tick_s, phase_s, call_s
        self.jitter_s, self.seed = jitter_s, seed
        self.busy_s = [1e9, 1e9]

    def perf_counter_ns(self):
        return round(self.now_s * NS_PER_S)

    def sleep(self, seconds):
        self.now_s += seconds

    def energy_j(self, at_s):
        begun, ended = (min(at_s, each) for each in self.busy_s)
        return IDLE_W * at_s + (BUSY_W - IDLE_W) * (ended - begun)

    def tick_at_s(self, number):
        off_s = random.Random(f"{self.seed} {number}").uniform(-1, 1) * self.jitter_s
        return self.phase_s + number * self.tick_s + off_s

    def read_mj(self):
        self.now_s += self.call_s / 2
        at_s = self.now_s
        if self.tick_s:
            number = int((at_s - self.phase_s) / self.tick_s) + 1
            at_s = max(tick_s for n in range(number - 2, number + 2) if (tick_s := self.tick_at_s(n)) <= at_s)
        self.now_s += self.call_s / 2
        return int(1e3 * self.energy_j(at_s))


@pytest.fixture
def machine(monkeypatch):
    def made(**options):
        it = Machine(**options)
        monkeypatch.setattr(ticks, "time", SimpleNamespace(perf_counter_ns=it.perf_counter_ns, sleep=it.sleep))
        return it, Counter(it.read_mj, OSError)

    return made


def edges_of(counter, begun_s, ended_s):
    begun_ns, ended_ns = round(begun_s * NS_PER_S), round(ended_s * NS_PER_S)
    begun = counter.at(begun_ns)
    return begun, counter.at(ended_ns, begun, begun_ns)


def window(it, counter, seconds=5.0, before_s=0.0, goes_on=False):
    """Measure a window of a load that starts with it, and stops with it or continues; return the error in joules."""
    counter.watch()
    it.sleep(before_s)
    begun_s = it.now_s
    it.busy_s = [begun_s, begun_s + (1e9 if goes_on else seconds)]
    counter.follow()
    it.sleep(max(0.0, begun_s + seconds - it.now_s))
    ended_s = it.now_s
    counter.watch_end()
    edges = edges_of(counter, begun_s, ended_s)
    measured_j = (edges[1].energy_mj - edges[0].energy_mj) * 1e-3
    return measured_j - (it.energy_j(ended_s) - it.energy_j(begun_s))


@pytest.mark.parametrize(("tick_s", "call_s"), [(0.1, 0.0), (0.1, 0.003), (0.1, 0.015), (0.01, 0.0), (0.1, 0.024)])
def test_the_tick_is_learnt_whatever_a_call_takes(machine, tick_s, call_s):
    _, counter = machine(tick_s=tick_s, call_s=call_s, phase_s=0.037)
    counter.learn()
    assert counter.tick_s == pytest.approx(tick_s, rel=0.05)


@pytest.mark.parametrize(("tick_s", "call_s"), [(0.0, 0.0), (0.0, 0.003), (0.01, 0.015)])
def test_a_counter_that_changes_at_every_reading_has_no_known_tick(machine, tick_s, call_s):
    it, counter = machine(tick_s=tick_s, call_s=call_s)
    counter.learn()
    assert counter.tick_s is None
    # The reading is off by half a call at both edges, at different powers.
    assert abs(window(it, counter)) < (BUSY_W - IDLE_W) * (call_s + tick_s) + 1


@pytest.mark.parametrize("call_s", [0.0, 0.001, 0.003, 0.015])
@pytest.mark.parametrize("jitter_s", [0.0, 0.001])
def test_a_windows_joules_are_not_biased_wherever_its_edges_fall(machine, call_s, jitter_s):
    # A plain difference would be off by up to a tick of power, 70 J; even interpolation across the step, by 10 J.
    errors_j = []
    for k in range(25):
        it, counter = machine(call_s=call_s, jitter_s=jitter_s, phase_s=k * 0.004, seed=k)
        counter.learn()
        errors_j.append(window(it, counter, before_s=random.Random(k).uniform(0, 0.12), goes_on=k % 2 == 0))
    assert abs(statistics.fmean(errors_j)) < BUSY_W * 0.002
    assert max(map(abs, errors_j)) < BUSY_W * (0.003 + call_s / 2 + 5 * jitter_s)


@pytest.mark.parametrize("call_s", [0.0, 0.003, 0.015])
def test_at_a_steady_power_every_window_is_exact_to_a_part_of_a_call(machine, call_s):
    for k in range(10):
        it, counter = machine(call_s=call_s, phase_s=k * 0.01)
        it.busy_s = [0.0, 1e9]
        counter.learn()
        counter.watch()
        begun_s = it.now_s
        counter.follow()
        it.sleep(1.0)
        ended_s = it.now_s
        counter.watch_end()
        edges = edges_of(counter, begun_s, ended_s)
        truth_j = BUSY_W * (ended_s - begun_s)
        assert (edges[1].energy_mj - edges[0].energy_mj) * 1e-3 == pytest.approx(truth_j, abs=BUSY_W * (0.002 + call_s))


@pytest.mark.parametrize("step_ms", range(-100, 101, 20))
def test_a_step_of_the_load_beside_an_edge_costs_at_most_half_a_tick_of_it(machine, step_ms):
    # The counter does not tell where in a tick a step occurred.
    for k in range(10):
        it, counter = machine(phase_s=k * 0.01)
        counter.learn()
        counter.watch()
        begun_s = it.now_s
        it.busy_s = [begun_s, begun_s + 2.0 + step_ms * 1e-3]
        counter.follow()
        it.sleep(begun_s + 2.0 - it.now_s)
        counter.watch_end()
        edges = edges_of(counter, begun_s, begun_s + 2.0)
        error_j = (edges[1].energy_mj - edges[0].energy_mj) * 1e-3 - it.energy_j(begun_s + 2.0) + it.energy_j(begun_s)
        assert abs(error_j) < (BUSY_W - IDLE_W) * 0.05 + 1


def test_a_barrier_of_seconds_between_settling_and_the_beginning_makes_no_difference(machine):
    it, counter = machine(call_s=0.003, phase_s=0.05)
    counter.learn()
    assert abs(window(it, counter, before_s=3.0)) < (BUSY_W - IDLE_W) * 0.1 / 4 + BUSY_W * 0.005


def test_a_step_that_spans_several_ticks_is_not_taken_for_a_rate(machine):
    values = iter([0, 1_000_000])
    it, counter = machine()
    counter.tick_s, counter._read_mj = 0.05, lambda: next(values)
    counter.poll()
    it.sleep(0.2)
    counter.poll()
    assert counter.at(it.perf_counter_ns() + 50_000_000) == Edge(1_000_000)


def test_a_reading_that_fails_is_a_reason(machine):
    it, counter = machine()

    def lost():
        raise OSError("GPU is lost")

    counter.poll()
    counter._read_mj = lost
    counter.watch()
    assert counter.at(it.perf_counter_ns()) == Edge(None, "GPU is lost")
    assert counter.last_since(Edge(0.0)) == Edge(None, "GPU is lost")


def test_a_counter_that_starts_afresh_is_lower_and_not_kept_up(machine):
    it, counter = machine()
    counter.learn()
    counter.watch()
    before = counter.at(it.perf_counter_ns())
    it.sleep(0.1)
    counter._read_mj = lambda: 5
    counter.watch()
    assert counter.at(it.perf_counter_ns()).energy_mj < before.energy_mj
