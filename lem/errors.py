"""Every error that lem raises on purpose, and the exit code that goes with it.

    LemError                1
    ├── BadInput            2   what the user asked for cannot be done; nothing has run
    │   ├── ConfigError         a config file, an override or a value in it
    │   ├── DatasetError        the prompts
    │   ├── ModelError          the model
    │   └── ResultsError        an experiment id or a results directory
    ├── RunError            1   the run began and failed; its record says how
    └── Interrupted       130   the user or the scheduler stopped it

A message is one sentence about what is wrong, with the remedy. Anything else that escapes is a bug in lem
and is shown as a traceback. This module knows no other module of lem.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LemError(Exception):
    """Base of all errors raised on purpose; the message is meant for the user."""

    exit_code = 1


class BadInput(LemError):
    """The input cannot be run as given; raised before anything is measured."""

    exit_code = 2


class ConfigError(BadInput):
    """A configuration with one or more problems, all of them named."""

    def __init__(self, *problems: str) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class DatasetError(BadInput):
    """The prompts cannot be had as asked for."""


class ModelError(BadInput):
    """The model cannot be found or read."""


class ResultsError(BadInput):
    """No such experiment, or a results directory that cannot be used."""


class RunError(LemError):
    """A run that began and did not succeed."""


class Interrupted(LemError):
    """A run that was stopped from outside."""

    exit_code = 130


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known names closest to `name`, best first; empty when none is close."""
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'a' or 'b'?`, or an empty text when nothing is close to `name`."""
    names = [f"'{candidate}'" for candidate in nearest(name, known)]
    return f" Did you mean {' or '.join(names)}?" if names else ""
