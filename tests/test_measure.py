"""The window: what is inside, what is outside, and what is kept when it breaks off."""

from __future__ import annotations

import itertools
import time

import pytest

from lem.backends import make_backend
from lem.energy.base import Meter
from lem.errors import RunError
from lem.measure import Measurement, measure
from lem.progress import silent
from lem.record import EnergyReading, WarmupInfo
from lem.spec import Batching, Experiment, SimulatedBackend, Warmup

TEXTS = [f"prompt number {i} " + "word " * (i % 7) for i in range(12)]


class ConstantPower(Meter):
    """A meter of exactly 50 W, which also refuses overlapping windows."""

    def __init__(self):
        self.begun_s = None
        self.windows = 0

    def begin(self):
        assert self.begun_s is None, "windows overlap"
        self.begun_s = time.perf_counter()

    def end(self):
        energy_j = 50 * (time.perf_counter() - self.begun_s)
        self.begun_s = None
        self.windows += 1
        return (EnergyReading("gpu", "replay", "device", "test", energy_j, "50 W"),)


class SlowLoad:
    """Makes a backend's loading and encoding take time, to see where that time goes."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def load(self):
        time.sleep(0.3)

    def encode(self, texts):
        time.sleep(0.3)
        return self._backend.encode(texts)


def run(into=None, *, slow=False, warmup=3, idle_s=0.0, **options):
    experiment = Experiment(
        model="any",
        max_output_tokens=20,
        batching=Batching(batch_size=4),
        backend=SimulatedBackend(decode_s_per_token=1e-3, **options),
    )
    backend = make_backend(experiment)
    into = into or Measurement()
    measure(
        TEXTS,
        backend=SlowLoad(backend) if slow else backend,
        meter=ConstantPower(),
        warmup=warmup if isinstance(warmup, Warmup) else Warmup(prompts=warmup),
        idle_s=idle_s,
        batch_size=4,
        report=silent,
        into=into,
    )
    return into


def test_phases_are_load_warmup_measured_each_with_its_energy():
    phases = run().phases
    assert [phase.name for phase in phases] == ["load", "warmup", "measured"]
    for phase in phases:
        assert phase.energy[0].energy_j == pytest.approx(50 * phase.duration_s, rel=0.02, abs=0.01)


def test_loading_and_encoding_are_outside_of_the_measured_window():
    measured = run(slow=True).phases[-1]
    assert measured.duration_s < 0.25


def test_without_warmup_there_is_no_such_phase():
    assert [phase.name for phase in run(warmup=0).phases] == ["load", "measured"]


def test_more_warmup_than_prompts_repeats_them_and_counts_none():
    measurement = run(warmup=30)
    assert len(measurement.requests) == len(TEXTS)


def test_each_prompt_is_counted_once_and_lies_inside_the_window():
    measurement = run()
    assert sorted(r.generation.index for r in measurement.requests) == list(range(len(TEXTS)))
    window_s = measurement.phases[-1].duration_s
    for request in measurement.requests:
        assert 0 <= request.start_s <= request.end_s <= window_s


def test_batches_follow_one_another_and_fill_the_window():
    measurement = run()
    spans = sorted({(r.start_s, r.end_s) for r in measurement.requests})
    assert len(spans) == 3
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    busy_s = sum(end - start for start, end in spans)
    assert busy_s == pytest.approx(measurement.phases[-1].duration_s, rel=0.05)


def test_a_failure_keeps_what_was_measured_until_then():
    measurement = Measurement()
    with pytest.raises(RunError):
        run(measurement, fail_at_request=9, warmup=0)
    assert measurement.current == "measured"
    assert len(measurement.requests) == 8
    assert measurement.phases[-1].name == "measured"
    assert measurement.phases[-1].energy[0].energy_j > 0


def test_idle_is_measured_before_loading_and_with_the_model_resident():
    phases = run(idle_s=0.1, warmup=0).phases
    assert [phase.name for phase in phases] == ["idle_before", "load", "idle_loaded", "measured"]
    for phase in phases[0], phases[2]:
        assert phase.duration_s == pytest.approx(0.1, rel=0.2)


def test_a_warmup_of_fixed_length_says_so():
    assert run(warmup=3).warmup == WarmupInfo(3, "fixed", None)


def test_a_warmup_ends_when_latencies_are_steady():
    ended = run(warmup=Warmup(until_cv=0.2, cv_batches=3)).warmup
    assert ended.ended == "converged"
    assert ended.prompts == 12
    assert ended.cv < 0.2


@pytest.mark.parametrize(("limit", "name"), [({"max_prompts": 20}, "max_prompts"), ({"max_s": 0.2}, "max_s")])
def test_a_warmup_that_never_steadies_ends_at_its_limit(limit, name):
    ended = run(warmup=Warmup(until_cv=1e-9, cv_batches=3, **limit)).warmup
    assert ended.ended == name
    assert ended.cv > 0


def test_the_processor_time_of_the_window_is_known():
    load = run().cpu_load
    assert 0 <= load.process_cores <= load.machine_cores + 0.5
