"""Writes plain data as YAML text that reads back as the same data, fast enough for ten thousand files.

Strings are quoted wherever YAML 1.1, YAML 1.2 or Hydra's loader might misread them. This module does not know the
schema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import yaml
from yaml.representer import SafeRepresenter


def flow(value: Any) -> str:
    """Return plain data as YAML on one line; parsers of YAML 1.1 and 1.2 read this text in the same way."""
    if isinstance(value, str):
        return _quoted(value)
    if isinstance(value, list):
        return f"[{', '.join(map(flow, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{flow(key)}: {flow(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, float):
        return str(SafeRepresenter().represent_float(value).value)
    return json.dumps(value)


@lru_cache(maxsize=4096)
def _quoted(text: str) -> str:
    is_word = re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", text) and text.lower() not in (
        "true", "false", "null", "yes", "no", "on", "off", "y", "n",
    )  # fmt: skip
    if is_word:
        return text
    return yaml.safe_dump(text, default_style='"', width=math.inf, allow_unicode=True).strip()


def block(tree: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Yield a mapping as YAML, one line for each value."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{flow(key)}:"
            yield from block(value, indent + "  ")
        else:
            yield f"{indent}{flow(key)}: {flow(value)}"


def escaped(value: Any) -> Any:
    """Escape every `${` in fully resolved data, so that no string is read as an interpolation."""
    if isinstance(value, dict):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [escaped(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + r"\${", value)
    return value
