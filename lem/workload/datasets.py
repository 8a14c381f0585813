"""The family of prompt sources: built-in, local files, the hub. A new dataset is only a YAML file in conf/dataset."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lem.errors import DatasetError
from lem.spec.experiment import Dataset
from lem.workload import builtin, file, hub
from lem.workload.prompts import Prompts, Row, pick


def load_prompts(dataset: Dataset, seed: int) -> Prompts:
    """Load the configured prompts.

    Raises:
        DatasetError: they cannot be loaded as configured; the message says which can.
    """
    if dataset.path is None:
        raise DatasetError("No prompts: name them with --dataset, --prompts or dataset.path.")
    rows, split = _rows(dataset, dataset.path)
    return pick(rows, source=dataset.path, split=split, column=dataset.column, n=dataset.sample_size, seed=seed)


def _rows(dataset: Dataset, path: str) -> tuple[Iterable[Row], str | None]:
    local, is_builtin = Path(path).expanduser(), path.startswith(builtin.PREFIX)
    if is_builtin or local.is_file():
        if dataset.split is not None:
            raise DatasetError(f"{dataset.path} has no splits; leave out --split.")
        return builtin.read(path) if is_builtin else file.read(local), None
    if not local.is_dir() and looks_like_a_file(path):
        raise DatasetError(f"There is no file {path}.")
    split = dataset.split or hub.DEFAULT_SPLIT
    return hub.read(str(local) if local.is_dir() else path, dataset.config, dataset.files, split), split


def looks_like_a_file(path: str) -> bool:
    """Return whether a path that does not exist means a local file, not a hub id (`owner/name`)."""
    return path.startswith(("/", ".", "~")) or path.count("/") > 1 or Path(path).suffix in file.BUILDERS
