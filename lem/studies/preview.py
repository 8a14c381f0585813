"""Describes the prompts before a run: how many were read, dropped and truncated, and the first few as they are sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from lem.errors import LemError
from lem.runner.preflight import Ready

SHOWN_PROMPTS = 3
# The beginning and the end of a long prompt are shown.
HEAD_CHARACTERS, TAIL_CHARACTERS = 200, 60
SHOWN_FILES = 5


def counts(ready: Ready) -> str:
    """Return how many prompts were read, dropped and drawn, and where they came from."""
    prompts = ready.prompts
    files = f" ({_listed(prompts.files)})" if prompts.files else ""
    empty = f", {prompts.dropped_empty} of them empty and dropped" if prompts.dropped_empty else ""
    everything = "all others used" if empty else "all used"
    is_sample = len(prompts.texts) < prompts.available
    drawn = f"{len(prompts.texts)} of {prompts.available} drawn" if is_sample else everything
    return printable(f"{prompts.read} read from {prompts.source}{files}, column {prompts.column}{empty}; {drawn}")


def _listed(files: Sequence[str]) -> str:
    more = f" and {len(files) - SHOWN_FILES} more files" if len(files) > SHOWN_FILES else ""
    return ", ".join(files[:SHOWN_FILES]) + more


def lines(ready: Ready) -> Iterator[str]:
    """Yield a dry run's description of the prompts: the counts, and the first prompts as the model receives them."""
    try:
        sent = _as_sent(ready)
    except LemError as error:
        yield f"prompts: {counts(ready)}"
        yield printable(f"the first prompts cannot be shown: {error}")
        return
    cut = sum(truncated for _, truncated, _ in sent)
    limit = ready.experiment.max_input_tokens
    yield f"prompts: {counts(ready)}" + (f"; {cut} cut to {limit} tokens" if limit is not None else "")
    yield "the first prompts as they are sent:"
    for count, truncated, text in sent[:SHOWN_PROMPTS]:
        yield f"  {count}{', cut' if truncated else ''}: {shown(text)}"


def _as_sent(ready: Ready) -> list[tuple[str, bool, str]]:
    """Return each prompt's length, whether it was cut, and its text; without `max_input_tokens`, only the first few."""
    experiment, texts = ready.experiment, ready.prompts.texts
    if experiment.max_input_tokens is None:
        texts = texts[:SHOWN_PROMPTS]
    if ready.model is None:  # the simulated backend has no tokenizer
        limit = experiment.max_input_tokens
        words = [text.split() for text in texts]
        whole = [limit is None or len(each) <= limit for each in words]
        cut = [text if fits else " ".join(each[:limit]) for text, each, fits in zip(texts, words, whole, strict=True)]
        return [(_count(len(text.split()), "word"), not fits, text) for text, fits in zip(cut, whole, strict=True)]
    from lem.backends.checkpoint import as_sent

    return [(_count(len(e.token_ids), "token"), e.truncated, t) for e, t in as_sent(experiment, ready.model, texts)]


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def shown(text: str) -> str:
    """Quote a string on one line, with unprintable characters escaped and, if it is long, the middle left out."""
    left_out = len(text) - HEAD_CHARACTERS - TAIL_CHARACTERS
    if left_out <= 0:
        return _quoted(text)
    head, tail = text[:HEAD_CHARACTERS], text[-TAIL_CHARACTERS:]
    return f"{_quoted(head)} … {left_out} more characters … {_quoted(tail)}"


def _quoted(text: str) -> str:
    return printable(json.dumps(text, ensure_ascii=False))


def printable(text: str) -> str:
    """Return a string with its unprintable characters escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
