"""The window: what is inside it, what is outside, and what is kept when it is interrupted."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import threading
import time

import pytest
from msgspec.structs import replace

from lem.backends import Backend, Encoded, make_backend
from lem.backends.simulated import Simulated
from lem.energy.base import CombinedMeter, ImmediateMeter, NoMeter
from lem.errors import RunError
from lem.record import EnergyReading, Phase, WarmupInfo
from lem.results.journal import Checkpoint
from lem.results.latency import under_load
from lem.runner.progress import silent
from lem.runner.ranks import Ranks
from lem.runner.records import WindowId, request_row
from lem.runner.window import Bench, Measurement, Queue, warmup_batches
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Batching, Experiment, Streaming, Warmup

TEXTS = [f"prompt number {i} " + "word " * (i % 7) for i in range(12)]
# As in an experiment in which another process has the even-numbered prompts.
INDICES = range(1, 2 * len(TEXTS), 2)


class ConstantPower(ImmediateMeter):
    """A meter of exactly 50 W that also refuses overlapping windows."""

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
    """A meter that knows no energy before the window closes."""

    def so_far(self):
        return None


class Recording:
    """Keeps all that it receives from the window."""

    def __init__(self):
        self.opened = 0
        self.batches = []
        self.checkpoints = []
        self.notes = []

    def window_opens(self):
        self.opened += 1

    def batch_finished(self, batch, checkpoint):
        self.batches.append(batch)
        self.checkpoints.append(checkpoint)

    def time_passed(self, checkpoint):
        self.notes.append(checkpoint)


class SlowLoad:
    """Makes a backend's loading and encoding take time, to see in which phase that time is counted."""

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
        backend=SimulatedBackend(**{"decode_s_per_token": 1e-3, **options}),
    )
    backend = make_backend(experiment)
    into = into or Measurement()
    bench = Bench(SlowLoad(backend) if slow else backend, meter or ConstantPower(), Ranks(), silent)
    prompts = bench.prepare(TEXTS, INDICES, idle_s, into)
    for _ in range(cycles):
        bench.warm_up(
            prompts, warmup if isinstance(warmup, Warmup) else Warmup(prompts=warmup), Batching(batch_size=4), into
        )
        bench.run_window(prompts, recording or Recording(), into, first_batch=first_batch)
    return into


def test_energy_is_read_again_and_again_while_requests_finish():
    into = run(decode_s_per_token=10e-3)
    assert len(into.readings) >= 3
    for each in into.readings:
        assert each.energy[0].energy_j == pytest.approx(50 * each.energy_at_s, rel=0.05, abs=0.05)
    assert [each.energy_at_s for each in into.readings] == sorted(each.energy_at_s for each in into.readings)
    assert into.readings[-1].energy_at_s <= into.phases[-1].duration_s
    assert run(meter=BlindMeter()).readings == []


def test_phases_are_load_warmup_measured_each_with_its_energy():
    phases = run().phases
    assert [phase.name for phase in phases] == ["load", "warmup", "measured"]
    for phase in phases:
        assert phase.energy[0].energy_j == pytest.approx(50 * phase.duration_s, rel=0.02, abs=0.01)
        assert phase.energy[0].covered_s == phase.duration_s


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
    # Little time lies between them; how little depends on the machine's other work.
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
    # The meter is asked only now and then, so its energy is that of a checkpoint, not of the end.
    known = [c for c in recording.checkpoints if c.energy is not None][-1]
    assert window.energy[0].energy_j == pytest.approx(50 * known.energy_at_s, abs=0.05)
    assert measurement.energy_behind_s == window.duration_s - known.energy_at_s
    assert window.energy[0].covered_s == known.energy_at_s


class Lagging(ConstantPower):
    """A meter whose own readings say how far its last sample reaches."""

    def so_far(self):
        (reading,) = super().so_far()
        return (replace(reading, covered_s=0.001),)


def test_a_meter_that_says_what_its_reading_covers_is_believed():
    measurement = Measurement()
    with pytest.raises(RunError):
        run(measurement, fail_at_request=INDICES[9], warmup=0, meter=Lagging())
    assert measurement.phases[-1].energy[0].covered_s == 0.001


class Refusing:
    """Makes some of a backend's requests fail, by prompt, and sets how many failures it tolerates."""

    def __init__(self, backend, refused, most):
        self._backend, self._refused, self._most = backend, refused, most

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def tolerated_failures(self, requests):
        return min(self._most, requests)

    def generate(self, prompts):
        for batch in self._backend.generate(prompts):
            yield [
                dataclasses.replace(g, token_ids=(), error="busy.") if g.index in self._refused else g for g in batch
            ]


def refused(numbers, most, warmup=0):
    backend = Refusing(make_backend(Experiment(model="any", backend=SimulatedBackend())), set(numbers), most)
    into, recording = Measurement(), Recording()
    bench = Bench(backend, ConstantPower(), Ranks(), silent)
    prompts = bench.prepare(TEXTS, range(len(TEXTS)), 0.0, into)
    try:
        bench.warm_up(prompts, Warmup(prompts=warmup), Batching(batch_size=4), into)
        bench.run_window(prompts, recording, into)
    except RunError as error:
        return into, recording, str(error)
    return into, recording, None


def test_as_many_requests_may_fail_as_the_backend_tolerates():
    into, _, error = refused([2, 7], most=2)
    assert error is None
    assert [r.generation.error for r in into.requests if r.generation.index in (2, 7)] == ["busy.", "busy."]
    assert len(into.requests) == len(TEXTS)


@pytest.mark.parametrize(
    ("numbers", "most", "words"),
    [
        ([7], 0, "The engine did not finish prompt 7: busy."),
        ([2, 7], 1, "2 of 12 requests failed, more than allowed; the last was prompt 7: busy."),
    ],
)
def test_one_more_ends_the_run_and_is_not_kept_so_that_it_runs_again(numbers, most, words):
    into, recording, error = refused(numbers, most)
    assert error == words
    kept = [r.generation.index for r in into.requests]
    assert 7 not in kept
    assert len([number for number in numbers if number in kept]) == most
    assert sum(len(batch) for batch in recording.batches) == len(kept)
    assert into.phases[-1].name == "measured"


@pytest.mark.parametrize(
    ("numbers", "most", "fails"), [([], 0, False), ([1], 0, True), ([1], 1, False), ([0, 1, 2, 3], 4, True)]
)
def test_a_warmup_in_which_all_fail_warms_nothing_up(numbers, most, fails):
    _, _, error = refused(numbers, most, warmup=4)
    assert (error is not None) == fails
    if fails:
        assert "of the warm-up: busy." in error


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


# ------------------------------------------------------------------ notes within a batch
def noted_in_one_batch(*, rank=0, replicas=2, recording=None):
    """Run one batch of 0.5 s; return what was recorded."""
    experiment = Experiment(
        model="any",
        max_output_tokens=50,
        min_output_tokens=50,
        backend=SimulatedBackend(decode_s_per_token=10e-3, prefill_s_per_token=0),
    )
    recording = recording or Recording()
    bench = Bench(make_backend(experiment), ConstantPower(), Ranks(rank, rank, 2), silent, replicas)
    into = Measurement()
    prompts = bench.prepare(TEXTS[:1], INDICES[:1], 0.0, into)
    bench.run_window(prompts, recording, into)
    return recording


def test_the_meters_owner_notes_within_a_batch_how_far_the_window_has_come():
    recording = noted_in_one_batch()
    assert len(recording.notes) >= 3
    for note in recording.notes:
        assert note.energy[0].energy_j == pytest.approx(50 * note.energy_at_s, rel=0.05, abs=0.1)
        assert (note.under_way.requests, note.under_way.output_tokens) == (1, None)
        assert note.under_way.longest_s == pytest.approx(note.duration_s)
    assert sorted(note.duration_s for note in recording.notes) == [note.duration_s for note in recording.notes]
    known = len(recording.notes)
    time.sleep(0.25)
    assert len(recording.notes) == known, "the window is over"


@pytest.mark.parametrize(("rank", "replicas"), [(1, 2), (0, 1)], ids=["no_owner", "alone"])
def test_nobody_else_takes_notes(rank, replicas):
    assert noted_in_one_batch(rank=rank, replicas=replicas).notes == []


def test_a_note_that_cannot_be_written_leaves_the_error_to_the_next_batch():
    class Full(Recording):
        def time_passed(self, checkpoint):
            super().time_passed(checkpoint)
            raise OSError(28, "no space left")

    recording = noted_in_one_batch(recording=Full())
    assert (len(recording.notes), len(recording.batches)) == (1, 1)


# ------------------------------------------------------------------ what is in flight at a cut
def cut_while_continuous(ranks=None, replicas=1):
    """Run three requests at a time, and interrupt 30 ms after the fifth finishes; return the measurements."""
    experiment = Experiment(
        model="any",
        max_output_tokens=20,
        batching=Batching(strategy="continuous", batch_size=3),
        backend=SimulatedBackend(decode_s_per_token=5e-3, prefill_s_per_token=0),
    )

    class Stuck(Recording):
        def batch_finished(self, batch, checkpoint):
            super().batch_finished(batch, checkpoint)
            if sum(map(len, self.batches)) >= 5:
                time.sleep(0.03)
                raise RunError("no more")

    into, recording, backend = Measurement(), Stuck(), make_backend(experiment)
    bench = Bench(backend, ConstantPower(), ranks or Ranks(), silent, replicas)
    prompts = bench.prepare(TEXTS, INDICES, 0.0, into)
    with pytest.raises(RunError):
        bench.run_window(prompts, recording, into)
    return into, recording


def test_the_work_on_requests_under_way_is_known_where_a_window_is_cut():
    into, recording = cut_while_continuous()
    window, (*_, last) = into.phases[-1], recording.checkpoints
    assert into.under_way == last.under_way
    assert 1 <= into.under_way.requests < 3, "a place is free where one was just finished"
    assert 0 < into.under_way.longest_s <= into.under_way.request_s <= 2 * into.under_way.longest_s
    assert into.under_way.longest_s < window.duration_s == last.duration_s
    # Each step decodes one token of each request.
    assert into.under_way.output_tokens == pytest.approx(into.under_way.request_s / 5e-3, rel=0.3, abs=1)


def test_the_energys_owner_ends_a_cut_window_where_others_may_have_ended_theirs():
    into, recording = cut_while_continuous(Ranks(0, 0, 2), replicas=2)
    last, window = recording.checkpoints[-1], into.phases[-1]
    later_s = window.duration_s - last.duration_s
    assert later_s >= 0.03
    assert window.energy[0].energy_j == pytest.approx(50 * window.duration_s, rel=0.02)
    assert (into.lost_s, into.energy_behind_s) == (0.0, 0.0)
    assert into.under_way.longest_s == pytest.approx(last.under_way.longest_s + later_s)
    # Another process ends the window with its own last batch.
    other, recording = cut_while_continuous(Ranks(1, 1, 2), replicas=2)
    assert other.phases[-1].duration_s == recording.checkpoints[-1].duration_s


def test_the_owner_has_a_window_even_if_only_others_have_finished_something():
    experiment = Experiment(model="any", backend=SimulatedBackend(fail_at_request=INDICES[0]))
    into = Measurement()
    bench = Bench(make_backend(experiment), ConstantPower(), Ranks(0, 0, 2), silent, 2)
    prompts = bench.prepare(TEXTS, INDICES, 0.0, into)
    with pytest.raises(RunError):
        bench.run_window(prompts, Recording(), into)
    assert into.phases[-1].name == "measured"
    assert into.under_way.requests == 1
    assert into.under_way.longest_s == into.phases[-1].duration_s


def test_without_arrivals_latency_and_ttft_count_from_when_the_engine_takes_a_request():
    experiment = Experiment(
        model="any",
        max_output_tokens=20,
        min_output_tokens=5,
        batching=Batching(strategy="continuous", batch_size=3),
        streaming=Streaming(enabled=True),
        backend=SimulatedBackend(decode_s_per_token=2e-3, prefill_s_per_token=0),
    )
    into, backend = Measurement(), make_backend(experiment)
    bench = Bench(backend, NoMeter(), Ranks(), silent)
    bench.run_window(bench.prepare(TEXTS, INDICES, 0.0, into), Recording(), into)
    rows = [request_row(WindowId("e", 0, 1, 1), each) for each in into.requests]
    assert max(row.start_s for row in rows) > 0.02, "not all are taken at once"
    for row in rows:
        assert row.arrived_s is row.queue_s is None
        assert row.latency_s == pytest.approx(row.end_s - row.start_s)
        assert row.ttft_s == pytest.approx(2e-3, abs=0.02)
    assert under_load(rows, 1.0, experiment.traffic) == {}


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


def test_a_warmup_ends_when_its_time_is_up():
    backend = make_backend(Experiment(model="any", backend=SimulatedBackend(decode_s_per_token=0.01)))
    bench, into = Bench(backend, ConstantPower(), Ranks(), silent), Measurement()
    prompts = bench.prepare(TEXTS, range(len(TEXTS)), 0.0, into)
    bench.warm_up(prompts, Warmup(prompts=10_000, max_s=0.2), Batching(batch_size=2), into)
    assert into.warmup.ended == "max_s"
    assert 2 <= into.warmup.prompts < 10_000


def test_a_process_without_prompts_opens_its_window_too():
    backend = make_backend(Experiment(model="any", backend=SimulatedBackend()))
    bench, into = Bench(backend, ConstantPower(), Ranks(), silent), Measurement()
    prompts = bench.prepare([], [], 0.0, into)
    bench.warm_up(prompts, Warmup(prompts=2), Batching(batch_size=4), into)
    bench.run_window(prompts, Recording(), into)
    assert [phase.name for phase in into.phases] == ["load", "measured"]
    assert into.requests == []


def test_idle_is_measured_before_loading_and_with_the_model_resident():
    phases = run(idle_s=0.1, warmup=0).phases
    assert [phase.name for phase in phases] == ["idle_before", "load", "idle_loaded", "measured"]
    for phase in phases[0], phases[2]:
        assert phase.duration_s == pytest.approx(0.1, rel=0.2)


def test_a_warmup_of_fixed_length_says_so():
    assert run(warmup=3).warmup == WarmupInfo(4, "fixed", None)


# ------------------------------------------------------------------ the warm-up's batches are the measured ones
class Batches:
    """Makes a backend note the sizes of its batches, and the prompts in them."""

    def __init__(self, backend):
        self._backend, self.ran = backend, []

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def generate(self, prompts):
        for batch in self._backend.generate(prompts):
            self.ran.append([generation.index for generation in batch])
            yield batch


@pytest.mark.parametrize("least", [1, 2, 4, 5, 12, 13, 40])
@pytest.mark.parametrize(
    "batching",
    [
        Batching(batch_size=4),
        Batching(strategy="sorted_static", batch_size=5),
        Batching(strategy="sorted_dynamic", batch_size=5, max_tokens_per_batch=30),
        Batching(batch_size=16),
    ],
    ids=["static", "sorted", "budgeted", "one_batch"],
)
def test_a_warmup_runs_whole_batches_as_they_are_measured_from_the_first_on(batching, least):
    experiment = Experiment(
        model="any", max_output_tokens=2, batching=batching, backend=SimulatedBackend(decode_s_per_token=1e-5)
    )
    backend, into = Batches(make_backend(experiment)), Measurement()
    bench = Bench(backend, NoMeter(), Ranks(), silent)
    prompts = bench.prepare(TEXTS, INDICES, 0.0, into)
    bench.warm_up(prompts, Warmup(prompts=least), batching, into)
    warmed, backend.ran = backend.ran, []
    bench.run_window(prompts, Recording(), into)
    assert warmed == [batch for _, batch in zip(warmed, itertools.cycle(backend.ran), strict=False)]
    ran = [len(batch) for batch in warmed]
    assert sum(ran) - ran[-1] < least <= sum(ran) == into.warmup.prompts


def test_a_warmup_until_steady_repeats_the_first_measured_batch():
    batching = Batching(strategy="sorted_dynamic", batch_size=5, max_tokens_per_batch=30)
    experiment = Experiment(
        model="any", max_output_tokens=2, batching=batching, backend=SimulatedBackend(decode_s_per_token=1e-4)
    )
    backend, into = Batches(make_backend(experiment)), Measurement()
    bench = Bench(backend, NoMeter(), Ranks(), silent)
    prompts = bench.prepare(TEXTS, INDICES, 0.0, into)
    bench.warm_up(prompts, Warmup(until_cv=0.9, cv_batches=2, max_prompts=20), batching, into)
    warmed, backend.ran = backend.ran, []
    bench.run_window(prompts, Recording(), into)
    assert {tuple(batch) for batch in warmed} == {tuple(backend.ran[0])}


def test_continuous_batching_is_warmed_up_with_all_places_taken():
    prompts = [Encoded(i, (1,) * (i + 1)) for i in range(11)]
    sizes = [len(batch) for batch in warmup_batches(prompts, Batching(strategy="continuous", batch_size=4))]
    assert sizes == [4, 4, 3]


# ------------------------------------------------------------------ several processes
class Ticking(ConstantPower):
    """A meter whose counter advances every 100 ms, and which waits for that when it settles."""

    TICK_S = 0.1

    def __init__(self):
        super().__init__()
        self.is_settled, self.settled = False, 0

    def settle(self):
        time.sleep(self.TICK_S - time.perf_counter() % self.TICK_S)
        self.is_settled = True
        self.settled += 1

    def begin(self):
        if not self.is_settled:
            self.settle()
        self.is_settled = False
        super().begin()


class Together(Ranks):
    """Processes (here threads) that wait for each other."""

    barriers = threading.Barrier(2)

    def barrier(self, meanwhile=lambda: None):
        self.barriers.wait(20)


@pytest.mark.parametrize("combined", [False, True])
def test_all_processes_open_their_windows_together_after_the_meter_has_settled_once(combined):
    experiment = Experiment(model="any", max_output_tokens=20, backend=SimulatedBackend(decode_s_per_token=5e-3))
    meter, measurements = Ticking(), [Measurement(), Measurement()]

    def measure(rank):
        own = CombinedMeter(meter, NoMeter()) if combined else meter
        bench = Bench(make_backend(experiment), NoMeter() if rank else own, Together(rank, rank, 2), silent)
        time.sleep(0.03 * rank)
        prompts = bench.prepare(TEXTS[:2], range(2), 0.0, measurements[rank])
        meter.settled = 0
        bench.run_window(prompts, Recording(), measurements[rank])

    threads = [threading.Thread(target=measure, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    owner, other = measurements
    assert meter.settled == 1
    assert abs(owner.window_opened_ns - other.window_opened_ns) < 0.05e9
    assert owner.phases[-1].duration_s == pytest.approx(other.phases[-1].duration_s, abs=0.05)


def test_a_warmup_ends_when_latencies_are_steady():
    ended = run(warmup=Warmup(until_cv=0.2, cv_batches=3)).warmup
    assert ended.ended == "converged"
    assert ended.prompts >= 12  # on a machine with other work it may need more batches
    assert ended.cv < 0.2


def test_a_warmup_ends_with_the_first_batches_that_are_steady_enough():
    # The coefficient of variation of three positive numbers is always below 2.
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


class SlowRecording(Recording):
    """Takes a while to keep each batch."""

    def batch_finished(self, batch, checkpoint):
        time.sleep(0.1)
        super().batch_finished(batch, checkpoint)


def test_the_time_for_recording_is_part_of_the_window_and_the_time_for_encoding_is_not(monkeypatch):
    monkeypatch.setattr(Simulated, "call_while_busy", Backend.call_while_busy)
    recording = SlowRecording()
    measured = run(recording=recording, slow=True)
    assert 0.1 * len(recording.batches) <= measured.own_time.recording_s < measured.phases[-1].duration_s
    assert measured.own_time.encode_s >= 0.3
    assert measured.own_time.import_s is None  # the engine is started elsewhere


# ------------------------------------------------------------------ recording while the device is busy
class TimedRecording(SlowRecording):
    def __init__(self, into):
        super().__init__()
        self.into, self.at_s = into, []

    def batch_finished(self, batch, checkpoint):
        self.at_s.append(self.into.since_opening_s(time.perf_counter_ns()))
        super().batch_finished(batch, checkpoint)


def test_a_batch_is_recorded_while_the_next_one_runs():
    into = Measurement()
    recording = TimedRecording(into)
    run(into, recording=recording, decode_s_per_token=10e-3)
    *before_last, last = [(batch[0].start_s, batch[0].end_s) for batch in recording.batches]
    for (_, end_s), (next_start_s, next_end_s), at_s in zip(
        before_last, [*before_last[1:], last], recording.at_s, strict=False
    ):
        assert end_s <= next_start_s <= at_s < next_end_s
    assert recording.at_s[-1] >= last[1], "nothing runs after the last batch"
    # Only the last batch's recording keeps the device waiting, and the checkpoints are those of the batches' ends.
    assert 0.1 <= into.own_time.recording_s < 0.15
    assert into.phases[-1].duration_s == pytest.approx(last[1] + 0.1, abs=0.05)
    for checkpoint, (_, end_s) in zip(recording.checkpoints, [*before_last, last], strict=True):
        assert end_s <= checkpoint.duration_s < end_s + 0.02


class FullDisk(Recording):
    """Keeps one batch and fails at the second."""

    def batch_finished(self, batch, checkpoint):
        if self.batches:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().batch_finished(batch, checkpoint)


def test_a_full_disk_is_no_error_of_the_engine_and_is_not_met_twice():
    recording = FullDisk()
    with pytest.raises(OSError, match="No space left"):
        run(recording=recording)
    assert len(recording.batches) == 1


def test_an_engine_that_fails_keeps_the_batch_that_was_not_yet_recorded():
    recording = Recording()
    with pytest.raises(RunError):
        run(recording=recording, fail_at_request=INDICES[-1])
    assert [r.generation.index for batch in recording.batches for r in batch] == list(INDICES[:8])


def test_a_backend_that_never_calls_loses_no_batch(monkeypatch):
    monkeypatch.setattr(Simulated, "call_while_busy", lambda *_: True)
    recording = Recording()
    run(recording=recording)
    assert [len(batch) for batch in recording.batches] == [4, 4, 4]


def test_with_arrivals_over_time_each_batch_is_recorded_at_once(monkeypatch):
    """The device may be idle until the next request arrives."""
    called = []
    monkeypatch.setattr(Simulated, "call_while_busy", lambda _, work: called.append(work) or False)
    backend = make_backend(Experiment(model="any", backend=SimulatedBackend(), batching=Batching(batch_size=4)))
    bench, into = Bench(backend, NoMeter(), Ranks(), silent), Measurement()
    prompts = bench.prepare(TEXTS, INDICES, 0.0, into)
    bench.run_window(prompts, Recording(), into, queue=Queue([0.0] * len(TEXTS), 1, 4))
    assert len(into.requests) == len(TEXTS)
    assert called == [None]
