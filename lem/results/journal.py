"""What a worker has finished, written down as it goes, so that a run that is killed loses nothing.

A journal is a file of JSON lines for one process and one attempt, appended to after each batch. It has two kinds of
lines: `{"record": …}` where a measured window opens, with what is known of the process by then; and
`{"done": [rows], "duration_s": …}` after each batch, now and then with the energy of the window so far. A last line
without a line end was cut off when the process died, and is ignored. Knows no engine and no meter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


class Checkpoint(msgspec.Struct, frozen=True, gc=False):
    """How far the measured window had come when a batch was done.

    `energy` is what the meter had read `energy_at_s` after the window's opening; None where it was not polled, or
    cannot be read before the window closes.
    """

    duration_s: float
    flops: Flops | None = None
    energy: tuple[EnergyReading, ...] | None = None
    energy_at_s: float | None = None


class _Done(Checkpoint, frozen=True, gc=False, kw_only=True):
    """A batch that is done: a line of the journal. Its rows lack what all rows of a window share."""

    done: list[RequestRecord]


class _Opening(msgspec.Struct, gc=False):
    record: ProcessRecord


class _Cycle(msgspec.Struct, gc=False):
    cycle: int


class _OpeningCycle(msgspec.Struct, gc=False):
    record: _Cycle


@dataclass
class Window:
    """A measured window as a journal holds it: the record at its opening, the rows, and the last checkpoints.

    `closed`: the process has written its own record of the window, and `record` is that one.
    """

    record: ProcessRecord
    closed: bool = False
    rows: list[RequestRecord] = field(default_factory=list)
    last: Checkpoint | None = None
    metered: Checkpoint | None = None

    def add(self, batch: _Done) -> None:
        """Add a batch that is done; its rows get what all rows of the window share."""
        record = self.record
        self.rows += [
            replace(
                row, experiment_id=record.experiment_id, rank=record.rank, cycle=record.cycle, attempt=record.attempt
            )
            for row in batch.done
        ]
        self.last = batch
        if batch.energy is not None:
            self.metered = batch

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
            warnings=(*record.warnings, warning("window_cut", self._cut(last))),
        )

    def _cut(self, last: Checkpoint) -> str:
        killed = "the process was killed, not known how long after its last finished request; its window ends with that"
        if self.metered and not self.metered.energy:
            return f"{killed}."
        known = self.metered.energy_at_s if self.metered else None
        if known is None:
            return f"{killed}, and its energy is not known."
        return f"{killed}, its energy {last.duration_s - known:.3g} s before that."


def _unread(record: ProcessRecord) -> tuple[EnergyReading, ...]:
    """Return the devices that were metered before, without energy: the meter is read only when a window closes."""
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
    windows: list[Window] = []
    for number, line in enumerate(journal.split(b"\n")[:-1], start=1):
        try:
            if line.startswith(OPENING):
                windows.append(_opened(line, known))
            elif windows:
                windows[-1].add(from_json(_Done, line))
            else:
                raise ValueError("it belongs to no window")
        except ValueError as error:
            text = " ".join(str(error).split())[:120]
            raise ValueError(f"line {number} is damaged ({text})") from None
    return windows


def _opened(line: bytes, known: Mapping[int, ProcessRecord]) -> Window:
    record = known.get(from_json(_OpeningCycle, line).record.cycle)
    return Window(record, closed=True) if record else Window(from_json(_Opening, line).record)
