"""`lem config generate-grid`: writes a config file, based on another one, for each combination of given values.

    --vary arguments ─> axes ─> points (their product, the last axis fastest) ─> checked ─> named ─> written

Hydra's grammar parses the arguments, as it does the arguments of --multirun. A point is composed by merging plain
dictionaries, then checked by the schema and the rules; Hydra would take a tenth of a second for each point. This module
does not know how points are run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from lem import __version__
from lem.config import file_schema, overrides, userfile
from lem.config.check import examine, known_keys, resolved, texts, unknown_key
from lem.config.compose import located
from lem.config.files import INDEX_KEY, is_index
from lem.config.layers import Sources, nested
from lem.config.options import CUSTOM, SUFFIXES, Options
from lem.config.problem import shortened, shown_path
from lem.config.userfile import Choice, UserFile, merged
from lem.config.yamltext import block, flow
from lem.errors import ConfigError
from lem.machine import host
from lem.machine.host import Host
from lem.runner.preflight import OUTSIDE_CAMPAIGNS, objections
from lem.spec.schema import GROUPS, leaves
from lem.studies.ask import print_warnings

INDEX = "grid.yaml"
# The version of the index's format: the value of its first key.
FORMAT = 1
MAX_POINTS = 100_000
# File systems allow names of 255 bytes; suffixes (.yaml, .part) count as well.
MAX_STEM = 180
MAX_VALUE = 60


@dataclass(frozen=True)
class Axis:
    """A key that is varied, with its values: plain values, or options of a group."""

    key: str
    values: tuple[Any, ...]

    @property
    def plain(self) -> tuple[Any, ...]:
        """The values as they are written in a file."""
        return tuple(map(_plain, self.values))


@dataclass(frozen=True)
class Point:
    """One combination: a value for each key, the name of its file, and its problems."""

    values: dict[str, Any]
    file: str
    problems: tuple[str, ...] = ()

    @property
    def plain(self) -> dict[str, Any]:
        """The values as they are written in a file, by dotted key."""
        return {key: _plain(value) for key, value in self.values.items()}


@dataclass(frozen=True)
class Grid:
    """A base file, the axes that vary, and the points: every combination of the axes' values."""

    base: UserFile
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()

    @property
    def valid(self) -> tuple[Point, ...]:
        """The points without problems."""
        return tuple(point for point in self.points if not point.problems)

    @property
    def invalid(self) -> tuple[Point, ...]:
        """The points with problems."""
        return tuple(point for point in self.points if point.problems)


def _plain(value: Any) -> Any:
    return (value.source if value.name == CUSTOM else value.name) if isinstance(value, Choice) else value


# ------------------------------------------------------------------ creating a grid
def make(base: Path, vary: Sequence[str], config_dir: Path | None = None, *, any_machine: bool = False) -> Grid:
    """Read the base, expand the axes, and check every point.

    Args:
        base: the config file that all points inherit from.
        vary: arguments such as `batch_size=1,2`, in the order in which their keys appear in file names.
        config_dir: a directory with the user's own options.
        any_machine: ignore problems specific to this machine.

    Raises:
        ConfigError: the base cannot be used, or an argument does not give values for an existing key.
    """
    file = userfile.read(base, config_dir)
    axes, notes = read_axes(vary, file.options)
    machine = host.look()
    combinations = itertools.product(*(axis.values for axis in axes))
    points = []
    for values, name in zip(combinations, stems(axes), strict=True):
        point = dict(zip((axis.key for axis in axes), values, strict=True))
        points.append(Point(point, f"{name}.yaml", judge(file, point, machine, any_machine=any_machine)))
    return Grid(file, axes, tuple(points), notes)


def read_axes(vary: Sequence[str], options: Options) -> tuple[tuple[Axis, ...], tuple[str, ...]]:
    """Parse the arguments; return the axes, and a note for each repeated value."""
    problems: list[str] = []
    notes: list[str] = []
    axes: list[Axis] = []
    for text in vary:
        try:
            axis = _axis(text, options)
        except ConfigError as error:
            problems += error.problems
            continue
        axes.append(Axis(axis.key, _distinct(axis, notes)))
    problems += _overlaps(axes)
    count = math.prod(len(axis.values) for axis in axes)
    if not problems and count > MAX_POINTS:
        problems.append(f"This grid has {count} points; at most {MAX_POINTS} can be generated.")
    if not vary:
        problems.append("No key is varied; give at least one --vary KEY=VALUE,VALUE.")
    if problems:
        raise ConfigError(*problems)
    return tuple(axes), tuple(notes)


def _axis(text: str, options: Options) -> Axis:
    key, equals, values = text.partition("=")
    if not equals or not values.strip():
        raise ConfigError(f"--vary {text}: the form must be KEY=VALUE,VALUE.")
    parsed, problems = overrides.parse([f"{full_key(key.strip())}={values}"], options)
    if problems:
        raise ConfigError(*(problem.sentence for problem in problems))
    return Axis(parsed[0].key, parsed[0].choices or parsed[0].values)


def full_key(name: str) -> str:
    """Return the dotted path of a value or group, given its whole path or only the last part of it."""
    paths = dict.fromkeys(leaf.path for leaf in leaves())
    if name in paths or name in GROUPS:
        return name
    named_so = [path for path in paths if path.rpartition(".")[2] == name]
    if len(named_so) > 1:
        raise ConfigError(f"{name} is ambiguous: {', '.join(named_so)}. Give one of these paths in full.")
    if named_so:
        return named_so[0]
    if name in known_keys():
        return name
    raise ConfigError(f"{name}: {unknown_key(tuple(name.split('.')))}")


def _distinct(axis: Axis, notes: list[str]) -> tuple[Any, ...]:
    """Return an axis's values without duplicates; 1 and 1.0 are equal if the value may be fractional."""
    allows_fractions = any("float" in str(item.annotation) for item in leaves() if item.path == axis.key)
    found: dict[str, Any] = {}
    for value in axis.values:
        plain = _plain(value)
        is_whole = isinstance(plain, int) and not isinstance(plain, bool)
        same = repr(float(plain) if is_whole and allows_fractions else plain)
        if same in found:
            notes.append(f"{axis.key}: {flow(plain)} is given more than once, but is used only once.")
        found.setdefault(same, value)
    return tuple(found.values())


def _overlaps(axes: Sequence[Axis]) -> Iterator[str]:
    times = Counter(axis.key for axis in axes)
    yield from (
        f"{key} is varied more than once; give all its values in one --vary." for key, n in times.items() if n > 1
    )
    for key, other in itertools.permutations(times, 2):
        if other.startswith(f"{key}.") and key not in GROUPS:
            yield f"{other} is part of {key}, which is also varied; vary only one of them."


def judge(base: UserFile, point: dict[str, Any], machine: Host, *, any_machine: bool = False) -> tuple[str, ...]:
    """Return why a point cannot be run: problems with its values or, if there are none, blocking objections."""
    sources = _sources(base, point)
    values, unresolved = resolved(sources.values())
    experiment, found = examine(values)
    if unresolved or experiment is None:
        return tuple(dict.fromkeys(str(problem) for problem in located(sources, [*unresolved, *found])))
    return tuple(
        str(objection)
        for objection in objections(experiment, machine)
        if objection.severity != "warning"
        and not (any_machine and objection.scope == "machine")
        and objection.code not in OUTSIDE_CAMPAIGNS
    )


def _sources(base: UserFile, point: dict[str, Any]) -> Sources:
    choices = {key: value for key, value in point.items() if isinstance(value, Choice)}
    return Sources.of(base, choices, {key: value for key, value in point.items() if key not in choices})


# ------------------------------------------------------------------ names
def stems(axes: Sequence[Axis]) -> Iterator[str]:
    """Yield the name of each point's file, without the suffix, such as `batch_size-4--fp_precision-float16`.

    A name contains only letters, digits, `_`, `-` and `.`, so that no shell, glob or Hydra override misreads it. Names
    are unique even if the file system ignores case.
    """
    last = Counter(axis.key.rpartition(".")[2] for axis in axes)
    short = (axis.key.rpartition(".")[2] for axis in axes)
    labels = [name if last[name] == 1 else axis.key for axis, name in zip(axes, short, strict=True)]
    parts = [[f"{label}-{slug}" for slug in _slugs(axis.plain)] for label, axis in zip(labels, axes, strict=True)]
    for combination in itertools.product(*parts):
        yield _shortened("--".join(combination), MAX_STEM)


def _slugs(values: Sequence[Any]) -> list[str]:
    """Return a word for each value; words that would be empty or identical get a hash."""
    words = [_word(value) for value in values]
    times = Counter(word.casefold() for word in words)
    return [
        _shortened(word, MAX_VALUE) if times[word.casefold()] == 1 and word else f"{word[:MAX_VALUE]}-{_digest(value)}"
        for word, value in zip(words, values, strict=True)
    ]


def _word(value: Any) -> str:
    text = value if isinstance(value, str) else flow(value)
    if isinstance(value, (int, float)):
        text = re.sub(r"^-", "minus", text)
    # Runs of dashes become one dash, because two dashes separate the values in a name.
    return re.sub(r"-{2,}", "-", re.sub(r"[^A-Za-z0-9.-]+", "_", text)).strip("_.-")


def _shortened(word: str, limit: int) -> str:
    return word if len(word) <= limit else f"{word[:limit].rstrip('_.-')}-{_digest(word)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:8]


# ------------------------------------------------------------------ the files
def file_text(point: Point, parent: str, about: str) -> str:
    """Return the text of a point's file: its parent and the values that distinguish this point."""
    tree: dict[str, Any] = {}
    # Options come first, so that a group's other values are added to the mapping with the option's name.
    for key, value in sorted(point.values.items(), key=lambda item: not isinstance(item[1], Choice)):
        if isinstance(value, Choice) and any(other.startswith(f"{key}.") for other in point.values):
            tree[key] = {"name": _plain(value)}
        else:
            tree = merged(tree, nested(key, _plain(value)))
    return _text([file_schema.EDITOR_LINE, f"# {about}", f"defaults: [{flow(parent)}]", *block(tree)])


def group_text(base: UserFile, point: Point, about: str) -> str:
    """Return the text of a point's file as an option of a plain Hydra config group, with all values and no parent."""
    values, _ = resolved(_sources(base, point.values).values())
    if any("${" in text for _, text in texts(values)):
        raise ConfigError(f"{point.file}: a value contains '${{', which Hydra would resolve again; change the value.")
    # Without this, Hydra would merge the values with the values of the default backend, which has other keys.
    engine = f"defaults: [override /backend: {flow(values['backend']['name'])}, _self_]"
    return _text(["# @package _global_", file_schema.EDITOR_LINE, f"# {about}", engine, *block(values)])


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------ writing
def write(
    grid: Grid, folder: Path, points: Sequence[Point], *, force: bool = False, as_group: bool = False
) -> dict[str, Any]:
    """Write the points' files, the index and the schema for editors; return the index.

    Args:
        grid: the grid.
        folder: the folder to write to; created if it does not exist.
        points: the points to write; the remaining points of the grid are listed as skipped.
        force: replace an earlier grid in that folder; other files in it are not touched.
        as_group: write options of a Hydra config group instead of files that inherit from the base.

    Raises:
        ConfigError: the folder cannot be used, or other files in it would be overwritten.
    """
    assert grid.base.path is not None
    base = grid.base.path.parent.resolve() / grid.base.path.name
    stale = _earlier_files(folder, {point.file for point in points}, base, force=force)
    index = _index(grid, points, os.path.relpath(base, folder.resolve()))
    parent, contents = _parent(base, folder), []
    for number, point in enumerate(points, start=1):
        about = f"Point {number} of {len(points)} of the grid in {INDEX}; written by lem config generate-grid."
        contents.append(group_text(grid.base, point, about) if as_group else file_text(point, parent, about))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in stale:
            file.unlink(missing_ok=True)
        # The index is written first, so that it lists all files of the grid even if writing is interrupted.
        (folder / INDEX).write_text(_index_text(index), encoding="utf-8")
        for point, text in zip(points, contents, strict=True):
            (folder / point.file).write_text(text, encoding="utf-8")
        file_schema.write_beside(folder / INDEX, grid.base.options)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot write the grid to this folder: {error.strerror}.") from None
    return index


def _parent(base: Path, folder: Path) -> str:
    """Return the name by which files in the folder refer to the base, without its suffix unless that is needed."""
    full = os.path.relpath(base, folder.resolve())
    stem = base.with_suffix("")
    candidates = [stem, *(stem.with_name(stem.name + suffix) for suffix in SUFFIXES)]
    is_plain = base.suffix in SUFFIXES and next((c for c in candidates if c.is_file()), None) == base
    return full.removesuffix(base.suffix) if is_plain and stem.name != "_self_" else full


def _earlier_files(folder: Path, names: set[str], base: Path, *, force: bool) -> list[Path]:
    """Return the files of an earlier grid that the new grid lacks.

    Raises `ConfigError` if the folder contains a grid and `force` is False, or if other files would be overwritten.
    """
    index = folder / INDEX
    earlier: set[str] = set()
    if os.path.lexists(index):
        if not is_index(index):
            raise ConfigError(f"{index} is not a grid index; choose another --output-dir.")
        if not force:
            raise ConfigError(
                f"{folder} already contains a grid; use --force to replace it, or choose another --output-dir."
            )
        earlier = _listed_files(index)
    if base.parent == folder.resolve() and base.name in earlier | names:
        raise ConfigError(f"{shown_path(base)} is itself one of the grid's files; choose another --output-dir.")
    others = sorted(name for name in names - earlier if os.path.lexists(folder / name))
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ConfigError(f"{folder / others[0]}{more} would be overwritten; choose another --output-dir.")
    return [folder / name for name in sorted(earlier - names)]


def _listed_files(index: Path) -> set[str]:
    """Return the names that an index lists, ignoring names of files outside its folder."""
    try:
        content = yaml.load(index.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        names = {str(entry["file"]) for entry in content["files"]}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, KeyError):
        raise ConfigError(f"{index}: the index cannot be read; delete it.") from None
    return {name for name in names if Path(name).name == name and name.endswith(SUFFIXES) and name != INDEX}


def _index(grid: Grid, points: Sequence[Point], base: str) -> dict[str, Any]:
    written = {point.file for point in points}
    return {
        INDEX_KEY: FORMAT,
        "lem_version": __version__,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": base,
        "vary": {axis.key: list(axis.plain) for axis in grid.axes},
        "files": [
            {"file": point.file, "point": point.plain, **({"problems": list(point.problems)} if point.problems else {})}
            for point in points
        ],
        "skipped": [
            {"point": point.plain, "problems": list(point.problems)}
            for point in grid.points
            if point.file not in written
        ],
    }


def _index_text(index: dict[str, Any]) -> str:
    """Return the index as text, with a line for each file; PyYAML would take longer than everything else combined."""
    lines = [
        "# The index of a grid written by lem config generate-grid: its files and their source. Not a config file."
    ]
    for key, value in index.items():
        if isinstance(value, list) and value:
            lines += [f"{key}:", *(f"  - {flow(entry)}" for entry in value)]
        else:
            lines += block({key: value})
    return _text(lines)


# ------------------------------------------------------------------ the command
@dataclass(frozen=True)
class GridOptions:
    """The options for generating a grid, apart from its content."""

    # Leave out the invalid points.
    validate: bool = False
    # Write nothing if any point is invalid.
    strict: bool = False
    force: bool = False
    any_machine: bool = False
    as_group: bool = False
    as_json: bool = False


def generate(
    base: Path, vary: Sequence[str], folder: Path, options: GridOptions, config_dir: Path | None = None
) -> int:
    """Generate a grid and print a summary; return the exit code.

    Raises:
        ConfigError: the grid cannot be generated; nothing has been written.
    """
    grid = make(base, vary, config_dir, any_machine=options.any_machine)
    points = grid.valid if options.validate else grid.points
    if grid.invalid and (options.strict or not points):
        headline = f"Nothing was written because of invalid points ({len(grid.invalid)} of {len(grid.points)})."
        raise ConfigError(headline, *reasons(grid.invalid))
    index = write(grid, folder, points, force=options.force, as_group=options.as_group)
    for note in grid.notes:
        print(f"Note: {note}", file=sys.stderr)
    if options.as_json:
        print(json.dumps(index, indent=2, ensure_ascii=False))
    else:
        _print_summary(grid, folder, len(points))
    return 0


def _print_summary(grid: Grid, folder: Path, written: int) -> None:
    if grid.invalid:
        is_left_out = written < len(grid.points)
        what = "left out" if is_left_out else "written all the same"
        print_warnings(f"Invalid points ({len(grid.invalid)} of {len(grid.points)}) are {what}:")
        for reason in reasons(grid.invalid):
            print(_indented(reason), file=sys.stderr)
        if not is_left_out:
            print("Use --validate to leave them out, or --strict to write nothing in this case.", file=sys.stderr)
    print(f"{written} config file{'' if written == 1 else 's'} in {folder}, listed in {folder / INDEX}")
    for axis in grid.axes:
        print(_indented(f"{axis.key}: {_enumerated(axis.plain)}"))
    print(f"Run them with: lem batch {shlex.quote(str(folder))}")


def _indented(text: str) -> str:
    return textwrap.fill(text, 80, initial_indent="  ", subsequent_indent="    ")


def _enumerated(values: Sequence[Any]) -> str:
    words = [shortened(flow(value)) for value in values]
    return ", ".join(words) if len(words) <= 10 else f"{', '.join(words[:5])}, … {words[-1]} ({len(words)} values)"


def reasons(points: Iterable[Point], limit: int = 10) -> Iterator[str]:
    """Yield each reason why points are invalid, with the number of points affected and the first point's values."""
    found: dict[str, list[Point]] = {}
    for point in points:
        for problem in point.problems:
            found.setdefault(problem, []).append(point)
    for problem, same in itertools.islice(found.items(), limit):
        first = ", ".join(f"{key}={shortened(flow(value))}" for key, value in same[0].plain.items())
        yield f"{problem} [{len(same)} points; {first}]" if len(same) > 1 else f"{problem} [{first}]"
    if len(found) > limit:
        yield f"… and {len(found) - limit} more."
