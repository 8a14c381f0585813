"""The sources of a configuration as layers of plain data, lowest first, and the composition of those layers.

    schema defaults < environment < options of the groups < preset < files, parents first < command line

The tests check that the result equals Hydra's composition of conf/config.yaml. Merging plain dictionaries is a thousand
times as fast as Hydra, and large grids need that speed. Unlike Hydra, this module also keeps track of the layer of each
value. It does not parse Hydra's grammar and does not check values.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache, lru_cache, reduce
from importlib import resources
from pathlib import Path
from typing import Any

from lem.config import yamlfile
from lem.config.options import CONFIG_MODULE, CUSTOM, OptionFile, Options
from lem.config.problem import Location, Problem, Problems, impossible
from lem.config.userfile import Choice, Layer, UserFile, examine_file, flattened, merged
from lem.config.yamlfile import KeyPath
from lem.spec.engines import BACKENDS
from lem.spec.experiment import Experiment
from lem.spec.schema import GROUPS, leaves

Values = dict[str, Any]


@dataclass(frozen=True)
class Option:
    """An option's values, nested as in the whole configuration, and, for a preset, the options that it chooses."""

    file: OptionFile
    layers: tuple[Layer, ...]
    choices: Mapping[str, Choice] = field(default_factory=dict)
    # The values that a preset sets for the options it chooses, by group; they do not apply to any other option.
    bound: Mapping[str, Layer] = field(default_factory=dict)


Chosen = tuple[tuple[str, str | None, str | None, str | None], ...]


@dataclass(frozen=True)
class Sources:
    """Everything that a configuration is composed of, apart from the schema."""

    file: UserFile = field(default_factory=UserFile)
    # The command line's choices and values; the layer of a value is named after its override.
    choices: Mapping[str, Choice] = field(default_factory=dict)
    given: tuple[Layer, ...] = ()

    @classmethod
    def of(cls, file: UserFile, choices: Mapping[str, Choice], values: Mapping[str, Any]) -> Sources:
        """Return sources made of a file, the command line's choices, and plain values by dotted path."""
        given = (Layer("command line", path, nested(path, value)) for path, value in values.items())
        return cls(file, choices, tuple(given))

    def settled(self) -> Sources:
        """Return the sources, without the file's values for any option that the command line replaces."""
        file = self.file
        for group, choice in self.choices.items():
            named = file.choices.get(group)
            # If a file names no option, its values are meant for whichever option is chosen.
            if named is not None and not choice.is_same(named):
                file = file.without_values_of(group)
        return Sources(file, self.choices, self.given)

    def chosen(self, group: str) -> Choice:
        """Return the choice in effect for a group, from the command line, the file, the preset or the defaults."""
        own = self.choices.get(group) or self.file.choices.get(group)
        if own is not None and (own.name is not None or group == "preset"):
            return own
        if group != "preset" and (preset := self.chosen("preset")).name is not None:
            by_preset = option(self.file.options, "preset", preset.name).choices.get(group)
            if by_preset is not None:
                return by_preset
        return Choice(default_choices()[group])

    def _all_chosen(self) -> Chosen:
        """Return the choices in effect as a tuple, which serves as a cache key."""
        chosen = ((group, self.chosen(group)) for group in default_choices())
        return tuple((group, choice.name, choice.source, choice.preset) for group, choice in chosen)

    def layers(self) -> list[Layer]:
        """Return all layers, lowest first."""
        settled = self.settled()
        base = _base_layers(self.file.options, settled._all_chosen(), _environment())
        return [*base, *settled.file.layers, *settled.given]

    def values(self) -> Values:
        """Compose the values, leaving interpolations unresolved; the result is shared, so do not modify it."""
        settled = self.settled()
        base = _base_values(self.file.options, settled._all_chosen(), _environment())
        above = [layer.values for layer in settled.file.layers] + [layer.values for layer in settled.given]
        return reduce(merged, above, base)


def origin(layers: Iterable[Layer], path: KeyPath) -> Layer | None:
    """Return the layer that determines the value at a path: the highest layer with a value there."""
    return next((layer for layer in reversed(list(layers)) if holds(layer.values, path)), None)


def holds(values: Any, path: KeyPath) -> bool:
    """Return whether a value exists at a path."""
    for part in path:
        inside = part in values if isinstance(values, dict) else isinstance(values, list) and part in range(len(values))
        if not inside:
            return False
        values = values[part]
    return True


def leaf_paths(values: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and value of every leaf; an empty mapping counts as a leaf."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaf_paths(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def nested(path: str, value: Any) -> Values:
    """Return nested mappings with a value at a dotted path."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value  # type: ignore[no-any-return]


# ------------------------------------------------------------------ the layers below the file
@lru_cache(maxsize=256)
def _base_layers(options: Options, chosen: Chosen, environment: tuple[tuple[str, str], ...]) -> tuple[Layer, ...]:
    layers = list(schema_layers(environment))
    for group, name, source, preset in chosen:
        if name is not None:
            layers += layers_of(options, group, Choice(name, source, preset=preset))
    return tuple(layers)


def layers_of(options: Options, group: str, choice: Choice) -> tuple[Layer, ...]:
    """Return the layers of a choice: the option's own and, if a preset chose the option, the preset's layer for it."""
    assert choice.name is not None
    own = option(options, group, choice.name, choice.source).layers
    return (*own, option(options, "preset", choice.preset).bound[group]) if choice.preset else own


@lru_cache(maxsize=256)
def _base_values(options: Options, chosen: Chosen, environment: tuple[tuple[str, str], ...]) -> Values:
    return flattened(_base_layers(options, chosen, environment))


def schema_layers(environment: tuple[tuple[str, str], ...] | None = None) -> Iterator[Layer]:
    """Yield a layer for the schema's defaults, and then one for each environment variable that sets a value."""
    yield Layer("default", None, schema_defaults())
    for name, value in _environment() if environment is None else environment:
        # The value of a variable is never an interpolation, even if it looks like one.
        yield Layer("environment", name, nested(_variables()[name], value.replace("${", "\\${")))


def _environment() -> tuple[tuple[str, str], ...]:
    """Return the environment variables that set values; an empty variable counts as unset."""
    return tuple((name, os.environ[name]) for name in _variables() if os.environ.get(name))


@cache
def _variables() -> dict[str, str]:
    """Return a mapping from environment variables to the paths of the values that they set."""
    return {leaf.env: leaf.path for leaf in leaves() if leaf.env}


@cache
def schema_defaults(backend: str | None = None) -> Values:
    """Return the defaults of a backend or, if none is given, of everything except the group `backend`."""
    cls: type[Any] = BACKENDS[backend] if backend else Experiment
    node: Values = {}
    for f in fields(cls):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        node[f.name] = asdict(default) if is_dataclass(default) and not isinstance(default, type) else default
    if backend is None:
        del node["backend"]
    return node


@cache
def default_choices() -> Mapping[str, str | None]:
    """Return the default option of each group, in the order of the defaults list in conf/config.yaml."""
    entries = yamlfile.read(Path(str(resources.files(CONFIG_MODULE))) / "config.yaml").values["defaults"]
    pairs = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return {group: name for group, name in pairs if group in GROUPS}


# ------------------------------------------------------------------ options
@lru_cache(maxsize=1024)
def option(options: Options, group: str, name: str, source: str | None = None) -> Option:
    """Read an option, either built-in or the user's own.

    Args:
        options: the available options.
        group: the option's group.
        name: the option's name; it must exist.
        source: the hub id or file, if the option is the dataset `custom`.

    Raises:
        Problems: the user's file has problems.
    """
    file = options.get(group, name)
    assert file is not None, (group, name)
    if source is not None and name == CUSTOM:
        # If a file or a preset names the source, its own layer sets these values too, and takes precedence over this
        # one.
        given = Layer("command line", f"dataset={source}", {"dataset": {"name": source, "path": source}})
        return Option(file, (given,))
    return _users(file, options) if file.is_users else _builtin(file)


def _builtin(file: OptionFile) -> Option:
    values = dict(yamlfile.read(file.path).values)
    entries = [entry for entry in values.pop("defaults", ()) if isinstance(entry, dict)]
    if file.group == "preset":
        chosen = {key.removeprefix("override /"): Choice(str(name)) for entry in entries for key, name in entry.items()}
        return Option(file, (Layer("preset", file.name, values),), chosen)
    return Option(file, (*_engine_defaults(file, values), _option_layer(file, {file.group: values})))


def _users(file: OptionFile, options: Options) -> Option:
    group = None if file.group == "preset" else file.group
    read = examine_file(file.path, options, group)
    if "preset" in read.choices:
        message = "a preset cannot choose another preset; inherit from that preset's file with defaults: [name]."
        read.problems.append(Problem("wrong_type", "preset", message, read.choices["preset"].location))
    locations = {path: location for layer in read.layers for path, location in layer.locations.items()}
    values = read.values
    own = values.setdefault(file.group, {}) if group else {}
    if file.group in ("dataset", "decoder"):
        own.setdefault("name", file.name)
    if file.group == "backend" and own.setdefault("name", file.name) not in BACKENDS:
        location = locations.get(("backend", "name"), Location(file.path))
        message = f"an option of this group must name its backend; choose one of {', '.join(BACKENDS)}."
        read.problems.append(Problem("unknown_option", "name", message, location))
    if problems := impossible(read.problems):
        raise Problems(problems)
    if group is None:
        chosen = {inner: choice for inner, choice in read.choices.items() if choice.name is not None}
        bound = {
            inner: Layer("preset", file.name, {inner: values.pop(inner)}, locations)
            for inner in chosen
            if inner in values
        }
        choices = {inner: replace(c, preset=file.name if inner in bound else None) for inner, c in chosen.items()}
        return Option(file, (Layer("preset", file.name, values, locations),), choices, bound)
    return Option(file, (*_engine_defaults(file, own), _option_layer(file, values, locations)))


def _engine_defaults(file: OptionFile, values: Values) -> tuple[Layer, ...]:
    """For an option of the group `backend`, return the layer of its backend's defaults; otherwise, return no layer."""
    if file.group != "backend":
        return ()
    return (Layer("default", None, {"backend": schema_defaults(values["name"])}),)


def _option_layer(file: OptionFile, values: Values, locations: Mapping[KeyPath, Location] | None = None) -> Layer:
    return Layer("option", f"{file.group}={file.name}", values, locations or {})
