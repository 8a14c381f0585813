"""Prompts in a local file: json, jsonl, csv, parquet, or text with one prompt per line.

The `datasets` library reads it in streaming mode, which leaves no copy in its cache.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lem.errors import DatasetError
from lem.workload.hub import quiet
from lem.workload.prompts import Row

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of a file; with an unknown suffix it is read as text, one prompt per line.

    Raises:
        DatasetError: the file is empty or cannot be read in its format.
    """
    if path.stat().st_size == 0:
        raise DatasetError(f"{path} is empty; write one prompt per line.")
    builder = BUILDERS.get(path.suffix.lower(), "text")
    import datasets

    quiet(datasets)
    try:
        # Characters such as [1] in the file's name must not act as a pattern.
        literal, options = glob.escape(str(path.resolve())), _options(builder, path)
        yield from datasets.load_dataset(builder, data_files=literal, split="train", streaming=True, **options)
    except DatasetError:
        raise
    except Exception as error:  # each builder raises its own parser's errors
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise DatasetError(f"{path} cannot be read as {builder}: {reason}") from None


def _options(builder: str, path: Path) -> dict[str, Any]:
    """Return the options that make a builder leave the prompts unchanged."""
    if builder == "json":
        # The first chunk determines the columns, so the whole file is one chunk.
        return {"chunksize": max(10 << 20, path.stat().st_size + 1)}
    if builder == "csv":
        # Words such as None and NA are text, not missing values.
        return {"keep_default_na": False, "encoding": "utf-8-sig"}
    return {"encoding": "utf-8-sig"} if builder == "text" else {}
