"""Paths as users write them. Does not know what they are for."""

from __future__ import annotations

import os
from pathlib import Path

from lem.errors import BadInput


def expanded(text: str | Path) -> Path:
    """Return a path, with `~` or `~user` at its beginning replaced by that home directory.

    `./~name` is a file in the working directory, so its path is returned as an absolute one.

    Raises:
        BadInput: there is no such user, or the user's home directory is not known.
    """
    given = str(text)
    path = os.path.expanduser(given)
    if given.startswith("~") and path.startswith("~"):
        user = given.partition("/")[0]
        reason = f"There is no user {user[1:]}" if user != "~" else "Your home directory is not known (HOME is not set)"
        raise BadInput(f"{given}: {reason}. If this is the name of a file or directory, write ./{given}.")
    return literal(path)


def literal(text: str) -> Path:
    """Return a path in which `./~name` keeps its meaning: `Path` alone would drop the `./`."""
    path = Path(text)
    return Path.cwd() / path if str(path).startswith("~") and not text.startswith("~") else path
