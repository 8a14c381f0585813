"""Silences libraries that print when they are imported."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Discard what is printed: some libraries list on import the hardware they have not found."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
