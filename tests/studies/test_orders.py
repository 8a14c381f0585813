"""The orders of a campaign: whole cycles, the same for the same seed, and balanced where that is promised."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lem.spec.campaign import STRUCTURES, square_size
from lem.studies.orders import order, williams_square

ARMS, CYCLES, SEEDS = st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**40)


def by_cycle(places):
    cycles = {}
    for place in places:
        cycles.setdefault(place.cycle, []).append(place.arm)
    return cycles


@given(st.sampled_from(STRUCTURES), ARMS, CYCLES, SEEDS)
def test_each_cycle_holds_each_arm_once(structure, arms, cycles, seed):
    places = order(structure, arms, cycles, seed)
    assert len(places) == arms * cycles
    assert set(by_cycle(places)) == set(range(1, cycles + 1))
    assert all(sorted(found) == list(range(arms)) for found in by_cycle(places).values())
    assert Counter(place.position for place in places) == dict.fromkeys(range(1, arms + 1), cycles)


@given(st.sampled_from(["shuffled", "latin", "interleaved"]), ARMS, CYCLES, st.integers(1, 10), SEEDS)
def test_a_longer_campaign_begins_like_a_shorter_one(structure, arms, cycles, more, seed):
    shorter, longer = (order(structure, arms, n, seed) for n in (cycles, cycles + more))
    assert longer[: len(shorter)] == shorter


def test_a_seed_gives_the_same_order_on_every_machine():
    assert [place.arm for place in order("shuffled", 4, 3, 0)] == [3, 1, 2, 0, 1, 3, 0, 2, 2, 0, 3, 1]
    assert [place.arm for place in order("latin", 3, 2, 0)] == [0, 1, 2, 2, 0, 1]
    assert order("shuffled", 5, 6, 1) != order("shuffled", 5, 6, 2)


def test_every_order_occurs_equally_often_in_shuffled_cycles():
    found = Counter(tuple(by_cycle(order("shuffled", 3, 3, seed))[3]) for seed in range(1200))
    assert len(found) == 6
    assert min(found.values()) > 150


@given(st.integers(2, 9), st.integers(3, 12), SEEDS)
def test_no_two_shuffled_arms_keep_their_order_in_three_cycles_in_a_row(arms, cycles, seed):
    rows = list(by_cycle(order("shuffled", arms, cycles, seed)).values())
    for three in zip(rows, rows[1:], rows[2:], strict=False):
        for one, other in permutations(range(arms), 2):
            assert any(row.index(one) > row.index(other) for row in three)


def test_interleaved_repeats_one_order_and_grouped_ends_with_each_arm():
    assert [place.arm for place in order("interleaved", 3, 2, 5)] == [0, 1, 2, 0, 1, 2]
    assert [(place.arm, place.cycle) for place in order("grouped", 2, 3, 5)] == [
        (0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3),
    ]  # fmt: skip


@pytest.mark.parametrize("arms", range(2, 9))
def test_a_whole_design_is_balanced_for_position_and_predecessor(arms):
    rows = williams_square(arms)
    assert len(rows) == square_size(arms)
    positions = Counter((at, arm) for row in rows for at, arm in enumerate(row))
    follow = Counter(pair for row in rows for pair in pairwise(row))
    assert len(positions) == arms * arms
    assert len(set(positions.values())) == 1
    assert len(follow) == arms * (arms - 1)
    assert len(set(follow.values())) == 1


@given(st.integers(2, 8), st.integers(1, 3), SEEDS)
def test_whole_squares_of_a_latin_campaign_stay_balanced_when_drawn(arms, squares, seed):
    cycles = squares * square_size(arms)
    rows = list(by_cycle(order("latin", arms, cycles, seed)).values())
    follow = Counter(pair for row in rows for pair in pairwise(row))
    assert len(follow) == arms * (arms - 1)
    assert len(set(follow.values())) == 1
