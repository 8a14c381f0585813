"""Formats numbers for people, with units and prefixes, and makes text safe to print.

Numbers in records are in unprefixed units (joules, watts, seconds, bytes) unless the field's name says otherwise.

Names from files and servers may contain control characters. Escape sequences can recolor the terminal or move its
cursor, other characters reverse the text direction, and a line break makes one message look like two. Control
characters are therefore printed as JSON escapes, so that JSON output stays valid and keeps its values.
`lem.cli.streams` and `lem.results.show` do this for everything that lem prints. This module knows nothing about
measurements.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

J_PER_WH = 3600.0
J_PER_KWH = 3.6e6
NS_PER_S = 1e9


@dataclass(frozen=True)
class Unit:
    """The unit of a field in a record, for the Arrow schema and the reference page."""

    symbol: str


JOULE = Unit("J")
JOULE_PER_TOKEN = Unit("J/token")
JOULE_PER_REQUEST = Unit("J/request")
WATT_HOUR = Unit("Wh")
WATT = Unit("W")
CELSIUS = Unit("°C")
SECOND = Unit("s")
BYTE = Unit("B")
TOKEN = Unit("token")
TOKEN_PER_SECOND = Unit("token/s")
REQUEST = Unit("request")
REQUEST_PER_SECOND = Unit("request/s")
FLOP = Unit("FLOP")
FLOP_PER_SECOND = Unit("FLOP/s")
FLOP_PER_TOKEN = Unit("FLOP/token")
RATIO = Unit("1")
GRAM_CO2E = Unit("gCO2e")
GRAM_CO2E_PER_KWH = Unit("gCO2e/kWh")

_PREFIXES = (
    (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"),
    (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"),
)  # fmt: skip


def quantity(value: float | None, unit: str, digits: int = 4) -> str:
    """Format a value with a scaled unit: `1.234 kJ`, `56.7 mJ/token`, or `–` if it was not measured."""
    if value is None:
        return "–"
    if value == 0:
        return f"0 {unit}"
    value = float(f"{value:.{digits}g}")  # a value that rounds up to 1000 takes the next prefix
    factor, prefix = next(((f, p) for f, p in _PREFIXES if abs(value) >= f), _PREFIXES[-1])
    return f"{value / factor:.{digits}g} {prefix}{unit}"


def plain(value: float | None, unit: str = "", digits: int = 4) -> str:
    """Format a value without scaling its unit: `12.3 gCO2e`, or `–` if it was not measured."""
    if value is None:
        return "–"
    return f"{value:.{digits}g} {unit}".rstrip()


def percent(share: float) -> str:
    """Return a share as a percentage with at most four significant digits: 2%, 97.34%."""
    return f"{100 * share:.4g}%"


def timestamp(now: datetime | None = None) -> str:
    """Return a time (now by default) in ISO 8601 with the local UTC offset, to the second; used only as a label."""
    return (now or datetime.now()).astimezone().isoformat(timespec="seconds")


# ------------------------------------------------------------------ texts
# C0 (except tab and line feed), DEL, C1, line and paragraph separators, and characters that change the text direction.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_CONTROL_OR_BREAK = re.compile(f"{_CONTROL.pattern[:-1]}\n\t]")
_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def printable(text: str) -> str:
    """Return the text with its control characters escaped (ESC as \\u001b), except tabs and line feeds."""
    return _CONTROL.sub(_escaped, text)


def one_line(text: str) -> str:
    """Return the text with all control characters escaped, including tabs and line feeds."""
    return _CONTROL_OR_BREAK.sub(_escaped, text)


def is_printable(text: str) -> bool:
    """Return whether the text contains no control characters other than tabs and line feeds."""
    return _CONTROL.search(text) is None


def _escaped(match: re.Match[str]) -> str:
    return _SHORT.get(match[0], f"\\u{ord(match[0]):04x}")
