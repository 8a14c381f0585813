"""Runs that are cut at random moments and resumed, compared with an uninterrupted run, on a virtual clock.

Everything but time and power is real: attempts, journals, records, merging, rows. Sleeping moves a clock instead of
waiting, so that a run of minutes takes milliseconds, a cut comes at an exact time, and the two runs differ by the cuts
alone. A killed process leaves its journal and no record. Power changes as it likes, and the attempts may have different
meters; what was really drawn in the windows is known.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import groupby
from pathlib import Path
from threading import Thread
from time import sleep  # imported as a name, because virtual time replaces it in its module

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lem.record import ENERGY_OWNER, ProcessRecord, RequestRecord
from lem.results.aggregate import measured
from lem.results.codec import config_sha256
from lem.results.directory import ExperimentDir
from lem.results.merging import together
from lem.results.plan import Plan, PromptsInfo, State
from lem.results.rows import Rows, rows_of
from lem.results.store import Store
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Batching, Dataset, Energy, Experiment, Streaming, Traffic, Warmup
from lem.workload.prompts import sha256_of
from tests.records import AT
from tests.virtual_power import KINDS, REACH_S, SAMPLED_S, SHAPES, TICK_S, Power, Powers, constant, drawn, metered
from tests.virtual_time import CLOCKS, Meeting, Openings, attempt, virtual_time

POWER_W = 100.0
STEP_S = 0.01
TEXTS = ["word " * (1 + i % 7) for i in range(40)]


# ------------------------------------------------------------------ runs
@dataclass(frozen=True)
class CutAt:
    """A cut after this share of the time that the attempt would take; `killed` ranks leave no record."""

    share: float
    killed: frozenset[int]


@dataclass(frozen=True)
class Metering:
    """The meter of each attempt, of which the last is that of all further ones; and what the machine draws."""

    kinds: tuple[str, ...] = ("replay",)
    shape: str = "flat"
    seed: int = 0

    @cached_property
    def powers(self) -> Powers:
        if self.shape == "flat":
            return Powers(constant(POWER_W), constant(POWER_W))
        return Powers(drawn(self.shape, self.seed), drawn(self.shape, self.seed + 1))


@dataclass(frozen=True)
class Run:
    """An experiment in a folder, how it is metered, and when its phases opened."""

    directory: ExperimentDir
    metering: Metering
    opened: Openings

    def go(self, number: int, cut_s: float | None = None) -> tuple[list[str], float]:
        folder = self.directory.path.parent
        with virtual_time(self.opened), metered(self.metering.kinds, self.metering.powers, folder):
            return attempt(self.directory, number, cut_s)

    def rows(self, *, strict: bool = True) -> Rows:
        rows = rows_of(measured(self.directory, strict=strict))
        check_energies(rows, self)
        return rows


def planned(folder: Path, experiment: Experiment, prompts: int, ranks: int, metering: Metering) -> Run:
    directory = Store(folder / "results").claim(datetime(2026, 1, 2, 3, 4, 5))
    info = PromptsInfo(prompts, sha256_of(TEXTS[:prompts]), "p", None, "text", prompts, 0)
    plan = Plan(directory.id, AT, experiment, info, config_sha256(experiment), ranks, ranks, 0, ())
    directory.write_plan(plan, TEXTS[:prompts])
    directory.write_state(State("running", 1, AT))
    return Run(directory, metering, {})


def uninterrupted(run: Run) -> tuple[Rows, float]:
    ended, spent_s = run.go(1)
    assert set(ended) == {"completed"}
    return run.rows(), spent_s


def resumed(run: Run, cuts: Sequence[CutAt], whole_s: float) -> Rows:
    """Run the experiment, cut it and resume it; return its rows."""
    directory = run.directory
    for number, cut in enumerate(cuts, start=1):
        ended, _ = run.go(number, cut.share * whole_s)
        for rank in cut.killed:
            for file in directory.path.glob(f"process_{rank}_c*_a{number}.json"):
                if json.loads(file.read_text())["status"] != "completed":
                    file.unlink()
        if set(ended) == {"completed"}:
            return run.rows()
        if directory.parts():
            check_interrupted(run.rows(strict=False))
    ended, _ = run.go(len(cuts) + 1)
    assert set(ended) == {"completed"}
    return run.rows()


# ------------------------------------------------------------------ what was really drawn
@dataclass(frozen=True)
class Window:
    """What one attempt measured of a cycle: the owner's record, and all requests that it finished."""

    opened_s: float
    record: ProcessRecord
    requests: Sequence[RequestRecord]

    @property
    def end_s(self) -> float:
        window = self.record.phase("measured")
        assert window is not None
        return self.opened_s + window.duration_s


def windows_of(run: Run, cycle: int) -> list[Window]:
    parts = sorted(
        (part for part in run.directory.parts() if part.record.cycle == cycle),
        key=lambda part: (part.record.attempt, part.record.rank),
    )
    found = []
    for number, group in groupby(parts, key=lambda part: part.record.attempt):
        of_attempt = list(group)
        records = together([part.record for part in of_attempt])
        if records[0].rank == ENERGY_OWNER and records[0].phase("measured"):
            requests = [row for part in of_attempt for row in part.requests]
            found.append(Window(run.opened[(number, cycle, "measured")], records[0], requests))
    return found


COMPONENTS = ("gpu", "cpu", "dram")
# Why energy may be null, and where a row may say how far its energy is off.
WHY_NULL = {"energy_missing", "energy_partial", "energy_mixed"}
BEHIND = re.compile(r"last read (?:a total of )?(\S+) s before (?:that|these ends|it)")


def uncovered_s(duration_s: float) -> float:
    """Return how much of a window its energy may leave out without a word, as in docs/concepts/methodology.md."""
    return max(min(TICK_S, 0.05 * duration_s), 0.01 * duration_s)


def check_energies(rows: Rows, run: Run) -> None:
    """Compare energies with what was really drawn in the windows, as far as the rows' warnings allow."""
    powers = run.metering.powers
    limits_j: dict[str, list[tuple[float, float]]] = {name: [] for name in COMPONENTS}
    for row in rows.cycles:
        windows = windows_of(run, row.cycle)
        if not windows:
            continue
        for window in windows:
            check_window(window, powers)
        assert row.duration_s == pytest.approx(sum(w.end_s - w.opened_s for w in windows), abs=1e-6)
        for name in COMPONENTS:
            limits_j[name].append(least_and_most_j(row, windows, powers.of(name)))
        check_components(row, {name: limits[-1:] for name, limits in limits_j.items()})
        if len(rows.cycles) == 1:
            check_prefill(rows.row, windows, powers)
    if len(rows.cycles) == rows.row.cycles_completed == len(limits_j["gpu"]):
        check_components(rows.row, limits_j)


def least_and_most_j(row, windows: Sequence[Window], power: Power) -> tuple[float, float]:
    """Return what a row's energy of a component may be, by what was drawn and by what the row says of it."""
    right_j = sum(power.energy_j(window.opened_s, window.end_s) for window in windows)
    behind_s = unread_s(row) * 1.006
    late_s = len(windows) * REACH_S if "energy_integrated" in codes(row) else 0.0
    missing_s = behind_s + uncovered_s(row.duration_s) + late_s
    return right_j - missing_s * power.most_w, right_j + late_s * power.most_w


def unread_s(row) -> float:
    """Return how many seconds of the row's windows its energy leaves out, as its warnings say."""
    told = [text for text in row.warnings if text.startswith("window_cut") and "last read" in text]
    found = [BEHIND.search(text) for text in told]
    assert None not in found, told
    return sum(float(each[1]) for each in found if each)


def check_components(row, limits_j: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Compare a row's energies with their limits in each of the cycles whose mean they are."""
    for name in COMPONENTS:
        shown_j = getattr(row, f"{name}_energy_j")
        assert shown_j is None or fits(shown_j, [limits_j[name]]), row.warnings
    check_headline(row, limits_j)


def check_headline(row, limits_j: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """The headline is of the GPU or the host; if it is null, the row says why; if it is estimated, that it is."""
    if row.energy_j is None:
        assert codes(row) & WHY_NULL, row.warnings
        return
    gpu_j = row.gpu_energy_j
    kinds = [("gpu",)] if gpu_j is not None else [("cpu",), ("dram",), ("cpu", "dram")]
    fitting = [names for names in kinds if fits(row.energy_j, [limits_j[name] for name in names])]
    assert fitting, row.warnings
    assert gpu_j is None or row.energy_j == gpu_j
    assert ("estimate" in row.energy_source) <= ("energy_estimated" in codes(row))


def fits(shown_j: float, of_components: Sequence[Sequence[tuple[float, float]]]) -> bool:
    """Return whether a sum of components, or the mean of such sums over cycles, lies within their limits."""
    cycles = len(of_components[0])
    low_j = sum(low for limits in of_components for low, _ in limits) / cycles
    high_j = sum(high for limits in of_components for _, high in limits) / cycles
    return low_j * (1 - 1e-6) - 1e-3 <= shown_j <= high_j * (1 + 1e-6) + 1e-3


def check_window(window: Window, powers: Powers) -> None:
    """The window ends no earlier than its last request; each reading is the energy of the time that it covers."""
    phase = window.record.phase("measured")
    assert phase is not None
    assert phase.duration_s >= max((row.end_s for row in window.requests), default=0.0) - 1e-6
    for reading in phase.energy:
        if reading.energy_j is not None:
            until_s = window.opened_s + reading.seconds_of(phase.duration_s)
            check_reading(reading.energy_j, reading.source, powers.of(reading.component), window.opened_s, until_s)
    headline = {reading.component for reading in phase.energy if reading.component == "gpu"}
    components = headline or {reading.component for reading in phase.energy if reading.is_measured}
    components = components or {reading.component for reading in phase.energy}
    source = "integral" if any(reading.source == "integral" for reading in phase.energy) else "counter"
    for each in window.record.energy_so_far:
        sums = [powers.of(name) for name in components]
        until_s = window.opened_s + each.at_s
        right_j = sum(power.energy_j(window.opened_s, until_s) for power in sums)
        slack_j = sum(power.most_w for power in sums) * (TICK_S if source == "counter" else TICK_S + REACH_S)
        assert abs(each.energy_j - right_j) <= slack_j + 1e-3


def check_reading(energy_j: float, source: str, power: Power, begun_s: float, until_s: float) -> None:
    right_j = power.energy_j(begun_s, until_s)
    lag_s = {"counter": TICK_S, "integral": SAMPLED_S + REACH_S}.get(source, 0.0)
    assert right_j - lag_s * power.most_w - 1e-3 <= energy_j
    assert energy_j <= right_j + (REACH_S * power.most_w if source == "integral" else 0.0) + 1e-3


def check_prefill(row, windows: Sequence[Window], powers: Powers) -> None:
    """The prefill's energy is within its stated uncertainty of what was drawn in it; batches begin one by one."""
    if row.prefill_energy_j is None:
        return
    spans = {
        (window.opened_s + r.start_s, window.opened_s + r.start_s + r.prefill_s)
        for window in windows
        for r in window.requests
    }
    right_j = sum(powers.gpu.energy_j(*span) for span in spans)
    assert abs(row.prefill_energy_j - right_j) <= row.prefill_energy_uncertainty_j + 1e-3


# ------------------------------------------------------------------ the properties to check
RATES = (
    "output_tokens_per_s", "requests_per_s", "energy_per_output_token_j", "energy_per_request_j",
    "arrival_rate_per_s", "goodput_requests_per_s",
)  # fmt: skip
# These are off by at most the shares that the warnings state: too large by the repeated work, or too small by the work
COUNTED = ("requests_completed", "input_tokens", "output_tokens", "cycles_completed")
SPENT = ("duration_s", "energy_j", "gpu_energy_j")
TIMED = re.compile(r"(latency|ttft|itl|tpot|queue)_(mean|p50|p95|p99)_s")
TWICE = re.compile(r"Up to (\S+) s")


def codes(row) -> set[str]:
    return {text.partition(":")[0] for text in row.warnings}


def admitted(row) -> tuple[float, float]:
    """Return, as shares by the row's warnings, how much time and energy may be too large, and energy too small."""
    behind_s = unread_s(row)
    twice_s = sum(float(TWICE.search(text)[1]) for text in row.warnings if text.startswith("work_repeated"))
    return twice_s / row.duration_s, behind_s / row.duration_s


def arriving_s(row) -> float:
    """Return the time from the first arrival to the last."""
    return (row.requests_completed - 1) / row.arrival_rate_per_s


def check_interrupted(rows: Rows) -> None:
    for row in (row for row in rows.cycles if row.status != "completed"):
        for name in RATES:
            assert getattr(row, name) is None, name


def check_row(row, expected, *, constant_power: bool) -> None:
    """Compare a row of a resumed run with that of an uninterrupted one: the same, null, or as far off as it says.

    Energies are those of the same power only if it is constant and read by the same meter.
    """
    assert row.status == "completed"
    for name in (name for name in COUNTED if hasattr(row, name)):
        assert getattr(row, name) == getattr(expected, name), name
    twice, behind = admitted(row)
    assert (row.repeated_share > 0) == ("work_repeated" in codes(row))
    assert row.repeated_share <= twice * 1.01
    rounded = 0.006  # within three digits, plus the shift of steps and prefills
    for name in (name for name in SPENT if hasattr(row, name) and (constant_power or "energy" not in name)):
        value, right = getattr(row, name), getattr(expected, name)
        if value is not None:
            assert right * (1 - behind - twice - rounded) <= value <= right * (1 + rounded) / (1 - min(twice, 0.99)), (
                name
            )
    assert expected.duration_s is not None
    for name in (name for name in RATES if constant_power or "energy" not in name):
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


def check(
    experiment: Experiment, prompts: int, ranks: int, cuts: Sequence[CutAt], metering: Metering = Metering()
) -> tuple[Rows, Rows]:
    with tempfile.TemporaryDirectory() as folder:
        (one := Path(folder) / "one").mkdir()
        (other := Path(folder) / "other").mkdir()
        expected, whole_s = uninterrupted(planned(one, experiment, prompts, ranks, metering))
        made = resumed(planned(other, experiment, prompts, ranks, metering), cuts, whole_s)
    assert len(made.cycles) == len(expected.cycles)
    for cycle, right in zip(made.cycles, expected.cycles, strict=True):
        check_row(cycle, right, constant_power=metering == Metering())
    return made, expected


# ------------------------------------------------------------------ random runs
def simulated(**options) -> Experiment:
    known = {"max_output_tokens": 20, "warmup": Warmup(prompts=1), "dataset": Dataset(name="d", path="p")}
    known["energy"] = Energy(idle_s=0)
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
def meterings(draw):
    """One meter for all attempts, or another one after a cut; power that stays or changes."""
    if draw(st.integers(0, 3)) == 0:
        return Metering()
    kinds = draw(
        st.one_of(
            st.sampled_from(KINDS).map(lambda kind: (kind,)),
            st.lists(st.sampled_from(KINDS), min_size=2, max_size=4).map(tuple),
        )
    )
    return Metering(kinds, draw(st.sampled_from(SHAPES)), draw(st.integers(0, 999)))


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
    prefill_s = draw(st.sampled_from([1e-5, 1e-5, 1e-3, 0.3]))
    # With continuous batching a request's times depend on whose prompts are processed beside it, which a cut changes.
    if traffic.pattern == "closed" and experiment.batching.strategy != "continuous":
        experiment = replace(experiment, backend=replace(experiment.backend, prefill_s_per_token=prefill_s))
    return experiment, draw(st.integers(6, len(TEXTS))), draw(st.sampled_from([1, 1, 2])), draw(cuts), draw(meterings())


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


@pytest.mark.parametrize("kind", ["replay", "blind"])
def test_what_other_ranks_had_finished_before_the_meter_was_killed_has_its_time_and_its_energy_if_that_was_read(kind):
    """The owner is killed within its first batch, of which its notes are all that is left."""
    experiment = simulated(batching=Batching(batch_size=1), max_output_tokens=60, seed=0)
    made, expected = check(experiment, 12, 2, [CutAt(0.25, frozenset({ENERGY_OWNER}))], Metering((kind,)))
    assert made.cycles[0].attempts == 2
    assert made.row.duration_s >= expected.row.duration_s
    assert made.row.energy_per_output_token_j is None  # too much was done twice
    if kind == "replay":
        assert made.row.average_power_w == pytest.approx(POWER_W, rel=0.02)
    else:
        assert made.row.energy_j is made.row.average_power_w is None
        assert "energy_missing" in codes(made.row)


def test_a_process_that_is_slow_in_real_time_changes_nothing(monkeypatch):
    """If it did, the other tests here would fail now and then on a busy machine."""
    experiment = simulated(batching=Batching(strategy="continuous", batch_size=2), max_output_tokens=5, cycles=2)
    cuts = [CutAt(0.25, NOBODY), CutAt(0.5, frozenset({1}))]
    meet, made = Meeting.meet, []
    for slow in (0, 1):

        def meet_slowly(meeting, now_ns, slow=slow):
            agreed_ns = meet(meeting, now_ns)
            if CLOCKS.ranks.rank == slow:
                sleep(0.05)  # longer than the windows that are cut
            return agreed_ns

        monkeypatch.setattr(Meeting, "meet", meet_slowly)
        made.append(check(experiment, 12, 2, cuts, Metering(("integral",)))[0])
    assert [cycle.duration_s for cycle in made[0].cycles] == [cycle.duration_s for cycle in made[1].cycles]


def test_a_process_knows_when_all_met_even_if_another_left_before_it_woke_up():
    meeting, known_ns = Meeting(2), []
    waiting = Thread(target=lambda: known_ns.append(meeting.meet(5)))
    waiting.start()
    while not meeting.arrived_ns:
        sleep(0.001)
    with meeting.changed:  # while this is held, the other process cannot wake up
        assert meeting.meet(7) == 7
        meeting.leave()
    waiting.join()
    assert known_ns == [7]
    assert meeting.meet(9) is None


QUICK = settings(
    deadline=None, max_examples=15, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
)


@QUICK
@given(runs())
def test_what_a_resumed_run_shows_is_right_or_null_or_as_far_off_as_it_says(run):
    check(*run)


@pytest.mark.slow
@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
)
@given(runs())
def test_what_any_resumed_run_shows_is_right_or_null_or_as_far_off_as_it_says(run):
    """The same examples each time, so that a fault belongs to a change; --hypothesis-profile search draws new ones."""
    check(*run)
