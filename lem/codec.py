"""Plans, records and configurations as JSON: written and read by their types. Knows no file."""

from __future__ import annotations

import hashlib
import json
from typing import Any, TypeVar

from lem.spec import Experiment

T = TypeVar("T")


# Building one takes milliseconds.
_ADAPTERS: dict[Any, Any] = {}


def adapter(cls: Any) -> Any:
    """Return the type's reader and writer."""
    if cls not in _ADAPTERS:
        from pydantic import TypeAdapter

        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """Write a plan, a record or a configuration as JSON."""
    return str(adapter(type(value)).dump_json(value, indent=indent).decode())


def from_json(cls: type[T], text: str | bytes) -> T:
    """Read what `to_json` wrote; raises ValueError when it is something else."""
    result: T = adapter(cls).validate_json(text)
    return result


def to_plain(value: Any) -> Any:
    """Return a plan, a record or a configuration as plain data."""
    return adapter(type(value)).dump_python(value, mode="json")


def config_sha256(experiment: Experiment) -> str:
    """Return the digest of what is measured: of every value but where the results go."""
    values = to_plain(experiment)
    del values["io"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
