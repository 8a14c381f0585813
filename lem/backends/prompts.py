"""Prompts as token ids, and the ids that end an output: the same for every engine that runs the same model.

Works with a tokenizer of transformers that has been loaded. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lem.backends.base import Encoded
from lem.errors import RunError
from lem.spec.experiment import Experiment


def encode(tokenizer: Any, texts: Sequence[str], experiment: Experiment, positions: int | None) -> list[Encoded]:
    """Tokenize each text by itself, with the model's own special tokens, and cut it to `max_input_tokens`.

    Args:
        tokenizer: the model's.
        texts: the prompts.
        experiment: says whether there is a chat template, and the limits.
        positions: tokens that a prompt and its output may have together; None where there is no limit.

    Raises:
        RunError: a prompt without tokens, or one that does not fit.
    """
    limit = experiment.max_input_tokens
    encoded = []
    for index, text in enumerate(texts):
        ids = _token_ids(tokenizer, text, chat=experiment.chat_template)
        encoded.append(Encoded(index, tuple(ids[:limit]), limit is not None and len(ids) > limit))
    _check_lengths(encoded, positions, experiment.max_output_tokens)
    return encoded


def _token_ids(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(text)["input_ids"])
    turns = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    # The template writes the special tokens itself.
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _check_lengths(encoded: Sequence[Encoded], positions: int | None, max_output_tokens: int) -> None:
    """Refuse prompts that do not fit into the model's positions, before anything is measured."""
    if not encoded:
        return
    empty = next((p for p in encoded if not p.token_ids), None)
    if empty is not None:
        raise RunError(f"Prompt {empty.index} has no tokens in this model's tokenizer; leave it out.")
    longest = max(encoded, key=lambda p: len(p.token_ids))
    if positions is not None and len(longest.token_ids) + max_output_tokens > positions:
        raise RunError(
            f"Prompt {longest.index} has {len(longest.token_ids)} tokens; with max_output_tokens {max_output_tokens} "
            f"that is more than the model's {positions} positions. "
            f"Set max_input_tokens={max(1, positions - max_output_tokens)} or less."
        )


def end_tokens(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """Return the ids that end a sequence, as the model's generation config has them, else the tokenizer's."""
    ids = generation_config.eos_token_id
    if ids is None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
