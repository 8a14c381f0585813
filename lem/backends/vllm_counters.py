"""vLLM's own counts, which its engine and its server have under the same names, and what they give to doubt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lem.doubts import note
from lem.record import Note

# The engine's counters and what they are called in records.
COUNTERS = {
    "vllm:prompt_tokens": "prompt_tokens",
    "vllm:generation_tokens": "generation_tokens",
    "vllm:prefix_cache_queries": "prefix_cache_queried_tokens",
    "vllm:prefix_cache_hits": "prefix_cache_hit_tokens",
    "vllm:num_preemptions": "preemptions",
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted_draft_tokens",
}


def notes_of(counts: Mapping[str, float]) -> Iterator[Note]:
    """Say so where the engine did less or more work than the tokens say."""
    if hits := counts.get("prefix_cache_hit_tokens"):
        share = hits / counts["prefix_cache_queried_tokens"]
        yield note("prefix_cached", f"{hits:.0f} input tokens ({share:.0%}) came from the prefix cache.")
    if preemptions := counts.get("preemptions"):
        text = f"requests were put off {preemptions:.0f} times for want of cache, and computed anew."
        yield note("preempted", text)
