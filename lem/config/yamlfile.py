"""Reads a YAML file as plain data, with the line of every key, without running any code.

Files are read as YAML 1.1, except that 1e-5 is a number and a date is a string. Duplicate keys are problems, and only
the tags of plain values are allowed. The cost of reading a file is bounded by limits on its size in bytes, its nesting,
the length of each string, and the number of values after aliases are expanded. This module does not know the keys of
the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.reader import Reader

from lem.config.problem import Location, Problem, Problems, shortened

KeyPath = tuple[str | int, ...]

MAX_BYTES = 4_000_000
MAX_DEPTH = 30
TOO_DEEP = f"the values are nested more than {MAX_DEPTH} levels deep."
MAX_VALUES = 20_000
MAX_TEXT = 100_000
MAX_DIGITS = 400
TAG = "tag:yaml.org,2002:"
SCALARS = {TAG + kind for kind in ("str", "int", "float", "bool", "null", "value", "merge")}
WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
# The same floats as OmegaConf: YAML 1.1 requires a decimal point and a signed exponent, but people write 1e-5.
FLOAT = re.compile(
    r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
    |[-+]?\.[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.X,
)


@dataclass
class Document:
    """A file's mapping, the locations of its keys and list items, and the problems that did not prevent reading it."""

    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[KeyPath, Location] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read(path: Path) -> Document:
    """Read one file as plain data.

    Raises:
        Problems: the file cannot be used at all: it is missing, not text, not valid YAML, or not a mapping.
    """
    text = _text(path)
    node = _node(path, text)
    if node is None:
        return Document(problems=[Problem("empty_file", "", "the file sets no values.", Location(path))])
    walk = _Walk(path)
    values = walk.value(node, ())
    if not isinstance(values, dict):
        message = f"a config file must be a mapping of keys to values, not {kind_of(values)}."
        raise Problems(
            [*walk.document.problems, Problem("not_a_mapping", "", message, _location(path, node.start_mark))]
        )
    walk.document.values = values
    return walk.document


def kind_of(value: Any) -> str:
    """Return the everyday name of a value's type."""
    kinds = ((bool, "a boolean"), (str, "a string"), (dict, "a mapping"), (list, "a list"), (type(None), "null"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "a number")


def resolvers(base: Any) -> dict[str, list[tuple[str, Any]]]:
    """Return a loader's or dumper's rules for plain scalars, but with FLOAT for floats and without timestamps."""
    rules = {
        first: [(tag, rule) for tag, rule in pairs if tag not in (TAG + "float", TAG + "timestamp")]
        for first, pairs in base.yaml_implicit_resolvers.items()
    }
    for first in "-+0123456789.":
        rules.setdefault(first, []).append((TAG + "float", FLOAT))
    return rules


# ------------------------------------------------------------------ bytes to nodes
def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _fatal("missing_file", "no such config file.", Location(path)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _fatal("unreadable_file", f"the file cannot be read: {reason}.", Location(path)) from None
    if len(data) > MAX_BYTES:
        raise _fatal("too_large", f"a config file must not exceed {MAX_BYTES} bytes.", Location(path))
    if data.startswith(WIDE_BOMS):
        raise _fatal("not_utf8", "the text is UTF-16 or UTF-32; save it as UTF-8.", Location(path))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8."
        raise _fatal("not_utf8", bad, _location_at(path, data[: error.start].decode("utf-8", "replace"))) from None
    if found := Reader.NON_PRINTABLE.search(text.removeprefix("\ufeff")):
        message = f"broken YAML: the character U+{ord(found[0]):04X} is not allowed."
        raise _fatal("yaml_syntax", message, _location_at(path, text[: found.start()]))
    return text


def _node(path: Path, text: str) -> yaml.Node | None:
    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        yaml_implicit_resolvers = resolvers(yaml.SafeLoader)

    try:
        _check_events(path, yaml.parse(text, Loader=Loader))
        node: yaml.Node | None = yaml.compose(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = _location(path, mark) if mark else Location(path)
        raise _fatal("yaml_syntax", f"broken YAML: {error.problem or error.context}.", location) from None
    except (yaml.YAMLError, ValueError) as error:
        raise _fatal("yaml_syntax", f"broken YAML: {' '.join(str(error).split())}.", Location(path)) from None
    return node


def _check_events(path: Path, events: Iterator[yaml.Event]) -> None:
    """Raise `Problems` for a second document, or for nesting so deep that the recursive composer could fail."""
    depth = documents = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        if depth > MAX_DEPTH:
            raise _fatal("too_large", TOO_DEEP, _location(path, event.start_mark))
        if documents > 1:
            message = "a second document begins here (---), but a config file must have only one."
            raise _fatal("several_documents", message, _location(path, event.start_mark))


# ------------------------------------------------------------------ nodes to data
class _Walk:
    """Converts nodes to plain data; an alias is expanded each time it occurs, up to MAX_VALUES values in all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document = Document()
        self.scalars = SafeConstructor()
        self.open: set[int] = set()
        self.count = 0

    def value(self, node: yaml.Node, at: KeyPath) -> Any:
        self._count(node)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, at)
        expected = TAG + ("seq" if isinstance(node, yaml.SequenceNode) else "map")
        if node.tag != expected:
            self._forbidden(node, at)
            return None
        with self._opened(node):
            if isinstance(node, yaml.SequenceNode):
                return [self._item(child, (*at, i)) for i, child in enumerate(node.value)]
            return {key: self._item(child, (*at, key), mark) for key, mark, child in self._pairs(node, at)}

    def _item(self, node: yaml.Node, at: KeyPath, mark: Any = None) -> Any:
        self.document.locations[at] = _location(self.path, mark or node.start_mark)
        return self.value(node, at)

    def _pairs(self, node: yaml.Node, at: KeyPath) -> list[tuple[str, Any, yaml.Node]]:
        """Return a mapping's entries as (key, mark, value): its own first, then the entries merged in by `<<`."""
        own: dict[str, tuple[str, Any, yaml.Node]] = {}
        merged: list[tuple[str, Any, yaml.Node]] = []
        for key_node, child in node.value:
            self._count(key_node)
            if key_node.tag == TAG + "merge":
                merged += self._merged(child, at)
            elif (key := self._key(key_node, at)) is None:
                continue
            elif key in own:
                message = f"duplicate key; it was first given on line {own[key][1].line + 1}."
                self._report("duplicate_key", (*at, key), message, key_node)
            else:
                own[key] = (key, key_node.start_mark, child)
        for pair in merged:
            own.setdefault(pair[0], pair)
        return list(own.values())

    def _merged(self, node: yaml.Node, at: KeyPath) -> list[tuple[str, Any, yaml.Node]]:
        self._count(node)
        with self._opened(node):
            if isinstance(node, yaml.MappingNode):
                return self._pairs(node, at)
            if isinstance(node, yaml.SequenceNode):
                return [pair for child in node.value for pair in self._merged(child, at)]
        raise _fatal("yaml_syntax", "broken YAML: << can merge only mappings.", _location(self.path, node.start_mark))

    def _key(self, node: yaml.Node, at: KeyPath) -> str | None:
        if node.tag in (TAG + "str", TAG + "value") and isinstance(node.value, str):
            if len(node.value) <= MAX_TEXT:
                return node.value
            message = f"the key has {len(node.value)} characters, but at most {MAX_TEXT} are allowed."
            self._report("too_large", at, message, node)
            return None
        shown = shortened(node.value) if isinstance(node.value, str) else "a collection"
        self._report("bad_key", at, f"the key {shown!r} is not a string; quote it if it is meant to be one.", node)
        return None

    def _scalar(self, node: yaml.ScalarNode, at: KeyPath) -> Any:
        if node.tag not in SCALARS:
            self._forbidden(node, at)
            return None
        if len(node.value) > (limit := MAX_TEXT if node.tag == TAG + "str" else MAX_DIGITS):
            message = f"the value has {len(node.value)} characters, but at most {limit} are allowed."
            self._report("too_large", at, message, node)
            return None
        if node.tag in (TAG + "str", TAG + "value", TAG + "merge"):
            return node.value
        try:
            return self.scalars.construct_object(node)
        except (ValueError, KeyError, OverflowError):
            kind = node.tag.removeprefix(TAG)
            self._report("yaml_syntax", at, f"broken YAML: {shortened(node.value)!r} is not of type {kind}.", node)
            return None

    def _forbidden(self, node: yaml.Node, at: KeyPath) -> None:
        tag = shortened(node.tag.replace(TAG, "!!"))
        self._report("forbidden_tag", at, f"the tag {tag} is not allowed; a config file must be plain data.", node)

    def _report(self, code: str, at: KeyPath, message: str, node: yaml.Node) -> None:
        problem = Problem(code, dotted(at), message, _location(self.path, node.start_mark))
        self.document.problems.append(problem)

    def _count(self, node: yaml.Node) -> None:
        self.count += 1
        if self.count > MAX_VALUES:
            message = f"the file contains more than {MAX_VALUES} values once its aliases are expanded."
            raise _fatal("too_large", message, _location(self.path, node.start_mark))

    @contextmanager
    def _opened(self, node: yaml.Node) -> Iterator[None]:
        """Mark a collection as open while its content is read.

        Raises:
            Problems: the collection contains itself, or collections are nested too deeply.
        """
        location = _location(self.path, node.start_mark)
        if id(node) in self.open:
            raise _fatal("yaml_syntax", "broken YAML: an anchor contains its own alias.", location)
        if len(self.open) > MAX_DEPTH:
            raise _fatal("too_large", TOO_DEEP, location)
        self.open.add(id(node))
        yield
        self.open.discard(id(node))


def dotted(path: KeyPath) -> str:
    """Return a path as a user would write it, shortened if a key is extremely long."""
    return shortened(".".join(map(str, path)), 200)


def _location(path: Path, mark: Any) -> Location:
    return Location(path, mark.line + 1, mark.column + 1)


def _location_at(path: Path, before: str) -> Location:
    return Location(path, before.count("\n") + 1, len(before) - before.rfind("\n"))


def _fatal(code: str, message: str, location: Location) -> Problems:
    return Problems([Problem(code, "", message, location)])
