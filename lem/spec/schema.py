"""The configuration seen as a schema: its groups, and each of its values by dotted path."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from lem.spec.experiment import Experiment

# Parts that are chosen by name among the files of a folder of conf/.
GROUPS = ("backend", "dataset", "decoder", "energy", "preset")


@dataclass(frozen=True)
class Leaf:
    """One configurable value: its dotted path, type, constraints, description and default."""

    path: str
    annotation: Any
    info: FieldInfo
    default: Any

    @property
    def description(self) -> str:
        """The sentence that says what the value is for."""
        return self.info.description or ""

    @property
    def env(self) -> str | None:
        """The environment variable below the value's other sources, if it has one."""
        extra = self.info.json_schema_extra
        return str(extra["env"]) if isinstance(extra, dict) and "env" in extra else None


def leaves(cls: type[Any] = Experiment, prefix: str = "") -> tuple[Leaf, ...]:
    """Return all values of a configuration type, depth first; `backend` has those of every backend."""
    return _leaves(cast(Hashable, cls), prefix)


@cache
def _leaves(cls: Any, prefix: str) -> tuple[Leaf, ...]:
    hints = get_type_hints(cls, include_extras=True)
    found: list[Leaf] = []
    for f in fields(cls):
        annotation, path = hints[f.name], prefix + f.name
        parts = [t for t in _flatten(annotation) if is_dataclass(t)]
        for part in parts:
            found += leaves(part, f"{path}.")  # type: ignore[arg-type]
        if not parts:
            found.append(Leaf(path, annotation, _field_info(annotation), f.default))
    return tuple(found)


def leaf(path: str) -> Leaf:
    """Return the leaf at a dotted path; KeyError when there is none."""
    return _first_leaves()[path]


@cache
def _first_leaves() -> dict[str, Leaf]:
    """Return the leaves by path, of those that several backends have the first."""
    return {each.path: each for each in reversed(leaves())}


def _flatten(annotation: Any) -> list[Any]:
    """Return an annotation's member types: of an Annotated its first, of a union all."""
    if get_origin(annotation) is Annotated:
        return _flatten(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return []
    members = get_args(annotation)
    return [t for member in members for t in _flatten(member)] if members else [annotation]


def _field_info(annotation: Any) -> FieldInfo:
    found = [meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, FieldInfo)]
    return found[0] if found else FieldInfo(annotation=annotation)
