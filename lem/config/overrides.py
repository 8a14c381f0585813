"""Overrides on the command line, `key=value`: parsed with Hydra's grammar, checked, and expanded into sweeps.

An option may be chosen as `GROUP=NAME` or `GROUP.name=NAME` (`backend=vllm`, `backend.name=vllm`), and a dataset also
by its hub id or file. A sweep is written `a,b`, `choice(a,b)`, `range(1,5)` or `glob(*)`. This module knows the keys of
the schema, but not their types.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lem.config.check import known_keys, unknown_key
from lem.config.layers import nested
from lem.config.options import CUSTOM, Options
from lem.config.problem import Problem, Problems, shortened
from lem.config.userfile import PARTS, Choice, Layer
from lem.spec.schema import GROUPS

# A preset that sets nothing. It is needed because Hydra has no other way to undo the choice of an option.
NO_PRESET = "none"
PLAIN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?")
NOT_NAMES = {"null", "true", "false", "nan", "inf"}
# A range of a few characters can expand to more values than fit in memory.
MOST_VALUES = 100_000
SEVERAL = "this override has several values; add --multirun to run each of them, or write a list as [a,b]."
HYDRA = ("hydra.", "hydra/", "+hydra", "++hydra", "~hydra")


@dataclass(frozen=True)
class Override:
    """One override, of a value or of a group's option; several values or options make it a sweep.

    `parts` are the values or options in Hydra's notation. An override of Hydra's own settings has no key.
    """

    text: str
    key: str = ""
    values: tuple[Any, ...] = ()
    choices: tuple[Choice, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def is_sweep(self) -> bool:
        """Whether the override has several values or options, each for an experiment of its own."""
        return len(self.parts) > 1

    @property
    def shown(self) -> str:
        """The override as a user would write it; Hydra may use a different name for the option."""
        if not self.choices:
            return self.text
        return f"{self.key}={','.join(choice.source or choice.name or 'null' for choice in self.choices)}"

    def layer(self) -> Layer:
        """Return the layer of the override's value, or of the first value of a sweep."""
        return Layer("command line", self.text, nested(self.key, self.values[0]))

    def each(self) -> list[Override]:
        """Return a separate override for each value or option; an override of a Hydra setting is returned as it is."""
        return [
            Override(f"{self.key}={part}", self.key, self.values[i : i + 1], self.choices[i : i + 1], (part,))
            for i, part in enumerate(self.parts)
        ] or [self]


def combinations(overrides: Iterable[Override]) -> list[tuple[Override, ...]]:
    """Expand a sweep into the overrides of each cell, in the order of Hydra's own sweeper: the last key varies fastest.

    If a key is given more than once, its last override applies, at the position of the first.
    """
    by_key = {override.key or override.text: override.each() for override in overrides}
    return list(itertools.product(*by_key.values()))


def parse(
    texts: Sequence[str], options: Options, groups_in: Path | None = None
) -> tuple[list[Override], list[Problem]]:
    """Parse overrides; if a group is given several times, only its last choice is returned.

    Args:
        texts: the overrides.
        options: the options that can be chosen by name.
        groups_in: a config directory known to Hydra; `+group=…` for a group in that directory is passed on to Hydra.
    """
    found: list[Override] = []
    problems: list[Problem] = []
    for text in texts:
        group = text.partition("=")[0].removeprefix("+")
        added = text.startswith("+") and groups_in is not None and group not in GROUPS and (groups_in / group).is_dir()
        try:
            found.append(Override(text) if added or is_hydra_setting(text) else _parsed(text, options))
        except Problems as error:
            problems += error.found
    last = {override.key: i for i, override in enumerate(found)}
    return [o for i, o in enumerate(found) if not o.choices or last[o.key] == i], problems


def is_hydra_setting(text: str) -> bool:
    """Return whether an override sets one of Hydra's own settings, such as `hydra.sweep.dir` or `hydra/launcher`."""
    return text.startswith(HYDRA)


def has_several_values(text: str) -> bool:
    """Return whether an override has several values in Hydra's grammar; False if it cannot be parsed."""
    try:
        return bool(_read(text).is_sweep_override())
    except Problems:
        return False


def _parsed(text: str, options: Options) -> Override:
    key, equals, value = text.partition("=")
    name = key.lstrip("+~").strip()
    _check_form(text, key, equals, name)
    if name.endswith(".name") and name.removesuffix(".name") in GROUPS:
        name = name.removesuffix(".name")
    if name in GROUPS:
        return _parsed_choice(name, value, options)
    if name not in known_keys():
        raise Problems.one("unknown_key", shortened(name), unknown_key(tuple(name.split("."))))
    # All keys of the schema exist, so adding (+) and forcing (++) are the same as setting a value.
    values, parts = _elements(_read(f"{name}={value}"))
    if name in PARTS and not all(isinstance(given, dict) for given in values):
        raise Problems.one("wrong_type", name, f"this is a mapping; set one of its values, as in {_example(name)}=….")
    return Override(f"{name}={value}", name, values, parts=parts)


def _check_form(text: str, key: str, equals: str, name: str) -> None:
    shown = shortened(text)
    if equals and not name:
        raise Problems.one("unknown_key", "", f"The override {shown!r} has no key.")
    if key.startswith("~"):
        message = f"The override {shown!r} removes a value, but every value is required; set another value, or null."
        raise Problems.one("unknown_key", "", message)
    if not equals:
        message = f"'{shown}' is neither an option, a config file (.yaml) nor an override (key=value)."
        raise Problems.one("unknown_key", "", message)
    if "@" in name:
        raise Problems.one("unknown_key", "", f"The override {shown!r} names a package (@); leave the package out.")


def _example(part: str) -> str:
    return min(key for key in known_keys() if key.startswith(f"{part}."))


# ------------------------------------------------------------------ options
def _parsed_choice(group: str, value: str, options: Options) -> Override:
    literal = _unquoted(value)
    if options.get(group, literal) or (group == "dataset" and _exists(literal)):
        names = [literal]
    else:
        names = _names(group, value, literal, options)
    if not names:
        raise Problems.one("unknown_option", group, f"{shortened(value)!r} matches no option of this group.")
    choices = tuple(choice_of(group, name, options) for name in names)
    parts = tuple(hydra_name(group, choice, options) for choice in choices)
    return Override(f"{group}={','.join(parts)}", group, choices=choices, parts=parts)


def _names(group: str, value: str, literal: str, options: Options) -> list[Any]:
    from hydra.core.override_parser.types import Glob

    try:
        override = _read(f"{group}={value}")
    except Problems:
        # The value is one or more names that Hydra's grammar cannot read.
        names = [name.strip() for name in literal.split(",")]
        return names if all(options.get(group, name) or _exists(name) for name in names) else [literal]
    if isinstance(override.value(), Glob):
        names = [name for name in options.names(group) if (group, name) != ("dataset", CUSTOM)]
        return list(override.value().filter(names))
    return list(_elements(override)[0])


def choice_of(group: str, name: Any, options: Options) -> Choice:
    """Return the choice that a name selects: an option, a dataset (hub id or file), or, for None, no preset.

    Raises:
        Problems: no such option exists, or the value is not a name.
    """
    if name is None and group == "preset":
        return Choice(None)
    if not isinstance(name, str):
        message = f"must be the name of an option: {', '.join(options.names(group))}."
        if isinstance(name, dict):
            message += f" Set single values separately, as in {_example(group)}=…."
        raise Problems.one("wrong_type", group, message)
    if options.get(group, name):
        return Choice(name)
    if group == "dataset" and options.is_source(name):
        return Choice(CUSTOM, name)
    raise Problems.one("unknown_option", group, options.unknown(group, shortened(name)))


def hydra_name(group: str, choice: Choice, options: Options) -> str:
    """Return the name under which Hydra knows a choice; a user's option or file is registered under that name."""
    if choice.preset is not None:
        return _hydra_word(choice.preset, "preset", is_free=False)
    if choice.name is None:
        return NO_PRESET if options.get(group, NO_PRESET) is None else f"user/{NO_PRESET}"
    if choice.source is not None and choice.name == CUSTOM:
        return _hydra_word(choice.source, "source", is_free=options.get(group, choice.source) is None)
    file = options.get(group, choice.name)
    assert file is not None, choice
    return _hydra_word(choice.name, "user", is_free=not file.shadows) if file.is_users else choice.name


def _hydra_word(name: str, prefix: str, is_free: bool) -> str:
    """Return a name that Hydra's grammar reads unchanged: the given one, or a similar one that is still free."""
    is_plain = PLAIN_NAME.fullmatch(name) and name.lower() not in NOT_NAMES and not name.endswith((".yaml", ".yml"))
    if is_plain and is_free:
        return name
    digest = "" if is_plain and "/" not in name else "-" + hashlib.sha256(name.encode()).hexdigest()[:6]
    return f"{prefix}/{re.sub(r'[^A-Za-z0-9_-]', '_', name)}{digest}"


def _unquoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return re.sub(r"\\(['\"])", r"\1", value[1:-1]) if is_quoted else value


def _exists(name: str) -> bool:
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError):
        return False


def quoted(value: str) -> str:
    """Quote a string so that Hydra's override grammar reads exactly that string.

    In that grammar, backslashes are special only before a quote, so they are doubled only before a quote and at the end
    of the string, where the closing quote follows.
    """
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value) + "'"


# ------------------------------------------------------------------ Hydra's grammar
@cache
def _parser() -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


def _read(text: str) -> Any:
    """Return the override as parsed by Hydra's grammar; raises `Problems`."""
    from hydra.errors import HydraException

    try:
        return _parser().parse_override(text)
    except HydraException as error:
        message = f"The override {shortened(text)!r} cannot be read: {first_sentence(error)}. Quote text values."
    except RecursionError:
        message = f"The override {shortened(text)!r} is nested too deeply."
    raise Problems.one("yaml_syntax", "", message)


def _elements(override: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Return the values of an override as plain data and in Hydra's notation."""
    from hydra.core.override_parser.types import Glob, IntervalSweep, RangeSweep, Transformer

    value = override.value()
    if isinstance(value, (Glob, IntervalSweep)):
        message = f"{shortened(override.input_line)!r} has no values; list them, as in a,b or range(1,5)."
        raise Problems.one("wrong_type", override.key_or_group, message)
    if not override.is_sweep_override():
        return (value,), (override.get_value_element_as_str(),)
    elements = value.range() if isinstance(value, RangeSweep) else ()
    if next(itertools.islice(elements, MOST_VALUES, None), None) is not None:
        message = f"{shortened(override.input_line)!r} expands to more than {MOST_VALUES:,} values; give fewer."
        raise Problems.one("out_of_range", override.key_or_group, message)
    # The values are read only once, because a shuffled sweep has a different order each time.
    found = list(override.sweep_iterator())
    if not found:
        raise Problems.one("wrong_type", override.key_or_group, f"{shortened(override.input_line)!r} has no values.")
    return tuple(map(_without_quotes, found)), tuple(map(Transformer.str, found))


def _without_quotes(element: Any) -> Any:
    from hydra.core.override_parser.types import QuotedString

    if isinstance(element, QuotedString):
        return element.text
    if isinstance(element, list):
        return list(map(_without_quotes, element))
    if isinstance(element, dict):
        return {_without_quotes(key): _without_quotes(value) for key, value in element.items()}
    return element


def first_sentence(error: BaseException) -> str:
    """Return a Hydra or OmegaConf error as a single sentence, reworded if the original message would not help."""
    text = " ".join(str(error).split())
    several = re.search(r"Ambiguous value for argument '([^']+)'", text)
    if several:
        return f"{several[1]}: {SEVERAL}"
    missing = re.search(r"Could not override '([^']+)'", text)
    if missing:
        return f"{missing[1]}: the chosen options have no such key."
    return shortened(text.partition(" See https://hydra.cc")[0], 300)
