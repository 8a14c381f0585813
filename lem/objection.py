"""A reason not to run an experiment as it is configured, found before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# impossible: it cannot run; inadvisable: it can, but --force must be given; warning: it runs, and says so.
Severity = Literal["impossible", "inadvisable", "warning"]


@dataclass(frozen=True)
class Objection:
    """What is wrong, at which key, and what to do about it."""

    severity: Severity
    path: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason} {self.remedy}".rstrip()
