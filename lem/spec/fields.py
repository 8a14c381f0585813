"""How a field of the configuration is declared: its description, range and environment variable."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

from pydantic import ConfigDict

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def config(cls: type[T]) -> type[T]:
    """Make a dataclass of configuration: keyword-only, no unknown keys, no silent conversion of types."""
    checks = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    cls.__pydantic_config__ = checks  # type: ignore[attr-defined]
    return dataclass(kw_only=True)(cls)


def Env(variable: str) -> dict[str, str]:  # noqa: N802 - reads as part of a field's declaration
    """Name the environment variable that gives a field's default (below every other source)."""
    return {"env": variable}
