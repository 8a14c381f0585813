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
from lem.workload.content import half_a_character

# Columns that hold prompts in common datasets, the most likely first.
PROMPT_COLUMNS = (
    "text", "prompt", "instruction", "question", "query", "input", "conversations", "messages", "content",
)  # fmt: skip
# How many columns a message lists.
MOST_LISTED = 20
USER_ROLES = ("human", "user")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The rows of a file or dataset, and the place of each, for messages.

    Args:
        name: the file's path or the dataset's id.
        unit: what a row is in it: a line, an item of a list, a row.
        rows: the rows.
        numbers: the number of each; None counts from 1.
        places: the place of each, if they come from several files.
        files: the files that were read, if a directory was named.
    """

    name: str
    unit: str
    rows: Sequence[Any]
    numbers: Sequence[int] | None = None
    places: Sequence[str] | None = None
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Return a row."""
        return self.rows[index]

    def place(self, index: int) -> str:
        """Return where a row is."""
        if self.places is not None:
            return self.places[index]
        return f"{self.name}, {self.unit} {self.numbers[index] if self.numbers else index + 1}"


@dataclass(frozen=True)
class Prompts:
    """The prompts of an experiment, in order.

    `available` counts the source's non-empty prompts, `dropped_empty` its empty ones; `files` are those that were read
    if the source is a directory.
    """

    texts: tuple[str, ...]
    source: str
    split: str | None
    column: str | None
    available: int
    dropped_empty: int
    files: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        """Digest of the texts in order; equal digests mean equal prompts."""
        return sha256_of(self.texts)

    @property
    def read(self) -> int:
        """Number of prompts that were read, the empty ones included."""
        return self.available + self.dropped_empty


def pick(
    rows: Iterable[Row], *, source: str, split: str | None, column: str | None, n: int | None, seed: int
) -> Prompts:
    """Take the prompts from rows: drop empty ones, then draw `n` with the seed, in the order of the source.

    Raises:
        DatasetError: no such column, no column that looks like prompts, a row without one, or no prompts; a row is
            named by its file and line.
    """
    placed = rows if isinstance(rows, Rows) else Rows(source, "row", list(rows))
    if not placed:
        raise DatasetError(f"{source} holds no prompts; give it at least one.")
    column = choose_column(list(dict.fromkeys(name for row in placed for name in row)), column, source)
    texts = [_checked_text(row, column, placed, i) for i, row in enumerate(placed)]
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
        files=placed.files,
    )


def draw(texts: Sequence[str], n: int | None, seed: int) -> list[str]:
    """Return `n` of the texts, drawn without replacement, in their order; all of them if there are fewer."""
    if n is None or n >= len(texts):
        return list(texts)
    return [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), n))]


def choose_column(columns: Sequence[str], asked: str | None, source: str, hint: str = "") -> str:
    """Return the column that holds the prompts: the requested one, otherwise the first with a common name.

    Raises:
        DatasetError: there is none; a column with another name is never taken, however much it looks like prompts.
    """
    listed = ", ".join(shortened(name, 60) for name in columns[:MOST_LISTED])
    listed += f" and {len(columns) - MOST_LISTED} more" if len(columns) > MOST_LISTED else ""
    if asked is not None:
        if asked not in columns:
            raise DatasetError(
                f"{source} has no column '{asked}'.{did_you_mean(asked, columns)} Its columns: {listed}.{hint}"
            )
        return asked
    by_name = [name for name in PROMPT_COLUMNS if name in columns]
    if by_name:
        return by_name[0]
    raise DatasetError(
        f"{source}: no column has a name that suggests prompts. Name one with --column; the columns are {listed}.{hint}"
    )


def shortened(text: str, most: int) -> str:
    """Return a text on one line, cut to a number of characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


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


def _checked_text(row: Row, column: str, rows: Rows, index: int) -> str:
    if column not in row:
        raise DatasetError(f"{rows.place(index)} has no '{column}': every row needs its prompt.")
    text = text_of(row[column])
    if text is None:
        kind = type(row[column]).__name__
        raise DatasetError(f"{rows.place(index)}: column '{column}' holds {kind} values, not text (--column).")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DatasetError(f"{rows.place(index)}: {half_a_character(text)}") from None
    return text


def sha256_of(texts: Iterable[str]) -> str:
    """Return the digest of prompts in order; equal digests mean equal prompts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()
