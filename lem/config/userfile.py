"""A user's config file: read with its parents, checked for shape, and split into chosen options and given values.

A file may choose options of config groups, set values, and inherit from other files. It chooses an option with
`backend: pytorch`, or with `name:` inside the group's mapping. It lists its parents under `defaults:`, where `- base`
means `base.yaml` in the same directory. Each file stays a separate layer, so that every value has a file and a line.
This module does not compose anything or check values against the schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from lem.config import yamlfile
from lem.config.options import CUSTOM, SUFFIXES, Options
from lem.config.problem import Location, Problem, Problems, impossible, shortened
from lem.config.yamlfile import KeyPath, dotted, kind_of
from lem.errors import did_you_mean
from lem.spec.experiment import Decoder
from lem.spec.schema import GROUPS, leaves

STAYS_WHEN_OPTION_CHANGES = {
    "dataset": frozenset({"sample_size"}),
    "energy": frozenset({"country_iso_code", "carbon_intensity_g_per_kwh", "carbon_trace"}),
}
MAX_FILES = 100
# These parts of the schema are mappings; neither a list nor a scalar can replace them.
PARTS = tuple(dict.fromkeys(leaf.path.partition(".")[0] for leaf in leaves() if "." in leaf.path))


@dataclass(frozen=True)
class Choice:
    """An option chosen for a group. In the group `preset`, a name of None means no preset; elsewhere, the default."""

    name: str | None
    # The hub id or file of a dataset that is not a named option.
    source: str | None = None
    location: Location | None = None
    # The preset that made this choice and also sets values for the option; those values apply only with the choice.
    preset: str | None = None

    def is_same(self, other: Choice) -> bool:
        """Return whether values meant for the other choice also apply to this one."""
        return (self.source or self.name) == (other.source or other.name)


@dataclass(frozen=True)
class Layer:
    """The values that come from one source.

    `name` is the name of the variable, option, preset, file or override. `locations` holds the places of the values in
    files.
    """

    kind: Literal["default", "environment", "option", "preset", "file", "command line"]
    name: str | None
    values: dict[str, Any]
    locations: Mapping[KeyPath, Location] = field(default_factory=dict)


@dataclass
class UserFile:
    """The content of a file and its parents, parents first, with interpolations unresolved."""

    options: Options = field(default_factory=Options)
    path: Path | None = None
    choices: dict[str, Choice] = field(default_factory=dict)
    layers: list[Layer] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        """The values of all layers, merged."""
        return flattened(self.layers)

    def without_values_of(self, group: str) -> UserFile:
        """Return the file without the values that may suit only its own option of a group.

        This is for a group whose option is replaced. Values that may not suit the new option, such as a dataset's
        column, are dropped; values that suit any option, such as a sample size or a country, are kept.
        """
        stays = STAYS_WHEN_OPTION_CHANGES.get(group, frozenset())
        layers = []
        for layer in self.layers:
            old = layer.values.get(group)
            if isinstance(old, dict):
                kept = {key: value for key, value in old.items() if key in stays}
                layer = replace(layer, values=layer.values | {group: kept})
            layers.append(layer)
        return replace(self, layers=layers)

    def without_group(self, group: str) -> UserFile:
        """Return the file without a group's choice and without any of the group's values."""

        def rest(mapping: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in mapping.items() if key != group}

        layers = [replace(layer, values=rest(layer.values)) for layer in self.layers]
        return replace(self, choices=rest(self.choices), layers=layers)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings deeply; lists and scalars in `over` replace those in `base`.

    The result shares its unchanged parts with the arguments.
    """
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def flattened(layers: Iterable[Layer]) -> dict[str, Any]:
    """Merge the values of layers, lowest first."""
    nothing: dict[str, Any] = {}
    return reduce(merged, (layer.values for layer in layers), nothing)


def read(path: Path, config_dir: Path | None = None) -> UserFile:
    """Read a config file and its parents, which are the files that it inherits from.

    Raises:
        Problems: the file or one of its parents cannot be used. For example, the file does not exist, has broken YAML
            (the error gives line and column) or inherits from itself, a parent is missing, or an option does not exist.
    """
    file = examine_file(path, find_options(path, config_dir))
    if problems := impossible(file.problems):
        raise Problems(problems)
    return file


def find_options(path: Path | None, config_dir: Path | None = None) -> Options:
    """Return the options available to a config file.

    The user's own options come from the given directory. If none is given, they come from the nearest `conf/`: beside
    the file or, if there is none, beside one of the files that it inherits from.

    Raises:
        ConfigError: the given directory contains no options.
    """
    options = Options.find(config_dir, path)
    waiting = [path] if path else []
    # The search is breadth-first; the loop extends the list over which it iterates.
    for file in waiting:
        if options.folder is not None or len(waiting) > MAX_FILES:
            break
        options = Options.find(None, file)
        waiting += [parent for parent in dict.fromkeys(_parents(file)) if parent not in waiting]
    return options


def _parents(path: Path) -> list[Path]:
    """Return the files that a file inherits from, leaving out those that cannot be read."""
    try:
        own = _OwnContent(Options(), None, yamlfile.read(path), path)
    except Problems:
        return []
    own.split()
    return [parent for parent, _ in own.parents]


def examine_file(path: Path, options: Options, group: str | None = None) -> UserFile:
    """Read a config file and its parents; leave out everything that is wrong, and list it in `problems`.

    Args:
        path: the file.
        options: the options that can be chosen by name.
        group: if the file is an option of a group, that group; the file then contains only values of the group.
    """
    return _Reader(options, group).file(path, ())


@dataclass
class _Reader:
    """Reads a file and the files that it inherits from."""

    options: Options
    group: str | None = None
    files: int = 0

    def file(self, path: Path, children: tuple[Path, ...]) -> UserFile:
        result = UserFile(self.options, path)
        self.files += 1
        try:
            document = yamlfile.read(path)
        except Problems as error:
            result.problems += error.found
            return result
        result.problems += document.problems
        own = _OwnContent(self.options, self.group, document, path)
        own_layer = own.split()
        for parent, location in own.parents:
            _merge_into(result, self._parent(parent, location, (*children, path)))
        _merge_into(result, UserFile(self.options, path, own.choices, [own_layer], own.problems))
        return result

    def _parent(self, path: Path, location: Location, children: tuple[Path, ...]) -> UserFile:
        ring = [child.resolve() for child in children]
        if path.resolve() in ring:
            names = " -> ".join(child.name for child in (*ring[ring.index(path.resolve()) :], path))
            problem = Problem("inheritance_cycle", "defaults", f"the file inherits from itself ({names}).", location)
        elif self.files >= MAX_FILES:
            problem = Problem("too_large", "defaults", f"the file inherits from more than {MAX_FILES} files.", location)
        else:
            return self.file(path, children)
        return UserFile(problems=[problem])


def _merge_into(base: UserFile, over: UserFile) -> None:
    for group, choice in over.choices.items():
        old = base.choices.get(group)
        if old is not None and not choice.is_same(old):
            base.layers = base.without_values_of(group).layers
    base.choices |= over.choices
    base.layers += over.layers
    base.problems += over.problems


# ------------------------------------------------------------------ one file
@dataclass
class _OwnContent:
    """Splits the content of one file into parents, options and values."""

    options: Options
    group: str | None
    document: yamlfile.Document
    path: Path
    parents: list[tuple[Path, Location]] = field(default_factory=list)
    choices: dict[str, Choice] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def split(self) -> Layer:
        """Fill `parents`, `choices` and `problems`; return the values as a layer."""
        content = dict(self.document.values)
        if "defaults" in content:
            self._defaults(content.pop("defaults"))
        locations: dict[KeyPath, Location] = self.document.locations
        if self.group:
            inside = {(self.group, *at): location for at, location in locations.items()}
            return Layer("file", str(self.path), {self.group: content}, inside)
        for key, value in content.items():
            if key == "hydra":
                self._report("forbidden_key", (key,), "Hydra settings belong on the command line (hydra.…=…).")
            elif key in GROUPS:
                self.values = merged(self.values, self._choice(key, value))
            elif key in PARTS and not isinstance(value, dict):
                self._report("wrong_type", (key,), f"must be a mapping of values, not {kind_of(value)}.")
            else:
                self.values[key] = value
        return Layer("file", str(self.path), self.values, locations)

    def _report(self, code: str, at: KeyPath, message: str) -> None:
        # A value that could not be read already has a problem.
        if dotted(at) not in {problem.path for problem in self.document.problems}:
            self.problems.append(Problem(code, dotted(at), message, self._location(at)))

    def _location(self, at: KeyPath) -> Location:
        return self.document.locations.get(at) or Location(self.path)

    def _choice(self, group: str, value: Any) -> dict[str, Any]:
        """Record the option that the value chooses; return a mapping of the group to its values, to be merged."""
        if group == "preset":
            self._preset(value)
            return {}
        if isinstance(value, str):
            return {group: self._named(group, value, {}, (group,))}
        if not isinstance(value, dict):
            message = f"must be the name of an option ({', '.join(self.options.names(group))}) or a mapping of values, "
            self._report("wrong_type", (group,), message + f"not {kind_of(value)}.")
            return {}
        values = dict(value)
        if "name" in values:
            return {group: self._named(group, values.pop("name"), values, (group, "name"))}
        if group == "dataset" and isinstance(source := values.get("path"), str):
            self.choices[group] = Choice(CUSTOM, source, self._location((group, "path")))
            values = {"name": source} | values
        return {group: values}

    def _preset(self, value: Any) -> None:
        location = self._location(("preset",))
        if value is None:
            self.choices["preset"] = Choice(None, location=location)
        elif not isinstance(value, str):
            names = ", ".join(self.options.names("preset"))
            self._report("wrong_type", ("preset",), f"must be the name of a preset ({names}), not {kind_of(value)}.")
        elif self.options.get("preset", value):
            self.choices["preset"] = Choice(value, location=location)
        else:
            self._report("unknown_option", ("preset",), self.options.unknown("preset", shortened(value)))

    def _named(self, group: str, name: Any, values: dict[str, Any], at: KeyPath) -> dict[str, Any]:
        """Record the option that `name` chooses, or a problem if there is none; return the group's values."""
        location = self._location(at)
        if not isinstance(name, str):
            self._report("wrong_type", at, f"must be the name of an option, not {kind_of(name)}.")
            return values
        if self.options.get(group, name):
            source = values.get("path") if group == "dataset" else None
            self.choices[group] = Choice(name, source if isinstance(source, str) else None, location)
            return values
        if group == "dataset" and isinstance(source := values.get("path"), str):
            # The name is only a label, as written by `lem config show`.
            self.choices[group] = Choice(CUSTOM, source, location)
            return {"name": name} | values
        if group == "dataset" and self.options.is_source(name):
            self.choices[group] = Choice(CUSTOM, name, location)
            return {"path": name, "name": name} | values
        if group == "decoder" and {f.name for f in fields(Decoder)} - {"name"} <= values.keys():
            # All values are given, so no option is needed and the name is only a label.
            self.choices[group] = Choice(None, location=location)
            return {"name": name} | values
        self._report("unknown_option", (group,), self.options.unknown(group, shortened(name)))
        return values

    def _defaults(self, entries: Any) -> None:
        if not isinstance(entries, list):
            message = f"must be a list of files to inherit from, not {kind_of(entries)}."
            self._report("bad_defaults", ("defaults",), message)
            return
        for i, entry in enumerate(entries):
            if isinstance(entry, str):
                self._inherit(entry, ("defaults", i))
            elif isinstance(entry, dict) and not self.group:
                for key, value in entry.items():
                    self._default_choice(key, value, ("defaults", i))
            else:
                message = f"an entry must be a file name or `group: option`, not {kind_of(entry)}."
                self._report("bad_defaults", ("defaults", i), message)

    def _inherit(self, name: str, at: KeyPath) -> None:
        if name == "_self_":
            return
        base = self.path.parent / name
        candidates = [base, *(base.with_name(base.name + suffix) for suffix in SUFFIXES)] if base.name else [base]
        if found := next((candidate for candidate in candidates if _is(candidate, Path.is_file)), None):
            self.parents.append((found, self._location(at)))
            return
        siblings = [path.stem for path in base.parent.glob("*.yaml")] if _is(base.parent, Path.is_dir) else []
        message = f"the file inherits from '{shortened(name)}', which does not exist."
        self._report("missing_parent", at, message + did_you_mean(name, siblings))

    def _default_choice(self, key: str, value: Any, at: KeyPath) -> None:
        group = key.removeprefix("override ").strip().lstrip("/")
        if group.startswith("hydra"):
            self._report("forbidden_key", at, f"'{group}' is a Hydra setting, which belongs on the command line.")
        elif group not in GROUPS:
            message = f"'{shortened(group)}' is not a group ({', '.join(GROUPS)})."
            self._report("bad_defaults", at, message)
        elif group == "preset" or isinstance(value, str):
            self.document.locations[(group,)] = self._location((*at, key))
            self.values = merged(self.values, self._choice(group, value))
        else:
            self._report("wrong_type", at, f"'{group}' needs the name of an option, not {kind_of(value)}.")


def _is(path: Path, kind: Callable[[Path], bool]) -> bool:
    """Return whether a path passes the check `kind`; False if the path is not even a valid name."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False
