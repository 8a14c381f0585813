"""Token latencies computed from the chunks in which tokens came."""

from __future__ import annotations

import statistics

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from lem.record import RequestRecord
from lem.results.latency import of_tokens, samples, under_load
from lem.spec.experiment import Traffic
from lem.workload.tokens import Chunk, first_tokens, token_times
from lem.workload.traffic import arrival_times_s
from tests.theory import exact_waits_s

MS = 1_000_000


def test_a_token_at_a_time():
    times = token_times(0, [Chunk(50 * MS, 1), Chunk(60 * MS, 1), Chunk(80 * MS, 1)])
    assert times.ttft_s == pytest.approx(0.050)
    assert times.itl_s == pytest.approx((0.010, 0.020))
    assert times.tpot_s == pytest.approx(0.015)
    assert not times.spread


def test_a_chunk_of_several_is_spread_over_the_time_since_the_one_before():
    times = token_times(0, [Chunk(50 * MS, 1), Chunk(80 * MS, 3)])
    assert times.itl_s == pytest.approx((0.010, 0.010, 0.010))
    assert times.spread


def test_tokens_that_come_with_the_first_have_no_gap():
    times = token_times(0, [Chunk(50 * MS, 2), Chunk(60 * MS, 1)])
    assert times.itl_s == pytest.approx((0.0, 0.010))


def test_one_token_has_no_gap_and_none_has_no_times():
    assert token_times(0, [Chunk(50 * MS, 1)]).tpot_s is None
    assert token_times(0, []) is None
    assert token_times(0, [Chunk(5, 0)]) is None


@given(st.lists(st.tuples(st.integers(1, 10**9), st.integers(1, 5)), min_size=1, max_size=30))
def test_the_gaps_add_up_to_the_time_between_first_and_last_token(steps):
    at, chunks = 0, []
    for gap, tokens in steps:
        at += gap
        chunks.append(Chunk(at, tokens))
    times = token_times(0, chunks)
    assert len(times.itl_s) == sum(chunk.tokens for chunk in chunks) - 1
    assert times.ttft_s + sum(times.itl_s) == pytest.approx(at / 1e9)
    if times.itl_s:
        assert times.tpot_s * len(times.itl_s) == pytest.approx(sum(times.itl_s))


def test_what_comes_after_the_end_token_is_left_out():
    chunks = [Chunk(1, 2), Chunk(2, 3), Chunk(3, 1)]
    assert first_tokens(chunks, 4) == (Chunk(1, 2), Chunk(2, 2))
    assert first_tokens(chunks, 0) == ()
    assert first_tokens(chunks, 6) == tuple(chunks)


def row(number=0, *, arrived_s=None, start_s=0.0, end_s=1.0, attempt=1, **times):
    return RequestRecord(
        experiment_id="e", rank=0, cycle=1, attempt=attempt, request=number, batch=number, input_tokens=3,
        output_tokens=4, input_truncated=False, finish_reason="length", start_s=start_s, end_s=end_s,
        latency_s=end_s - start_s, arrived_s=arrived_s,
        queue_s=None if arrived_s is None else start_s - arrived_s, **times,
    )  # fmt: skip


def test_inter_token_latencies_are_summarised_over_tokens_not_over_requests():
    rows = [row(0, ttft_s=0.1, tpot_s=0.01, itl_s=[0.01] * 9), row(1, ttft_s=0.3, tpot_s=0.11, itl_s=[0.11])]
    found = of_tokens(rows)
    assert found["ttft_mean_s"] == pytest.approx(0.2)
    assert found["itl_mean_s"] == pytest.approx(0.02)
    assert found["tpot_mean_s"] == pytest.approx(0.06)
    assert found["itl_p50_s"] == pytest.approx(0.01)


def test_without_streaming_nothing_is_said_of_tokens():
    assert of_tokens([row()]) == {}


def test_failed_requests_arrive_and_are_never_good():
    rows = [row(i, arrived_s=i * 1.0, start_s=i * 1.0, end_s=i + 0.5, ttft_s=0.1) for i in range(3)]
    rows[1] = replace(rows[1], error="refused", ttft_s=None)
    rows[2] = replace(rows[2], error="broken off in the middle")
    found = under_load(rows, 4.0, Traffic(pattern="constant", target_qps=1.0, ttft_limit_s=0.5))
    assert found["goodput_requests_per_s"] == 0.25
    assert found["arrival_rate_per_s"] == pytest.approx(1.0)
    assert found["idle_share"] == pytest.approx(1 - 1.5 / 4.0)


def test_the_idle_share_is_the_time_in_which_no_request_is_there():
    rows = [
        row(0, arrived_s=1.0, start_s=1.0, end_s=3.0),
        row(1, arrived_s=2.0, start_s=3.0, end_s=4.0),
        row(2, arrived_s=6.0, start_s=6.0, end_s=7.0),
    ]
    found = under_load(rows, 8.0, Traffic(pattern="constant", target_qps=1.0))
    assert found["idle_share"] == pytest.approx(0.5)
    assert found["queue_mean_s"] == pytest.approx(1 / 3)
    assert found["arrival_rate_per_s"] == pytest.approx(2 / 5)


def test_the_windows_of_two_attempts_follow_each_other_on_the_clock_of_the_arrivals():
    poisson = Traffic(pattern="poisson", target_qps=1.0)
    # One of the second attempt's requests arrived in the first window, and was present until that ended at 2 s.
    rows = [row(0, arrived_s=0.0, end_s=1.0), row(1, arrived_s=-0.5, end_s=1.0, attempt=2)]
    rows.append(row(2, arrived_s=1.5, end_s=2.0, attempt=2))
    found = under_load(rows, 4.0, poisson, {1: 0.0, 2: 2.0})
    assert found["idle_share"] == pytest.approx(1 - (1.0 + 1.5 + 0.5) / 4.0)
    assert found["arrival_rate_per_s"] == pytest.approx(2 / 3.5)


def test_what_depends_on_the_clock_of_the_arrivals_is_null_if_that_is_not_known():
    rows = [row(0, arrived_s=0.0, end_s=1.0), row(1, arrived_s=0.0, end_s=1.0, attempt=2)]
    found = under_load(rows, 4.0, Traffic(pattern="poisson", target_qps=1.0), {1: 0.0, 2: None})
    assert found.get("idle_share") is found.get("arrival_rate_per_s") is None


def test_goodput_counts_what_keeps_every_limit():
    rows = [row(0, ttft_s=0.1, tpot_s=0.01), row(1, ttft_s=0.5, tpot_s=0.01), row(2, ttft_s=0.1, tpot_s=0.2)]
    limits = Traffic(ttft_limit_s=0.2, itl_limit_s=0.05)
    assert under_load(rows, 2.0, limits)["goodput_requests_per_s"] == pytest.approx(0.5)
    assert under_load(rows, 2.0, Traffic()) == {}


def test_queueing_agrees_with_theory_on_the_simulated_engine(lem, tmp_path):
    """One server, fixed service, Poisson arrivals (M/D/1): compared with Lindley's recursion over the same arrivals."""
    (tmp_path / "prompts.txt").write_text("".join(f"word number {i}\n" for i in range(250)))
    done = lem(
        "experiment", "--backend", "simulated", "--model", "any", "--prompts", "prompts.txt", "energy=none", "-y",
        "traffic.pattern=poisson", "traffic.target_qps=50", "--max-tokens", "10", "min_output_tokens=10",
        "backend.decode_s_per_token=0.001", "backend.prefill_s_per_token=0",
    )  # fmt: skip
    assert done.code == 0
    requests = pd.read_parquet(tmp_path / "results/requests").sort_values("request")
    service_s = requests.end_s - requests.start_s
    free_s = requests.end_s.shift(fill_value=0.0)
    # The engine's wait for lem before a request delays the following ones as service does; its length depends on the
    # machine and its load.
    before_s = requests.start_s - requests.arrived_s.clip(lower=free_s)
    assert 0 <= before_s.median() < 0.0025
    usual_s = before_s.quantile(0.95)
    least_s = statistics.fmean(exact_waits_s(requests.arrived_s, service_s))
    most_s = statistics.fmean(exact_waits_s(requests.arrived_s, service_s + usual_s)) + usual_s
    assert 0.99 * least_s <= requests.queue_s.mean() <= most_s
    assert requests.queue_s.tolist() == pytest.approx((requests.start_s - requests.arrived_s).tolist(), abs=1e-6)
    expected = arrival_times_s(Traffic(pattern="poisson", target_qps=50.0), 250, 42)
    assert (requests.arrived_s - expected).abs().max() < 0.001


def test_samples_are_counted_where_there_are_percentiles():
    counts = [{"latency": 3, "queueing": 2}, {}]
    assert samples(counts)["latency_samples"] == [3, None]
    assert samples(counts)["queue_samples"] == [2, None]
    assert samples(counts)["ttft_samples"] == [None, None]
