"""What a worker has finished, written down as it goes, so that a run that is killed loses nothing.

A journal is a file of JSON lines for one process and one attempt, appended to after each batch. It has two kinds of
lines: `{"record": …}` where a measured window opens, with what is known of the process by then; and
`{"done": [rows], "duration_s": …}` after each batch, now and then with the energy of the window so far. A last line
without a line end was cut off when the process died, and is ignored. Knows no engine and no meter.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import msgspec
from msgspec.structs import asdict, replace

from lem.record import COMMON, EnergyReading, Flops, Phase, ProcessRecord, RequestRecord
from lem.results.codec import from_json
from lem.warning_codes import warning

# The type of the error of a process that could not write its record.
DIED = "WorkerDied"
OPENING = b'{"record":'
# The cycle of an opening line, at a fifth of the cost of decoding the line. No string can hold this: its quotation
# marks would be escaped.
CYCLE = re.compile(rb'"cycle":(\d+),"attempt":')


class Checkpoint(msgspec.Struct, frozen=True, gc=False):
    """How far the measured window had come when a batch was done.

    `energy` is what the meter had read `energy_at_s` after the window's opening; None where it was not polled, or
    cannot be read before the window closes.
    """

    duration_s: float
    flops: Flops | None = None
    energy: tuple[EnergyReading, ...] | None = None
    energy_at_s: float | None = None


class _Rows(msgspec.Struct, gc=False):
    """A batch that is done, as a line of the journal. Its rows lack what all rows of a window share."""

    done: list[RequestRecord]


class _Done(Checkpoint, frozen=True, gc=False, kw_only=True):
    """The same line with its checkpoint."""

    done: list[RequestRecord]


class _Opening(msgspec.Struct, gc=False):
    record: ProcessRecord


_ROWS, _DONE = msgspec.json.Decoder(_Rows), msgspec.json.Decoder(_Done)


@dataclass(frozen=True)
class Window:
    """A measured window as a journal holds it.

    Where the process has written its own record of the window, `record` is that one, and there are no checkpoints;
    else `record` is the one at the window's opening.
    """

    record: ProcessRecord
    rows: list[RequestRecord]
    checkpoints: Sequence[Checkpoint] = ()

    @property
    def metered(self) -> Checkpoint | None:
        """The last checkpoint with energy."""
        return next((each for each in reversed(self.checkpoints) if each.energy is not None), None)

    def salvaged(self) -> ProcessRecord:
        """Return the process's own record, or what is known without it: up to the last batch that was done."""
        if not self.checkpoints:
            return self.record
        record, last = self.record, self.checkpoints[-1]
        metered = self.metered
        readings = _unread(record) if metered is None else metered.energy or ()
        return replace(
            record,
            phases=(*record.phases, Phase("measured", last.duration_s, readings)),
            requests_completed=len(self.rows),
            input_tokens=sum(row.input_tokens for row in self.rows),
            output_tokens=sum(row.output_tokens for row in self.rows),
            flops=last.flops,
            warnings=(*record.warnings, warning("window_cut", _cut(last, metered))),
        )


def _cut(last: Checkpoint, metered: Checkpoint | None) -> str:
    killed = "the process was killed an unknown time after its last finished request, where its window ends"
    if metered and not metered.energy:
        return f"{killed}."
    if metered is None or metered.energy_at_s is None:
        return f"{killed}, and its energy is not known."
    return f"{killed}; its energy was last read {last.duration_s - metered.energy_at_s:.3g} s before that."


def _unread(record: ProcessRecord) -> tuple[EnergyReading, ...]:
    """Return the devices that were metered before, without energy: the meter is read only when a window closes."""
    metered = next((phase.energy for phase in reversed(record.phases) if phase.energy), ())
    reason = "the process was killed before its window was closed"
    return tuple(replace(reading, energy_j=None, trace_energy_j=None, reason=reason) for reading in metered)


class Journal:
    """Appends to a journal. Raises OSError, for example when the disk is full."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def open_window(self, record: ProcessRecord) -> None:
        """Note that a measured window opens; `record` stands in for the process's own if that is never written."""
        self._write(OPENING + msgspec.json.encode(record) + b"}\n")

    def add(self, rows: Sequence[RequestRecord], checkpoint: Checkpoint) -> None:
        """Note a batch that is done. The kernel has it when this returns: a kill cannot take it back."""
        done = [{name: value for name, value in asdict(row).items() if name not in COMMON} for row in rows]
        known = {name: value for name, value in asdict(checkpoint).items() if value is not None}
        self._write(msgspec.json.encode({"done": done} | known) + b"\n")

    def close(self) -> None:
        """Flush the journal to the disk and close it."""
        os.fsync(self._file)
        os.close(self._file)

    def _write(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._file, line) :]


def read(journal: bytes, known: Mapping[int, ProcessRecord] = MappingProxyType({})) -> list[Window]:
    """Read a journal, however its writer ended.

    Args:
        journal: what the file holds.
        known: the records that the same process has written in this attempt, by cycle.

    Raises:
        ValueError: a line other than the last is damaged.
    """
    content = journal[: journal.rfind(b"\n") + 1]
    try:
        return list(_windows(content, known))
    except (ValueError, msgspec.MsgspecError):
        raise ValueError(_damage(content)) from None


def _windows(content: bytes, known: Mapping[int, ProcessRecord]) -> Iterator[Window]:
    begin = 0
    while begin < len(content):
        line_end = content.index(b"\n", begin)
        opening = content[begin:line_end]
        begin = content.find(b"\n" + OPENING, line_end) + 1 or len(content)
        lines = content[line_end + 1 : begin]
        cycle = CYCLE.search(opening)
        record = known.get(int(cycle[1])) if cycle else None
        if record is not None:
            yield Window(record, _of_window(record, _ROWS.decode_lines(lines)))
        else:
            record, checkpoints = _opened(opening), _DONE.decode_lines(lines)
            yield Window(record, _of_window(record, checkpoints), checkpoints)


def _opened(line: bytes) -> ProcessRecord:
    if not line.startswith(OPENING):
        raise ValueError("it belongs to no window")
    return from_json(_Opening, line).record


def _of_window(record: ProcessRecord, batches: Sequence[_Rows | _Done]) -> list[RequestRecord]:
    shared = {name: getattr(record, name) for name in COMMON}
    return [replace(row, **shared) for batch in batches for row in batch.done]


def _damage(content: bytes) -> str:
    """Return which line of a damaged journal is damaged first, and how."""
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            if number > 1 and not line.startswith(OPENING):
                from_json(_Done, line)
            else:
                _opened(line)
        except ValueError as error:
            return f"line {number} is damaged ({' '.join(str(error).split())[:120]})"
    raise AssertionError("a damaged journal has a damaged line")
