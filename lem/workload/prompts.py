"""Turns rows into prompts: chooses the column, drops empty prompts and draws a sample.

Rows are mappings from column names to values. This module knows nothing about their source.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lem.errors import DatasetError, did_you_mean
from lem.workload.content import half_a_character

# Names of the prompt column in common datasets, the most likely first.
PROMPT_COLUMNS = (
    "text", "prompt", "instruction", "question", "query", "input", "conversations", "messages", "content",
)  # fmt: skip
# The maximum number of columns that a message lists.
MOST_LISTED = 20
USER_ROLES = ("human", "user")
# The beginning of a list of turns in JSON.
CONVERSATION = re.compile(r"\s*\[\s*\{\s*\"")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """The rows of a file or dataset, with the location of each row for use in messages.

    Args:
        name: the file's path or the dataset's id.
        unit: the word for a row in this format, such as line, item or row.
        rows: the rows.
        numbers: the number of each row in its source, such as a line number; None means that rows are counted from 1.
        places: the location of each row, if the rows come from several files.
        files: the files that were read, if the dataset is a directory.
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
        """Return the location of a row, for messages."""
        if self.places is not None:
            return self.places[index]
        return f"{self.name}, {self.unit} {self.numbers[index] if self.numbers else index + 1}"


@dataclass(frozen=True)
class Prompts:
    """The prompts of an experiment, in order.

    `available` is the number of non-empty prompts in the source, and `dropped_empty` is the number of empty prompts.
    `files` lists the files that were read, if the source is a directory.
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
        """The digest of the texts, in order; equal digests mean equal prompts."""
        return sha256_of(self.texts)

    @property
    def read(self) -> int:
        """The number of prompts read from the source, including empty ones."""
        return self.available + self.dropped_empty


def pick(
    rows: Iterable[Row], *, source: str, split: str | None, column: str | None, n: int | None, seed: int
) -> Prompts:
    """Take the prompts from rows: drop empty prompts, then draw `n` with the seed, keeping the order of the source.

    Raises:
        DatasetError: the column does not exist, no column has a name that suggests prompts, a row has no prompt or one
            that is not text, or there are no prompts. If a row is at fault, the message gives its location.
    """
    placed = rows if isinstance(rows, Rows) else Rows(source, "row", list(rows))
    if not placed:
        raise DatasetError(f"{source} contains no prompts; add at least one.")
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
    """Return `n` of the texts, drawn without replacement, in their original order; all if `n` is None or too large."""
    if n is None or n >= len(texts):
        return list(texts)
    return [texts[i] for i in sorted(random.Random(seed).sample(range(len(texts)), n))]


def choose_column(columns: Sequence[str], asked: str | None, source: str, hint: str = "") -> str:
    """Return the column that holds the prompts: the requested column or else the first of `PROMPT_COLUMNS` that exists.

    No other column is ever used, even if it seems to contain prompts.

    Raises:
        DatasetError: there is no such column.
    """
    listed = ", ".join(shortened(name, 60) for name in columns[:MOST_LISTED])
    listed += f" and {len(columns) - MOST_LISTED} more" if len(columns) > MOST_LISTED else ""
    if asked is not None:
        if asked not in columns:
            raise DatasetError(
                f"{source} has no column '{asked}'.{did_you_mean(asked, columns)} Its columns: {listed}.{hint}"
            )
        return _once(asked, columns, source)
    by_name = [name for name in PROMPT_COLUMNS if name in columns]
    if by_name:
        return _once(by_name[0], columns, source)
    raise DatasetError(
        f"{source}: no column has a name that suggests prompts. Name one with --column; the columns are {listed}.{hint}"
    )


def _once(column: str, columns: Sequence[str], source: str) -> str:
    if columns.count(column) > 1:
        raise DatasetError(f"{source} has more than one column named '{column}'; rename the others.")
    return column


def shortened(text: str, most: int) -> str:
    """Return the text on one line, cut to at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def text_of(value: Any) -> str | None:
    """Return the prompt in a table's cell: its text, or the first user turn of a conversation; None for other values.

    A conversation is a list of turns, `{"from": "human", "value": …}` (ShareGPT) or
    `{"role": "user", "content": …}`. The prompt is empty if the cell is missing or the conversation has no user turn.
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
        # The content is a list of parts; only text parts are used, and images are left out.
        parts = [part.get("text") for part in text if isinstance(part, Mapping)]
        text = "\n".join(part for part in parts if isinstance(part, str))
    return text if role in USER_ROLES and isinstance(text, str) else None


def _checked_text(row: Row, column: str, rows: Rows, index: int) -> str:
    if column not in row:
        raise DatasetError(f"{rows.place(index)} has no '{column}': every row needs a prompt.")
    text = text_of(row[column])
    if text is None:
        kind = type(row[column]).__name__
        raise DatasetError(
            f"{rows.place(index)}: column '{column}' contains {kind} values, not text; choose another with --column."
        )
    if _is_conversation(text):
        raise DatasetError(
            f"{rows.place(index)}: column '{column}' contains a conversation in the form of JSON text, which would be "
            "sent unchanged as the prompt; convert the conversation to a list of turns."
        )
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DatasetError(f"{rows.place(index)}: {half_a_character(text)}") from None
    return text


def _is_conversation(text: str) -> bool:
    """Return whether a text is a list of turns in JSON rather than a prompt."""
    if not CONVERSATION.match(text):
        return False
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        return False
    keys = ({"role", "content"}, {"from", "value"})
    return isinstance(turns, list) and all(
        isinstance(t, dict) and any(each <= t.keys() for each in keys) for t in turns
    )


def sha256_of(texts: Iterable[str]) -> str:
    """Return the digest of prompts, in order; equal digests mean equal prompts."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(json.dumps(text).encode() + b"\n")
    return digest.hexdigest()
