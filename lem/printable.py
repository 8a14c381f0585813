"""Text that comes from files, servers and users, made safe to print: control characters are shown, not obeyed.

A name may hold sequences that colour a terminal, set its title or move its cursor, characters that reverse the text
around them, or line ends that make one message look like two. The escapes are those of JSON, so that JSON stays valid
with the same values. All that lem prints passes through here; `lem.cli.streams` and `lem.results.show` see to it.
"""

from __future__ import annotations

import re

# C0 without tab and line feed, DEL, C1, line and paragraph separators, and what changes the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_CONTROL_OR_BREAK = re.compile(f"{_CONTROL.pattern[:-1]}\n\t]")
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def printable(text: str) -> str:
    """Return a text with its control characters escaped (ESC as \\u001b), except tabs and line feeds."""
    return _CONTROL.sub(_escaped, text)


def one_line(text: str) -> str:
    """Return a text with all control characters escaped, tabs and line feeds included."""
    return _CONTROL_OR_BREAK.sub(_escaped, text)


def is_printable(text: str) -> bool:
    """Return whether a text holds no control characters, apart from tabs and line feeds."""
    return _CONTROL.search(text) is None


def _escaped(match: re.Match[str]) -> str:
    return _SHORT.get(match[0], f"\\u{ord(match[0]):04x}")
