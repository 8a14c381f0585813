"""What a worker has finished, written down as it goes, so that a run that is killed loses nothing.

A journal is a file of JSON lines for one process and one attempt, appended to after each batch. It has two kinds of
lines: `{"record": …}` where a measured window opens, with what is known of the process until then; and
`{"done": [rows], "duration_s": …}` after each batch, now and then with the energy of the window up to there. A line
without its end was being written when the process died, and counts for nothing. Knows no engine and no meter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec.structs import asdict, replace

from lem.record import COMMON, EnergyReading, Flops, Phase, ProcessRecord, RequestRecord
from lem.results.codec import from_json, with_value_errors
from lem.warning_codes import warning

# The type of the error of a process that could not write its record.
DIED = "WorkerDied"
OPENING = b'{"record":'
# In no text of a record can this stand: its quotation marks would be escaped.
CYCLE = re.compile(rb'"cycle":(\d+),"attempt":')


class Checkpoint(msgspec.Struct, frozen=True, gc=False):
    """How far the measured window had come when a batch was done.

    `energy` is what the meter had read `energy_at_s` after the window's opening; None where it was not asked, or
    cannot tell before the window closes.
    """

    duration_s: float
    flops: Flops | None = None
    energy: tuple[EnergyReading, ...] | None = None
    energy_at_s: float | None = None


@dataclass
class Window:
    """A measured window as a journal tells it: the record at its opening, the rows, and the last checkpoints.

    Where the process's own record of the window is known, that stands here, and checkpoints are left out.
    """

    record: ProcessRecord
    closed: bool = False
    rows: list[RequestRecord] = field(default_factory=list)
    last: Checkpoint | None = None
    metered: Checkpoint | None = None

    def add(self, rows: Iterable[RequestRecord]) -> None:
        """Add rows as lines hold them, and fill in what all rows of the window share."""
        shared = {name: getattr(self.record, name) for name in COMMON}
        self.rows += [replace(row, **shared) for row in rows]

    def salvaged(self) -> ProcessRecord:
        """Return the record of a process that could not write its own: up to the last batch that was done."""
        record, last = self.record, self.last
        if last is None:
            return record
        energy = self.metered.energy if self.metered else None
        readings = energy if energy is not None else _unread(record)
        return replace(
            record,
            phases=(*record.phases, Phase("measured", last.duration_s, readings)),
            requests_completed=len(self.rows),
            input_tokens=sum(row.input_tokens for row in self.rows),
            output_tokens=sum(row.output_tokens for row in self.rows),
            flops=last.flops,
            warnings=(*record.warnings, warning("window_cut", self._cut())),
        )

    def _cut(self) -> str:
        assert self.last is not None
        killed = "the process was killed, not known how long after its last finished request; its window ends with that"
        if self.metered and not self.metered.energy:
            return f"{killed}."
        known = self.metered.energy_at_s if self.metered else None
        if known is None:
            return f"{killed}, and its energy is not known."
        return f"{killed}, its energy {self.last.duration_s - known:.3g} s before that."


def _unread(record: ProcessRecord) -> tuple[EnergyReading, ...]:
    """Return the devices that were metered before, with no energy: the meter could not tell before the end."""
    metered = next((phase.energy for phase in reversed(record.phases) if phase.energy), ())
    reason = "the process was killed before its window was closed"
    return tuple(replace(reading, energy_j=None, trace_energy_j=None, reason=reason) for reading in metered)


class Journal:
    """Appends to a journal. Raises OSError, as when the disk is full."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def open_window(self, record: ProcessRecord) -> None:
        """Note that a measured window opens; `record` stands in for the process's own if that is never written."""
        self._write(OPENING + msgspec.json.encode(record) + b"}\n")

    def add(self, rows: Sequence[RequestRecord], checkpoint: Checkpoint) -> None:
        """Note a batch that is done. It is on its way to the disk when this returns: a kill cannot take it back."""
        done = [{name: value for name, value in asdict(row).items() if name not in COMMON} for row in rows]
        known = {name: value for name, value in asdict(checkpoint).items() if value is not None}
        self._write(msgspec.json.encode({"done": done} | known) + b"\n")

    def close(self) -> None:
        """See to it that all is on the disk."""
        os.fsync(self._file)
        os.close(self._file)

    def _write(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._file, line) :]


def read(journal: bytes, known: Mapping[int, ProcessRecord] = MappingProxyType({})) -> list[Window]:
    """Read a journal, however its writer ended.

    Args:
        journal: what the file holds.
        known: records of the same process and attempt that need not be read here once more, by cycle.

    Raises:
        ValueError: a line other than the last is damaged.
    """
    windows: list[Window] = []
    begin, end = 0, journal.rfind(b"\n") + 1
    try:
        while begin < end:
            if not journal.startswith(OPENING, begin):
                raise ValueError("it belongs to no window")
            line_end = journal.index(b"\n", begin)
            window = _opened(journal[begin:line_end], known)
            windows.append(window)
            begin, following = line_end + 1, journal.find(b"\n" + OPENING, line_end)
            window_end = following + 1 if following >= 0 else end
            while begin < window_end:
                begin = _take(journal, begin, window_end, window)
    except ValueError as error:
        number = journal.count(b"\n", 0, begin) + 1
        raise ValueError(f"line {number} is damaged ({' '.join(str(error).split())[:120]})") from None
    return windows


def _opened(line: bytes, known: Mapping[int, ProcessRecord]) -> Window:
    place = CYCLE.search(line)
    if place and (record := known.get(int(place[1]))):
        return Window(record, closed=True)
    return Window(from_json(ProcessRecord, line.removeprefix(OPENING)[:-1]))


def _take(journal: bytes, begin: int, end: int, window: Window) -> int:
    """Take the next line of a window, or all up to its end where only rows are wanted; return where it ended.

    Raises:
        ValueError: a line is damaged; those before it have been taken.
    """
    if window.closed:
        with suppress(ValueError):  # line by line it is found out which one is damaged
            window.add(row for done in _read_lines(journal[begin:end]) for row in done.done)
            return end
    line_end = journal.index(b"\n", begin, end)
    line = journal[begin:line_end]
    window.add(_read_line(line).done)
    if not window.closed:
        _note_checkpoint(line, window)
    return line_end + 1


def _note_checkpoint(line: bytes, window: Window) -> None:
    """Keep how far the window had come; only where the process's own record is not known."""
    window.last = from_json(Checkpoint, line)
    if window.last.energy is not None:
        window.metered = window.last


class _Done(msgspec.Struct, gc=False):
    done: list[RequestRecord]


_done = msgspec.json.Decoder(_Done)
_read_line, _read_lines = with_value_errors(_done.decode), with_value_errors(_done.decode_lines)
