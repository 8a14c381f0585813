"""The standard streams, so that none of them can end a run: closed, full, left by its reader, or ASCII only.

Also keeps other libraries' words off stdout, which may be read by a program. Knows nothing of what is written,
and nothing of exit codes.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from typing import Any, TextIO

# Spelling of what lem and rich write, for encodings that lack it.
SPELLED = {
    "–": "-", "—": "-", "·": "|", "≈": "~", "°": "deg", "µ": "u", "×": "x", "±": "+/-", "…": "...", "→": "->",
    "≥": ">=", "≤": "<=", "‘": "'", "’": "'", "“": '"', "”": '"', "│": "|", "─": "-", "├": "+", "└": "+",
    "╭": "+", "╮": "+", "╰": "+", "╯": "+", "━": "-", "╸": "-", "╺": "-", "•": "*",
}  # fmt: skip
ENCODING_ERRORS = "lem.spelled"


def forgiving_streams() -> None:
    """Replace the process's standard streams by ones that never raise; `lost_output` tells what became of stdout."""
    codecs.register_error(ENCODING_ERRORS, _spelled)
    _fill_closed_descriptors()
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115 - lives as long as the process
    sys.stdout = _forgiving(sys.stdout, 1)
    sys.stderr = _forgiving(sys.stderr, 2)


def lost_output() -> OSError | None:
    """Flush stdout; return the error if a part of what was written to it is lost."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Descriptor) else None


def _fill_closed_descriptors() -> None:
    """Put /dev/null where 0, 1 or 2 is closed: the next file or pipe would get that number, and stray words with it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _forgiving(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a stream on the descriptor like the given one; one that was redirected within the process is kept."""
    if stream is None:
        return _text(descriptor, encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != descriptor:
        return stream
    stream.flush()
    return _text(
        descriptor,
        encoding=stream.encoding,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _text(descriptor: int, **options: Any) -> TextIO:
    return io.TextIOWrapper(io.BufferedWriter(_Descriptor(descriptor)), errors=ENCODING_ERRORS, **options)


class _Descriptor(io.FileIO):
    """Writes to a descriptor until that fails once; keeps the error and drops what comes after it."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self.lost: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, waiting where a reader of a non-blocking pipe is slow; claim success in any case."""
        try:
            while self.lost is None:
                # FileIO gives None, against its type, where the descriptor would block.
                written: int | None = super().write(data)
                if written is not None:
                    return written
                select.select([], [self], [])
        except OSError as error:
            self.lost = error
        return memoryview(data).nbytes


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    """Spell a character that the encoding lacks; one without a spelling is escaped as JSON would."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file's name that was no text when it came in
        return bytes([code - 0xDC00]), error.start + 1
    units = character.encode("utf-16-be", "surrogatepass").hex()
    escaped = "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))
    return SPELLED.get(character, escaped), error.start + 1
