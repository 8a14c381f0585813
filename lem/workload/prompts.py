"""Prompts: taking the text from rows, dropping empty ones, drawing a sample.

Rows are mappings from column names to values; nothing here knows where they come from.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lem.errors import DatasetError, did_you_mean

# Columns that hold prompts in common datasets, the most likely first.
PROMPT_COLUMNS = (
    "text", "prompt", "instruction", "question", "query", "input", "conversations", "messages", "content",
)  # fmt: skip
USER_ROLES = ("human", "user")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Prompts:
    """The prompts of an experiment, in order.

    `available` counts the source's non-empty prompts, `dropped_empty` its empty ones.
    """

    texts: tuple[str, ...]
    source: str
    split: str | None
    column: str | None
    available: int
    dropped_empty: int

    @property
    def sha256(self) -> str:
        """Digest of the texts in order; equal digests mean equal prompts."""
        return sha256_of(self.texts)


def pick(
    rows: Iterable[Row], *, source: str, split: str | None, column: str | None, n: int | None, seed: int
) -> Prompts:
    """Take the prompts from rows: drop empty ones, then draw `n` with the seed, in the order of the source.

    Raises:
        DatasetError: no such column, no column that looks like prompts, values that are not text, or no prompts.
    """
    rows = list(rows)
    if not rows:
        raise DatasetError(f"{source} holds no prompts; give it at least one line.")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    column = choose_column(columns, column, rows, source)
    texts = [_checked_text(row.get(column), column, source) for row in rows]
    filled = [text for text in texts if text.strip()]
    if not filled:
        raise DatasetError(f"{source}: all prompts in column '{column}' are empty.")
    return Prompts(
        texts=tuple(draw(filled, n, seed)),
        source=source,
        split=split,
        column=column,
        available=len(filled),
        dropped_empty=len(texts) - len(filled),
    )


def draw(texts: Sequence[str], n: int | None, seed: int) -> list[str]:
    """Return `n` of the texts, drawn without replacement, in their order; all of them if there are fewer."""
    if n is None or n >= len(texts):
        return list(texts)
    return [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), n))]


def choose_column(columns: Sequence[str], asked: str | None, rows: Sequence[Row], source: str) -> str:
    """Return the column that holds the prompts: the requested one, otherwise the first that looks suitable."""
    if asked is not None:
        if asked not in columns:
            raise DatasetError(
                f"{source} has no column '{asked}'.{did_you_mean(asked, columns)} Its columns: {', '.join(columns)}."
            )
        return asked
    by_name = [name for name in PROMPT_COLUMNS if name in columns]
    textual = by_name or [name for name in columns if isinstance(rows[0].get(name), str)]
    if by_name or len(textual) == 1:
        return textual[0]
    raise DatasetError(
        f"{source}: no column looks like prompts. Name one with --column; the columns are {', '.join(columns)}."
    )


def text_of(value: Any) -> str | None:
    """Return a cell's prompt: the text itself, or the first user turn of a conversation; None if neither.

    A conversation is a list of turns, `{"from": "human", "value": …}` (ShareGPT) or
    `{"role": "user", "content": …}`. A conversation without a user turn is empty, and so is a missing cell.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(turn, Mapping) for turn in value):
        return next((text for turn in value if (text := _user_text(turn)) is not None), "")
    return None


def _user_text(turn: Row) -> str | None:
    role = turn.get("from", turn.get("role"))
    text = turn.get("value", turn.get("content"))
    if isinstance(text, (list, tuple)):
        # Content in parts: text and perhaps images, which are left out.
        parts = [part.get("text") for part in text if isinstance(part, Mapping)]
        text = "\n".join(part for part in parts if isinstance(part, str))
    return text if role in USER_ROLES and isinstance(text, str) else None


def _checked_text(value: Any, column: str, source: str) -> str:
    text = text_of(value)
    if text is None:
        raise DatasetError(
            f"{source}: column '{column}' holds {type(value).__name__} values, not text; name another with --column."
        )
    return text


def sha256_of(texts: Iterable[str]) -> str:
    """Return the digest of prompts in order; equal digests mean equal prompts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()
