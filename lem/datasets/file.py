"""Prompts in a local file: json, jsonl, csv, parquet, or text with a prompt on each line.

Read by the `datasets` library in its streaming mode, which leaves no copy in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lem.datasets.base import Row
from lem.datasets.hub import quiet
from lem.errors import DatasetError

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
}


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of a file; a suffix that names no format is read as text, a prompt on each line.

    Raises:
        DatasetError: the file is empty or cannot be read in its format.
    """
    if path.stat().st_size == 0:
        raise DatasetError(f"{path} is empty; write a prompt on each line.")
    builder = BUILDERS.get(path.suffix.lower(), "text")
    import datasets

    quiet(datasets)
    try:
        # A pattern in the file's name (such as [1]) must not be read as one.
        rows = datasets.load_dataset(builder, data_files=_literal(path), split="train", streaming=True)
        yield from rows
    except DatasetError:
        raise
    except Exception as error:  # each builder raises the errors of the parser behind it
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise DatasetError(f"{path} cannot be read as {builder}: {reason}") from None


def _literal(path: Path) -> str:
    import glob

    return glob.escape(str(path.resolve()))
