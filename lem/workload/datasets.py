"""Loads prompts from lem's own files, from local files or from the hub.

To add a dataset, add a YAML file to conf/dataset.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from lem.errors import DatasetError
from lem.spec.experiment import Dataset
from lem.spec.paths import expanded
from lem.workload import apart, builtin, file, folder, hub
from lem.workload.offline import use_cache_if_unreachable
from lem.workload.prompts import Prompts, Row, pick


def load_prompts(dataset: Dataset, seed: int) -> Prompts:
    """Load the configured prompts, without loading the library `datasets` into this process.

    Raises:
        DatasetError: the prompts cannot be loaded as configured; the message says what to change.
        BadInput: the path begins with `~user`, but the user does not exist.
        RunError: the process that reads a dataset through the library was killed.
    """
    if dataset.path is None:
        raise DatasetError("No prompts are configured; set --dataset, --prompts or dataset.path.")
    if not _needs_library(dataset, dataset.path):
        return load_here(dataset, seed)
    if not os.path.isdir(expanded(dataset.path)):
        use_cache_if_unreachable()  # called here, so that processes started from here are in offline mode, too
    return apart.call("datasets", load_here, dataset, seed)


def _needs_library(dataset: Dataset, path: str) -> bool:
    """Return whether the library `datasets` has to read the prompts.

    This is so if the prompts are on the hub and, in some cases, if they are in a directory (`folder.needs_library`).
    """
    local = expanded(path)
    if os.path.isdir(local):
        return folder.needs_library(local, dataset)
    return not (path.startswith(builtin.PREFIX) or os.path.lexists(local) or looks_like_a_file(path))


def load_here(dataset: Dataset, seed: int) -> Prompts:
    """Load the configured prompts in this process; `load_prompts` calls this in a separate process if necessary."""
    assert dataset.path is not None
    rows, split = _rows(dataset, dataset.path)
    return pick(rows, source=dataset.path, split=split, column=dataset.column, n=dataset.sample_size, seed=seed)


def _rows(dataset: Dataset, path: str) -> tuple[Iterable[Row], str | None]:
    if path.startswith(builtin.PREFIX):
        _refuse_split(dataset)
        return builtin.read(path), None
    local = expanded(path)
    # Path.is_file is not used, because it raises if the name is too long or a parent directory is not readable.
    if os.path.isfile(local):
        _refuse_split(dataset)
        return file.read(local, dataset.column), None
    if os.path.isdir(local):
        return folder.read(local, dataset)
    if os.path.lexists(local):
        raise DatasetError(f"{path} is not a regular file; save its content to a regular file first.")
    if looks_like_a_file(path):
        raise DatasetError(f"There is no file {path}.")
    split = dataset.split or hub.DEFAULT_SPLIT
    return hub.read(path, dataset.config, dataset.files, split), split


def _refuse_split(dataset: Dataset) -> None:
    if dataset.split is not None:
        raise DatasetError(f"{dataset.path} has no splits; leave out --split.")


def looks_like_a_file(path: str) -> bool:
    """Return whether a path that does not exist looks like a local file rather than a hub id (`owner/name`)."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).suffix.lower() in file.SUFFIXES
