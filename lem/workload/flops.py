"""Model FLOPs of counted tokens, from a model's architecture.

It counts the matrix products of the forward pass, with a multiply-add as two operations: 2 for each weight that a token
passes through, and in each attention layer 4·(heads·head_dim) for each position that a token attends to (QKᵀ and the
weighted sum of V). This is the usual accounting of model FLOPs (Kaplan et al. 2020, arXiv 2001.08361, table 1;
Chowdhery et al. 2022, arXiv 2204.02311, appendix B), without the approximation that all parameters are matrices.
Padding, recomputation, norms and softmax are not counted. Knows nothing about engines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

METHOD = "formula: 2 per weight used + 4·heads·head_dim per attended position, causal, no padding"


@dataclass(frozen=True)
class Architecture:
    """The dimensions that determine a decoder's FLOPs.

    `body_weights` are the matrix weights that every token passes through (in a mixture of experts, its experts'
    weights), `head_weights` those of the output projection, which is computed only where a token is chosen.
    `attention_width` is heads·head_dim, summed over the attention layers.
    """

    body_weights: int
    head_weights: int
    attention_width: int


def forward_flops(arch: Architecture, input_tokens: int, output_tokens: int) -> float:
    """Return the FLOPs of one request: its prefill and the decode steps after it.

    The last output token is never fed back, so input + output - 1 tokens pass through the body; each output
    token costs one output projection.
    """
    if output_tokens < 1:
        return 0.0
    passed = input_tokens + output_tokens - 1
    attended = passed * (passed + 1) / 2
    return (
        2.0 * arch.body_weights * passed
        + 2.0 * arch.head_weights * output_tokens
        + 4.0 * arch.attention_width * attended
    )


def total_flops(arch: Architecture, requests: Iterable[tuple[int, int]]) -> float:
    """Return the FLOPs of requests given as (input tokens, output tokens)."""
    return sum((forward_flops(arch, n_in, n_out) for n_in, n_out in requests), 0.0)
