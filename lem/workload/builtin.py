"""The prompts that come with lem; reading them needs neither network access nor a library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources

from lem.errors import DatasetError
from lem.workload.prompts import Row

PREFIX = "builtin:"
NAMES = ("sample",)


def read(path: str) -> Iterator[Row]:
    """Yield the rows (`text`, `kind`) of the built-in dataset at a path of the form `builtin:<name>`."""
    name = path.removeprefix(PREFIX)
    if name not in NAMES:
        raise DatasetError(f"There is no built-in dataset '{name}'; the built-in datasets are {', '.join(NAMES)}.")
    with (resources.files("lem.workload") / f"{name}.jsonl").open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
