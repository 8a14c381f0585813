"""Plans, records and configurations as JSON: written and read by their types. Knows no file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lem.spec import Experiment

T = TypeVar("T")


# Building one takes milliseconds.
_ADAPTERS: dict[Any, Any] = {}
_READERS: dict[Any, Callable[[str | bytes], Any]] = {}


def adapter(cls: Any) -> Any:
    """Return the type's reader and writer."""
    if cls not in _ADAPTERS:
        from pydantic import TypeAdapter

        _ADAPTERS[cls] = TypeAdapter(cls)
    return _ADAPTERS[cls]


def to_json(value: Any, *, indent: int | None = 2) -> str:
    """Write a plan, a record or a configuration as JSON."""
    return str(adapter(type(value)).dump_json(value, indent=indent).decode())


def to_compact_json(value: Any) -> str:
    """Write the same without line breaks, in a third of the time."""
    import msgspec

    return msgspec.json.encode(value).decode()


def from_json(cls: type[T], text: str | bytes) -> T:
    """Read what `to_json` wrote; raises ValueError when it is something else."""
    result: T = reader(cls)(text)
    return result


def reader(cls: Any) -> Callable[[str | bytes], Any]:
    """Return what reads a type's JSON, each value of which must be of its type; it raises ValueError.

    msgspec reads records in half of the time that pydantic takes; only types that choose among dataclasses, as a
    configuration does among backends, are left to pydantic.
    """
    if cls not in _READERS:
        import msgspec

        try:
            _READERS[cls] = with_value_errors(msgspec.json.Decoder(cls).decode)
        except TypeError:
            _READERS[cls] = _with_short_errors(adapter(cls).validate_json)
    return _READERS[cls]


def _with_short_errors(validate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return pydantic's reader with the first of its errors in a line."""
    from pydantic import ValidationError

    def read(content: str | bytes) -> Any:
        try:
            return validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from None

    return read


def with_value_errors(decode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a reader of msgspec's that raises ValueError where its own errors are something else."""
    import msgspec

    damaged = msgspec.MsgspecError

    def read(content: str | bytes) -> Any:
        try:
            return decode(content)
        except damaged as error:
            raise ValueError(str(error)) from None

    return read


def to_plain(value: Any) -> Any:
    """Return a plan, a record or a configuration as plain data."""
    return adapter(type(value)).dump_python(value, mode="json")


def config_sha256(experiment: Experiment) -> str:
    """Return the digest of what is measured: of every value but where the results go."""
    values = to_plain(experiment)
    del values["io"]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def arrivals_sha256(times_s: Sequence[float]) -> str:
    """Return the digest of the arrivals of a trace."""
    return hashlib.sha256(json.dumps(list(times_s)).encode()).hexdigest()
