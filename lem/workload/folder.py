"""Reads prompts from a local directory: a dataset with a card, a dataset saved by `datasets`, or plain files.

Plain files must all have the same format. The files that were read are reported, because a directory may contain more
files than the user expects. If a file of prompts belongs to no split, and so would never be read, the directory is
rejected.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from lem.errors import DatasetError
from lem.spec.experiment import Dataset
from lem.workload import file, hub
from lem.workload.prompts import Rows, choose_column

CARD = "README.md"
# Files that `datasets` writes next to the data.
NO_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
# All files that `datasets` never reads as data.
NEVER_DATA = (CARD, "config.json", "dummy_data.zip", *NO_DATA[:3])
# The words by which `datasets` recognizes a split in the names of files and folders, and the characters that separate
# such a word from the rest of a name.
KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
SEPARATOR = "[-._ 0-9]"
# A file such as data/train-00000-of-00002.parquet.
NUMBERED_PART = re.compile(r"data/([^/]+)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
# The keys that describe a configuration in a card; any other key is an option for the library's reader.
PLAIN = frozenset({"config_name", "data_files", "data_dir", "default"})
HIDDEN = (".", "__")
MOST_NAMED = 3


def read(folder: Path, dataset: Dataset) -> tuple[Rows, str | None]:
    """Return the rows of a directory, and the split to which they belong.

    Raises:
        DatasetError: the directory contains nothing to read, lacks the split, cannot be read, or has files of prompts
            that belong to no split.
    """
    try:
        return _rows(folder, dataset)
    except OSError as error:
        raise DatasetError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from None


def needs_library(folder: Path, dataset: Dataset) -> bool:
    """Return whether the library is needed to read a directory.

    It is needed if a configuration is requested, or if the dataset card lists configurations. It is never needed for a
    dataset written by `save_to_disk`, or if `dataset.files` selects the files.

    Raises:
        DatasetError: the card cannot be read.
    """
    if _is_saved(folder) or dataset.files is not None:
        return False
    return dataset.config is not None or bool(_configurations(folder))


def _is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _rows(folder: Path, dataset: Dataset) -> tuple[Rows, str | None]:
    if _is_saved(folder):
        return _saved(folder, dataset)
    if dataset.files is not None:
        _refuse_split(folder, dataset.split, [hub.DEFAULT_SPLIT])
        found = _matching(folder, dataset.files)
        return _read(folder, found, dataset.column), dataset.split
    split = dataset.split or hub.DEFAULT_SPLIT
    if needs_library(folder, dataset):
        plain = all(isinstance(each, dict) and PLAIN.issuperset(each) for each in _configurations(folder))
        return hub.read_folder(
            folder, dataset.config, split, partial(_read, folder, column=dataset.column) if plain else None
        ), split
    return _read(folder, _files_of(folder, split), dataset.column), split


def _matching(folder: Path, pattern: str) -> list[Path]:
    try:
        found = sorted(path for path in folder.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError):  # the pattern is empty or absolute
        found = []
    if not found:
        raise DatasetError(f"The directory {folder} contains no file that matches {pattern}.")
    return found


def _configurations(folder: Path) -> list[Any]:
    """Return the configurations in a directory's dataset card; each assigns files to splits."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    before, _, rest = text.partition("---\n")
    header = rest.partition("\n---")[0] if not before else ""
    try:
        found = yaml.safe_load(header)
    except yaml.YAMLError as error:
        raise DatasetError(f"{folder / CARD} cannot be read: {' '.join(str(error).split())[:200]}.") from None
    configurations = found.get("configs") if isinstance(found, dict) else None
    return configurations if isinstance(configurations, list) else []


def _refuse_split(folder: Path, asked: str | None, splits: Sequence[str]) -> None:
    if asked is not None and asked not in splits:
        raise DatasetError(f"The directory {folder} has no split '{asked}', only {', '.join(splits)} (--split).")


def _read(folder: Path, files: Sequence[Path], column: str | None) -> Rows:
    parts = [file.read(path, column) for path in files]
    return replace(file.together(parts), files=tuple(str(path.relative_to(folder)) for path in files))


# ------------------------------------------------------------------ plain files
def _files_of(folder: Path, split: str) -> list[Path]:
    """Return the files of a split; as in `datasets`, the names of files and folders determine the split."""
    data = sorted(_data_files(folder))
    if not data:
        raise DatasetError(f"The directory {folder} contains no file of prompts ({file.KNOWN}).")
    kinds = {str(file.kind_of(path.name)): path for path in reversed(data)}
    if len(kinds) > 1:
        named = ", ".join(str(path.relative_to(folder)) for path in sorted(kinds.values()))
        raise DatasetError(
            f"The directory {folder} contains files of several formats ({named}); name one file as the dataset, or "
            "select the files to read with dataset.files, for example dataset.files='*.csv'."
        )
    of_split = _splits(folder)
    left_out = sorted(set(data) - {path for paths in of_split.values() for path in paths})
    if left_out:
        raise DatasetError(
            f"Some files in the directory {folder} would not be read: {_named(folder, left_out)}; select the files to "
            "read with dataset.files, for example dataset.files='*.csv'."
        )
    _refuse_split(folder, split, list(of_split))
    return of_split[split]


def _data_files(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        for path in (Path(where, name) for name in names if not name.startswith(HIDDEN) and name not in NO_DATA):
            if path.suffix and file.kind_of(path.name) and path.is_file():
                yield path


def _raise(error: OSError) -> None:
    raise error


def _splits(folder: Path) -> Mapping[str, list[Path]]:
    """Return the data files of each split; as in `datasets`, the names of files and folders determine the splits.

    There are three rules: numbered parts in the folder `data`, the names of folders, and the names of files. The first
    rule that any file matches applies to all files. If no file matches a rule, all files belong to the split `train`.
    """
    names = sorted(_all_files(folder))
    data = [path for path in sorted(_data_files(folder)) if path.name not in NEVER_DATA]
    if parts := _numbered_parts(names):
        return {split: [path for path in data if _numbered_split(folder, path) == split] for split in parts}
    for is_of in (_is_in_folder_of, _is_named_after):
        splits = [split for split in KEYWORDS if any(is_of(name, split) for name in names)]
        if splits:
            return {split: [path for path in data if is_of(_name_in(folder, path), split)] for split in splits}
    return {hub.DEFAULT_SPLIT: data} if names else {}


def _all_files(folder: Path) -> Iterator[PurePosixPath]:
    """Yield the relative paths of all files whose names may determine the splits, whether or not they hold data."""
    for where, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        for name in names:
            if not name.startswith(".") and name not in NEVER_DATA and os.path.isfile(os.path.join(where, name)):
                yield _name_in(folder, Path(where, name))


def _name_in(folder: Path, path: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(folder).as_posix())


def _numbered_parts(names: Sequence[PurePosixPath]) -> list[str]:
    """Return the names of the splits that are stored in numbered parts; names in `KEYWORDS` come first."""
    found = {match[1] for name in names if (match := NUMBERED_PART.fullmatch(str(name)))}
    return [split for split in KEYWORDS if split in found] + sorted(found - KEYWORDS.keys())


def _numbered_split(folder: Path, path: Path) -> str | None:
    match = NUMBERED_PART.fullmatch(str(_name_in(folder, path)))
    return match[1] if match else None


def _is_in_folder_of(name: PurePosixPath, split: str) -> bool:
    """Return whether a keyword of the split, set off by separators, is in the name of a folder above a file."""
    return any(
        re.fullmatch(rf"(.*{SEPARATOR})?({KEYWORDS[split]})({SEPARATOR}.*)?", each) for each in name.parent.parts
    )


def _is_named_after(name: PurePosixPath, split: str) -> bool:
    """Return whether a keyword of the split, set off by separators, is in a file's name."""
    return bool(re.fullmatch(rf"(.*{SEPARATOR})?({KEYWORDS[split]}){SEPARATOR}.*", name.name))


def _named(folder: Path, paths: Sequence[Path]) -> str:
    names = ", ".join(str(path.relative_to(folder)) for path in paths[:MOST_NAMED])
    return names + (f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else "")


# ------------------------------------------------------------------ saved by the library
def _saved(folder: Path, dataset: Dataset) -> tuple[Rows, str | None]:
    """Read a dataset written by `save_to_disk`: a folder for each split, with a state.json that lists Arrow files."""
    given = [name for name in ("config", "files") if getattr(dataset, name) is not None]
    if given:
        raise DatasetError(f"The directory {folder} was written by save_to_disk; leave out dataset.{given[0]}.")
    split, place = dataset.split, folder
    if (folder / "dataset_dict.json").is_file():
        splits = _listed(folder / "dataset_dict.json", "splits")
        split = split or hub.DEFAULT_SPLIT
        _refuse_split(folder, split, splits)
        place = folder / split
    elif split is not None:
        raise DatasetError(f"The directory {folder} has no splits; leave out --split.")
    names = [Path(name).name for name in _listed(place / "state.json", "_data_files")]
    rows = file.together([_arrow(place / name, dataset.column) for name in names])
    return replace(rows, files=tuple(str((place / name).relative_to(folder)) for name in names)), split


def _listed(path: Path, key: str) -> list[str]:
    """Return the names listed in a file written by `save_to_disk`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
        return [each if isinstance(each, str) else each["filename"] for each in found]
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (ValueError, LookupError, TypeError):
        raise DatasetError(f"{path} is not a file of a saved dataset: it lists no '{key}'.") from None


def _arrow(path: Path, column: str | None) -> Rows:
    import pyarrow as pa

    try:
        with path.open("rb") as stream:
            table = pa.ipc.open_stream(stream).read_all()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{path} cannot be read as Arrow: {' '.join(str(error).split())[:200]}") from None
    chosen = choose_column(table.column_names, column, str(path)) if len(table) else None
    return file.arrow_rows(str(path), table.select([chosen] if chosen else []))
