"""What is wrong with a configuration and where it stands: a code, a path, a sentence, a line of a file.

The severity of a code, its meaning and its remedy stand in `lem.spec.rules`. This module knows neither YAML nor Hydra
nor the schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lem.errors import ConfigError
from lem.spec.rules import RULES, Severity


@dataclass(frozen=True)
class Place:
    """A place in a file; line and column count from 1."""

    file: Path
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return shown_path(self.file) + (f":{self.line}" if self.line else "")


@dataclass(frozen=True)
class Problem:
    """One fault of a configuration."""

    code: str
    path: str
    message: str
    place: Place | None = None

    @property
    def severity(self) -> Severity:
        """What the catalogue says of the code."""
        return RULES[self.code].severity

    @property
    def where(self) -> str:
        """`my.yaml:12`, with the column where the text itself is broken; empty without a file."""
        if self.place is None:
            return ""
        exact = self.code == "yaml_syntax" and self.place.column
        return f"{self.place}:{self.place.column}" if exact else str(self.place)

    @property
    def sentence(self) -> str:
        """The path and what is wrong there."""
        return f"{self.path}: {self.message}" if self.path else self.message

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.where, self.sentence]))


class Faults(ConfigError):
    """Problems of a configuration, located."""

    def __init__(self, found: Iterable[Problem]) -> None:
        # The same fault may be met twice: a parent of two parents is read twice.
        self.found = tuple(dict.fromkeys(found))
        super().__init__(*map(str, self.found))


def shown_path(file: Path) -> str:
    """Return a path as people would write it here: relative below the working directory."""
    try:
        return str(file.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(file)


def shortened(text: str, limit: int = 60) -> str:
    """Return a text that fits into a sentence, on one line."""
    line = "".join(c if c.isprintable() else "·" for c in text[: limit + 1])
    return line if len(text) <= limit else f"{line[: limit - 3]}…"
