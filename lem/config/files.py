"""Finds the config files to which command-line arguments (files, folders, glob patterns) refer; parses no file."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lem.config.options import SUFFIXES
from lem.errors import BadInput, ConfigError
from lem.spec.paths import expanded

# The first key of a grid's index file, which shows that the file is not a config file.
INDEX_KEY = "lem_grid"


def find(patterns: Sequence[str]) -> list[Path]:
    """Return the config files that files, folders and glob patterns refer to, in order and without duplicates."""
    return _each_once(path for files in find_each(patterns) for path in files)


def find_each(patterns: Sequence[str]) -> list[list[Path]]:
    """Return, for each of the given files, folders and glob patterns, the config files that it matches.

    A grid's index is skipped if config files of the same grid are given too, because a shell expands `grid/*.yaml` to
    the index and the config files. An index that is given without any config file of its grid is an error.

    Raises:
        ConfigError: some patterns match no config file; the message lists all of them.
    """
    found: list[list[Path]] = []
    problems = []
    indexes: dict[str, Path] = {}
    for pattern in patterns:
        try:
            hits = list(_matches(pattern))
        except BadInput as error:
            problems.append(str(error))
            continue
        files = [path for path in hits if not is_index(path)]
        if hits == [expanded(pattern)] and not files:
            indexes[pattern] = hits[0]
        elif not files:
            hint = "" if glob.has_magic(pattern) or Path(pattern).exists() else " There is no such file."
            problems.append(f"{pattern!r} matches no config file (.yaml, .yml).{hint}")
        found.append(_each_once(files))
    folders = {path.resolve().parent for files in found for path in files}
    problems += [
        f"{pattern!r} matches no config file (.yaml, .yml): this file is the index of a grid. Give its folder instead."
        for pattern, index in indexes.items()
        if index.resolve().parent not in folders
    ]
    if problems:
        raise ConfigError(*problems)
    return found


def _each_once(files: Iterable[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for file in files:
        found.setdefault(file.resolve(), file)
    return list(found.values())


def _matches(pattern: str) -> Iterator[Path]:
    path = expanded(pattern)
    if path.is_dir():
        hits = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    elif path.exists():
        hits = [path]
    else:
        hits = [Path(hit) for hit in glob.glob(str(path), recursive=True)]
    return (hit for hit in sorted(hits) if hit.suffix in SUFFIXES and hit.is_file())


def is_index(path: Path) -> bool:
    """Return whether a file is the index of a grid rather than a config file."""
    try:
        with path.open(encoding="utf-8") as file:
            return any(line.startswith(f"{INDEX_KEY}:") for line in itertools.islice(file, 5))
    except (OSError, UnicodeDecodeError):
        return False  # the problem is reported when the file is read as a config file
