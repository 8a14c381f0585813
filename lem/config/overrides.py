"""The command line's overrides, `key=value`: parsed by Hydra's grammar, checked, and put into Hydra's form.

An option may be chosen as `group=name` or `group.name=name`, a dataset also by its hub id or file; sweeps are
`a,b`, `choice(a,b)`, `range(1,5)` and `glob(*)`. Knows the keys of the schema, not their types.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from lem.config.check import known_keys, unknown_key
from lem.config.layers import Layer, nested
from lem.config.options import CUSTOM, Options
from lem.config.problem import Problem, shortened
from lem.config.userfile import PARTS, Choice
from lem.spec.schema import GROUPS

# A preset that is none: Hydra has no other way to take back an option of a group.
NO_PRESET = "none"
PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
NOT_NAMES = {"null", "true", "false", "nan", "inf"}
# A range is made in no time and may be larger than any memory.
MOST_VALUES = 100_000
HYDRA = ("hydra.", "hydra/", "+hydra", "++hydra", "~hydra")


@dataclass(frozen=True)
class Override:
    """One override: of a value, or of a group's option; several values or options are a sweep."""

    text: str
    key: str
    values: tuple[Any, ...] = ()
    choices: tuple[Choice, ...] = ()

    @property
    def is_sweep(self) -> bool:
        """Whether it stands for several experiments."""
        return len(self.values) + len(self.choices) > 1

    def layer(self) -> Layer:
        """Return the value that it sets; of a sweep the first."""
        return Layer("command line", self.text, nested(self.key, self.values[0]))


class BadOverride(Exception):
    """One override that cannot be used; collected, never shown as it is."""

    def __init__(self, code: str, path: str, message: str) -> None:
        self.problem = Problem(code, path, message)


def parse(
    texts: Sequence[str], options: Options, groups_in: Path | None = None
) -> tuple[list[Override], list[Problem]]:
    """Parse overrides; of several choices for one group the last holds.

    Args:
        texts: the overrides.
        options: what can be chosen by name.
        groups_in: a config directory that Hydra itself has been given: `+group=…` of a group there is Hydra's.
    """
    found: list[Override] = []
    problems: list[Problem] = []
    for text in texts:
        try:
            found.append(Override(text, "") if _is_hydras(text, groups_in) else _parsed(text, options))
        except BadOverride as bad:
            problems.append(bad.problem)
    last = {override.key: i for i, override in enumerate(found)}
    return [o for i, o in enumerate(found) if not o.choices or last[o.key] == i], problems


def _is_hydras(text: str, groups_in: Path | None) -> bool:
    group = text.partition("=")[0].removeprefix("+")
    added = text.startswith("+") and groups_in is not None and group not in GROUPS and (groups_in / group).is_dir()
    return added or text.startswith(HYDRA)


def _parsed(text: str, options: Options) -> Override:
    key, equals, value = text.partition("=")
    name = key.lstrip("+~").strip()
    _check_form(text, key, equals, name)
    if name.endswith(".name") and name.removesuffix(".name") in GROUPS:
        name = name.removesuffix(".name")
    if name in GROUPS:
        return _choice(name, value, options)
    if name not in known_keys():
        raise BadOverride("unknown_key", shortened(name), unknown_key(tuple(name.split("."))))
    # A key exists always, so that adding (+) and forcing (++) are setting.
    override = _grammar(f"{name}={value}")
    values = tuple(_elements(override))
    if name in PARTS and not all(isinstance(given, dict) for given in values):
        raise BadOverride("wrong_type", name, f"it holds named values; set one of them, as {_example(name)}=….")
    return Override(f"{name}={value}", name, values)


def _check_form(text: str, key: str, equals: str, name: str) -> None:
    shown = shortened(text)
    if equals and not name:
        raise BadOverride("unknown_key", "", f"The override {shown!r} names no key.")
    if key.startswith("~"):
        message = f"The override {shown!r} removes a value, and each has one always; give it another, or null."
        raise BadOverride("unknown_key", "", message)
    if not equals:
        message = f"'{shown}' is neither an option, a config file (.yaml) nor an override (key=value)."
        raise BadOverride("unknown_key", "", message)
    if "@" in name:
        raise BadOverride("unknown_key", "", f"The override {shown!r} names a package (@), and there are none.")


def _example(part: str) -> str:
    return min(key for key in known_keys() if key.startswith(f"{part}."))


# ------------------------------------------------------------------ options
def _choice(group: str, value: str, options: Options) -> Override:
    literal = _unquoted(value)
    if options.get(group, literal) or (group == "dataset" and _exists(literal)):
        choices = [_chosen(group, literal, options)]
    else:
        choices = [_chosen(group, name, options) for name in _names(group, value, literal, options)]
    if not choices:
        raise BadOverride("unknown_option", group, f"{shortened(value)!r} matches none of its options.")
    named = ",".join(hydra_name(group, choice, options) for choice in choices)
    return Override(f"{group}={named}", group, choices=tuple(choices))


def _names(group: str, value: str, literal: str, options: Options) -> list[Any]:
    from hydra.core.override_parser.types import Glob

    try:
        override = _grammar(f"{group}={value}")
    except BadOverride:
        # Names that Hydra's grammar cannot take, one or several.
        names = [name.strip() for name in literal.split(",")]
        return names if all(options.get(group, name) or _exists(name) for name in names) else [literal]
    if isinstance(override.value(), Glob):
        names = [name for name in options.names(group) if (group, name) != ("dataset", CUSTOM)]
        return list(override.value().filter(names))
    return list(_elements(override))


def _chosen(group: str, name: Any, options: Options) -> Choice:
    if name is None and group == "preset":
        return Choice(None)
    if not isinstance(name, str):
        message = f"it is chosen by name, one of {', '.join(options.names(group))}."
        if isinstance(name, dict):
            message += f" Set its values one by one, as {_example(group)}=…."
        raise BadOverride("wrong_type", group, message)
    if options.get(group, name):
        return Choice(name)
    if group == "dataset" and options.is_source(name):
        return Choice(CUSTOM, name)
    raise BadOverride("unknown_option", group, options.unknown(group, shortened(name)))


def hydra_name(group: str, choice: Choice, options: Options) -> str:
    """Return the name by which Hydra knows a choice; that of a user's option or file is registered with it."""
    if choice.preset is not None:
        return _word(choice.preset, "preset", is_free=False)
    if choice.name is None:
        return NO_PRESET if options.get(group, NO_PRESET) is None else f"user/{NO_PRESET}"
    if choice.source is not None and choice.name == CUSTOM:
        return _word(choice.source, "source", is_free=options.get(group, choice.source) is None)
    file = options.get(group, choice.name)
    assert file is not None, choice
    return _word(choice.name, "user", is_free=not file.shadows) if file.is_users else choice.name


def _word(name: str, prefix: str, is_free: bool) -> str:
    """Return a name that Hydra's grammar takes as it is: the same, or a like one that no other name has."""
    is_plain = PLAIN_NAME.fullmatch(name) and name.lower() not in NOT_NAMES and not name.endswith((".yaml", ".yml"))
    if is_plain and is_free:
        return name
    digest = "" if is_plain and "/" not in name else "-" + hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{prefix}/{re.sub(r'[^A-Za-z0-9_-]', '_', name)}{digest}"


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return re.sub(r"\\(['\"])", r"\1", value[1:-1]) if quoted else value


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):
        return False


def quoted(value: str) -> str:
    """Write a text so that Hydra's override grammar reads exactly that text.

    In that grammar a backslash is special only before a quote, so only those are doubled.
    """
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


# ------------------------------------------------------------------ Hydra's grammar
@cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def _grammar(text: str) -> Any:
    from hydra.errors import HydraException

    try:
        return _parser().parse_override(text)
    except HydraException as error:
        message = f"The override {shortened(text)!r} cannot be read: {first_sentence(error)}. Quote a value of text."
    except RecursionError:
        message = f"The override {shortened(text)!r} is nested too deep."
    raise BadOverride("yaml_syntax", "", message)


def _elements(override: Any) -> Iterator[Any]:
    """Yield the values that an override stands for."""
    from hydra.core.override_parser.types import Glob, IntervalSweep, RangeSweep
    from hydra.core.override_parser.types import Override as Parsed

    value = override.value()
    if isinstance(value, (Glob, IntervalSweep)):
        message = f"{shortened(override.input_line)!r} names no values; list them, as a,b or range(1,5)."
        raise BadOverride("wrong_type", override.key_or_group, message)
    if not override.is_sweep_override():
        yield value
        return
    elements = value.range() if isinstance(value, RangeSweep) else ()
    if next(islice(elements, MOST_VALUES, None), None) is not None:
        message = f"{shortened(override.input_line)!r} stands for more than {MOST_VALUES:,} values; name fewer."
        raise BadOverride("out_of_range", override.key_or_group, message)
    for element in override.sweep_iterator():
        yield Parsed._convert_value(element)


def first_sentence(error: BaseException) -> str:
    """Return what Hydra or OmegaConf says, as a sentence of our own where theirs would not help."""
    text = " ".join(str(error).split())
    several = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if several:
        return f"{several[1]}: these are several values; add --multirun to run each, or write a list as [a,b]."
    missing = re.search(r"Could not override '([^']+)'", text)
    if missing:
        return f"{missing[1]}: the chosen options have no such key."
    return shortened(text.partition(" See https://hydra.cc")[0], 300)
