"""Silences libraries that print when they are imported."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Discard all output to stdout in the block: on import, some libraries print which hardware they did not find."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
