from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lem.spec.experiment import Batching
from lem.workload.batching import plan_batches

STRATEGIES = ("static", "dynamic", "sorted_static", "sorted_dynamic")
LENGTHS = st.lists(st.integers(1, 60), max_size=60)
SIZES = st.integers(1, 9)
BUDGETS = st.integers(1, 200)


def plan(lengths, strategy, size, budget):
    return plan_batches(lengths, Batching(strategy=strategy, batch_size=size, max_tokens_per_batch=budget))


@given(LENGTHS, st.sampled_from(STRATEGIES), SIZES, BUDGETS)
def test_each_position_is_in_exactly_one_batch_and_no_batch_is_empty(lengths, strategy, size, budget):
    batches = plan(lengths, strategy, size, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batches)


@given(LENGTHS, st.sampled_from(STRATEGIES), SIZES, BUDGETS)
def test_no_batch_is_larger_than_batch_size(lengths, strategy, size, budget):
    assert all(len(batch) <= size for batch in plan(lengths, strategy, size, budget))


@given(LENGTHS, st.sampled_from(["dynamic", "sorted_dynamic"]), SIZES, BUDGETS)
def test_padded_input_stays_within_the_budget_unless_a_prompt_is_alone(lengths, strategy, size, budget):
    for batch in plan(lengths, strategy, size, budget):
        assert len(batch) == 1 or max(lengths[i] for i in batch) * len(batch) <= budget


@given(LENGTHS, st.sampled_from(["dynamic", "sorted_dynamic"]), SIZES, BUDGETS)
def test_dynamic_batches_are_as_full_as_size_and_budget_allow(lengths, strategy, size, budget):
    for batch, following in pairwise(plan(lengths, strategy, size, budget)):
        grown = [*batch, following[0]]
        assert len(grown) > size or max(lengths[i] for i in grown) * len(grown) > budget


@given(LENGTHS, st.sampled_from(["static", "sorted_static"]), SIZES)
def test_all_static_batches_but_the_last_are_full(lengths, strategy, size):
    assert all(len(batch) == size for batch in plan(lengths, strategy, size, None)[:-1])


@given(LENGTHS, st.sampled_from(["static", "dynamic"]), SIZES, BUDGETS)
def test_unsorted_strategies_keep_the_order(lengths, strategy, size, budget):
    order = [i for batch in plan(lengths, strategy, size, budget) for i in batch]
    assert order == list(range(len(lengths)))


@given(st.lists(st.integers(1, 4), max_size=60), st.sampled_from(["sorted_static", "sorted_dynamic"]), SIZES, BUDGETS)
def test_sorted_strategies_put_the_longest_first_and_equals_in_their_order(lengths, strategy, size, budget):
    order = [i for batch in plan(lengths, strategy, size, budget) for i in batch]
    assert all(lengths[a] > lengths[b] or (lengths[a] == lengths[b] and a < b) for a, b in pairwise(order))


@pytest.mark.parametrize("strategy", ["dynamic", "sorted_dynamic"])
def test_prompt_over_the_budget_is_a_batch_alone(strategy):
    batches = plan([3, 50, 4, 2], strategy, 8, 10)
    assert [1] in batches
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3]


def test_budget_counts_padding():
    # 2 + 2 + 6 tokens fit into 12, but padded to the longest they are 18.
    assert plan([2, 2, 6], "dynamic", 8, 12) == [[0, 1], [2]]


@pytest.mark.parametrize("strategy", ["dynamic", "sorted_dynamic"])
def test_dynamic_strategies_need_a_budget(strategy):
    with pytest.raises(ValueError, match="max_tokens_per_batch"):
        plan([1, 2], strategy, 4, None)
