"""A user's config file: read, checked for shape, and turned into what Hydra composes.

A file may name options of config groups (`backend: pytorch`, `dataset: alpaca`, or `name:` inside the group's
mapping), hold values, and inherit from other files through a `defaults:` list (`- base` is `base.yaml` beside
the file). This module finds the options and merges the values along the inheritance; the composition itself is
Hydra's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lem.errors import ConfigError
from lem.spec import GROUPS

SUFFIXES = (".yaml", ".yml")
STAYS_WHEN_OPTION_CHANGES = {
    "dataset": frozenset({"sample_size"}),
    "energy": frozenset({"country_iso_code", "carbon_intensity_g_per_kwh"}),
}


@dataclass
class UserFile:
    """What a file and its parents say: options chosen for groups, and values (interpolations unresolved)."""

    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def forget_values_of(self, group: str) -> None:
        """Drop the values that belonged to a group's option, because another option takes its place.

        A batch of options for one engine, or the column of one dataset, means nothing to another; a sample
        size or a country stays.
        """
        stays = STAYS_WHEN_OPTION_CHANGES.get(group, frozenset())
        old = self.values.get(group)
        if isinstance(old, dict):
            self.values[group] = {key: value for key, value in old.items() if key in stays}


def read(path: Path) -> UserFile:
    """Read a config file with its parents.

    Raises:
        ConfigError: no such file, broken YAML (with line and column), a parent that is missing or that
            inherits from its own child, or a file that is not a mapping.
    """
    return _read(path, ())


def _read(path: Path, children: tuple[Path, ...]) -> UserFile:
    path = path.resolve()
    if path in children:
        ring = " -> ".join(p.name for p in (*children[children.index(path) :], path))
        raise ConfigError(f"{path}: the file inherits from itself ({ring}).")
    content = load_yaml(path)
    parents, chosen_in_defaults = _split_defaults(path, content.pop("defaults", []))
    result = UserFile()
    for parent in parents:
        _merge_into(result, _read(parent, (*children, path)))
    _merge_into(result, _own(content, chosen_in_defaults))
    return result


def load_yaml(path: Path) -> dict[str, Any]:
    """Load one YAML mapping with OmegaConf's safe loader; raises `ConfigError` with line and column."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file.") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: broken YAML: {error.problem or error}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: the file cannot be read as a config: {reason}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a config file is a mapping of keys to values, not a {_kind(content)}.")
    not_text = [key for key in content if not isinstance(key, str)]
    if not_text:
        raise ConfigError(f"{path}: the key {not_text[0]!r} is not a word.")
    return content  # type: ignore[return-value]


def _split_defaults(path: Path, entries: Any) -> tuple[list[Path], dict[str, str]]:
    """Return the parent files and the group options that a `defaults:` list names."""
    parents: list[Path] = []
    choices: dict[str, str] = {}
    if not isinstance(entries, list):
        raise ConfigError(f"{path}: defaults is a list of files to inherit from, not a {_kind(entries)}.")
    for entry in entries:
        if entry == "_self_":
            continue
        if isinstance(entry, str):
            parents.append(_parent(path, entry))
        elif isinstance(entry, dict) and all(isinstance(v, str) for v in entry.values()):
            choices |= {_group(path, key): value for key, value in entry.items()}
        else:
            raise ConfigError(f"{path}: an entry of defaults is a file name or `group: option`, not {entry!r}.")
    return parents, choices


def _parent(path: Path, name: str) -> Path:
    base = path.parent / name
    candidates = [base, *(base.with_name(base.name + suffix) for suffix in SUFFIXES)]
    found = next((c for c in candidates if c.is_file()), None)
    if found is None:
        raise ConfigError(f"{path}: it inherits from '{name}', but there is no {candidates[1]}.")
    return found


def _group(path: Path, key: str) -> str:
    group = key.removeprefix("override ").lstrip("/")
    if group not in GROUPS:
        raise ConfigError(f"{path}: defaults names '{group}', which is not a group ({', '.join(GROUPS)}).")
    return group


def _own(content: dict[str, Any], choices: dict[str, str]) -> UserFile:
    """Separate the options that a file's own values choose from the values."""
    own = UserFile(dict(choices))
    for key, value in content.items():
        if key not in GROUPS:
            own.values[key] = value
        elif isinstance(value, str):
            own.choices[key] = value
        elif isinstance(value, dict):
            rest = dict(value)
            if isinstance(rest.get("name"), str):
                own.choices[key] = rest.pop("name")
            elif key == "dataset" and isinstance(rest.get("path"), str):
                own.choices[key] = "custom"
            own.values[key] = rest
        elif value is not None:
            own.values[key] = value
    return own


def _merge_into(base: UserFile, over: UserFile) -> None:
    for group, option in over.choices.items():
        if base.choices.get(group, option) != option:
            base.forget_values_of(group)
    base.choices |= over.choices
    base.values = _merged(base.values, over.values)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge mappings deeply; lists and scalars of `over` replace those of `base`."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def _kind(value: Any) -> str:
    names: Iterable[tuple[type, str]] = (
        (list, "list"),
        (str, "text"),
        (bool, "truth value"),
        (dict, "mapping"),
    )
    return next((name for kind, name in names if isinstance(value, kind)), "number" if value else "nothing")
