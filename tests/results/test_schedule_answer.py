"""The results of a schedule: which runs count, the verdicts, the warnings, and how all of it is shown."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import sys
import threading
from dataclasses import replace
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from msgspec import structs
from rich.cells import cell_len

from lem.record import Environment
from lem.results.aggregate import aggregate_all
from lem.results.campaign import DEFINITION
from lem.results.schedule import Config, ScheduleManifest, Start, folder_of, write_manifest
from lem.results.schedule_answer import answer, spans
from lem.results.schedule_show import as_plain, sentences, show_answer
from lem.results.store import Store
from lem.spec.campaign import CampaignCell
from lem.spec.schedule import Schedule
from tests.records import experiment, put, reading, record, requests

BERLIN = ZoneInfo("Europe/Berlin")
BEGIN = datetime(2026, 3, 2, 3, tzinfo=BERLIN)
HERE = Environment("h", "Linux", "CPU", 4, 2**30, (), {"torch": "2.9.0"}, driver_version="580.1")
TOKENS = 60  # of the three requests of an experiment


def manifest(starts, name="nights"):
    config = Config("experiment", "tiny, sample", None, (), "0" * 64, False, "/")
    settings = Schedule(interval_s=21600.0, duration_s=7 * 86400.0, time_zone="Europe/Berlin")
    return ScheduleManifest(
        name, "sch_1", BEGIN.isoformat(), (BEGIN + timedelta(days=7)).isoformat(), "Europe/Berlin", settings, config,
        starts,
    )  # fmt: skip


def start(number, status="done", hours=6, **more):
    at = BEGIN + timedelta(hours=hours * (number - 1))
    started = (at + timedelta(seconds=2)).isoformat() if status in ("done", "failed") else None
    return Start(number, at.isoformat(), status, started, late_s=2.0 if started else None, **more)


def measure(store, of, each, energy_j, *, arm=None, cycle=1, **of_record):
    """Write an experiment of a run; its energy is given, and None if it was not measured."""
    directory = experiment(store, datetime(2026, 3, 2) + timedelta(minutes=len(store.ids())))
    cell = None if arm is None else CampaignCell("c", arm, cycle, 1)
    plan = replace(directory.plan(), schedule=of.place(each), campaign=cell)
    directory.write_plan(plan, ["a"] * 3)
    known = {"energy": (reading(energy_j=energy_j),), "environment": HERE, "config_sha256": plan.config_sha256}
    put(directory, record(**(known | of_record)), requests())
    each.experiment_id = directory.id
    return directory


def written(store, of):
    write_manifest(folder_of(store, of.name), of)
    list(aggregate_all(store, store.ids(), strict=False))
    return answer(store, of)


def energies(count, by_day=1.05):
    """Return joules with a known difference between day and night and a little noise, in a schedule of 6 hours."""
    noise = [1.0, 0.995, 1.004, 1.002, 0.997]
    return [60.0 * (by_day if i % 4 in (1, 2) else 1.0) * noise[i % 5] for i in range(count)]


@pytest.fixture
def three_days(tmp_path):
    """Three days of runs every 6 hours, in which runs cost more by day."""
    store = Store(tmp_path / "results")
    of = manifest([start(i + 1) for i in range(12)])
    for each, energy_j in zip(of.starts, energies(12), strict=True):
        measure(store, of, each, energy_j)
    return store, of


def primary(found, arm=""):
    (one,) = [each for each in found.found if each.is_primary and each.arm == arm]
    return one


def codes(found):
    return {note.code for note in found.warnings}


def test_a_difference_between_day_and_night_is_found(three_days):
    found = written(*three_days)
    by_time = primary(found).by_time
    assert by_time.verdict == "varies"
    assert [(level.name, level.runs, level.days) for level in by_time.levels] == [
        ("03:00", 3, 3), ("09:00", 3, 3), ("15:00", 3, 3), ("21:00", 3, 3),
    ]  # fmt: skip
    assert by_time.levels[0].mean == pytest.approx(60.0 / TOKENS, rel=0.005)
    assert by_time.ratio == pytest.approx(1.05, rel=0.01)
    assert primary(found).by_weekday.reason == "fewer than two weeks"
    first, second, last = sentences(found)
    assert first.startswith("Energy per output token varies with the time of day: ")
    assert "two-way analysis of variance with days as blocks, F(3, 6)" in first
    assert second == "Energy per output token by weekday: cannot tell (fewer than two weeks)."
    counted = "means are geometric, and the runs of a slot on one day count as one value"
    assert last == f"The p-values are compared with 4%; {counted}."
    assert codes(found) == {"schedule_runs_warn"}


def test_without_a_difference_it_says_what_would_have_been_found(three_days):
    store, of = three_days
    for each, energy_j in zip(of.starts, energies(12, by_day=1.0), strict=True):
        measure(store, of, each, energy_j)  # a later experiment of the same run takes the place of the first
    found = written(store, of)
    assert primary(found).by_time.verdict == "no variation found"
    text = next(sentences(found))
    assert "no more than repeats do" in text
    assert "between one half of the times of day and the other would have been found with a probability of 95%." in text


def test_failed_skipped_and_missed_runs_are_named_and_not_averaged(three_days):
    store, of = three_days
    for number, status, error in (
        (5, "failed", "CUDA"),
        (6, "skipped", "busy"),
        (7, "missed", "off"),
        (8, "missed", ""),
    ):
        of.starts[number - 1] = start(number, status, error=error or None)
    measure(store, of, of.starts[4], 1e6, status="failed", requests_completed=3)
    # The experiments of runs 6 to 8 stay, as if an earlier schedule of this name had planned them at other times.
    of.starts = [
        structs.replace(each, planned_at=each.planned_at.replace(":00+", ":30+")) if 6 <= each.number <= 8 else each
        for each in of.starts
    ]
    of.starts[4] = structs.replace(of.starts[4], planned_at=of.starts[4].planned_at.replace(":00+", ":30+"))
    found = written(store, of)
    assert sum(level.runs for level in primary(found).by_time.levels) == 8
    (note,) = [note for note in found.warnings if note.code == "schedule_runs_missing"]
    assert note.text == "some runs have no complete result: failed: 5; skipped: 6; missed: 7–8; no mean includes them."
    assert [run.start.number for run in found.runs if not run.rows] == [5, 6, 7, 8]


def test_an_experiment_that_was_completed_after_its_run_is_not_averaged(three_days):
    store, of = three_days
    of.starts[4] = structs.replace(of.starts[4], status="interrupted")
    found = written(store, of)
    assert sum(level.runs for level in primary(found).by_time.levels) == 11
    assert not found.runs[4].rows


def test_of_a_campaign_the_completed_cells_of_a_failed_run_are_averaged(tmp_path):
    store, of = Store(tmp_path / "results"), manifest([start(1), start(5, "failed")])
    of.config = structs.replace(of.config, kind="campaign")
    for each in of.starts:
        measure(store, of, each, 60.0, arm="a")
        if each.status == "done":  # in the failed run, only arm a was completed
            measure(store, of, each, 60.0, arm="b")
    found = written(store, of)
    assert [sum(level.runs for level in primary(found, arm).by_time.levels) for arm in ("a", "b")] == [2, 1]
    (note,) = [note for note in found.warnings if note.code == "schedule_runs_missing"]
    assert note.text == "some runs have no complete result: failed: 5; the means include only their completed cells."


def test_null_is_never_averaged(three_days):
    store, of = three_days
    measure(store, of, of.starts[0], None)
    found = written(store, of)
    assert primary(found).by_time.levels[0].runs == 2
    speed = next(each for each in found.found if each.measure == "output_tokens_per_s")
    assert speed.by_time.levels[0].runs == 3


def test_without_energy_it_cannot_tell(tmp_path):
    store, of = Store(tmp_path / "results"), manifest([start(1), start(2, "planned")])
    assert primary(written(store, of)).by_time.reason == "no run has completed"
    measure(store, of, of.starts[0], None)
    assert primary(written(store, of)).by_time.reason == "no run has a value for energy_per_output_token_j"
    assert next(sentences(answer(store, of))).endswith(
        "cannot tell (no run has a value for energy_per_output_token_j)."
    )


def test_one_run_has_a_mean_without_an_interval(tmp_path):
    store, of = Store(tmp_path / "results"), manifest([start(1)])
    measure(store, of, of.starts[0], 120.0)
    (level,) = primary(written(store, of)).by_time.levels
    assert (level.mean, level.ci95_low) == (pytest.approx(2.0), None)


def test_changes_of_the_machine_and_its_software_are_warned_about(three_days):
    store, of = three_days
    newer = structs.replace(HERE, driver_version="590.2", versions={"torch": "2.9.1"})
    measure(store, of, of.starts[10], 60.0, environment=newer)
    (note,) = [note for note in written(store, of).warnings if note.code == "schedule_environment_changed"]
    for part in ("driver from 580.1 to 590.2 at run 11", "torch from 2.9.1 to 2.9.0 at run 12"):
        assert part in note.text


def test_measured_and_estimated_energy_are_never_averaged(three_days):
    store, of = three_days
    measure(store, of, of.starts[3], 60.0, energy=(reading("cpu", "estimate", 60.0, "CPU", "machine"),))
    found = written(store, of)
    assert primary(found).by_time.reason == "the energy of the runs was obtained in different ways"
    assert "schedule_meters_differ" in codes(found)
    speed = next(each for each in found.found if each.measure == "output_tokens_per_s")
    assert sum(level.runs for level in speed.by_time.levels) == 12


def test_each_arm_of_a_campaign_is_examined_by_itself_and_adjusted_for_both(tmp_path):
    store, of = Store(tmp_path / "results"), manifest([start(i + 1) for i in range(8)])
    for each, energy_j in zip(of.starts, energies(8), strict=True):
        measure(store, of, each, energy_j, arm="slow [b]")
        measure(store, of, each, 60.0 + each.number % 3, arm="fast")
    found = written(store, of)
    assert found.arms == ["slow [b]", "fast"]
    slow, fast = (primary(found, arm).by_time for arm in found.arms)
    assert slow.verdict == "varies"
    assert slow.p_adjusted == pytest.approx(2 * slow.result.p_value)
    assert "adjusted for 2 tests by Holm's method" in list(sentences(found))[-1]
    assert fast.verdict == "no variation found"


def test_the_cycles_of_a_campaign_are_one_value_of_its_run(tmp_path):
    store, of = Store(tmp_path / "results"), manifest([start(1), start(5)])
    for each in of.starts:
        for cycle, energy_j in ((1, 30.0), (2, 120.0), (3, None)):
            measure(store, of, each, energy_j, arm="a", cycle=cycle)
    found = written(store, of)
    assert [run.value("a", "energy_per_output_token_j") for run in found.runs] == [pytest.approx(1.0)] * 2
    (level,) = primary(found, "a").by_time.levels
    assert (level.runs, level.days, level.mean) == (2, 2, pytest.approx(1.0))


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([4], "4"), ([1, 2, 3, 7, 9, 10], "1–3, 7, 9–10")])
def test_numbers_in_a_row_are_joined(numbers, text):
    assert spans(numbers) == text


# ------------------------------------------------------------------ the command
def test_the_command_shows_it_as_text_and_as_json(three_days, lem):
    store, of = three_days
    of.starts[1] = structs.replace(of.starts[1], status="failed", error="The GPU [0] is gone.")
    found = written(store, of)
    done = lem("results", "show", "nights", "-o", str(store.root))
    assert done.code == 0, done.err
    assert "Schedule nights: 12 runs planned, 11 done, 1 failed" in done.out
    assert "The GPU [0] is gone." in done.out
    assert "Mon 2026-03-02 03:00 +0100  03:00:02   2 s  done" in done.out
    shown = json.loads(lem("results", "show", "sch_1", "--json", "-o", str(store.root)).out)
    assert shown == json.loads(json.dumps(as_plain(found)))
    assert shown["measures"][0]["variations"][0]["verdict"] == "varies"
    assert shown["runs"][0]["experiments"][0]["energy_per_output_token_j"] == pytest.approx(1.0)
    by_folder = lem("results", "show", str(folder_of(store, "nights")))
    assert by_folder.out == done.out


ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Reader(threading.Thread):
    """Reads what is printed on a terminal, so that printing never waits."""

    def __init__(self, handle):
        super().__init__()
        self.handle, self.chunks = handle, []
        self.start()

    def run(self):
        with contextlib.suppress(OSError):  # at the end of what was printed
            while chunk := os.read(self.handle, 10_000):
                self.chunks.append(chunk)
        os.close(self.handle)

    def text(self):
        self.join()
        return b"".join(self.chunks).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("width", [46, 60, 80, 120])
def test_it_fits_the_terminal(three_days, width, monkeypatch):
    written(*three_days)
    ours, theirs = pty.openpty()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        reader = Reader(ours)
        show_answer(answer(*three_days))
    monkeypatch.undo()
    lines = ANSI.sub("", reader.text()).splitlines()
    assert max(map(cell_len, lines)) <= width
    assert "varies with the time of day" in " ".join(line.strip() for line in lines)


def test_runs_can_be_listed(three_days, lem):
    store, of = three_days
    written(store, of)
    experiment(store)
    rows = json.loads(lem("results", "list", "--schedule", "nights", "--json", "-o", str(store.root)).out)
    assert len(rows) == 12
    assert {row["schedule"] for row in rows} == {"nights"}
    assert json.loads(lem("results", "list", "--schedule", "other", "--json", "-o", str(store.root)).out) == []


def test_bad_requests_name_the_remedy(three_days, lem):
    store, of = three_days
    written(store, of)
    where = ("-o", str(store.root))
    done = lem("results", "show", "nights", "--raw", *where)
    assert done.code == 2
    assert "--raw applies to a single experiment, but 'nights' is a schedule. To list its experiments: " in done.err
    done = lem("results", "show", "nigths", *where)
    assert done.code == 2
    assert "Nearest: nights." in done.err
    (store.root / "campaigns" / "nights").mkdir(parents=True)
    (store.root / "campaigns" / "nights" / DEFINITION).write_text("{}")
    done = lem("results", "show", "nights", *where)
    assert done.code == 2
    assert "'nights' is the name of a schedule and of a campaign. Give the directory instead: " in done.err
    (folder_of(store, "nights") / "schedule.json").write_text("{")
    done = lem("results", "show", "nights", *where)
    assert done.code == 2
    assert "damaged" in done.err
    assert "Traceback" not in done.err
