"""The contents of a checkpoint, as described by its index and the headers of its files; no weights are read.

The module detects problems that would otherwise show up only when the model is loaded: files that are missing or cut
short, and Git LFS pointers. It also reports the names and shapes of the tensors. It needs neither torch nor
transformers.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

# The names of weight files and of their indexes, in the order in which transformers looks for them.
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
POINTER = b"version https://git-lfs"
ZIP = b"PK"
# A safetensors file begins with an integer of LENGTH_BYTES bytes. This is the length of its header, which has at most
# LONGEST_HEADER bytes.
LENGTH_BYTES, LONGEST_HEADER = 8, 100_000_000

# The maximum number of names of each kind that a record keeps; if thousands are missing, the first few are enough.
KEPT = 20

Kind = Literal["pointer", "missing", "damaged"]


@dataclass(frozen=True)
class Flaw:
    """A reason why a file of a checkpoint cannot be used; `fact` is a complete sentence."""

    kind: Kind
    fact: str


@dataclass(frozen=True)
class Tensor:
    """A tensor as described in the header of its file; `dtype` is the safetensors name, such as BF16."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The tensors of one safetensors file, and the size in bytes that the complete file must have."""

    tensors: Mapping[str, Tensor]
    file_bytes: int


@dataclass(frozen=True)
class Fit:
    """The names of tensors that the checkpoint lacks, that the model does not use, or whose shapes do not match."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    @property
    def recorded(self) -> dict[str, tuple[str, ...]]:
        """The corresponding fields of a record; each lists at most `KEPT` names and says how many were left out."""
        lists = {"missing": self.missing, "unexpected": self.unexpected, "mismatched": self.mismatched}
        return {f"weights_{kind}": _shortened(names) for kind, names in lists.items()}


def flaws(folder: Path) -> Iterator[Flaw]:
    """Yield the flaws of the checkpoint files in a folder; if the folder contains no weights at all, yield nothing."""
    index = _index(folder)
    if index is not None and (flaw := _pointer(index) or _damaged_index(index)):
        yield flaw
        return
    files = weight_files(folder)
    if missing := [file.name for file in files if not file.is_file()]:
        named = f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}"
        are = "is" if len(missing) == 1 else "are"
        fact = f"{len(missing)} of the {len(files)} files named in {_name(index)} {are} missing: {named}."
        yield Flaw("missing", fact)
    for file in files:
        if file.is_file() and (flaw := _pointer(file) or _damage(file)):
            yield flaw


def has_any(folder: Path, *, of_any_name: bool = False) -> bool:
    """Return whether a folder has weights, or an index of weights, under a name that transformers looks for.

    If `of_any_name` is True, weight files with other names also count, because some engines read them (for example,
    consolidated.safetensors).
    """
    if of_any_name and any(file.suffix in SUFFIXES for file in folder.iterdir()):
        return True
    return any((folder / name).is_file() for name in (*SINGLE_FILES, *INDEX_FILES))


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers would load; some may not exist."""
    index = _index(folder)
    if index is None:
        return [folder / name for name in SINGLE_FILES if (folder / name).is_file()][:1]
    return [folder / name for name in sorted(set(_weight_map(index).values()))]


def tensors(folder: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a checkpoint by name.

    The result is None if there are no files, or if any file is missing, unreadable or not in the safetensors format.
    """
    files = weight_files(folder)
    if not files or any(file.suffix != ".safetensors" for file in files):
        return None
    found: dict[str, Tensor] = {}
    for file in files:
        try:
            found |= _header(file).tensors
        except (OSError, ValueError):
            return None
    return found


def of_integers(folder: Path) -> tuple[str, ...]:
    """Return the names of the weights stored as integers in a folder's safetensors files."""
    found = (tensors(folder) or {}).items()
    return tuple(name for name, tensor in found if name.endswith(".weight") and tensor.dtype.startswith(("I", "U")))


def archives(folder: Path) -> list[Path]:
    """Return a checkpoint's files if all are torch archives, whose tensors only torch can list; otherwise, no files."""
    files = weight_files(folder)
    are_archives = all(file.suffix != ".safetensors" and _beginning(file, len(ZIP)) == ZIP for file in files)
    return files if are_archives else []


def pointer(file: Path) -> Flaw | None:
    """Return a flaw if a file is a Git LFS pointer instead of the real file; otherwise None."""
    return _pointer(file) if file.is_file() else None


# ------------------------------------------------------------------ index
def _index(folder: Path) -> Path | None:
    """Return the index that transformers would use; None if one file contains all weights, or if there is no index."""
    for single, index in zip(SINGLE_FILES, INDEX_FILES, strict=True):
        if (folder / single).is_file():
            return None
        if (folder / index).is_file():
            return folder / index
    return None


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    is_map = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    return weight_map if is_map else {}


def _damaged_index(index: Path) -> Flaw | None:
    return None if _weight_map(index) else Flaw("damaged", f"{index} is not an index that maps weights to files.")


def _name(index: Path | None) -> str:
    return "the model" if index is None else index.name


# ------------------------------------------------------------------ files
def _pointer(file: Path) -> Flaw | None:
    if _beginning(file, len(POINTER)) != POINTER:
        return None
    return Flaw("pointer", f"{file} is a Git LFS pointer, a placeholder for the real file.")


def _damage(file: Path) -> Flaw | None:
    if file.suffix == ".safetensors":
        return _damaged_safetensors(file)
    # torch writes zip archives; older files are pickles, which cannot be checked without reading them completely.
    if _beginning(file, len(ZIP)) == ZIP and not zipfile.is_zipfile(file):
        return Flaw("damaged", f"{file} is cut short: the end of the archive is missing.")
    return None


def _damaged_safetensors(file: Path) -> Flaw | None:
    size = file.stat().st_size
    try:
        header = _header(file)
    except OSError as error:
        return Flaw("damaged", f"{file} cannot be read: {error.strerror}.")
    except ValueError:
        return Flaw("damaged", f"{file} ({size:,} bytes) has no readable header: it is damaged or cut short.")
    if size < header.file_bytes:
        return Flaw("damaged", f"{file} is cut short: it has {size:,} of {header.file_bytes:,} bytes.")
    return None


def _beginning(file: Path, count: int) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(count)
    except OSError:
        return b""


def _header(file: Path) -> Header:
    """Return a safetensors file's header.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file has no safetensors header.
    """
    status = file.stat()
    return _header_of(str(file), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _header_of(file: str, _size: int, _mtime_ns: int) -> Header:
    """Return a header; the result is cached until the file's size or modification time changes."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
        if not 0 < length <= LONGEST_HEADER:
            raise ValueError("no header")
        text = stream.read(length)
    content = json.loads(text)
    try:
        described = {name: each for name, each in content.items() if name != "__metadata__"}
        found = {name: Tensor(str(each["dtype"]), tuple(map(int, each["shape"]))) for name, each in described.items()}
        end = max((int(each["data_offsets"][1]) for each in described.values()), default=0)
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError("not a header") from error
    return Header(found, LENGTH_BYTES + length + end)


# ------------------------------------------------------------------ names
def summary(names: Sequence[Any], at_most: int = 3) -> str:
    """Return the first few names and, if some are left out, the total number."""
    shown = ", ".join(map(str, names[:at_most]))
    return shown if len(names) <= at_most else f"{shown}, … ({len(names)} in all)"


def _shortened(names: tuple[str, ...]) -> tuple[str, ...]:
    left_out = len(names) - KEPT
    return names if left_out <= 0 else (*names[:KEPT], f"… and {left_out} more")
