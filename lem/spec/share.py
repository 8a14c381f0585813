"""Shares between 0 and 1 as people write them: 0.02, "0.02" or "2%". Flags and campaign files accept the same forms."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

IN_WORDS = "a share between 0 and 1, such as 2% or 0.02"
_TEXT = r"^\s*(0?\.[0-9]+|[0-9]{1,2}(\.[0-9]+)?\s*%)\s*$"
_SCHEMA = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
        {"type": "string", "pattern": _TEXT},
        {"type": "null"},
    ]
}


def share(value: object) -> float:
    """Return a share as a number: 0.02 for 0.02, "0.02", "2%" and "2 %".

    Raises:
        ValueError: the value is not a number greater than 0 and less than 1.
    """
    if isinstance(value, str):
        number, is_percentage = value.strip(), value.strip().endswith("%")
        try:
            found = float(Decimal(number.removesuffix("%").rstrip()) / (100 if is_percentage else 1))
        except (InvalidOperation, OverflowError):
            raise ValueError(IN_WORDS) from None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    else:
        raise ValueError(IN_WORDS)
    if not 0 < found < 1:  # NaN fails this check as well
        raise ValueError(IN_WORDS)
    return found


def _checked(value: Any) -> float | None:
    try:
        return None if value is None else share(value)
    except ValueError:
        raise PydanticCustomError("share", IN_WORDS) from None


# The type of a share in a schema; None means that no share is set.
Share = Annotated[float | None, BeforeValidator(_checked), WithJsonSchema(_SCHEMA)]
