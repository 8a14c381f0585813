"""The files of a schedule: reading them back, finding a schedule, and the lock."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lem.errors import ResultsError
from lem.results import schedule as files
from lem.results.schedule import Config, RunOutcome, ScheduleManifest, Start, load_schedule
from lem.results.store import Store
from lem.spec.schedule import Schedule

PLANNED = "2026-03-29T03:00:00+02:00"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def manifest(name="nights", *statuses):
    return ScheduleManifest(
        name=name,
        id="schedule_20260329_010000",
        created_at="2026-03-29T01:00:00+01:00",
        ends_at="2026-03-30T02:00:00+02:00",
        time_zone="Europe/Berlin",
        settings=Schedule(at=("02:30",), time_zone="Europe/Berlin"),
        config=Config("experiment", "2 prompts", None, ("seed=1",), "abc", False, "/work"),
        starts=[Start(number, PLANNED, status) for number, status in enumerate(statuses or ("planned",), start=1)],
    )


def test_a_schedule_is_found_by_its_name_and_by_its_id(store):
    kept = manifest()
    files.write_manifest(files.folder_of(store, "nights"), kept)
    assert load_schedule(store, "nights") == kept
    assert load_schedule(store, kept.id) == kept
    assert files.names(store) == ["nights"]
    assert files.store_of(files.folder_of(store, "nights")).root == store.root
    with pytest.raises(ResultsError, match=r"There is no schedule 'night' in .* Did you mean 'nights'\?"):
        load_schedule(store, "night")


def test_without_schedules_none_is_found(store):
    assert files.names(store) == []
    with pytest.raises(ResultsError, match="There is no schedule 'nights'"):
        load_schedule(store, "nights")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "nights"}', "null"])
def test_a_damaged_table_is_named(store, content):
    file = files.folder_of(store, "nights") / files.TABLE
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(ResultsError, match=r"schedule\.json is damaged .* Restore the file"):
        load_schedule(store, "nights")


def test_the_place_of_a_run_goes_into_its_records():
    start = Start(3, PLANNED, "running", started_at="2026-03-29T03:00:01.500+02:00")
    place = manifest().place(start)
    assert (place.schedule, place.number, place.planned_at) == ("nights", 3, PLANNED)
    assert (place.started_at, place.time_zone) == (start.started_at, "Europe/Berlin")


def test_the_counts_are_in_words():
    kept = manifest("nights", "done", "skipped", "done", "failed", "planned")
    assert kept.counts() == "2 done, 1 failed, 1 skipped, 1 not started"
    assert kept.has_failed


def test_an_outcome_is_read_back_and_a_damaged_one_counts_as_none(tmp_path):
    outcome = RunOutcome("failed", "exp_1", error="no memory", ended_at=PLANNED)
    files.write_outcome(tmp_path, 7, outcome)
    assert files.read_outcome(tmp_path, 7) == outcome
    assert files.read_outcome(tmp_path, 8) is None
    files.outcome_file(tmp_path, 7).write_text("{")
    assert files.read_outcome(tmp_path, 7) is None


def test_only_one_process_holds_the_lock_and_a_killed_one_releases_it(tmp_path):
    folder = tmp_path / "schedules" / "nights"
    program = f"""
from pathlib import Path
from lem.results.schedule import held
with held(Path({str(folder)!r})):
    print("held", flush=True)
    input()
"""
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ResultsError, match="Another process is working through schedule 'nights'"), files.held(folder):
        pass
    holder.kill()
    holder.communicate()
    with files.held(folder):
        pass
