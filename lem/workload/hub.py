"""Prompts from a dataset on the Hugging Face hub, or from a local directory with a dataset card."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lem.errors import DatasetError
from lem.workload.offline import is_unreachable, use_cache_if_unreachable
from lem.workload.prompts import Row, Rows

DEFAULT_SPLIT = "train"
OFFLINE_HINT = "Use a local file, or -d sample for the prompts that come with lem."


def read(path: str, config: str | None, files: str | None, split: str | None) -> Iterator[Row]:
    """Yield the rows of one split.

    Args:
        path: the hub id.
        config: the name of a configuration, if the dataset has several.
        files: the file to read, if the repository has no configurations.
        split: the split to read; None means `train`.

    Raises:
        DatasetError: the dataset does not exist, is neither reachable nor cached, or lacks the configuration or split.
    """
    use_cache_if_unreachable()
    import datasets

    quiet(datasets)
    try:
        yield from datasets.load_dataset(path, config, data_files=files, split=split or DEFAULT_SPLIT)
    except DatasetError:
        raise
    except Exception as error:  # the library and the hub client raise many types of errors
        raise DatasetError(_sentence(path, split or DEFAULT_SPLIT, error)) from None


def read_folder(
    folder: Path, config: str | None, split: str | None, read: Callable[[Sequence[Path]], Rows] | None
) -> Rows:
    """Return the rows of one split of a local directory with a dataset card.

    Args:
        folder: the directory.
        config: the name of a configuration, if the dataset has several.
        split: the split to read; None means `train`.
        read: a function that reads the files; None if the library has to read them, because the card has options for
            the library's reader.

    Raises:
        DatasetError: the directory cannot be read as a dataset, or lacks the configuration or split.
    """
    import datasets

    quiet(datasets)
    chosen = split or DEFAULT_SPLIT
    # The library's own cache is not used, because it may be in a home directory that is not writable.
    with tempfile.TemporaryDirectory(prefix="lem-datasets-") as cache:
        try:
            builder = datasets.load_dataset_builder(str(folder), config, cache_dir=cache)
            files = list((builder.config.data_files or {}).get(chosen, ()))
            is_local = bool(files) and all(Path(name).is_relative_to(folder.resolve()) for name in files)
            # The data is streamed: the library's cache would mix up directories whose paths have the same end.
            rows = [] if read and is_local else list(builder.as_streaming_dataset(split=chosen))
        except Exception as error:  # the library raises many types of errors
            raise DatasetError(_sentence(str(folder), chosen, error)) from None
    if read and is_local:
        return read([folder / Path(name).relative_to(folder.resolve()) for name in files])
    return Rows(str(folder), "row", rows, files=tuple(files))


def quiet(datasets: Any) -> None:
    """Turn off the library's progress bars and log messages; errors are still raised as exceptions."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)


def _sentence(path: str, split: str, error: Exception) -> str:
    text = " ".join(str(error).split())[:300].rstrip(".") + "."
    if "split" in text.lower() and split in text:
        return f"Dataset {path}: {text} Choose one with --split."
    if isinstance(error, ValueError) and "config" in text.lower():
        return f"Dataset {path}: {text} Choose one with dataset.config=…"
    if Path(path).is_dir():
        return f"The directory {path} cannot be read as a dataset: {text}"
    if is_unreachable(error):
        return f"Dataset {path} is not cached on this machine, and the hub cannot be reached. {OFFLINE_HINT}"
    return f"Dataset {path} cannot be loaded: {text} {OFFLINE_HINT}"
