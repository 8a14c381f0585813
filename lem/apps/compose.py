"""From a config file and overrides to an `Experiment`, by Hydra's own composition. Hydra ends here.

The order of the sources is that of Hydra's defaults list: schema (environment variables included), group
options, preset, config file, command line; the later wins. What comes out is a plain dataclass, checked as a
whole: all problems are reported in one go, each with its path.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lem.apps import userfile
from lem.apps.userfile import UserFile
from lem.errors import ConfigError, DatasetError, did_you_mean
from lem.spec import BACKENDS, GROUPS, Experiment, leaves

CONFIG_MODULE = "lem.conf"
CONFIG_NAME = "config"
# Removes a preset that the file names; Hydra itself has no way to say so.
NO_PRESET = "preset=null"
# The user's file becomes this option of a group of its own, appended to the end of the defaults list.
FILE_GROUP, FILE_OPTION = "user_file", "this"
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".txt")


# ------------------------------------------------------------------ options of the groups
@cache
def options(group: str) -> tuple[str, ...]:
    """Return the names of a group's options: the YAML files in its folder of conf/."""
    folder = resources.files(CONFIG_MODULE) / group
    return tuple(sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")))


def dataset_overrides(source: str) -> list[str]:
    """Return the overrides that select a dataset by what a user calls it: an option, a hub id or a file."""
    if source in options("dataset"):
        return [f"dataset={source}"]
    if "/" not in source and not source.endswith(DATA_SUFFIXES) and not Path(source).exists():
        known = [name for name in options("dataset") if name != "custom"]
        raise DatasetError(
            f"Unknown dataset '{source}'.{did_you_mean(source, known)} Built in: {', '.join(known)}; "
            "or give a hub id (owner/name) or a local file."
        )
    return ["dataset=custom", f"dataset.path={quoted(source)}", f"dataset.name={quoted(source)}"]


def quoted(value: str) -> str:
    """Write a text so that Hydra's override grammar reads exactly that text.

    In that grammar a backslash is special only before a quote, so only those are doubled.
    """
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


# ------------------------------------------------------------------ the request
@dataclass(frozen=True)
class Request:
    """What Hydra is asked to compose: overrides in the order of their precedence."""

    overrides: tuple[str, ...]

    def experiment(self) -> Experiment:
        """Compose and check; raises `ConfigError` with all problems."""
        return check(self.values())

    def values(self) -> dict[Any, Any]:
        """Compose and resolve, without a check; raises `ConfigError` when Hydra cannot."""
        from hydra import compose, initialize_config_module

        with initialize_config_module(CONFIG_MODULE, version_base="1.3"), _hydra_errors():
            return to_values(compose(CONFIG_NAME, overrides=list(self.overrides)))


def prepare(config_file: Path | None, overrides: Sequence[str]) -> Request:
    """Register the schema and the user's file with Hydra and return what to compose.

    Args:
        config_file: a user's config file, or None.
        overrides: Hydra overrides from the command line; `group=option`, `group.name=option` and
            `dataset=<hub id or file>` choose options.

    Raises:
        ConfigError: an unknown key or option, an override that cannot be parsed, or a faulty file.
    """
    register_schema()
    given = [part for text in overrides for part in _normalised(text)]
    chosen = {key for key in map(_key, given) if key in GROUPS}
    file = userfile.read(config_file) if config_file else UserFile()
    _check_mappings(file)
    for group in chosen:
        named = file.choices.pop(group, None)
        other_path = group == "dataset" and any(_key(text) == "dataset.path" for text in given)
        # Values of a file that names no option are meant for whichever is chosen.
        if named is not None and (other_path or named != _option_of(given, group)):
            file.forget_values_of(group)
    from_file = [part for group, option in file.choices.items() for part in _file_choice(group, option, file)]
    _register_file(file)
    appended = [f"+{FILE_GROUP}@_global_={FILE_OPTION}"] if config_file else []
    return Request((*from_file, *appended, *(text for text in given if text != NO_PRESET)))


def _check_mappings(file: UserFile) -> None:
    """Refuse a list where the schema has named values: Hydra could not merge it."""
    parts = {path.partition(".")[0] for path in known_keys() if "." in path}
    problems = [f"{key}: it holds named values, not a list." for key in parts if isinstance(file.values.get(key), list)]
    if problems:
        raise ConfigError(*sorted(problems))


def _normalised(text: str) -> list[str]:
    """Check one override's key and option and bring it into Hydra's form."""
    if text.startswith(("hydra.", "hydra/", "+hydra", "~hydra")):
        return [text]
    key, equals, value = text.partition("=")
    name = key.lstrip("+~").split("@")[0]
    if equals and not name:
        raise ConfigError(f"The override {text!r} names no key.")
    if not equals and not text.startswith("~"):
        raise ConfigError(f"'{text}' is neither an option, a config file (.yaml) nor an override (key=value).")
    if name.endswith(".name") and name.removesuffix(".name") in GROUPS:
        key = name = name.removesuffix(".name")
    if name in GROUPS and equals:
        return _chosen(name, value.strip("'\""))
    _check_key(name)
    _check_grammar(text)
    return [text]


def _check_grammar(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise ConfigError(
            f"The override {text!r} cannot be read: {_first_sentence(error)}. Quote the value if it is text."
        ) from None


def _chosen(group: str, value: str) -> list[str]:
    if value == "null" and group == "preset":
        return [NO_PRESET]
    if _is_sweep(value):
        for option in value.split(","):
            _check_option(group, option.strip())
        return [f"{group}={value}"]
    if group == "dataset":
        return dataset_overrides(value)
    _check_option(group, value)
    return [f"{group}={value}"]


def _is_sweep(value: str) -> bool:
    return "," in value and not Path(value).exists()


def _check_option(group: str, option: str) -> None:
    if option not in options(group):
        raise ConfigError(
            f"{group}: there is no '{option}'.{did_you_mean(option, options(group))} "
            f"Choose one of {', '.join(options(group))}."
        )


def _check_key(name: str) -> None:
    known = known_keys()
    if name not in known:
        raise ConfigError(unknown_key(name, known))


def unknown_key(name: str, known: Iterable[str] | None = None) -> str:
    """Return the sentence about a key that does not exist, with the nearest ones that do."""
    paths = sorted(known_keys() if known is None else known)
    if name in paths:
        outer, _, inner = name.partition(".")
        return f"{name}: in a file this is written nested, {outer}: {{{inner}: …}}."
    # A leaf's own name is what people remember: batch_size, temperature.
    by_leaf = [path for path in paths if path.split(".")[-1] == name.split(".")[-1]]
    hint = f" Did you mean '{by_leaf[0]}'?" if len(by_leaf) == 1 else did_you_mean(name, paths)
    return f"{name}: unknown key.{hint}"


@cache
def known_keys() -> frozenset[str]:
    """Return the dotted paths of all values and of the mappings that hold them."""
    paths = {leaf.path for leaf in leaves()}
    return frozenset(paths | {path.rpartition(".")[0] for path in paths if "." in path} | {"preset"})


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~").split("@")[0]


def _option_of(overrides: Sequence[str], group: str) -> str | None:
    return next((text.partition("=")[2] for text in overrides if _key(text) == group), None)


def _file_choice(group: str, option: str, file: UserFile) -> list[str]:
    """Return the override for an option that a file names; a dataset's hub id or path becomes a value of the file."""
    if group == "dataset" and option not in options(group):
        choice, *_ = dataset_overrides(option)  # raises when it is neither a hub id nor a file
        file.values["dataset"] = {"path": option, "name": option} | (file.values.get("dataset") or {})
        return [choice]
    _check_option(group, option)
    return [f"{group}={option}"]


# ------------------------------------------------------------------ what Hydra knows of us
@cache
def register_schema() -> None:
    """Give Hydra the schema's defaults as config nodes; environment variables become `${oc.env:…}`."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(group="schema", name="experiment", package="_global_", node=_defaults_node(Experiment))
    for name, backend in BACKENDS.items():
        store.store(group="schema/backend", name=name, node=_defaults_node(backend))


def _defaults_node(cls: type[Any]) -> dict[str, Any]:
    """Return a configuration type's defaults as a plain mapping; `backend` comes from its own group."""
    variables = {leaf.path: leaf.env for leaf in leaves(cls) if leaf.env}
    node: dict[str, Any] = {}
    for f in fields(cls):
        default = f.default if f.default_factory is MISSING else f.default_factory()
        node[f.name] = asdict(default) if is_dataclass(default) and not isinstance(default, type) else default
    if cls is Experiment:
        del node["backend"]
    for path, variable in variables.items():
        *parents, last = path.split(".")
        target = node
        for parent in parents:
            target = target[parent]
        target[last] = f"${{oc.env:{variable},{json.dumps(target[last])}}}"
    return node


def _register_file(file: UserFile) -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(group=FILE_GROUP, name=FILE_OPTION, node=file.values)


# ------------------------------------------------------------------ out of Hydra
class _hydra_errors:  # noqa: N801 - reads as a statement
    """Turn Hydra's errors into one sentence each."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        if isinstance(error, (HydraException, OmegaConfBaseException)):
            raise ConfigError(_first_sentence(error)) from None


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    several = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if several:
        return f"{several[1]}: these are several values; add --multirun to run each, or write a list as [a,b]."
    missing = re.search(r"Could not override '([^']+)'", text)
    if missing:
        return f"{missing[1]}: the chosen options have no such key."
    return text.partition(" See https://hydra.cc")[0]


def to_experiment(composed: Any) -> Experiment:
    """Turn a composed config into a checked `Experiment`; raises `ConfigError` with all problems."""
    return check(to_values(composed))


def to_values(composed: Any) -> dict[Any, Any]:
    """Turn a composed config into plain data, interpolations resolved."""
    from omegaconf import OmegaConf

    with _hydra_errors():
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    _refuse_secrets(plain)
    return plain


def _refuse_secrets(values: dict[Any, Any]) -> None:
    """Refuse a configuration that holds the hub's token: it is written to files that people publish."""
    token = os.environ.get("HF_TOKEN")
    if token and token in json.dumps(values, default=str):
        raise ConfigError("A value holds your HF_TOKEN; leave it out, the hub's client reads it from the environment.")


def check(values: dict[Any, Any]) -> Experiment:
    """Check a plain mapping against the schema; raises `ConfigError` with all problems."""
    from pydantic import TypeAdapter, ValidationError

    try:
        text = json.dumps(values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"The configuration holds a value that is not plain data: {error}.") from None
    try:
        # As JSON: strict about types, but a mapping may become a dataclass.
        return TypeAdapter(Experiment).validate_json(text)
    except ValidationError as error:
        raise ConfigError(*map(_problem, error.errors(include_url=False))) from None


def _problem(detail: Any) -> str:
    # The discriminator's tag stands in the location of a union's member: backend.pytorch.device.
    location = [str(part) for part in detail["loc"]]
    if len(location) > 1 and location[0] == "backend" and location[1] in BACKENDS:
        del location[1]
    path = ".".join(location)
    if detail["type"] == "unexpected_keyword_argument":
        return unknown_key(path)
    if detail["type"] == "union_tag_invalid":
        return f"{path}.name: there is no {detail['ctx']['tag']!r}; choose one of {', '.join(BACKENDS)}."
    message = str(detail["msg"]).replace("Input should be", "it should be", 1)
    return f"{path}: {message}, not {_shown(detail['input'])}."


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
