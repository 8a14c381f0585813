"""Runs that are cut at random moments and resumed, compared with an uninterrupted run, on a virtual clock.

Everything but the time is real: attempts, journals, records, merging, rows. Sleeping moves a clock instead of waiting,
so that a run of minutes takes milliseconds, a cut comes at an exact time, and the two runs differ only in the cuts.
Processes are threads, each with its own clock, that agree on the time at barriers. A killed process leaves its journal
and no record.
"""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lem.errors import Interrupted
from lem.machine import host
from lem.record import ENERGY_OWNER
from lem.results.aggregate import measured
from lem.results.codec import config_sha256
from lem.results.directory import ExperimentDir
from lem.results.plan import Plan, PromptsInfo, State
from lem.results.rows import Rows, rows_of
from lem.results.store import Store
from lem.runner.attempt import Attempt
from lem.runner.progress import silent
from lem.runner.ranks import Ranks
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Batching, Dataset, Energy, Experiment, Streaming, Traffic, Warmup
from lem.units import NS_PER_S
from lem.workload.prompts import sha256_of
from tests.records import AT

POWER_W = 100.0
STEP_S = 0.01
TEXTS = ["word " * (1 + i % 7) for i in range(40)]
MACHINE = host.environment(host.look())


# ------------------------------------------------------------------ virtual time
@dataclass
class Clock:
    """The clock of one process, which at a given time raises the exception that ends the process."""

    now_ns: int = 0
    cut_ns: int | None = None

    def until(self, moment_ns: int) -> None:
        if self.cut_ns is not None and moment_ns >= self.cut_ns:
            self.now_ns, self.cut_ns = max(self.now_ns, self.cut_ns), None
            raise Interrupted("stopped by a test")
        self.now_ns = max(self.now_ns, moment_ns)


class Clocks(threading.local):
    """The clock of the current thread."""

    clock = Clock()

    def now_ns(self) -> int:
        return self.clock.now_ns

    def sleep(self, seconds: float) -> None:
        self.clock.until(self.clock.now_ns + round(seconds * NS_PER_S))


CLOCKS = Clocks()


@dataclass
class Meeting:
    """A barrier at which processes wait for each other; if one is stopped, all are, at the same time."""

    size: int
    arrived_ns: list[int] = field(default_factory=list)
    agreed_ns: int = 0

    def __post_init__(self):
        self.barrier = threading.Barrier(self.size, action=self._agree)

    def _agree(self):
        self.agreed_ns, self.arrived_ns = max(self.arrived_ns), []


@dataclass(frozen=True)
class VirtualRanks(Ranks):
    """A group of processes on virtual clocks."""

    meeting: Meeting | None = None

    def barrier(self, meanwhile=lambda: None):
        clock = CLOCKS.clock
        if self.meeting is None:
            return
        self.meeting.arrived_ns.append(clock.now_ns)
        try:
            self.meeting.barrier.wait(20)
        except threading.BrokenBarrierError:
            agreed_ns = clock.cut_ns  # another process is stopped before it gets here, so this one is, too
        else:
            agreed_ns = self.meeting.agreed_ns
        while clock.now_ns + NS_PER_S < agreed_ns:
            clock.until(clock.now_ns + NS_PER_S)
            meanwhile()
        clock.until(agreed_ns)


@contextmanager
def virtual_time() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "perf_counter_ns", CLOCKS.now_ns)
        patch.setattr(time, "sleep", CLOCKS.sleep)
        patch.setattr("lem.runner.attempt.ignore_signals", lambda: None)
        patch.setattr("lem.runner.attempt._report_error", lambda _: None)
        patch.setattr("lem.runner.attempt.named_by_launcher", lambda: RANKS.ranks)
        patch.setattr("lem.runner.attempt.join", lambda *_, **__: RANKS.ranks)
        patch.setattr("lem.machine.host.environment", lambda *_: MACHINE)
        yield


class OwnRanks(threading.local):
    ranks: Ranks = Ranks()


RANKS = OwnRanks()


# ------------------------------------------------------------------ runs
@dataclass(frozen=True)
class CutAt:
    """A cut after this share of the time that the attempt would take; `killed` ranks leave no record."""

    share: float
    killed: frozenset[int]


def experiment_in(folder: Path, experiment: Experiment, prompts: int, ranks: int) -> ExperimentDir:
    trace = folder / "trace.csv"
    trace.write_text(f"t_s,power_w\n0,{POWER_W}\n1000000,{POWER_W}\n")
    experiment = replace(experiment, energy=Energy(name="replay", trace=str(trace), idle_s=0))
    directory = Store(folder / "results").claim(datetime(2026, 1, 2, 3, 4, 5))
    info = PromptsInfo(prompts, sha256_of(TEXTS[:prompts]), "p", None, "text", prompts, 0)
    plan = Plan(directory.id, AT, experiment, info, config_sha256(experiment), ranks, ranks, 0, ())
    directory.write_plan(plan, TEXTS[:prompts])
    directory.write_state(State("running", 1, AT))
    return directory


def attempt(directory: ExperimentDir, number: int, cut_s: float | None = None) -> tuple[list[str], float]:
    """Run one attempt of all processes; return how each ended, and how long they took."""
    size = directory.plan().processes
    meeting = Meeting(size) if size > 1 else None
    ended, spent_s = ["" for _ in range(size)], [0.0] * size

    def run(rank: int) -> None:
        CLOCKS.clock = Clock(cut_ns=None if cut_s is None else round(cut_s * NS_PER_S))
        RANKS.ranks = VirtualRanks(rank, rank, size, meeting)
        try:
            ended[rank] = Attempt(directory, number).run(silent)
        finally:
            spent_s[rank] = CLOCKS.clock.now_ns / NS_PER_S
            if meeting is not None and ended[rank] != "completed":
                meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    directory.write_state(State("interrupted", number, AT))
    return ended, max(spent_s)


def uninterrupted(folder: Path, experiment: Experiment, prompts: int, ranks: int) -> tuple[Rows, float]:
    directory = experiment_in(folder, experiment, prompts, ranks)
    with virtual_time():
        ended, spent_s = attempt(directory, 1)
    assert set(ended) == {"completed"}
    return rows_of(measured(directory)), spent_s


def resumed(
    folder: Path, experiment: Experiment, prompts: int, ranks: int, cuts: Sequence[CutAt], whole_s: float
) -> Rows:
    """Run the experiment, cut it and resume it; return its rows."""
    directory = experiment_in(folder, experiment, prompts, ranks)
    number = 0
    with virtual_time():
        for cut in cuts:
            number += 1
            ended, _ = attempt(directory, number, cut.share * whole_s)
            for rank in cut.killed:
                for file in directory.path.glob(f"process_{rank}_c*_a{number}.json"):
                    if json.loads(file.read_text())["status"] != "completed":
                        file.unlink()
            if set(ended) == {"completed"}:
                return rows_of(measured(directory))
            if directory.parts():
                check_interrupted(rows_of(measured(directory, strict=False)))
        ended, _ = attempt(directory, number + 1)
    assert set(ended) == {"completed"}
    return rows_of(measured(directory))


# ------------------------------------------------------------------ the properties to check
RATES = (
    "output_tokens_per_s", "requests_per_s", "energy_per_output_token_j", "energy_per_request_j",
    "arrival_rate_per_s", "goodput_requests_per_s",
)  # fmt: skip
# These are off by at most the shares that the warnings state: too large by the repeated work, or too small by the work
# that was not metered; and repeated work may be batched better the second time.
SPENT = ("duration_s", "energy_j", "gpu_energy_j", "energy_wh", "average_power_w")
COUNTED = ("requests_completed", "input_tokens", "output_tokens", "cycles_completed")
TIMED = re.compile(r"(latency|ttft|itl|tpot|queue)_(mean|p50|p95|p99)_s")
BEHIND = re.compile(r"read (\S+) s before that")
TWICE = re.compile(r"Up to (\S+) s")


def codes(row) -> set[str]:
    return {text.partition(":")[0] for text in row.warnings}


def admitted(row) -> tuple[float, float]:
    """Return, as shares by the row's warnings, how much time and energy may be too large, and energy too small."""
    told = [text for text in row.warnings if text.startswith("window_cut")]
    behind_s = sum(float(found[1]) for text in told if (found := BEHIND.search(text)))
    twice_s = sum(float(TWICE.search(text)[1]) for text in row.warnings if text.startswith("work_repeated"))
    return twice_s / row.duration_s, behind_s / row.duration_s


def arriving_s(row) -> float:
    """Return the time from the first arrival to the last."""
    return (row.requests_completed - 1) / row.arrival_rate_per_s


def check_interrupted(rows: Rows) -> None:
    for row in (row for row in rows.cycles if row.status != "completed"):
        for name in RATES:
            assert getattr(row, name) is None, name


def check_row(row, expected) -> None:
    """Compare the row of a resumed run with that of an uninterrupted one: equal, null, or off as far as it says."""
    assert row.status == "completed"
    for name in (name for name in COUNTED if hasattr(row, name)):
        assert getattr(row, name) == getattr(expected, name), name
    twice, behind = admitted(row)
    assert (row.repeated_share > 0) == ("work_repeated" in codes(row))
    assert row.repeated_share <= twice * 1.01
    rounded = 0.006  # within three digits, plus the shift of steps and prefills
    for name in (name for name in SPENT if hasattr(row, name)):
        value, right = getattr(row, name), getattr(expected, name)
        if value is not None:
            assert right * (1 - behind - twice - rounded) <= value <= right * (1 + rounded) / (1 - min(twice, 0.99)), (
                name
            )
    assert expected.duration_s is not None
    for name in RATES:
        value, right = getattr(row, name), getattr(expected, name)
        if row.repeated_share > 0.02:
            assert value is None, name
        elif value is not None:
            # Requests arrive during only a part of the window, of which the same number of seconds is a larger share.
            part = arriving_s(expected) / expected.duration_s if name == "arrival_rate_per_s" else 1.0
            assert value == pytest.approx(right, rel=(twice + behind) / part + rounded), name
    for name in filter(TIMED.fullmatch, type(row).__struct_fields__):
        value, right = getattr(row, name), getattr(expected, name)
        if value is not None:
            assert value == pytest.approx(right, rel=0.02, abs=0.002), name
    if row.idle_share is not None:
        assert row.idle_share == pytest.approx(expected.idle_share, abs=0.01 + twice)


def check(experiment: Experiment, prompts: int, ranks: int, cuts: Sequence[CutAt]) -> tuple[Rows, Rows]:
    with tempfile.TemporaryDirectory() as folder:
        (one := Path(folder) / "one").mkdir()
        (other := Path(folder) / "other").mkdir()
        expected, whole_s = uninterrupted(one, experiment, prompts, ranks)
        made = resumed(other, experiment, prompts, ranks, cuts, whole_s)
    assert len(made.cycles) == len(expected.cycles)
    for cycle, right in zip(made.cycles, expected.cycles, strict=True):
        check_row(cycle, right)
    return made, expected


# ------------------------------------------------------------------ random runs
def simulated(**options) -> Experiment:
    known = {"max_output_tokens": 20, "warmup": Warmup(prompts=1), "dataset": Dataset(name="d", path="p")}
    backend = SimulatedBackend(prefill_s_per_token=1e-5, decode_s_per_token=STEP_S)
    return Experiment(model="any", backend=backend, **(known | options))


batchings = st.builds(
    Batching,
    strategy=st.sampled_from(["static", "sorted_static", "continuous"]),
    batch_size=st.integers(1, 4),
)
LIMITS = {"ttft_limit_s": 0.15, "itl_limit_s": 0.02}
traffics = st.one_of(
    st.just(Traffic()),
    st.builds(Traffic, pattern=st.sampled_from(["poisson", "constant"]), target_qps=st.sampled_from([2.0, 8.0, 30.0])),
    st.builds(Traffic, pattern=st.just("concurrency"), concurrency=st.sampled_from([2, 6])),
)
cuts = st.lists(
    st.builds(
        CutAt, st.floats(0.02, 1.0), st.sampled_from([frozenset(), frozenset({0}), frozenset({1}), frozenset({0, 1})])
    ),
    min_size=1,
    max_size=3,
)


@st.composite
def runs(draw):
    streams, traffic = draw(st.booleans()), draw(traffics)
    if streams:
        traffic = replace(traffic, **LIMITS)
    experiment = simulated(
        batching=draw(batchings),
        traffic=traffic,
        cycles=draw(st.integers(1, 2)),
        streaming=Streaming(enabled=streams, warmup_requests=1),
        seed=draw(st.integers(0, 99)),
        max_output_tokens=draw(st.sampled_from([5, 20, 60])),
    )
    return experiment, draw(st.integers(6, len(TEXTS))), draw(st.sampled_from([1, 1, 2])), draw(cuts)


NOBODY: frozenset[int] = frozenset()
OVERLOADED = Traffic(pattern="poisson", target_qps=14.0, **LIMITS)


@pytest.mark.parametrize("killed", [NOBODY, frozenset({0})], ids=["stopped", "killed"])
@pytest.mark.parametrize("traffic", [OVERLOADED, Traffic(pattern="concurrency", concurrency=6, **LIMITS)])
def test_a_queue_goes_on_where_a_run_was_cut(traffic, killed):
    experiment = simulated(batching=Batching(batch_size=2), traffic=traffic, streaming=Streaming(enabled=True))
    made, expected = check(experiment, 40, 1, [CutAt(0.4, killed), CutAt(0.3, killed)])
    assert made.cycles[0].attempts == 3
    assert expected.cycles[0].queue_mean_s > 0.1
    for name in (
        "queue_mean_s",
        "queue_p99_s",
        "latency_mean_s",
        "ttft_mean_s",
        "goodput_requests_per_s",
        "idle_share",
    ):
        assert getattr(made.row, name) == pytest.approx(getattr(expected.row, name), rel=0.01, abs=0.003), name
    assert made.row.arrival_rate_per_s == pytest.approx(expected.row.arrival_rate_per_s, rel=0.01)


def test_with_requests_under_way_at_a_cut_the_queue_is_not_shown():
    batching = Batching(strategy="continuous", batch_size=4)
    traffic = replace(OVERLOADED, target_qps=30.0)
    made, _ = check(simulated(batching=batching, traffic=traffic), 40, 1, [CutAt(0.5, NOBODY)])
    assert made.row.queue_mean_s is made.row.latency_mean_s is made.row.goodput_requests_per_s is None
    assert {"queue_lost", "work_repeated"} < codes(made.row)


def test_work_that_was_done_twice_is_said_and_leaves_no_rates():
    batching = Batching(strategy="continuous", batch_size=4)
    made, expected = check(simulated(batching=batching, max_output_tokens=60), 12, 1, [CutAt(0.6, NOBODY)])
    assert made.row.repeated_share > 0.05
    assert made.row.duration_s > expected.row.duration_s * 1.02
    assert made.row.energy_per_output_token_j is made.row.output_tokens_per_s is None


def test_little_work_that_was_done_twice_leaves_rates_that_are_off_by_less():
    batching = Batching(strategy="continuous", batch_size=2)
    made, expected = check(simulated(batching=batching), 40, 1, [CutAt(0.45, NOBODY)])
    assert made.cycles[0].attempts == 2
    assert 0 < made.row.repeated_share < 0.02
    slower = expected.row.output_tokens_per_s / made.row.output_tokens_per_s - 1
    assert 0 < slower <= made.row.repeated_share * 1.02


@pytest.mark.parametrize("strategy", ["static", "continuous"])
def test_what_other_ranks_had_finished_has_its_time_and_its_energy(strategy):
    """The metering process runs one long batch while the other process finishes several."""
    batching = Batching(strategy=strategy, batch_size=1)
    made, expected = check(simulated(batching=batching, max_output_tokens=60), 30, 2, [CutAt(0.5, NOBODY)])
    assert made.cycles[0].attempts == 2
    assert made.row.average_power_w == pytest.approx(POWER_W, rel=0.01)
    assert (
        expected.row.duration_s * 0.99
        < made.row.duration_s
        < expected.row.duration_s * (1 + 2 * made.row.repeated_share)
    )


def test_what_other_ranks_had_finished_before_the_meter_was_killed_has_its_time_and_no_energy():
    experiment = simulated(batching=Batching(batch_size=1), max_output_tokens=60, seed=0)
    made, expected = check(experiment, 12, 2, [CutAt(0.25, frozenset({ENERGY_OWNER}))])
    assert made.cycles[0].attempts == 2
    assert made.row.duration_s >= expected.row.duration_s
    assert made.row.energy_j is made.row.average_power_w is made.row.energy_per_output_token_j is None
    assert "energy_missing" in codes(made.row)


QUICK = settings(
    deadline=None, max_examples=15, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


@QUICK
@given(runs())
def test_what_a_resumed_run_shows_is_right_or_null_or_as_far_off_as_it_says(run):
    check(*run)


@pytest.mark.slow
@settings(QUICK, max_examples=200, derandomize=False, phases=[Phase.generate, Phase.shrink])
@given(runs())
def test_what_any_resumed_run_shows_is_right_or_null_or_as_far_off_as_it_says(run):
    check(*run)
