"""Standard streams that never end a run, even if they are closed, cannot be written to, or accept only ASCII.

They escape control characters in all output, so that printed names cannot manipulate the terminal. This module knows
neither the content of the output nor the exit codes.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from lem.quantities import printable

# ASCII spellings of characters that lem and rich write but some encodings lack.
SPELLED = {
    "–": "-", "—": "-", "·": "|", "≈": "~", "°": "deg", "µ": "u", "×": "x", "±": "+/-", "…": "...", "→": "->",
    "≥": ">=", "≤": "<=", "‘": "'", "’": "'", "“": '"', "”": '"', "│": "|", "─": "-", "├": "+", "└": "+",
    "╭": "+", "╮": "+", "╰": "+", "╯": "+", "━": "-", "╸": "-", "╺": "-", "•": "*",
}  # fmt: skip
ENCODING_ERRORS = "lem.spelled"


def forgiving_streams() -> None:
    """Replace stdout and stderr with streams that raise no error if a write fails, and open stdin if it is closed."""
    codecs.register_error(ENCODING_ERRORS, _spelled)
    _fill_closed_descriptors()
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    sys.stdout = _guarded(_forgiving(sys.stdout, 1))
    sys.stderr = _guarded(_forgiving(sys.stderr, 2))


def lost_output() -> OSError | None:
    """Flush stdout; return the error that caused the loss of output, or None if nothing was lost."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Descriptor) else None


def _fill_closed_descriptors() -> None:
    """Open /dev/null in place of closed descriptors 0 to 2; otherwise, a file opened later could get stray output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _forgiving(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a forgiving stream with the same settings, or the stream itself if this process has redirected it."""
    if stream is None:
        return _text(descriptor, encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != descriptor:
        return stream
    stream.flush()
    # With PYTHONUNBUFFERED, a stream has no buffer of its own; here it gets one, which each line must leave at once.
    return _text(descriptor, encoding=stream.encoding, line_buffering=stream.line_buffering or stream.write_through)


def _text(descriptor: int, **options: Any) -> TextIO:
    return io.TextIOWrapper(io.BufferedWriter(_Descriptor(descriptor)), errors=ENCODING_ERRORS, **options)


class _Guard:
    """A text stream that escapes control characters and otherwise behaves like the stream it wraps."""

    def __init__(self, stream: TextIO) -> None:
        # If a stream has an attribute of this name, rich writes to the attribute instead, so rich's color codes are not
        # escaped. lem's own consoles have already escaped their texts (`lem.results.show.console`).
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write a string with its control characters escaped; return the length of the original string."""
        self.rich_proxied_file.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write strings with their control characters escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rich_proxied_file)


def _guarded(stream: TextIO) -> TextIO:
    return stream if isinstance(stream, _Guard) else cast(TextIO, _Guard(stream))


class _Descriptor(io.FileIO):
    """Writes to a descriptor until a write fails; then keeps the error and drops all further output."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write the data, waiting if a non-blocking pipe is full; always report success."""
        try:
            while self.lost is None:
                # Despite its declared type, FileIO.write returns None if the descriptor would block.
                written: int | None = super().write(data)
                if written is not None:
                    return written
                select.select([], [self], [])
        except OSError as error:
            self.lost = error
        return memoryview(data).nbytes


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return what to write for a character that the encoding lacks: an ASCII spelling or, failing that, a JSON escape.

    For a byte of a file name that could not be decoded, return the byte itself.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    code = ord(character)
    if 0xDCA0 <= code <= 0xDCFF:  # a file name's undecodable byte, unless it is a Latin-1 control character
        return bytes([code - 0xDC00]), error.start + 1
    units = character.encode("utf-16-be", "surrogatepass").hex()
    escaped = "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
    return SPELLED.get(character, escaped), error.start + 1
