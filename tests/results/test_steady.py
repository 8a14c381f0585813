"""The steady state: its edges, tokens and energy computed by hand, and the cases without one."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lem.record import EnergySoFar
from lem.results.codec import excerpt_of
from lem.results.rows import Cycle, as_rows, cycle_columns
from lem.results.schema import ExperimentRow
from lem.results.steady import full_span, places, steady_state, tokens_between
from lem.spec.engines import OpenaiBackend
from lem.spec.experiment import Batching, Traffic
from tests.records import GPU, phases, plan, record, request

# Two places; the requests take 4, 2, 2, 3 and 5 s, and the fifth is alone from 7 s on.
#   place 1: 0 ──── 4, 4 ─── 7
#   place 2: 1 ── 3, 3 ── 5, 5 ───── 10
SPANS = [(0.0, 4.0), (1.0, 3.0), (3.0, 5.0), (4.0, 7.0), (5.0, 10.0)]
CONTINUOUS = Batching(strategy="continuous", batch_size=2)
# 50 W until both places are taken, then 100 W, and 60 W when the last request is alone.
ENERGY = tuple(
    EnergySoFar(at_s, 50 * min(at_s, 1.0) + 100 * max(0.0, min(at_s, 7.0) - 1.0) + 60 * max(0.0, at_s - 7.0))
    for at_s in (0.5, 2.0, 3.0, 4.0, 5.0, 6.5, 7.001, 10.0)
)


def served(spans=SPANS, tokens_per_s=10, **more):
    return [
        request(
            request=i,
            start_s=start_s,
            end_s=end_s,
            latency_s=end_s - start_s,
            output_tokens=round((end_s - start_s) * tokens_per_s),
            **more,
        )
        for i, (start_s, end_s) in enumerate(spans)
    ]


def row(requests, *, attempts=1, energy_so_far=ENERGY, energy=(GPU,), **options):
    measured = record(phases=phases(10.0, energy), energy_so_far=energy_so_far)
    known = {"count": len(SPANS), "batching": CONTINUOUS, **options}
    cycle = Cycle(excerpt_of(plan(**known)), 1, attempts, [measured], requests)
    (made,) = as_rows(ExperimentRow, cycle_columns([cycle]))
    return made


# ------------------------------------------------------------------ its edges
def test_it_lasts_from_when_the_places_are_first_taken_until_they_last_are():
    assert full_span(served(), 2) == (1.0, 7.0)


def test_moment_between_two_requests_does_not_end_it():
    assert full_span(served([(0, 4), (1, 3), (3.01, 5), (4.02, 7), (5.01, 10)]), 2) == (1, 7)


def test_wave_after_wave_it_lasts_until_the_last_full_one_ends():
    waves = [(at, at + 2) for at in (0, 2.01, 4.02) for _ in range(2)]
    assert full_span(served(waves), 2) == (0, pytest.approx(6.02))
    assert full_span(served(waves[:-1]), 2) == (0, pytest.approx(4.01))


@pytest.mark.parametrize(
    ("spans", "why"),
    [
        (SPANS[:2], "no more requests than places"),
        ([(0, 1), (1, 2), (2, 3)], "one after the other"),
        ([], "nothing ran"),
        ([(0, 2), (0, 1), (4, 6), (6, 9), (7, 8)], "a place was empty for most of the time"),
    ],
)
def test_there_is_none_without_a_queue(spans, why):
    assert full_span(served(spans), 2) is None, why


@given(st.lists(st.floats(0.1, 5), min_size=4, max_size=30), st.integers(1, 3))
def test_places_filled_from_a_queue_are_full_until_it_is_empty(durations_s, taken):
    free_at_s, spans = [0.0] * taken, []
    for duration_s in durations_s:
        start_s = min(free_at_s)
        free_at_s[free_at_s.index(start_s)] = start_s + duration_s
        spans.append((start_s, start_s + duration_s))
    # Nothing starts after the last place was taken, so from the next end on, one place is free.
    assert full_span(served(spans), taken) == (0.0, min(free_at_s))


@pytest.mark.parametrize(
    ("arguments", "taken"),
    [
        (("continuous", 8, "closed", None), 8),
        (("continuous", 8, "concurrency", 4), 4),
        (("continuous", 8, "concurrency", 16), 8),
        (("continuous", 8, "poisson", None), None),
        (("continuous", 8, "trace", None), None),
        (("static", 8, "closed", None), None),
        (("sorted_dynamic", 8, "concurrency", 4), None),
    ],
)
def test_places_are_those_that_a_queue_keeps_taken(arguments, taken):
    assert places(*arguments, by_client=False) == taken


def test_of_a_server_the_client_knows_only_what_it_has_sent():
    assert places("continuous", 8, "concurrency", 16, by_client=True) == 16


# ------------------------------------------------------------------ its tokens
def test_tokens_of_a_request_inside_all_count_and_outside_none():
    one = request(start_s=2.0, end_s=4.0, output_tokens=20)
    assert [tokens_between(one, *span) for span in [(2, 4), (0, 9), (4, 9), (0, 2)]] == [20, 20, 0, 0]


def test_tokens_that_were_timed_count_when_they_came():
    one = request(start_s=1.0, end_s=4.5, output_tokens=4, arrived_s=0.5, ttft_s=1.0, itl_s=[0.5, 2.0, 0.5])
    # 1.5, 2.0, 4.0 and 4.5 s
    assert [tokens_between(one, *span) for span in [(0, 1.5), (1.5, 9), (2.0, 4.2), (2.1, 3.9)]] == [1, 3, 1, 0]


def test_tokens_without_times_are_spread_after_the_prefill():
    one = request(start_s=0.0, end_s=5.0, output_tokens=5, prefill_s=1.0)
    assert [tokens_between(one, 0, at_s) for at_s in (0.9, 1.0, 2.5, 4.0)] == [0, 1, 2, 4]
    unknown = request(start_s=0.0, end_s=5.0, output_tokens=5)
    assert [tokens_between(unknown, 0, at_s) for at_s in (0.9, 1.0, 2.5, 4.0)] == [0, 1, 2, 4]
    only = request(start_s=0.0, end_s=5.0, output_tokens=1, prefill_s=4.9)
    assert tokens_between(only, 0, 4.95) == 0


@given(st.lists(st.floats(0, 10), min_size=2, max_size=5, unique=True))
def test_spans_that_follow_each_other_have_all_tokens_between_them(edges):
    edges = [-1.0, *sorted(edges), 11.0]
    for one in served():
        parts = [tokens_between(one, begin, end) for begin, end in itertools.pairwise(edges)]
        assert sum(parts) == one.output_tokens


# ------------------------------------------------------------------ rows
def test_row_has_time_tokens_and_energy_of_the_same_span():
    made = row(served())
    # Between the readings at 2 and 6.5 s there are two requests at 10 tokens/s each, at 100 W.
    assert made.steady_duration_s == pytest.approx(4.5)
    assert made.steady_output_tokens == pytest.approx(90, abs=2)
    assert made.steady_energy_j == pytest.approx(450)
    assert made.steady_average_power_w == pytest.approx(100)
    assert made.steady_output_tokens_per_s == made.steady_output_tokens / made.steady_duration_s
    assert made.steady_energy_per_output_token_j == made.steady_energy_j / made.steady_output_tokens
    # The values of the whole window are unchanged.
    assert (made.duration_s, made.output_tokens, made.energy_j) == (10.0, 160, 100.0)


def test_without_readings_the_edges_are_those_of_the_requests_and_energy_is_null():
    made = row(served(), energy_so_far=())
    assert (made.steady_duration_s, made.steady_output_tokens) == (6.0, pytest.approx(120, abs=2))
    assert made.steady_energy_j is made.steady_energy_per_output_token_j is made.steady_average_power_w is None


def test_energy_that_the_window_does_not_have_is_not_that_of_a_part_of_it():
    unread = [GPU.__class__("gpu", "counter", "device", "GPU-0", None, "test", reason="lost")]
    assert row(served(), energy=unread).steady_energy_j is None


NULL = [name for name in ExperimentRow.__struct_fields__ if name.startswith("steady_")]


@pytest.mark.parametrize(
    "changes",
    [
        {"batching": Batching(strategy="static", batch_size=2)},
        {"traffic": Traffic(pattern="poisson", target_qps=1.0)},
        {"batching": Batching(strategy="continuous", batch_size=5)},
        {"attempts": 2},
        {"count": len(SPANS) + 1},
        {"energy_so_far": (EnergySoFar(0.5, 1.0), EnergySoFar(2.0, 2.0), EnergySoFar(8.0, 3.0))},
    ],
    ids=["padded", "open loop", "no queue", "resumed", "unfinished", "one reading"],
)
def test_it_is_null_where_there_is_none(changes):
    made = row(served(), **changes)
    assert [getattr(made, name) for name in NULL] == [None] * 6


def test_it_is_null_if_the_requests_are_of_several_attempts():
    mixed = [*served(SPANS[:2], attempt=1), *served(SPANS, attempt=2)[2:]]
    assert steady_state(mixed, 2, (), ends_at_readings=False) is None


def test_of_several_processes_it_is_the_time_in_which_all_are_full():
    later = [(start_s + 2, end_s + 2) for start_s, end_s in SPANS]
    both = [*served(rank=0), *served(later, rank=1)]
    found = steady_state(both, 2, (), ends_at_readings=False)
    assert (found.duration_s, found.output_tokens) == (4.0, pytest.approx(160, abs=4))
    far = [(start_s + 20, end_s + 20) for start_s, end_s in SPANS]
    assert steady_state([*served(rank=0), *served(far, rank=1)], 2, (), ends_at_readings=False) is None


def test_the_concurrency_is_divided_among_the_replicas():
    traffic = Traffic(pattern="concurrency", concurrency=4)
    both = [*served(rank=0), *served(rank=1)]
    for i, one in enumerate(both):
        both[i] = request(**{**{name: getattr(one, name) for name in one.__struct_fields__}, "request": i})
    batching = Batching(strategy="continuous", batch_size=8)
    made = row(both, count=len(both), energy_so_far=(), traffic=traffic, batching=batching)
    assert made.steady_duration_s == 6.0


def test_a_server_is_full_when_as_many_are_under_way_as_the_client_keeps():
    cycle = Cycle(
        excerpt_of(plan(count=5, batching=CONTINUOUS, traffic=Traffic(pattern="concurrency", concurrency=3))),
        1, 1, [record()], served(),
    )  # fmt: skip
    of_server = excerpt_of(plan(count=5, batching=CONTINUOUS, traffic=Traffic(pattern="concurrency", concurrency=3)))
    of_server.experiment.backend.name = OpenaiBackend().name
    columns = cycle_columns([cycle, cycle._replace(plan=of_server)])
    assert columns["steady_duration_s"] == [6.0, None]  # with three places, all of them are never taken at once


def test_short_one_in_a_long_window_carries_a_warning():
    codes = [text.partition(":")[0] for text in row(served()).warnings]
    assert "short_steady_state" in codes
    calm = row(served(), energy_so_far=())
    assert "short_steady_state" not in [text.partition(":")[0] for text in calm.warnings]
