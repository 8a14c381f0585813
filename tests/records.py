"""Handmade raw files for tests of aggregation and display: plans, records and request rows as workers write them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from msgspec.structs import replace

from lem.record import EnergyReading, Phase, PowerRecord, ProcessRecord, RequestRecord
from lem.results.codec import config_sha256
from lem.results.directory import ExperimentDir
from lem.results.journal import Checkpoint, Journal
from lem.results.parquet import write_rows
from lem.results.plan import Plan, PromptsInfo, State
from lem.results.store import Store
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Dataset, Experiment

ID = "exp_20260102_030405"
AT = "2026-01-02T03:04:05+00:00"


def reading(component="gpu", source="counter", energy_j=100.0, device="GPU-0", scope="device", **more) -> EnergyReading:
    return EnergyReading(component, source, scope, device, energy_j, "test", **more)


GPU = reading()


def plan(count=3, processes=1, cycles=1, experiment_id=ID, **more) -> Plan:
    experiment = Experiment(
        model="m", backend=SimulatedBackend(), dataset=Dataset(name="d", path="p"), cycles=cycles, **more
    )
    prompts = PromptsInfo(count, "0" * 64, "p", None, "text", count, 0)
    return Plan(experiment_id, AT, experiment, prompts, config_sha256(experiment), processes, processes, 0, ("seed=1",))


def requests(positions: Sequence[int] = (0, 1, 2), rank=0, cycle=1, attempt=1, experiment_id=ID) -> list[RequestRecord]:
    place = {"experiment_id": experiment_id, "rank": rank, "cycle": cycle, "attempt": attempt}
    return [
        request(request=i, batch=i, input_tokens=10 + i, start_s=i * 1.0, end_s=i + 0.5, **place) for i in positions
    ]


def request(**values: Any) -> RequestRecord:
    """Return a request row with some of its values given."""
    known = {"request": 0, "batch": 0, "input_tokens": 10, "output_tokens": 20, "input_truncated": False}
    known |= {"finish_reason": "length", "start_s": 0.0, "end_s": 0.5, "latency_s": 0.5}
    return RequestRecord(**(known | values))


def failed(row: RequestRecord, reason="HTTP 429: busy.") -> RequestRecord:
    """Return the row of a failed request."""
    nothing = dict.fromkeys(("output_tokens", "latency_s", "ttft_s", "tpot_s", "itl_s", "itl_spread"))
    return replace(row, finish_reason="error", error=reason, **nothing)


def phases(duration_s=4.0, energy: Sequence[EnergyReading] = (GPU,)) -> tuple[Phase, ...]:
    return (
        Phase("load", 5.0, (reading(energy_j=40.0),)),
        Phase("warmup", 1.0, (reading(energy_j=10.0),)),
        Phase("measured", duration_s, tuple(energy)),
    )


def record(rows: Sequence[RequestRecord] | None = None, energy=(GPU,), duration_s=4.0, **more: Any) -> ProcessRecord:
    """Return the record of a process that has finished the requests of `rows`."""
    rows = requests() if rows is None else rows
    values = {
        "format_version": 2,
        "lem_version": "0",
        "experiment_id": ID,
        "rank": 0,
        "world_size": 1,
        "status": "completed",
        "started_at": AT,
        "hostname": "h",
        "config_sha256": plan().config_sha256,
        "backend": "simulated",
        "window_opened_unix_s": 1000.0,
        "phases": phases(duration_s, energy),
        "requests_planned": len(rows),
        "requests_completed": len(rows),
        "input_tokens": sum(row.input_tokens for row in rows),
        "output_tokens": sum(row.output_tokens for row in rows),
    }
    return ProcessRecord(**(values | more))


def put(directory: ExperimentDir, it: ProcessRecord, rows: Sequence[RequestRecord]) -> None:
    """Write a process's record of one window and add its rows to the process's journal, as if it were this one's."""
    it = replace(it, experiment_id=directory.id)
    place = {"experiment_id": directory.id, "rank": it.rank, "cycle": it.cycle, "attempt": it.attempt}
    journal = Journal(directory.journal_file(it.rank, it.attempt))
    opening = [phase for phase in it.phases if phase.name != "measured"]
    counts = {"requests_completed": 0, "input_tokens": 0, "output_tokens": 0}
    journal.open_window(replace(it, status="interrupted", phases=tuple(opening), **counts))
    for row in rows:
        journal.add([replace(row, **place)], Checkpoint(row.end_s))
    journal.close()
    directory.write_record(it)


def experiment(store: Store, at: datetime | None = None, **of_plan: Any) -> ExperimentDir:
    """Claim an experiment and write its plan and the state `completed`; it has no records yet."""
    directory = store.claim(at or datetime(2026, 1, 2, 3, 4, 5))
    made = plan(experiment_id=directory.id, **of_plan)
    directory.write_plan(made, ["a"] * made.prompts.count)
    directory.write_state(State("completed", 1, AT))
    return directory


def finished(store: Store, at: datetime | None = None, **of_record: Any) -> ExperimentDir:
    """Write a completed experiment with one process, one cycle and three prompts, that has no row yet."""
    directory = experiment(store, at)
    put(directory, record(**of_record, config_sha256=directory.plan().config_sha256), requests())
    return directory


def power(directory: ExperimentDir) -> None:
    """Write a power trace of two samples."""
    samples = [PowerRecord(directory.id, 0, 1, 1, t_s, "gpu", "GPU-0", power_w) for t_s, power_w in ((0, 50), (1, 60))]
    write_rows(directory.power_file(0, 1, 1), PowerRecord, samples)
