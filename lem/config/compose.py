"""From a config file and overrides to an `Experiment`, by Hydra's own composition. Hydra ends here.

The order of the sources is that of Hydra's defaults list: schema (environment variables included), group
options, preset, config file, command line; the later wins. What comes out is a plain dataclass, checked as a
whole: all problems are reported in one go, each with its path and, if it stands in a file, its line.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lem.config.check import Found, backend_of, check, examine, is_missing, resolved, secrets, unknown_key
from lem.config.layers import (
    Layer,
    Sources,
    Values,
    flattened,
    holds,
    layers_of,
    nested,
    option,
    schema_defaults,
    schema_layers,
)
from lem.config.options import CONFIG_MODULE, CUSTOM, Options, builtin
from lem.config.overrides import NO_PRESET, Override, first_sentence, hydra_name, parse
from lem.config.problem import Faults, Place, Problem
from lem.config.userfile import Choice, UserFile, find_options
from lem.config.userfile import examine as examine_file
from lem.config.yamlfile import Path_
from lem.errors import ConfigError
from lem.spec.engines import BACKENDS
from lem.spec.experiment import Experiment

CONFIG_NAME = "config"
# The user's file becomes this option of a group of its own, appended to the end of the defaults list; in a sweep
# over a group its values for one of the options become options of user_file_<group>.
FILE_GROUP, FILE_OPTION = "user_file", "this"


def options(group: str) -> tuple[str, ...]:
    """Return the names of a group's built-in options."""
    return tuple(builtin(group))


# ------------------------------------------------------------------ what is asked for
@dataclass(frozen=True)
class Asked:
    """A config file and overrides, read and parsed, with what is wrong so far."""

    sources: Sources
    overrides: tuple[Override, ...]
    problems: tuple[Problem, ...]

    def faults(self) -> list[Problem]:
        """Return all that is wrong, values included."""
        _, found = values_of(self.sources)
        return without_echoes(self.problems, located(self.sources, found))


def ask(
    config_file: Path | None,
    overrides: Sequence[str],
    config_dir: Path | None = None,
    groups_in: Path | None = None,
) -> Asked:
    """Read a config file and parse overrides; what is wrong with them is told in the result."""
    known = find_options(config_file, config_dir)
    file = examine_file(config_file, known) if config_file else UserFile(known)
    parsed, problems = parse(overrides, known, groups_in)
    chosen = [*file.choices.items(), *((o.key, c) for o in parsed for c in o.choices)]
    for group, choice in chosen:
        if faults := _option_problems(known, [(group, choice)]):
            problems += faults
            # The rest can be checked without it.
            file = file.without_group(group)
            parsed = [override for override in parsed if override.key != group]
    sources = _with_overrides(file, parsed)
    return Asked(sources, tuple(parsed), (*file.problems, *(_of_the_backend(problem, sources) for problem in problems)))


def _of_the_backend(problem: Problem, sources: Sources) -> Problem:
    """Word an unknown key of the backend anew, now that it is known which one is chosen."""
    if problem.code != "unknown_key" or not problem.path.startswith("backend."):
        return problem
    try:
        backend = backend_of(sources.values())
    except Faults:
        return problem  # an option at fault, which has been told of
    return replace(problem, message=unknown_key(tuple(problem.path.split(".")), backend))


def _option_problems(known: Options, chosen: Iterable[tuple[str, Choice]]) -> list[Problem]:
    """Read the options that are chosen, and those that a preset chooses; a user's may be at fault."""
    problems: list[Problem] = []
    for group, choice in chosen:
        if choice.name is None:
            continue
        try:
            found = option(known, group, choice.name, choice.source)
        except Faults as faults:
            problems += faults.found
        else:
            problems += _option_problems(known, found.choices.items())
    return problems


def values_of(sources: Sources) -> tuple[Values, Found]:
    """Compose in plain dictionaries, resolve and check; return the values and what is wrong with them."""
    try:
        values, found = resolved(sources.values())
    except Faults:
        return {}, []  # an option at fault, which has been told of
    faulty = {path for path, _ in found}
    return values, found + [(path, problem) for path, problem in examine(values)[1] if path not in faulty]


def without_echoes(first: Iterable[Problem], then: Iterable[Problem]) -> list[Problem]:
    """Return problems without those that only follow from another with the same path."""
    first = list(first)
    paths = {problem.path for problem in first if problem.path}
    return first + [problem for problem in then if problem.path not in paths]


def located(sources: Sources, found: Found) -> list[Problem]:
    """Return problems with the places where their values stand."""
    layers = sources.layers() if found else []
    return [replace(problem, place=locate(sources, layers, path)) for path, problem in found]


def locate(sources: Sources, layers: Sequence[Layer], path: Path_) -> Place | None:
    """Return where the value at a path stands, or what chose it or holds it; None if that is no file."""
    for end in range(len(path), 0, -1):
        for layer in reversed(layers):
            if layer.kind == "command line" and holds(layer.values, path[:end]):
                return None
            if (place := layer.places.get(path[:end])) and holds(layer.values, path[:end]):
                return place
    chosen = sources.file.choices.get(str(path[0])) if path else None
    return chosen.place if chosen else None


# ------------------------------------------------------------------ the request
@dataclass(frozen=True)
class Request:
    """What Hydra is asked to compose: overrides in the order of their precedence."""

    overrides: tuple[str, ...]
    sources: Sources = field(default_factory=Sources)
    # What the overrides in Hydra's form say: a choice has a name for Hydra that is not always the user's.
    asked: tuple[Override, ...] = ()

    def experiment(self) -> Experiment:
        """Compose and check; raises `ConfigError` with all problems."""
        experiment, found = examine(self.values())
        if experiment is None:
            raise Faults(located(self.sources, found))
        return experiment

    def values(self) -> Values:
        """Compose and resolve, without a check; raises `ConfigError` when Hydra cannot."""
        from hydra import compose, initialize_config_module

        if swept := next((override for override in self.asked if override.is_sweep), None):
            several = "these are several values; add --multirun to run each, or write a list as [a,b]."
            raise ConfigError(f"{swept.text}: {several}")
        with initialize_config_module(CONFIG_MODULE, version_base="1.3"), _hydra_errors(self.sources):
            composed = compose(CONFIG_NAME, overrides=list(self.overrides))
        # Hydra lets a ??? stand aside for the value below it; whoever wrote it wants to be asked for one.
        if missing := [(path, problem) for path, problem in values_of(self.sources)[1] if is_missing(problem)]:
            raise Faults(located(self.sources, missing))
        return to_values(composed, self.sources)

    def cell(self, overrides: Sequence[str]) -> Request:
        """Return the request for one point of a sweep, given its overrides as Hydra's sweeper writes them."""
        known = self.sources.file.options
        chosen = {text: choice for _, text, choice in self._choices()}
        asked: list[Override] = []
        for text in filter(_is_visible, overrides):
            if text in chosen:
                asked.append(Override(text, text.partition("=")[0], choices=(chosen[text],)))
            else:
                asked += parse([text], known)[0]
        sources = _with_overrides(self.sources.file, asked)
        return Request(tuple(overrides), sources, tuple(asked))

    def visible(self, overrides: Sequence[str]) -> list[str]:
        """Return overrides as a user would write them: without the file's, and with the user's names for choices."""
        names = {text: f"{key}={choice.source or choice.name or 'null'}" for key, text, choice in self._choices()}
        return [names.get(text, text) for text in overrides if _is_visible(text)]

    def _choices(self) -> Iterator[tuple[str, str, Choice]]:
        """Yield the choices of the command line: the group, the override in Hydra's form, the choice."""
        for override in self.asked:
            for choice in override.choices:
                name = hydra_name(override.key, choice, self.sources.file.options)
                yield override.key, f"{override.key}={name}", choice


def _is_visible(override: str) -> bool:
    return not override.startswith(f"+{FILE_GROUP}")


def _with_overrides(file: UserFile, overrides: Iterable[Override]) -> Sources:
    overrides = list(overrides)
    return Sources(
        file,
        {override.key: override.choices[0] for override in overrides if override.choices},
        tuple(override.layer() for override in overrides if override.values),
    )


def prepare(
    config_file: Path | None,
    overrides: Sequence[str],
    *,
    config_dir: Path | None = None,
    groups_in: Path | None = None,
) -> Request:
    """Register the schema, the chosen options and the user's file with Hydra and return what to compose.

    Args:
        config_file: a user's config file, or None.
        overrides: Hydra overrides from the command line; `group=option`, `group.name=option` and
            `dataset=<hub id or file>` choose options.
        config_dir: a directory of the user's own options; None looks for `conf/` beside the file.
        groups_in: a config directory that Hydra itself has been given (as a plain Hydra app, by --config-dir).

    Raises:
        ConfigError: an unknown key or option, an override that cannot be parsed, or a faulty file.
    """
    asked = ask(config_file, overrides, config_dir, groups_in)
    if any(problem.severity == "impossible" for problem in asked.problems):
        raise Faults(problem for problem in asked.faults() if problem.severity == "impossible")
    file, given = asked.sources.settled().file, {override.key for override in asked.overrides}
    known = file.options
    chosen = [(group, choice) for group, choice in file.choices.items() if choice.name and group not in given]
    from_file = [f"{group}={hydra_name(group, choice, known)}" for group, choice in chosen]
    with _hydra_errors(asked.sources):
        register_schema()
        _register_options(known, [*chosen, *((o.key, c) for o in asked.overrides for c in o.choices)])
        appended = _register_file(asked) if config_file else []
    texts = (*from_file, *appended, *(override.text for override in asked.overrides))
    return Request(texts, asked.sources, asked.overrides)


def plain_values(file: UserFile, choices: Mapping[str, str | None], values: Mapping[str, Any]) -> Values:
    """Compose in plain dictionaries what `prepare(…).values()` composes by Hydra, a thousand times as fast.

    Args:
        file: a config file that has been read, or `UserFile()`.
        choices: options by group; a dataset also by hub id or local file, no preset as None.
        values: plain values by dotted path.

    Returns:
        The values, interpolations resolved, not yet checked. Parts may be shared with other results.

    Raises:
        Faults: an option that does not exist or is at fault, an interpolation that cannot be resolved.
    """
    named = {group: _choice(file.options, group, name) for group, name in choices.items()}
    given = tuple(Layer("command line", path, nested(path, value)) for path, value in values.items())
    sources = Sources(file, named, given)
    plain, found = resolved(sources.values())
    if found:
        raise Faults(located(sources, found))
    return plain


def _choice(known: Options, group: str, name: str | None) -> Choice:
    if name is None or known.get(group, name):
        return Choice(name)
    if group == "dataset" and known.is_source(name):
        return Choice(CUSTOM, name)
    raise Faults([Problem("unknown_option", group, known.unknown(group, name))])


# ------------------------------------------------------------------ what Hydra knows of us
def register_schema() -> None:
    """Give Hydra the schema's defaults as config nodes, with the environment's values in their place."""
    for name in BACKENDS:
        _store("schema/backend", name, None, schema_defaults(name))
    _store("schema", "experiment", "_global_", flattened(schema_layers()))
    _store("preset", NO_PRESET, "_global_", {})
    _store("preset/user", NO_PRESET, "_global_", {})


def _store(group: str, name: str, package: str | None, node: Values) -> None:
    """Store a config node; a name may hold slashes, which for Hydra are folders."""
    from hydra.core.config_store import ConfigStore

    *folders, last = name.split("/")
    ConfigStore.instance().store(group="/".join([group, *folders]), name=last, package=package, node=node)


def _register_options(known: Options, chosen: Iterable[tuple[str, Choice]]) -> None:
    """Store the options that are no files of conf/: a user's, and datasets that are hub ids or local files."""
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


def _register_file(asked: Asked) -> list[str]:
    """Store the values of the user's file; return the overrides that append them to the defaults list.

    In a sweep over a group the file's values for its own option hold for that one point only.
    """
    file, known = asked.sources.file, asked.sources.file.options
    appended = [f"+{FILE_GROUP}@_global_={FILE_OPTION}"]
    for override in asked.overrides:
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


# ------------------------------------------------------------------ out of Hydra
@contextmanager
def _hydra_errors(sources: Sources | None = None) -> Iterator[None]:
    """Turn what Hydra says into one sentence each, located where the plain composition finds the same fault."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        found = values_of(sources)[1] if sources else []
        if sources and found:
            raise Faults(located(sources, found)) from None
        raise ConfigError(first_sentence(error)) from None


def to_experiment(composed: Any) -> Experiment:
    """Turn a composed config into a checked `Experiment`; raises `ConfigError` with all problems."""
    return check(to_values(composed))


def to_values(composed: Any, sources: Sources | None = None) -> Values:
    """Turn a composed config into plain data, interpolations resolved."""
    from omegaconf import OmegaConf

    with _hydra_errors(sources):
        plain: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    plain.pop("hydra", None)
    if found := secrets(plain):
        raise Faults(located(sources or Sources(), found))
    values: Values = plain
    return values
