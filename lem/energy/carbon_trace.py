"""Carbon intensity over time, from a CSV file, and its mean over a window.

The file has the columns `time` (ISO 8601 with a UTC offset) and `g/kWh`; other columns are ignored. Each value applies
from its time until the next one, and the last value applies for as long as the one before it. All times must be equally
spaced, so that a missing line is noticed. This module knows nothing about meters or records.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

from lem.errors import BadInput
from lem.spec.paths import expanded

TIME, INTENSITY = "time", "g/kWh"
HEADER = f"The first line must be {TIME},{INTENSITY}."
# Returns the energy in joules of a part of a window, or None if it is unknown. The arguments are the beginning and the
# end of the part, in seconds from the window's opening.
EnergyOf = Callable[[float, float], float | None]


@dataclass(frozen=True)
class Piece:
    """A stretch of time with one carbon intensity; the times are in seconds since 1970."""

    start_s: float
    end_s: float
    intensity_g_per_kwh: float


@dataclass(frozen=True)
class Weighted:
    """The mean intensity over a window, and whether it is weighted by energy (otherwise, by time)."""

    intensity_g_per_kwh: float
    by_energy: bool


@dataclass(frozen=True)
class CarbonTrace:
    """A carbon intensity that changes at known times; `sha256` is the digest of the trace's file."""

    path: str
    sha256: str
    starts_s: tuple[float, ...]
    intensities: tuple[float, ...]

    @property
    def end_s(self) -> float:
        """The time until which the last value applies."""
        return 2 * self.starts_s[-1] - self.starts_s[-2]

    def at(self, time_s: float) -> Piece:
        """Return the stretch that contains a time; raise `BadInput` if the trace does not cover it."""
        place = bisect_right(self.starts_s, time_s) - 1
        if place < 0 or time_s >= self.end_s:
            raise BadInput(self._outside(time_s))
        ends_s = (*self.starts_s[1:], self.end_s)
        return Piece(self.starts_s[place], ends_s[place], self.intensities[place])

    def mean(self, opened_s: float, duration_s: float, energy_of: EnergyOf) -> Weighted:
        """Return the mean over a window, weighted by the energy of the window's parts.

        If the energy of a part is unknown, or if the total energy is zero, the parts are weighted by their lengths.

        Raises:
            BadInput: the trace does not cover the window.
        """
        pieces = list(self._pieces(opened_s, opened_s + duration_s))
        energies_j = [energy_of(piece.start_s - opened_s, piece.end_s - opened_s) for piece in pieces]
        known_j = [each for each in energies_j if each is not None]
        by_energy = len(known_j) == len(pieces) and sum(known_j) > 0
        weights = known_j if by_energy else [piece.end_s - piece.start_s for piece in pieces]
        if sum(weights) == 0:  # a window without a length
            return Weighted(pieces[0].intensity_g_per_kwh, by_energy=False)
        weighted = sum(w * piece.intensity_g_per_kwh for w, piece in zip(weights, pieces, strict=True))
        return Weighted(weighted / sum(weights), by_energy)

    def _pieces(self, start_s: float, end_s: float) -> Iterator[Piece]:
        """Yield the parts of a window, each with a single intensity; a window of length zero has one part."""
        while True:
            found = self.at(start_s)
            yield Piece(start_s, min(found.end_s, end_s), found.intensity_g_per_kwh)
            start_s = found.end_s
            if start_s >= end_s:
                return

    def _outside(self, time_s: float) -> str:
        first, last, at = (
            datetime.fromtimestamp(each).astimezone().isoformat(timespec="seconds")
            for each in (self.starts_s[0], self.end_s, time_s)
        )
        return f"{self.path} covers {first} to {last}, but the run was measured at {at}"


# ------------------------------------------------------------------ reading
def read_carbon_trace(path: str) -> CarbonTrace:
    """Read a trace.

    Raises:
        BadInput: the trace cannot be read, has too few values, or has an invalid line; the message says which line.
    """
    content, text = _content(path)
    rows = csv.reader(io.StringIO(text))
    columns = _columns(path, next(rows, []))
    starts_s: list[float] = []
    values: list[float] = []
    lines: list[int] = []
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        try:
            time, intensity = _parsed(row, columns)
            _check_time(time, starts_s, lines)
        except ValueError as error:
            raise BadInput(f"{path}, line {rows.line_num}: {error}") from None
        starts_s.append(time)
        values.append(intensity)
        lines.append(rows.line_num)
    if len(values) < 2:
        raise BadInput(f"{path} has fewer than two values. Give at least two, so that the time between them is known.")
    return CarbonTrace(path, hashlib.sha256(content).hexdigest(), tuple(starts_s), tuple(values))


def _content(path: str) -> tuple[bytes, str]:
    file = expanded(path)
    if file.exists() and not file.is_file():
        raise BadInput(f"{path} is not a file.")
    try:
        content = file.read_bytes()
        return content, content.decode("utf-8-sig")  # spreadsheets write a byte order mark
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist.") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}). Make the file readable.") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not in UTF-8. Save it as CSV in UTF-8.") from None


def _columns(path: str, header: list[str]) -> tuple[int, int]:
    names = [name.strip() for name in header]
    if any(";" in name for name in names):
        raise BadInput(f"{path}: the columns are separated by semicolons. Separate them with commas.")
    for name in (TIME, INTENSITY):
        if names.count(name) != 1:
            problem = "has no column" if name not in names else "has several columns"
            raise BadInput(f"{path} {problem} '{name}'. {HEADER}")
    return names.index(TIME), names.index(INTENSITY)


def _parsed(row: list[str], columns: tuple[int, int]) -> tuple[float, float]:
    if len(row) <= max(columns):
        raise ValueError("a value is missing. Give a time and an intensity on each line.")
    time, intensity = (row[column].strip() for column in columns)
    return _time(time), _intensity(intensity)


def _time(text: str) -> float:
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"'{text}' is not a time. Use ISO 8601, such as 2026-01-31T10:00Z.") from None
    if at.tzinfo is None:
        raise ValueError(f"'{text}' has no UTC offset. Add one, such as {text}Z or {text}+01:00.")
    return at.timestamp()


def _intensity(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"'{text}' is not a number. Give g/kWh, with a point (not a comma) for decimals.") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{text} g/kWh is not an intensity. Give a number of at least 0.")
    return value


def _check_time(time_s: float, before_s: list[float], lines: list[int]) -> None:
    """Raise `ValueError` if a time is not later than the previous one, or if the times are not equally spaced."""
    if not before_s:
        return
    step_s = time_s - before_s[-1]
    if step_s == 0:
        raise ValueError(f"the time is the same as on line {lines[-1]}. Remove one of the two lines.")
    if step_s < 0:
        raise ValueError(f"the time is earlier than on line {lines[-1]}. Sort the lines by time.")
    if len(before_s) < 2:
        return
    usual_s = before_s[1] - before_s[0]
    if not math.isclose(step_s, usual_s, abs_tol=1e-3):
        what = "there is a gap" if step_s > usual_s else "the times are closer together than before"
        raise ValueError(
            f"{what}: the time is {step_s:g} s later than on line {lines[-1]}, but the first two times are "
            f"{usual_s:g} s apart. Space all times equally."
        )
