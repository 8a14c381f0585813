"""Turns a config file and overrides into an `Experiment`, using Hydra's own composition.

The sources apply in the order of Hydra's defaults list, and later sources win: schema (including environment
variables), group options, preset, config file, command line. The result is checked as a whole, so all problems are
reported at once, each with its path and, if it is in a file, its line. Callers receive only plain dataclasses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lem.config.check import Found, backend_of, check, examine, resolved, secrets, unknown_key, unusable
from lem.config.layers import Sources, Values, holds, layers_of, option, schema_defaults, schema_layers
from lem.config.options import CONFIG_MODULE, CUSTOM, Options
from lem.config.overrides import (
    NO_PRESET,
    SEVERAL,
    Override,
    choice_of,
    combinations,
    first_sentence,
    has_several_values,
    hydra_name,
    is_hydra_setting,
    parse,
)
from lem.config.problem import Location, Problem, Problems, impossible
from lem.config.userfile import Choice, Layer, UserFile, examine_file, find_options, flattened
from lem.config.yamlfile import KeyPath
from lem.errors import ConfigError
from lem.spec.engines import BACKENDS
from lem.spec.experiment import Experiment

CONFIG_NAME = "config"
# The user's file becomes this option of a group of its own, which is appended to the defaults list. In a sweep over
# another group, the values that the file sets in that group become options of user_file_<group> instead.
FILE_GROUP, FILE_OPTION = "user_file", "this"


# ------------------------------------------------------------------ the user's input
@dataclass(frozen=True)
class Inputs:
    """A config file and overrides after reading and parsing, and the problems found so far."""

    sources: Sources
    overrides: tuple[Override, ...]
    problems: tuple[Problem, ...]

    def all_problems(self) -> list[Problem]:
        """Return the problems found so far and the problems with the composed values."""
        _, found = values_of(self.sources)
        return without_echoes(self.problems, located(self.sources, found))


def read_inputs(
    config_file: Path | None, overrides: Sequence[str], config_dir: Path | None = None, groups_in: Path | None = None
) -> Inputs:
    """Read a config file and parse overrides; problems are returned in the result, not raised.

    Raises:
        ConfigError: the config directory contains no options.
    """
    known = find_options(config_file, config_dir)
    file = examine_file(config_file, known) if config_file else UserFile(known)
    parsed, problems = parse(overrides, known, groups_in)
    chosen = [*file.choices.items(), *((o.key, c) for o in parsed for c in o.choices)]
    for group, choice in chosen:
        if found := _option_problems(known, [(group, choice)]):
            problems += found
            # The rest can still be checked without this group.
            file = file.without_group(group)
            parsed = [override for override in parsed if override.key != group]
    sources = _sources(file, parsed)
    return Inputs(sources, tuple(parsed), (*file.problems, *(_of_the_backend(each, sources) for each in problems)))


def _of_the_backend(problem: Problem, sources: Sources) -> Problem:
    """Reword a problem about an unknown `backend.…` key to suit the chosen backend; return any other unchanged."""
    if problem.code != "unknown_key" or not problem.path.startswith("backend."):
        return problem
    try:
        backend = backend_of(sources.values())
    except Problems:
        return problem  # the problem is in an option and has already been reported
    return replace(problem, message=unknown_key(tuple(problem.path.split(".")), backend))


def _option_problems(known: Options, chosen: Iterable[tuple[str, Choice]]) -> list[Problem]:
    """Return the problems with the chosen options, including the options that a chosen preset selects."""
    problems: list[Problem] = []
    for group, choice in chosen:
        if choice.name is None:
            continue
        try:
            found = option(known, group, choice.name, choice.source)
        except Problems as error:
            problems += error.found
        else:
            problems += _option_problems(known, found.choices.items())
    return problems


def _sources(file: UserFile, overrides: Iterable[Override]) -> Sources:
    overrides = list(overrides)
    return Sources(
        file,
        {override.key: override.choices[0] for override in overrides if override.choices},
        tuple(override.layer() for override in overrides if override.values),
    )


# ------------------------------------------------------------------ composition in plain dictionaries
def values_of(sources: Sources) -> tuple[Values, Found]:
    """Compose the values in plain dictionaries and resolve interpolations; return the values and their problems."""
    try:
        values, found = resolved(sources.values())
    except Problems:
        return {}, []  # the problem is in an option and has already been reported
    unresolved = {path for path, _ in found}
    return values, found + [(path, problem) for path, problem in examine(values)[1] if path not in unresolved]


def plain_values(file: UserFile, choices: Mapping[str, str | None], values: Mapping[str, Any]) -> Values:
    """Compose the same values as `prepare(…).values()` in plain dictionaries, about a thousand times as fast as Hydra.

    Args:
        file: a config file that has already been read, or `UserFile()`.
        choices: the chosen option of each group; a dataset may be a hub id or a local file; None means no preset.
        values: plain values by dotted path.

    Returns:
        The values, with interpolations resolved, but not checked against the schema. Subtrees may be shared
        with other results.

    Raises:
        Problems: an option does not exist or cannot be used, or a string is unusable (see `lem.config.check.resolved`).
    """
    chosen = {group: choice_of(group, name, file.options) for group, name in choices.items()}
    sources = Sources.of(file, chosen, values)
    plain, found = resolved(sources.values())
    if found:
        raise Problems(located(sources, found))
    return plain


def without_echoes(first: Iterable[Problem], then: Iterable[Problem]) -> list[Problem]:
    """Return `first`, followed by the problems in `then` at other paths.

    A problem in `then` is dropped if `first` has a problem at the same path, because the first has probably caused the
    second.
    """
    first = list(first)
    paths = {problem.path for problem in first if problem.path}
    return first + [problem for problem in then if problem.path not in paths]


def located(sources: Sources, found: Found) -> list[Problem]:
    """Return the problems, each with the location of its value, if known."""
    layers = sources.layers() if found else []
    return [replace(problem, location=_location(sources, layers, path)) for path, problem in found]


def _location(sources: Sources, layers: Sequence[Layer], path: KeyPath) -> Location | None:
    """Return the location of a value or, failing that, of its parent or option; None if it is not from a file."""
    for end in range(len(path), 0, -1):
        for layer in reversed(layers):
            if layer.kind == "command line" and holds(layer.values, path[:end]):
                return None
            if (location := layer.locations.get(path[:end])) and holds(layer.values, path[:end]):
                return location
    chosen = sources.file.choices.get(str(path[0])) if path else None
    return chosen.location if chosen else None


# ------------------------------------------------------------------ composition by Hydra
@dataclass(frozen=True)
class Composition:
    """The input of Hydra's composition: the user's file as overrides, followed by the overrides of the command line."""

    of_file: tuple[str, ...]
    given: tuple[Override, ...] = ()
    sources: Sources = field(default_factory=Sources)

    @property
    def overrides(self) -> tuple[str, ...]:
        """All overrides in Hydra's form, lowest precedence first."""
        return (*self.of_file, *(override.text for override in self.given))

    def experiment(self) -> Experiment:
        """Compose and check the experiment; raises `ConfigError` listing all problems."""
        experiment, found = examine(self.values())
        if experiment is None:
            raise Problems(located(self.sources, found))
        return experiment

    def quickly(self) -> Experiment:
        """Return the same experiment as `experiment`, composed in plain dictionaries in a hundredth of the time.

        Use this method for many cells, but compose one of them with `experiment`, because only Hydra checks overrides
        of its own settings. If plain composition meets a problem or an unknown key, Hydra composes the experiment, so
        that the messages are the same as those of `experiment`.
        """
        return self.plainly() or self.experiment()

    def plainly(self) -> Experiment | None:
        """Compose and check the experiment in plain dictionaries; None if there are problems or unknown keys."""
        if any(not override.key and not is_hydra_setting(override.text) for override in self.given):
            return None
        try:
            values, found = resolved(self.sources.values())
        except Problems:
            return None
        return None if found else examine(values)[0]

    def values(self) -> Values:
        """Compose the values and resolve interpolations, without checking types and ranges.

        Raises:
            ConfigError: an override is a sweep, Hydra fails, a value is marked as missing (???), or a string contains
                the Hugging Face token or a null character.
        """
        from hydra import compose, initialize_config_module

        if swept := next((override for override in self.given if override.is_sweep), None):
            raise ConfigError(f"{swept.text}: {SEVERAL}")
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"), _hydra_errors(self.sources):
            composed = compose(CONFIG_NAME, overrides=list(self.overrides))
        # Hydra lets a lower layer's value stand in for ???, but ??? means that the value must be set explicitly.
        _, found = values_of(self.sources)
        if missing := [(path, problem) for path, problem in found if problem.code == "missing_value"]:
            raise Problems(located(self.sources, missing))
        return to_values(composed, self.sources)

    def cells(self) -> list[Composition]:
        """Return a composition for each cell of a sweep, in the order in which Hydra would run the cells."""
        file = self.sources.file
        if several := next((o.text for o in self.given if not o.key and has_several_values(o.text)), None):
            raise ConfigError(f"{several}: a Hydra setting must have a single value for all cells.")
        return [Composition(self.of_file, given, _sources(file, given)) for given in combinations(self.given)]


def prepare(
    config_file: Path | None, overrides: Sequence[str], *, config_dir: Path | None = None, groups_in: Path | None = None
) -> Composition:
    """Register the schema, the chosen options and the user's file with Hydra, and return the composition.

    Args:
        config_file: a user's config file, or None.
        overrides: Hydra overrides from the command line; `group=option`, `group.name=option` and
            `dataset=<hub id or file>` choose options.
        config_dir: a directory with the user's own options; None means the `conf/` that `find_options` finds.
        groups_in: a config directory known to Hydra (--config-dir of a plain Hydra app).

    Raises:
        ConfigError: a key or option is unknown, an override cannot be parsed, or a file cannot be used.
    """
    inputs = read_inputs(config_file, overrides, config_dir, groups_in)
    if impossible(inputs.problems):
        raise Problems(impossible(inputs.all_problems()))
    file, given = inputs.sources.settled().file, {override.key for override in inputs.overrides}
    known = file.options
    chosen = [(group, choice) for group, choice in file.choices.items() if choice.name and group not in given]
    named = [f"{group}={hydra_name(group, choice, known)}" for group, choice in chosen]
    with _hydra_errors(inputs.sources):
        register_schema()
        _register_options(known, [*chosen, *((o.key, c) for o in inputs.overrides for c in o.choices)])
        appended = _register_file(inputs) if config_file else []
    return Composition((*named, *appended), inputs.overrides, inputs.sources)


def compose_quickly(
    config_file: Path, overrides: Sequence[str], config_dir: Path | None = None
) -> tuple[Experiment, Sources]:
    """Return the experiment that `prepare` and `Composition.experiment` would give, and its sources, but faster.

    This is meant for many files; see `Composition.quickly`.

    Raises:
        ConfigError: the input cannot be used, or the experiment has problems.
    """
    inputs = read_inputs(config_file, overrides, config_dir)
    if not inputs.problems and (experiment := Composition((), inputs.overrides, inputs.sources).plainly()):
        return experiment, inputs.sources
    composition = prepare(config_file, overrides, config_dir=config_dir)
    return composition.experiment(), composition.sources


def register_schema() -> None:
    """Register the schema's defaults, overridden by environment variables, as config nodes in Hydra."""
    for name in BACKENDS:
        _store("schema/backend", name, None, schema_defaults(name))
    _store("schema", "experiment", "_global_", flattened(schema_layers()))
    _store("preset", NO_PRESET, "_global_", {})
    _store("preset/user", NO_PRESET, "_global_", {})


# The nodes already in Hydra's store. Storing a node takes milliseconds, and most compositions need the same nodes.
_STORED: dict[tuple[str, str], tuple[str | None, Values]] = {}


def _store(group: str, name: str, package: str | None, node: Values) -> None:
    """Store a config node, unless Hydra's store already has it; slashes in its name separate folders."""
    from hydra.core.config_store import ConfigStore

    if _STORED.get((group, name)) == (package, node):
        return
    *folders, last = name.split("/")
    ConfigStore.instance().store(group="/".join([group, *folders]), name=last, package=package, node=node)
    _STORED[group, name] = (package, deepcopy(node))


def _register_options(known: Options, chosen: Iterable[tuple[str, Choice]]) -> None:
    """Register with Hydra the chosen options that it cannot read from lem's conf/.

    These are the user's own options, datasets given as hub ids or files, and options for which a preset sets values.
    """
    for group, choice in chosen:
        if choice.name is None:
            continue
        found = option(known, group, choice.name, choice.source)
        _register_options(known, found.choices.items())
        is_named = choice.source is None or choice.name != CUSTOM
        if not found.file.is_users and is_named and choice.preset is None:
            continue
        values = flattened(layers_of(known, group, choice))
        if group == "preset":
            overrides = [
                {f"override /{inner}": hydra_name(inner, c, known)} for inner, c in found.choices.items() if c.name
            ]
            node, package = {"defaults": [*overrides, "_self_"], **values}, "_global_"
        else:
            node, package = values[group], group
        _store(group, hydra_name(group, choice, known), package, node)


def _register_file(inputs: Inputs) -> list[str]:
    """Store the values of the user's file; return the overrides that append them to the defaults list.

    In a sweep over a group, the values that the file sets in this group apply only to the cells with the option that
    the file chooses.
    """
    file, known = inputs.sources.file, inputs.sources.file.options
    appended = [f"+{FILE_GROUP}@_global_={FILE_OPTION}"]
    for override in inputs.overrides:
        group, named = override.key, file.choices.get(override.key)
        if not override.choices or named is None or group == "preset":
            continue
        own = file.values.get(group, {})
        file = file.without_values_of(group)
        appended.append(f"+{FILE_GROUP}_{group}@_global_=${{{group}}}")
        for choice in override.choices:
            node = {group: own} if choice.is_same(named) else {}
            _store(f"{FILE_GROUP}_{group}", hydra_name(group, choice, known), "_global_", node)
    _store(FILE_GROUP, FILE_OPTION, "_global_", file.values)
    return appended


@contextmanager
def _hydra_errors(sources: Sources | None = None) -> Iterator[None]:
    """In the block, turn Hydra errors into the problems that plain composition finds or, failing that, one sentence."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        found = values_of(sources)[1] if sources else []
        if sources and found:
            raise Problems(located(sources, found)) from None
        raise ConfigError(first_sentence(error)) from None


def to_experiment(composed: Any) -> Experiment:
    """Turn a composed config into a checked `Experiment`; raises `ConfigError` listing all problems."""
    return check(to_values(composed))


def to_values(composed: Any, sources: Sources | None = None) -> Values:
    """Turn a composed config into plain data with interpolations resolved."""
    from omegaconf import OmegaConf

    with _hydra_errors(sources):
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    plain.pop("hydra", None)
    if found := [*secrets(plain), *unusable(plain)]:
        raise Problems(located(sources or Sources(), found))
    values: Values = plain
    return values
