"""The base classes of all errors that lem raises on purpose, and their exit codes.

    LemError                1
    ├── BadInput            2   a command or call cannot be carried out; nothing has run
    │   ├── ConfigError         a config file, an override or a value in it
    │   ├── DatasetError        the prompts
    │   ├── ModelError          the model
    │   └── ResultsError        an experiment's id or a results directory
    ├── RunError            1   the run started and then failed; its record says how
    └── Interrupted       130   the user or the scheduler stopped the run

A message says briefly what is wrong, where, and what to do. Any other exception that escapes is a bug in lem and
is shown as a traceback. Packages derive their own errors from these classes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from lem.quantities import one_line


class LemError(Exception):
    """Base class of all errors raised on purpose, with a message for the user and exit code 1."""

    exit_code = 1


class BadInput(LemError):
    """A command or call cannot be carried out; raised by the checks before a run. Exit code 2."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        """Store the problems. Each becomes one line of the message; line breaks inside a problem are escaped."""
        self.problems = tuple(map(one_line, problems))
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type[BadInput], tuple[Any, ...]]:
        """Return what pickle needs to rebuild the error in another process: its problems, not the whole message."""
        return type(self), self.problems


class ConfigError(BadInput):
    """The configuration is invalid; `problems` lists every problem. Raised by `config` and preflight. Exit code 2."""


class DatasetError(BadInput):
    """The prompts cannot be loaded as configured; raised by the sources of prompts. Exit code 2."""


class ModelError(BadInput):
    """The model is missing or its config.json is unreadable; raised when preflight looks for it. Exit code 2."""


class ResultsError(BadInput):
    """The experiment does not exist, or its results are unusable; raised by `results` and on resume. Exit code 2."""


class RunError(LemError):
    """A run started and then failed; raised by backends, workers and the parent, and recorded. Exit code 1."""


class Interrupted(LemError):
    """A run was stopped by Ctrl-C, SIGTERM or SIGHUP, or because its parent process died. Exit code 130."""

    exit_code = 130

    def __init__(self, reason: str = "", remedy: str = "") -> None:
        """Join reason and remedy into the message; keep the reason, because a study combines it with its own remedy."""
        self.reason = reason
        super().__init__(" ".join(filter(None, (reason, remedy))))


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Return the known names closest to `name`, best match first; the list is empty if none is close."""
    return difflib.get_close_matches(name, list(known), n=limit, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'a' or 'b'?`, or an empty string if no known name is close to `name`."""
    names = [f"'{candidate}'" for candidate in nearest(name, known)]
    return f" Did you mean {' or '.join(names)}?" if names else ""
