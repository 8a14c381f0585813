"""A problem with a configuration: a code, a path, a message, and a location in a file.

`lem.spec.rules` defines the severity, meaning and remedy of each code. This module does not know YAML, Hydra or the
schema.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.errors import ConfigError
from lem.spec.rules import RULES, Severity


@dataclass(frozen=True)
class Location:
    """A position in a file; lines and columns are counted from 1."""

    file: Path
    line: int | None = None
    column: int | None = None

    def __str__(self) -> str:
        return shown_path(self.file) + (f":{self.line}" if self.line else "")


@dataclass(frozen=True)
class Problem:
    """One problem with a configuration."""

    code: str
    path: str
    message: str
    location: Location | None = None

    @property
    def severity(self) -> Severity:
        """The severity of the code, as listed in the catalog of rules."""
        return RULES[self.code].severity

    @property
    def where(self) -> str:
        """The position, as in `my.yaml:12`, with the column if the YAML is broken; empty if no file is involved."""
        if self.location is None:
            return ""
        exact = self.code == "yaml_syntax" and self.location.column
        return f"{self.location}:{self.location.column}" if exact else str(self.location)

    @property
    def sentence(self) -> str:
        """The path and the message."""
        return f"{self.path}: {self.message}" if self.path else self.message

    def __str__(self) -> str:
        return ": ".join(filter(None, [self.where, self.sentence]))


class Problems(ConfigError):
    """The configuration has problems; `found` lists them all."""

    def __init__(self, found: Iterable[Problem]) -> None:
        # The same problem may be found twice: a file from which two others inherit is read twice.
        self.found = tuple(dict.fromkeys(found))
        super().__init__(*map(str, self.found))

    def __reduce__(self) -> tuple[type[Problems], tuple[Any, ...]]:
        """Return what pickle needs to rebuild the error in another process."""
        return type(self), (self.found,)

    @classmethod
    def one(cls, code: str, path: str, message: str, location: Location | None = None) -> Problems:
        """Return an error with a single problem."""
        return cls([Problem(code, path, message, location)])


def impossible(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems that make a configuration unusable."""
    return [problem for problem in problems if problem.severity == "impossible"]


def shown_path(file: Path) -> str:
    """Return a path as a user would write it: relative if it is inside the working directory."""
    try:
        return str(file.relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(file)


def shortened(text: str, limit: int = 60) -> str:
    """Return a string on one line, shortened to fit into a message."""
    line = "".join(c if c.isprintable() else "·" for c in text[: limit + 1])
    return line if len(text) <= limit else f"{line[: limit - 3]}…"
