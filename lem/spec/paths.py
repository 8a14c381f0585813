"""Expands `~` in paths that users write. This module knows nothing about the purpose of a path."""

from __future__ import annotations

import os
from pathlib import Path

from lem.errors import BadInput


def expanded(text: str | Path) -> Path:
    """Return the path with a leading `~` or `~user` replaced by that user's home directory.

    `./~name` names a file in the working directory and is returned as an absolute path.

    Raises:
        BadInput: the user does not exist, or the home directory is unknown.
    """
    given = str(text)
    path = os.path.expanduser(given)
    if given.startswith("~") and path.startswith("~"):
        user = given.partition("/")[0]
        reason = f"there is no user {user[1:]}" if user != "~" else "your home directory is unknown (HOME is not set)"
        raise BadInput(f"{given}: {reason}. If this is the name of a file or directory, write ./{given}.")
    return literal(path)


def literal(text: str) -> Path:
    """Return a path in which `./~name` still names a local file; `Path` alone would drop the `./`."""
    path = Path(text)
    return Path.cwd() / path if str(path).startswith("~") and not text.startswith("~") else path
