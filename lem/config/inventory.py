"""Summarizes the options that can be chosen by name, from lem's YAML files in conf/ and the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.config.layers import leaf_paths, option
from lem.config.options import Options


@dataclass(frozen=True)
class Summary:
    """An option of a config group: its name, its purpose (the first comment in its file), and its values by path."""

    name: str
    purpose: str
    values: dict[str, Any]
    # The user's own file; None for a built-in option.
    file: Path | None = None
    shadows: bool = False


def summaries(group: str, options: Options | None = None) -> Iterator[Summary]:
    """Yield summaries of a group's options, sorted by name; raises `Problems` if a user's option cannot be used."""
    options = options or Options()
    for name in options.names(group):
        yield summary(options, group, name)


def summary(options: Options, group: str, name: str) -> Summary:
    """Return the summary of one option; raises `Problems` if it is a user's option that cannot be used."""
    read = option(options, group, name)
    values = {inner: chosen.name for inner, chosen in read.choices.items() if chosen.name}
    for layer in (*read.bound.values(), *read.layers):
        if layer.kind != "default":
            values |= {".".join(path): value for path, value in leaf_paths(layer.values) if value != {}}
    text = read.file.path.read_text(encoding="utf-8-sig")
    return Summary(name, _purpose(text), values, read.file.path if read.file.is_users else None, read.file.shadows)


def _purpose(text: str) -> str:
    comments = (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return next((line for line in comments if line and not line.startswith(("@package", "yaml-language-server"))), "")
