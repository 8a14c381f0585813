"""Silence for libraries that print on import which hardware they have not found."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Swallow what is printed: some libraries announce on import which hardware they have not found."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
