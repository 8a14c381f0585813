"""Keeping other libraries' words off stdout, which may be read by a program."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Swallow what is printed: some libraries announce on import which hardware they have not found."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
