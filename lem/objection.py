"""A reason not to run an experiment as it is configured, found before anything is measured.

Knows the catalogue of codes, not what provokes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from lem.rules import OBJECTIONS, Scope, Severity

__all__ = ["Objection", "Severity", "without_effect"]


@dataclass(frozen=True)
class Objection:
    """What is wrong, at which key, and what to do about it; its code says how grave it is.

    Raises:
        KeyError: the catalogue has no such code.
    """

    code: str
    path: str
    reason: str
    remedy: str

    def __post_init__(self) -> None:
        OBJECTIONS[self.code]

    @property
    def severity(self) -> Severity:
        """How grave it is: the catalogue's word."""
        return OBJECTIONS[self.code].severity

    @property
    def scope(self) -> Scope:
        """What it is about: the options alone, the machine, or files."""
        return OBJECTIONS[self.code].scope

    @property
    def message(self) -> str:
        """The reason and the remedy, without key and code."""
        return f"{self.reason} {self.remedy}".rstrip()

    def __str__(self) -> str:
        return f"{self.path}: {self.message} [{self.code}]"


def without_effect(code: str, path: str, reason: str, remedy: str) -> Objection:
    """Object to an option that would be accepted and ignored."""
    return Objection(code, path, f"it would have no effect: {reason}", remedy)
