"""Model FLOPs of the counted tokens, computed from the model's architecture.

The count covers the matrix products of the forward pass; a multiply-add counts as two operations. A token costs 2
operations for each weight that it passes through and, in each attention layer, 4·(heads·head_dim) operations for each
position that it attends to (QKᵀ and the weighted sum of V). This is the usual way of counting model FLOPs (Kaplan et
al. 2020, arXiv 2001.08361, table 1; Chowdhery et al. 2022, arXiv 2204.02311, appendix B), but without the approximation
that all parameters belong to matrices. Padding, recomputation, norms and softmax are not counted. This module knows
nothing about engines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lem.errors import LemError

METHOD = "2 per weight used + 4·width per attended position, without padding; sizes counted by torch without values"


class UnknownArchitecture(LemError):
    """A model's sizes cannot be determined; the message is the reason, as a clause without a period."""


@dataclass(frozen=True)
class Attention:
    """The total width of one or more attention layers, and how far back each of them attends.

    The width of a layer is heads·head_dim; if the heads of keys and values differ in size, head_dim is the mean of the
    two sizes. By default, a token attends to itself and to all earlier positions. If `reach` is set, it attends only to
    the last `reach` positions, including its own; if `in_chunks` is also set, it attends only to the positions since
    the last multiple of `reach`.
    """

    width: int
    reach: int | None = None
    in_chunks: bool = False

    def positions(self, tokens: int) -> float:
        """Return the number of attended positions, summed over the tokens of a sequence."""
        if self.reach is None or tokens <= self.reach:
            return tokens * (tokens + 1) / 2
        of_one = self.reach * (self.reach + 1) / 2
        if not self.in_chunks:
            return of_one + (tokens - self.reach) * self.reach
        chunks, left = divmod(tokens, self.reach)
        return chunks * of_one + left * (left + 1) / 2


@dataclass(frozen=True)
class Architecture:
    """The dimensions that determine a decoder's FLOPs.

    `body_weights` is the number of matrix weights that every token passes through; in a mixture of experts, this
    includes only the experts to which a token is routed. `head_weights` is the number of weights in the output
    projection, which is computed only where a token is chosen. `attention` has one entry for each group of layers that
    attend equally far back.
    """

    body_weights: int
    head_weights: int
    attention: tuple[Attention, ...] = ()

    def with_adapter(self, of_body: int, of_head: int) -> Architecture:
        """Return this architecture with an adapter's weights added to the body and to the output projection."""
        return replace(self, body_weights=self.body_weights + of_body, head_weights=self.head_weights + of_head)


def forward_flops(arch: Architecture, input_tokens: int, output_tokens: int) -> float:
    """Return the FLOPs of one request: its prefill and the decode steps that follow.

    The last output token is never fed back into the model, so input + output - 1 tokens pass through the body. Each
    output token costs one output projection.
    """
    if output_tokens < 1:
        return 0.0
    passed = input_tokens + output_tokens - 1
    return (
        2.0 * arch.body_weights * passed
        + 2.0 * arch.head_weights * output_tokens
        + sum(4.0 * part.width * part.positions(passed) for part in arch.attention)
    )


def total_flops(arch: Architecture, requests: Iterable[tuple[int, int]]) -> float:
    """Return the FLOPs of all requests, each given as (input tokens, output tokens)."""
    return sum((forward_flops(arch, n_in, n_out) for n_in, n_out in requests), 0.0)
