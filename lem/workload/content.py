"""Reads a file, decompresses its bytes and decodes them as UTF-8. This module ignores the meaning of the text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from lem.errors import DatasetError

# The first bytes of compressed files. They, not the file's name, determine the method.
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# The maximum size of a decompressed file. A compressed file can unpack to a thousand times its size.
MOST_BYTES = 4 << 30
CHUNK_BYTES = 1 << 20
# If a file is not UTF-8, its encoding is guessed from this many bytes around the first invalid byte.
SAMPLE_BYTES = 1 << 15
# In Western European text, the share of letters outside ASCII is smaller than this.
WESTERN_SHARE = 0.3

OTHERS = {
    b"PK\x03\x04": "a zip archive or an office document; unpack it, or export it as CSV",
    b"%PDF-": "a PDF document; save its text as UTF-8",
    b"{\\rtf": "an RTF document; save it as plain text",
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file; fetch the file with git lfs pull",
}
# Escape sequences that switch the character set in encodings that are otherwise ASCII.
SWITCHES = re.compile(rb"\x1b\$(\)C|[@AB(])")
BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}


def data_of(path: Path) -> bytes:
    """Return a file's bytes, decompressed if necessary.

    Raises:
        DatasetError: the file cannot be read, is empty, or is recognizably something else, such as a PDF document.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from None
    if not data:
        raise DatasetError(f"{path} is empty; write one prompt per line.")
    method = next((name for magic, name in MAGIC.items() if data.startswith(magic)), None)
    if method is not None:
        data = _unpacked(path, data, method)
    for magic, what in OTHERS.items():
        if data.startswith(magic):
            raise DatasetError(f"{path} is {what}.")
    return data


def _unpacked(path: Path, data: bytes, method: str) -> bytes:
    whole = bytearray()
    try:
        with _opened(data, method) as stream:
            while chunk := stream.read(CHUNK_BYTES):
                whole += chunk
                if len(whole) > MOST_BYTES:
                    raise DatasetError(f"{path} unpacks to more than {MOST_BYTES >> 30} GiB; keep fewer prompts in it.")
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DatasetError(f"{path} cannot be unpacked as {method}: {' '.join(str(error).split())[:200]}.") from None
    if not whole:
        raise DatasetError(f"{path} is empty; write one prompt per line.")
    return bytes(whole)


def _opened(data: bytes, method: str) -> IO[bytes]:
    if method == "zstd":
        import pyarrow as pa

        return cast(IO[bytes], pa.input_stream(pa.BufferReader(data), compression=method))
    openers: dict[str, Callable[[IO[bytes]], Any]] = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}
    return cast(IO[bytes], openers[method](io.BytesIO(data)))


def text_of(path: Path, data: bytes) -> str:
    """Decode bytes as UTF-8, dropping a byte order mark.

    Raises:
        DatasetError: the bytes have a different encoding or are not text; the message gives the line and, if possible,
            the likely encoding.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if data.startswith(mark):
            raise _encoded_as(path, 1, encoding)
    if switch := SWITCHES.search(data):
        raise _encoded_as(path, _line(data, switch.start()), "ISO-2022-KR" if switch[1] == b")C" else "ISO-2022-JP")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf_8(path, data, error) from None
    zero = data.find(b"\0")
    if zero >= 0:
        line, share = _line(data, zero), data.count(b"\0") / len(data)
        if share > 0.2:
            raise _encoded_as(path, line, "UTF-32" if share > 0.6 else "UTF-16")
        raise DatasetError(f"{path}, line {line} is not text: it contains a zero byte.")
    return text


def _not_utf_8(path: Path, data: bytes, error: UnicodeDecodeError) -> DatasetError:
    line = _line(data, error.start)
    try:
        data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return _encoded_as(path, line, _likely(data, error.start))
    return DatasetError(f"{path}, line {line}: {half_a_character(data.decode('utf-8', 'surrogatepass'))}")


def half_a_character(text: str) -> str:
    """Return the message about a text that contains a lone surrogate, which no Unicode encoding can represent."""
    lone = next(letter for letter in text if "\ud800" <= letter <= "\udfff")
    return f"U+{ord(lone):04X} is only half of a character (a lone surrogate); remove or correct it."


def _likely(data: bytes, position: int) -> str | None:
    """Return the likely encoding of bytes that are not UTF-8, or None if there is no good guess."""
    sample = data[max(0, position - SAMPLE_BYTES // 2) : position + SAMPLE_BYTES // 2]
    letters = [byte for byte in sample if byte > 127 or chr(byte).isalpha()]
    if sum(byte > 127 for byte in letters) < WESTERN_SHARE * len(letters):
        return "Windows-1252"
    import charset_normalizer

    best = charset_normalizer.from_bytes(sample).best()
    return best.encoding.replace("_", "-") if best else None


def _encoded_as(path: Path, line: int, encoding: str | None) -> DatasetError:
    likely = f"probably in {encoding}" if encoding else "in an unknown encoding"
    remedy = f"convert the file with iconv -f {(encoding or 'ENCODING').upper()} -t UTF-8"
    return DatasetError(f"{path}, line {line} is not in UTF-8 but {likely}; {remedy}.")


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1
