"""TTFT, inter-token latency and time per output token of one request, computed from its chunks of tokens.

An engine delivers tokens in chunks. Most chunks have one token; with speculative decoding or over a network, a chunk
can have several. Latencies are per token, never per chunk: the tokens of a chunk are spread evenly over the time since
the previous chunk. This module knows nothing about engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lem.quantities import NS_PER_S


@dataclass(frozen=True)
class Chunk:
    """Tokens that arrived together, at `at_ns` on the clock of the backend."""

    at_ns: int
    tokens: int


@dataclass(frozen=True)
class TokenTimes:
    """The latencies of one request's tokens.

    `ttft_s` is the time to the first token, `itl_s` holds the gap before each later token, and `tpot_s` is the mean
    gap, or None if there is only one token. `spread` says whether any chunk had several tokens, so that some gaps were
    not measured one by one.
    """

    ttft_s: float
    itl_s: tuple[float, ...]
    tpot_s: float | None
    spread: bool


def token_times(start_ns: int, chunks: Sequence[Chunk]) -> TokenTimes | None:
    """Return the latencies of a request's tokens, or None if it has no tokens.

    Args:
        start_ns: the time from which latency counts: the request's arrival or, without traffic, its start.
        chunks: the tokens as they arrived, in order. All tokens of the first chunk arrived together, so the gaps
            between them are 0.
    """
    chunks = [chunk for chunk in chunks if chunk.tokens > 0]
    if not chunks:
        return None
    first, last = chunks[0], chunks[-1]
    gaps = [0.0] * (first.tokens - 1)
    for before, chunk in pairwise(chunks):
        gaps += [(chunk.at_ns - before.at_ns) / NS_PER_S / chunk.tokens] * chunk.tokens
    return TokenTimes(
        ttft_s=(first.at_ns - start_ns) / NS_PER_S,
        itl_s=tuple(gaps),
        tpot_s=(last.at_ns - first.at_ns) / NS_PER_S / len(gaps) if gaps else None,
        spread=any(chunk.tokens > 1 for chunk in chunks),
    )


def first_tokens(chunks: Sequence[Chunk], count: int) -> tuple[Chunk, ...]:
    """Return the chunks cut to the first `count` tokens; an engine may have continued after the end token."""
    kept: list[Chunk] = []
    for chunk in chunks:
        if count <= 0:
            break
        kept.append(Chunk(chunk.at_ns, min(chunk.tokens, count)))
        count -= chunk.tokens
    return tuple(kept)
