"""The decorator for parts of the configuration, which turns a class into a dataclass that pydantic checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def config(cls: type[T]) -> type[T]:
    """Turn a class into a configuration dataclass: keyword-only, no unknown keys, no implicit type conversion."""
    checks = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    cls.__pydantic_config__ = checks  # type: ignore[attr-defined]
    return dataclass(kw_only=True)(cls)
