"""The schema of the configuration: its groups, and every value by dotted path."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from lem.spec.experiment import Experiment

# Parts of the configuration that are chosen by name from the files in a folder of conf/.
GROUPS = ("backend", "dataset", "decoder", "energy", "preset")


@dataclass(frozen=True)
class Leaf:
    """One value of the configuration: its dotted path, type, constraints, description and default."""

    path: str
    annotation: Any
    info: FieldInfo
    default: Any

    @property
    def description(self) -> str:
        """A one-sentence description of the value."""
        return self.info.description or ""

    @property
    def env(self) -> str | None:
        """The environment variable, if any, that sets the default; every other source takes precedence over it."""
        extra = self.info.json_schema_extra
        return str(extra["env"]) if isinstance(extra, dict) and "env" in extra else None


def leaves(cls: type[Any] = Experiment, prefix: str = "") -> tuple[Leaf, ...]:
    """Return all values of a configuration type, depth first; `backend` includes the values of every backend."""
    return _leaves(cast(Hashable, cls), prefix)


@cache
def _leaves(cls: Any, prefix: str) -> tuple[Leaf, ...]:
    hints = get_type_hints(cls, include_extras=True)
    found: list[Leaf] = []
    for f in fields(cls):
        annotation, path = hints[f.name], prefix + f.name
        parts = [t for t in _member_types(annotation) if is_dataclass(t)]
        for part in parts:
            found += leaves(part, f"{path}.")  # type: ignore[arg-type]
        if not parts:
            infos = [meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, FieldInfo)]
            found.append(Leaf(path, annotation, infos[0] if infos else FieldInfo(annotation=annotation), f.default))
    return tuple(found)


def leaf(path: str) -> Leaf:
    """Return the leaf at a dotted path, or the first backend's if several backends have this path.

    Raises:
        KeyError: no value has this path.
    """
    return _leaves_by_path()[path]


@cache
def _leaves_by_path() -> dict[str, Leaf]:
    return {each.path: each for each in reversed(leaves())}


def _member_types(annotation: Any) -> list[Any]:
    """Return the types that an annotation allows: every member of a union, and no type for a Literal."""
    if get_origin(annotation) is Annotated:
        return _member_types(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return []
    members = get_args(annotation)
    return [t for member in members for t in _member_types(member)] if members else [annotation]
