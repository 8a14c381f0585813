"""Standard streams that cannot end a run, even if they are closed, full, abandoned by their reader, or ASCII-only.

They show the control characters in what is printed, so that no name paints a terminal. Knows nothing about what is
written, or about exit codes.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from lem.units import printable

# Replacements for characters that lem and rich write, for encodings that lack them.
SPELLED = {
    "–": "-", "—": "-", "·": "|", "≈": "~", "°": "deg", "µ": "u", "×": "x", "±": "+/-", "…": "...", "→": "->",
    "≥": ">=", "≤": "<=", "‘": "'", "’": "'", "“": '"', "”": '"', "│": "|", "─": "-", "├": "+", "└": "+",
    "╭": "+", "╮": "+", "╰": "+", "╯": "+", "━": "-", "╸": "-", "╺": "-", "•": "*",
}  # fmt: skip
ENCODING_ERRORS = "lem.spelled"


def forgiving_streams() -> None:
    """Replace the process's standard streams with ones that never raise; `lost_output` returns the error instead."""
    codecs.register_error(ENCODING_ERRORS, _spelled)
    _fill_closed_descriptors()
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    sys.stdout = _guarded(_forgiving(sys.stdout, 1))
    sys.stderr = _guarded(_forgiving(sys.stderr, 2))


def lost_output() -> OSError | None:
    """Flush stdout; return the error if some of the output is lost."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Descriptor) else None


def _fill_closed_descriptors() -> None:
    """Open /dev/null as 0, 1 or 2 if closed, or the next file opened would get that number and any stray output."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _forgiving(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a stream on the descriptor like the given one; keep one that was redirected within this process."""
    if stream is None:
        return _text(descriptor, encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != descriptor:
        return stream
    stream.flush()
    return _text(
        descriptor, encoding=stream.encoding, line_buffering=stream.line_buffering, write_through=stream.write_through
    )


def _text(descriptor: int, **options: Any) -> TextIO:
    return io.TextIOWrapper(io.BufferedWriter(_Descriptor(descriptor)), errors=ENCODING_ERRORS, **options)


class _Guard:
    """A text stream in which control characters are escaped; in all other respects the stream that it wraps."""

    def __init__(self, stream: TextIO) -> None:
        # Consoles of rich, which colour what they print, write to this attribute of a stream if it has it. What they
        # print for lem they have escaped before (`lem.results.show.console`).
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write a text, escaped; return the number of its characters."""
        self.rich_proxied_file.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts, escaped."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.rich_proxied_file)


def _guarded(stream: TextIO) -> TextIO:
    return stream if isinstance(stream, _Guard) else cast(TextIO, _Guard(stream))


class _Descriptor(io.FileIO):
    """Writes to a descriptor until a write fails; keeps the error and drops everything after it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, waiting if the reader of a non-blocking pipe is slow; report success in any case."""
        try:
            while self.lost is None:
                # Despite its declared type, FileIO returns None if the descriptor would block.
                written: int | None = super().write(data)
                if written is not None:
                    return written
                select.select([], [self], [])
        except OSError as error:
            self.lost = error
        return memoryview(data).nbytes


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replace a character that the encoding lacks by a spelling or, if there is none, by a JSON escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    code = ord(character)
    if 0xDCA0 <= code <= 0xDCFF:  # a byte in a file name that is not valid text, nor a control character of Latin-1
        return bytes([code - 0xDC00]), error.start + 1
    units = character.encode("utf-16-be", "surrogatepass").hex()
    escaped = "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
    return SPELLED.get(character, escaped), error.start + 1
