"""The columns that say to which run of a schedule an experiment belongs."""

from __future__ import annotations

from lem.machine import host
from lem.results.aggregate import read
from lem.runner.job import run_ready
from lem.runner.preflight import preflight
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Dataset, Energy, Experiment, Io
from lem.spec.schedule import ScheduleRun

RUN = ScheduleRun("nights", 3, "2026-03-29T03:00:00+02:00", "2026-03-29T01:00:02.500000+00:00", "Europe/Berlin")


def ran(results, schedule):
    experiment = Experiment(
        model="any",
        backend=SimulatedBackend(sleep=False),
        dataset=Dataset(path="builtin:sample", sample_size=2),
        energy=Energy(name="none"),
        io=Io(results_dir=str(results)),
    )
    return run_ready(preflight(experiment, host.look()), schedule=schedule)


def test_the_row_names_the_run_and_how_late_it_was(tmp_path):
    outcome = ran(tmp_path, RUN)
    row = outcome.row
    assert (row.schedule, row.schedule_run, row.schedule_late_s) == ("nights", 3, 2.5)
    assert (row.schedule_planned_at, row.schedule_started_at) == (RUN.planned_at, RUN.started_at)
    assert outcome.directory.plan().schedule == RUN
    assert read(outcome.directory, strict=True).row.schedule_run == 3, "computed again from the files"


def test_without_a_schedule_the_columns_are_null(tmp_path):
    row = ran(tmp_path, None).row
    assert [name for name in row.__struct_fields__ if name.startswith("schedule")]
    assert {getattr(row, name) for name in row.__struct_fields__ if name.startswith("schedule")} == {None}
