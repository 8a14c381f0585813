"""Groups requests into batches by the lengths of their inputs; it knows nothing else about the requests."""

from __future__ import annotations

from collections.abc import Sequence

from lem.spec.experiment import Batching


def plan_batches(lengths: Sequence[int], batching: Batching) -> list[list[int]]:
    """Return batches of indices into `lengths`, in order of execution; each index is in exactly one batch.

    Args:
        lengths: the number of input tokens of each request, without padding.
        batching: the strategy and its limits. The dynamic strategies need `max_tokens_per_batch`, which limits the
            padded input of a batch (longest input × requests); a request that exceeds this limit runs alone.

    Raises:
        ValueError: a dynamic strategy is used without `max_tokens_per_batch`.
    """
    order = list(range(len(lengths)))
    if batching.strategy == "continuous":
        return [order] if order else []  # the engine itself decides which requests run at the same time
    if batching.strategy.startswith("sorted"):
        # The longest inputs come first, so that a run that needs too much memory fails early.
        order.sort(key=lambda i: -lengths[i])
    if batching.strategy.endswith("static"):
        return [order[i : i + batching.batch_size] for i in range(0, len(order), batching.batch_size)]
    if batching.max_tokens_per_batch is None:
        raise ValueError(f"{batching.strategy} batching needs batching.max_tokens_per_batch")
    return _by_budget(order, lengths, batching.batch_size, batching.max_tokens_per_batch)


def _by_budget(order: list[int], lengths: Sequence[int], size: int, budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    current: list[int] = []
    longest = 0
    for i in order:
        padded = max(longest, lengths[i]) * (len(current) + 1)
        if current and (len(current) == size or padded > budget):
            batches.append(current)
            current, longest = [], 0
        current.append(i)
        longest = max(longest, lengths[i])
    return [*batches, current] if current else batches
