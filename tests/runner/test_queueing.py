"""Queueing under Poisson arrivals, compared with theory: an engine with a fixed service time is an M/D/1 queue."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lem.spec.experiment import Traffic
from lem.workload.traffic import arrival_times_s
from tests.conftest import command
from tests.theory import exact_waits_s

SERVICE_S, RATE_PER_S, REQUESTS = 0.08, 6.25, 1875
LOAD = RATE_PER_S * SERVICE_S
# M/D/1, by the Pollaczek–Khinchine formula.
WAIT_S = LOAD * SERVICE_S / (2 * (1 - LOAD))
# With other seeds, the exact mean wait of so few requests differs from the theory by 9% (standard deviation); only the
# mean over seeds agrees, which the first test checks. With this seed, wait, rate and idle share differ by less than
# 0.1%, so any larger difference is caused by the run itself.
SEED = 621
WITHIN = 0.03
# If a sleeping engine wakes this much too late, the whole machine stood still, and the theory does not apply.
STANDSTILL_S = 0.05


def drawn(seed: int) -> list[float]:
    return arrival_times_s(Traffic(pattern="poisson", target_qps=RATE_PER_S), REQUESTS, seed)


def exact_mean_s(arrivals_s: Sequence[float], service_s: float = SERVICE_S) -> float:
    return statistics.fmean(exact_waits_s(arrivals_s, [service_s] * len(arrivals_s)))


def test_drawn_arrivals_wait_as_long_as_theory_says_on_average_over_seeds():
    means = [exact_mean_s(drawn(seed)) for seed in range(600)]
    assert statistics.stdev(means) / len(means) ** 0.5 < 0.004 * WAIT_S
    assert statistics.fmean(means) == pytest.approx(WAIT_S, rel=0.01)
    assert exact_mean_s(drawn(SEED)) == pytest.approx(WAIT_S, rel=0.002)


@pytest.mark.slow
def test_five_minutes_of_poisson_arrivals_queue_as_theory_says(tmp_path):
    for attempt in ("first", "second"):
        row, own, priority = five_minutes(tmp_path / attempt)
        late_s = max(r["end_s"] - r["start_s"] for r in own) - SERVICE_S
        if late_s < STANDSTILL_S:
            break
        print(f"\nThe machine stood still for {late_s:.2f} s.")
    arrivals_s = drawn(SEED)
    services_s = [r["end_s"] - r["start_s"] for r in own]
    # How long the engine waits for lem between two requests when the second is already in the queue.
    between_s = [b["start_s"] - a["end_s"] for a, b in pairwise(own) if b["arrived_s"] <= a["end_s"]]
    # lem's work between two requests delays the next one as service does; its duration depends on the machine.
    exact_s = exact_mean_s(arrivals_s, SERVICE_S + statistics.fmean(between_s))
    print(
        f"\n{len(own)} requests in {row['duration_s']:.1f} s, {priority}\n"
        f"arrivals  {row['arrival_rate_per_s']:8.3f} /s   asked for {RATE_PER_S:.3f}\n"
        f"service   {1e3 * statistics.fmean(services_s):8.3f} ms   asked for {1e3 * SERVICE_S:.3f}\n"
        f"wait      {1e3 * row['queue_mean_s']:8.3f} ms   theory {1e3 * WAIT_S:.3f}, drawn times {1e3 * exact_s:.3f}\n"
        f"idle      {100 * row['idle_share']:8.2f}%    theory {100 * (1 - LOAD):.2f}\n"
        f"between two requests: median {1e6 * statistics.median(between_s):.0f} µs, mean "
        f"{1e6 * statistics.fmean(between_s):.0f} µs"
    )
    assert [r["arrived_s"] for r in own] == pytest.approx(arrivals_s, abs=1e-6)
    assert all(r["output_tokens"] == 90 and r["queue_s"] >= 0 for r in own)
    assert row["arrival_rate_per_s"] == pytest.approx(RATE_PER_S, rel=WITHIN)
    assert statistics.fmean(services_s) == pytest.approx(SERVICE_S, rel=0.002)
    assert row["queue_mean_s"] == pytest.approx(exact_s, rel=WITHIN)
    # At most a fortieth of the service time: beyond that, lem and not the traffic would determine the waits.
    assert statistics.median(between_s) < SERVICE_S / 40
    assert exact_mean_s(arrivals_s) == pytest.approx(WAIT_S, rel=WITHIN)
    assert row["idle_share"] == pytest.approx(1 - LOAD, rel=WITHIN)


def five_minutes(folder: Path) -> tuple[dict, list[dict], str]:
    """Run the experiment; return its row, its requests' rows in order, and the priority with which it ran."""
    folder.mkdir()
    (folder / "alike.jsonl").write_text('{"text": "one two three four five six seven eight nine ten"}\n' * REQUESTS)
    with first_in_line() as priority:
        done = command(
            "experiment", "--backend", "simulated", "-m", "any", "-d", "alike.jsonl", "-n", str(REQUESTS), "-y",
            "energy=none", f"seed={SEED}", "traffic.pattern=poisson", f"traffic.target_qps={RATE_PER_S}",
            "max_output_tokens=90", "min_output_tokens=90",  # 10 · 0.8 ms + 90 · 0.8 ms
            "backend.prefill_s_per_token=8e-4", "backend.decode_s_per_token=8e-4", cwd=folder, timeout_s=600,
        )  # fmt: skip
    assert done.code == 0, done.err
    (row,) = pq.read_table(folder / "results" / "experiments").to_pylist()
    own = pq.read_table(folder / "results" / "requests").to_pylist()
    return row, sorted(own, key=lambda r: r["request"]), priority


@contextmanager
def first_in_line() -> Iterator[str]:
    """Let processes started here run as soon as they wake, where that is allowed: other tests run as well."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        yield "at ordinary priority"
        return
    try:
        yield "at real-time priority"
    finally:
        os.sched_setscheduler(0, *before)
