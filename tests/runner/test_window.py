"""The window: what is inside, what is outside, and what is kept when it is interrupted."""

from __future__ import annotations

import itertools
import time

import pytest

from lem.backends import make_backend
from lem.energy.base import ImmediateMeter
from lem.errors import RunError
from lem.record import EnergyReading, Phase, WarmupInfo
from lem.results.journal import Checkpoint
from lem.runner.progress import silent
from lem.runner.ranks import Ranks
from lem.runner.window import Bench, Measurement
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Batching, Experiment, Warmup

TEXTS = [f"prompt number {i} " + "word " * (i % 7) for i in range(12)]
# As in an experiment in which another process has the even ones.
INDICES = range(1, 2 * len(TEXTS), 2)


class ConstantPower(ImmediateMeter):
    """A meter of exactly 50 W, which also refuses overlapping windows."""

    def __init__(self):
        self.begun_s = None
        self.windows = 0

    def so_far(self):
        return (EnergyReading("gpu", "replay", "device", "test", 50 * (time.perf_counter() - self.begun_s), "50 W"),)

    def begin(self):
        assert self.begun_s is None, "windows overlap"
        self.begun_s = time.perf_counter()

    def _taken(self):
        energy_j = 50 * (time.perf_counter() - self.begun_s)
        self.begun_s = None
        self.windows += 1
        return (EnergyReading("gpu", "replay", "device", "test", energy_j, "50 W"),)


class BlindMeter(ConstantPower):
    """One that knows no energy before the window closes."""

    def so_far(self):
        return None


class Recording:
    """Keeps what it receives of the window."""

    def __init__(self):
        self.opened = 0
        self.batches = []
        self.checkpoints = []

    def window_opens(self):
        self.opened += 1

    def batch_finished(self, batch, checkpoint):
        self.batches.append(batch)
        self.checkpoints.append(checkpoint)


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


def run(into=None, *, slow=False, warmup=3, idle_s=0.0, meter=None, recording=None, cycles=1, first_batch=0, **options):
    experiment = Experiment(
        model="any",
        max_output_tokens=20,
        batching=Batching(batch_size=4),
        backend=SimulatedBackend(decode_s_per_token=1e-3, **options),
    )
    backend = make_backend(experiment)
    into = into or Measurement()
    bench = Bench(SlowLoad(backend) if slow else backend, meter or ConstantPower(), Ranks(), silent)
    prompts = bench.prepare(TEXTS, INDICES, idle_s, into)
    for _ in range(cycles):
        bench.warm_up(prompts, warmup if isinstance(warmup, Warmup) else Warmup(prompts=warmup), 4, into)
        bench.run_window(prompts, recording or Recording(), into, first_batch=first_batch)
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
    assert sorted(r.generation.index for r in measurement.requests) == list(INDICES)
    assert all(r.generation.index == r.prompt.index for r in measurement.requests)
    window_s = measurement.phases[-1].duration_s
    for request in measurement.requests:
        assert 0 <= request.start_s <= request.end_s <= window_s


def test_batches_follow_one_another_and_fill_the_window():
    measurement = run()
    spans = sorted({(r.start_s, r.end_s) for r in measurement.requests})
    assert len(spans) == 3
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(spans))
    busy_s = sum(end - start for start, end in spans)
    # What lies between them is little; how little depends on what else the machine does.
    assert 0.5 * measurement.phases[-1].duration_s < busy_s <= measurement.phases[-1].duration_s


def test_a_failure_keeps_what_was_measured_until_then_and_ends_the_window_with_the_last_batch():
    measurement, recording = Measurement(), Recording()
    with pytest.raises(RunError):
        run(measurement, fail_at_request=INDICES[9], warmup=0, recording=recording)
    assert measurement.current == "measured"
    assert len(measurement.requests) == 8
    window = measurement.phases[-1]
    assert window.name == "measured"
    assert window.duration_s == recording.checkpoints[-1].duration_s
    # The meter is asked now and then only: what it knows is of a checkpoint, not of the end.
    known = [c for c in recording.checkpoints if c.energy is not None][-1]
    assert window.energy[0].energy_j == pytest.approx(50 * known.energy_at_s, abs=0.05)
    assert measurement.energy_behind_s == window.duration_s - known.energy_at_s


def test_what_is_lost_of_a_broken_window_is_the_time_since_its_last_batch():
    measurement, since_s = Measurement(), 0.1

    class Stuck(Recording):
        def batch_finished(self, batch, checkpoint):
            super().batch_finished(batch, checkpoint)
            if len(self.batches) == 2:
                time.sleep(since_s)
                raise RunError("no more")

    began_s = time.perf_counter()
    with pytest.raises(RunError):
        run(measurement, warmup=0, recording=Stuck())
    whole_s = time.perf_counter() - began_s
    assert since_s <= measurement.lost_s <= whole_s - measurement.phases[-1].duration_s


def test_what_is_lost_grows_as_the_end_is_put_earlier():
    phases, earlier = [Phase("load", 9.0), Phase("measured", 3.0)], Phase("measured", 1.0)
    energy = (EnergyReading("gpu", "replay", "device", "test", 40.0, "50 W"),)
    cut = Measurement(phases=phases, lost_s=0.5, energy_behind_s=0.25)
    cut.cut_back(0, earlier, Checkpoint(0.75, energy=energy, energy_at_s=0.75))
    assert (cut.lost_s, cut.energy_behind_s) == (2.5, 0.25)
    assert cut.phases == [Phase("load", 9.0), earlier]
    cut.cut_back(0, earlier, Checkpoint(0.75, energy=(), energy_at_s=0.75))
    assert cut.energy_behind_s is None
    cut.cut_back(0, None, None)  # nothing of it is in the journal
    assert (cut.lost_s, cut.energy_behind_s) == (None, None)


def test_the_energy_of_a_broken_window_is_null_with_a_reason_where_the_meter_cannot_tell():
    measurement = Measurement()
    with pytest.raises(RunError):
        run(measurement, fail_at_request=INDICES[9], warmup=0, meter=BlindMeter())
    (reading,) = measurement.phases[-1].energy
    assert (measurement.lost_s > 0, measurement.energy_behind_s) == (True, None)
    assert reading.energy_j is None
    assert "interrupted" in reading.reason


def test_a_window_without_a_finished_batch_is_none():
    measurement = Measurement()
    with pytest.raises(RunError):
        run(measurement, fail_at_request=INDICES[0], warmup=0)
    assert [phase.name for phase in measurement.phases] == ["load"]


def test_each_batch_is_recorded_as_soon_as_it_is_finished_with_the_window_up_to_there():
    recording = Recording()
    measurement = run(recording=recording)
    assert recording.opened == 1
    assert [len(batch) for batch in recording.batches] == [4, 4, 4]
    assert [request for batch in recording.batches for request in batch] == measurement.requests
    ends = [batch[0].end_s for batch in recording.batches]
    assert all(end <= c.duration_s for end, c in zip(ends, recording.checkpoints, strict=True))
    assert recording.checkpoints[-1].duration_s <= measurement.phases[-1].duration_s


def test_batches_are_numbered_on_from_an_earlier_attempt():
    assert sorted({r.generation.batch for r in run(first_batch=5).requests}) == [5, 6, 7]


def test_cycles_have_a_window_each_and_the_model_is_loaded_once():
    names = [phase.name for phase in run(cycles=2, idle_s=0.1).phases]
    assert names == ["idle_before", "load", "idle_loaded", "warmup", "measured", "warmup", "measured"]


def test_a_process_without_prompts_opens_its_window_too():
    backend = make_backend(Experiment(model="any", backend=SimulatedBackend()))
    bench, into = Bench(backend, ConstantPower(), Ranks(), silent), Measurement()
    prompts = bench.prepare([], [], 0.0, into)
    bench.warm_up(prompts, Warmup(prompts=2), 4, into)
    bench.run_window(prompts, Recording(), into)
    assert [phase.name for phase in into.phases] == ["load", "measured"]
    assert into.requests == []


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
    assert ended.prompts >= 12  # on a machine with other work it may take more batches
    assert ended.cv < 0.2


def test_a_warmup_ends_with_the_first_batches_that_are_steady_enough():
    # Of three numbers above 0 the coefficient of variation is always below 2.
    ended = run(warmup=Warmup(until_cv=2.0, cv_batches=3)).warmup
    assert (ended.ended, ended.prompts) == ("converged", 12)


@pytest.mark.parametrize(("limit", "name"), [({"max_prompts": 20}, "max_prompts"), ({"max_s": 0.2}, "max_s")])
def test_a_warmup_that_never_steadies_ends_at_its_limit(limit, name):
    ended = run(warmup=Warmup(until_cv=1e-9, cv_batches=3, **limit)).warmup
    assert ended.ended == name
    assert ended.cv > 0


def test_the_processor_time_of_the_window_is_known():
    load = run().cpu_load
    assert 0 <= load.process_cores <= load.machine_cores + 0.5
