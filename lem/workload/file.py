"""Prompts in a local file: json, jsonl, csv, parquet, or text with a prompt on each line.

Read by the `datasets` library in its streaming mode, which leaves no copy in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lem.errors import DatasetError
from lem.workload.hub import quiet
from lem.workload.prompts import Row

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
        options = _options(builder, path)
        yield from datasets.load_dataset(builder, data_files=_literal(path), split="train", streaming=True, **options)
    except DatasetError:
        raise
    except Exception as error:  # each builder raises the errors of the parser behind it
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise DatasetError(f"{path} cannot be read as {builder}: {reason}") from None


def _options(builder: str, path: Path) -> dict[str, Any]:
    """Return what a builder needs so that it changes nothing in the prompts."""
    if builder == "json":
        # The columns are those of the first chunk, so the whole file is one.
        return {"chunksize": max(10 << 20, path.stat().st_size + 1)}
    if builder == "csv":
        # Words such as None and NA are text here, not missing numbers.
        return {"keep_default_na": False, "encoding": "utf-8-sig"}
    return {"encoding": "utf-8-sig"} if builder == "text" else {}


def _literal(path: Path) -> str:
    import glob

    return glob.escape(str(path.resolve()))
