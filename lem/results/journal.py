"""A worker's journal of finished requests, written during the run, so that a killed run loses no finished work.

A journal is a file of JSON lines for one process and one attempt. It has two kinds of lines:

- `{"record": …}` is written when a measured window opens, with the process's record up to then.
- `{"done": [rows], "duration_s": …}` is written after each batch, occasionally with the window's energy so far. If
  several processes share the prompts, the metering process also writes such lines, without rows, during a batch.

If the last line has no line break, it was cut off when the process died, and is ignored. This module knows nothing
about engines or meters.
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

from lem import warning_codes
from lem.record import (
    COMMON,
    Amount,
    Carbon,
    CodedWarning,
    Cut,
    EnergyReading,
    Flops,
    Number,
    Phase,
    ProcessRecord,
    RequestRecord,
    UnderWay,
    covering,
)
from lem.results.codec import from_json
from lem.results.merging import unread
from lem.warning_codes import warning

# The error type recorded for a process that could not write its record.
DIED = "WorkerDied"
OPENING = b'{"record":'
# Finds the cycle in an opening line in a fifth of the time that decoding takes. No string value can match, because its
# quotation marks would be escaped.
CYCLE = re.compile(rb'"cycle":(\d+),"attempt":')


class Checkpoint(msgspec.Struct, frozen=True, gc=False):
    """The progress of the measured window at some moment: after a batch or, with several processes, also during one.

    `energy` is the meter's reading, taken `energy_at_s` after the window opened; None if the meter was not polled or
    cannot be read before the window closes. `under_way` is None if no request was in flight.
    """

    duration_s: Amount
    flops: Flops | None = None
    energy: tuple[EnergyReading, ...] | None = None
    energy_at_s: Number | None = None
    under_way: UnderWay | None = None

    def energy_behind_s(self, end_s: float) -> float | None:
        """Return an upper bound on how long before `end_s` the energy was last known; None if nothing was read.

        A counter's value may be as old as its last tick, and a trace's integral as old as its last sample. An estimate
        states the time that it covers.
        """
        known = [r for r in self.energy or () if r.energy_j is not None]
        if self.energy_at_s is None or not self.energy:
            return None
        reached_s = [
            (self.energy_at_s if r.covered_s is None else r.covered_s)
            - (r.resolution_s or 0.0) * (r.source in ("counter", "integral"))
            for r in known
        ]
        return end_s - max(0.0, min(reached_s, default=self.energy_at_s))


class _Rows(msgspec.Struct, gc=False):
    """A finished batch, as a line of the journal; its rows omit the values that all rows of a window share."""

    done: list[RequestRecord]


class _Done(Checkpoint, frozen=True, gc=False, kw_only=True):
    """A line of the journal: a checkpoint, and the rows of the batch that has just finished, if any."""

    done: list[RequestRecord]


class _Opening(msgspec.Struct, gc=False):
    record: ProcessRecord


_ROWS, _DONE = msgspec.json.Decoder(_Rows), msgspec.json.Decoder(_Done)


@dataclass(frozen=True)
class Window:
    """A measured window as recorded in a journal.

    If the process has written its final record of the window, `record` is that record and there are no checkpoints;
    otherwise `record` was written when the window opened.
    """

    record: ProcessRecord
    rows: list[RequestRecord]
    checkpoints: Sequence[Checkpoint] = ()

    @property
    def metered(self) -> Checkpoint | None:
        """The last checkpoint with energy, or None."""
        return next((each for each in reversed(self.checkpoints) if each.energy is not None), None)

    def salvaged(self) -> ProcessRecord:
        """Return `record` or, if there are checkpoints, a record of the window up to the last checkpoint."""
        if not self.checkpoints:
            return self.record
        record, last = self.record, self.checkpoints[-1]
        metered = self.metered
        unread_because = "the process was killed before its window was closed"
        readings = unread(record, unread_because) if metered is None else metered.energy or ()
        if metered is not None and metered.energy_at_s is not None:
            readings = covering(readings, metered.energy_at_s)
        finished = [row for row in self.rows if row.error is None]
        carbon, doubts = _carbon(record, last.duration_s)
        behind_s = None if metered is None else metered.energy_behind_s(last.duration_s)
        salvaged = replace(
            record,
            phases=(*record.phases, Phase("measured", last.duration_s, readings)),
            requests_completed=len(finished),
            requests_failed=len(self.rows) - len(finished),
            input_tokens=sum(row.input_tokens for row in finished),
            output_tokens=sum(row.output_tokens or 0 for row in finished),
            flops=last.flops,
            carbon=carbon,
            cut=Cut(1, None, behind_s, last.under_way or UnderWay()),
            warnings=(*record.warnings, *doubts, warning("window_cut", _cut(metered, behind_s))),
        )
        return replace(salvaged, warnings=(*salvaged.warnings, *warning_codes.of_record(salvaged, self.rows)))


def _carbon(record: ProcessRecord, duration_s: float) -> tuple[Carbon | None, tuple[CodedWarning, ...]]:
    """Return the carbon intensity of a window that was never closed; None if it is unknown or may have changed."""
    carbon, opened_s = record.carbon, record.window_opened_unix_s
    if carbon is None or carbon.until_unix_s is None or opened_s is None:
        return carbon, ()
    if opened_s + duration_s <= carbon.until_unix_s:
        return replace(carbon, until_unix_s=None), ()
    text = (
        "the carbon intensity changed during the window, and the process was killed before it could compute the mean "
        "intensity."
    )
    return None, (warning("carbon_unknown", text),)


def _cut(metered: Checkpoint | None, behind_s: float | None) -> str:
    killed = "the process was killed an unknown time after its last finished request; the window ends at that request"
    if metered and not metered.energy:
        return f"{killed}."
    if behind_s is None:
        return f"{killed}, and the window's energy is unknown."
    return f"{killed}; the window's energy was last read {behind_s:.3g} s before that request ended."


class Journal:
    """Appends to a journal. All methods may raise OSError, for example if the disk is full."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def open_window(self, record: ProcessRecord) -> None:
        """Record that a measured window opens; `record` is used if the process never writes its final record."""
        self._write(OPENING + msgspec.json.encode(record) + b"}\n")

    def add(self, rows: Sequence[RequestRecord], checkpoint: Checkpoint) -> None:
        """Record a finished batch; once this returns, the batch is not lost even if the process is killed."""
        done = [{name: value for name, value in asdict(row).items() if name not in COMMON} for row in rows]
        known = {name: value for name, value in asdict(checkpoint).items() if value is not None}
        self._write(msgspec.json.encode({"done": done} | known) + b"\n")

    def close(self) -> None:
        """Flush the journal to disk and close it."""
        os.fsync(self._file)
        os.close(self._file)

    def _write(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._file, line) :]


def read(journal: bytes, known: Mapping[int, ProcessRecord] = MappingProxyType({})) -> list[Window]:
    """Read a journal, even if its writer was killed.

    Args:
        journal: the file's content.
        known: the records that the journal's process has written in the same attempt, by cycle.

    Raises:
        ValueError: a line that ends with a line break is damaged.
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
        raise ValueError("the line belongs to no window")
    return from_json(_Opening, line).record


def _of_window(record: ProcessRecord, batches: Sequence[_Rows | _Done]) -> list[RequestRecord]:
    shared = {name: getattr(record, name) for name in COMMON}
    return [replace(row, **shared) for batch in batches for row in batch.done]


def _damage(content: bytes) -> str:
    """Return the number of the first damaged line of a journal, and a description of the damage."""
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            if number > 1 and not line.startswith(OPENING):
                from_json(_Done, line)
            else:
                _opened(line)
        except ValueError as error:
            return f"line {number} is damaged ({' '.join(str(error).split())[:120]})"
    raise AssertionError("a damaged journal has a damaged line")
