"""The daemon of a schedule in a simulated world: a year of starts, clocks that are set, suspends, signals, crashes."""

from __future__ import annotations

import copy
import os
import pty
import signal
import subprocess
import sys
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lem.results import schedule as files
from lem.results.files import DiskFull
from lem.results.schedule import RunOutcome, ScheduleManifest, due
from lem.studies.daemon import GRACE_S, Clock, Screen
from tests.studies.simulated_world import SIGNAL, STEP, SUSPENDED, World, daemon_of, manifest_of

HOUR, DAY = 3600.0, 86_400.0
BERLIN = "Europe/Berlin"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "results" / "schedules" / "one"


def half_hours(**values):
    """Return a schedule of six hours with a start each half hour, and its world."""
    manifest = manifest_of("2026-06-01T00:00:00+00:00", interval_s=1800.0, duration_s=6 * HOUR)
    return World(datetime.fromisoformat("2026-06-01T00:00:00+00:00"), **values), manifest


def of_status(manifest, status):
    return [start.number for start in manifest.starts if start.status == status]


# ------------------------------------------------------------------ the table is followed
@pytest.mark.parametrize("zone", [BERLIN, "America/New_York", "Asia/Kathmandu"])
@pytest.mark.parametrize(
    "timing",
    [
        {"at": ("02:30", "14:00"), "days": ("mon", "wed", "sun")},
        {"interval_s": 6 * HOUR},
        {"interval_s": 30 * HOUR, "at": ("02:30",), "days": ("sat", "sun")},
    ],
)
def test_for_a_year_every_run_starts_when_the_table_says(zone, timing, folder):
    begin = "2026-01-01T00:00:00+00:00"
    manifest = manifest_of(begin, duration_s=365 * DAY, time_zone=zone, **timing)
    world = World(datetime.fromisoformat(begin))
    assert daemon_of(world, manifest, folder, longest_sleep_s=HOUR).work() == 0
    assert world.begun == [(start.number, due(start)) for start in manifest.starts]
    assert {(start.status, start.late_s) for start in manifest.starts} == {("done", 0.0)}
    assert all(start.started_at and start.ended_at and start.experiment_id for start in manifest.starts)
    assert all(datetime.fromisoformat(start.started_at) == due(start) for start in manifest.starts)


def test_a_week_of_half_hours_in_short_sleeps(folder):
    begin = "2026-10-23T00:00:00+02:00"  # with the Sunday on which the clock is set back
    manifest = manifest_of(begin, interval_s=1800.0, duration_s=7 * DAY, time_zone=BERLIN)
    world = World(datetime.fromisoformat(begin))
    assert daemon_of(world, manifest, folder).work() == 0
    assert world.begun == [(start.number, due(start)) for start in manifest.starts]
    assert len(world.begun) == 7 * 48


def test_a_start_that_comes_while_a_run_is_going_is_skipped(folder):
    world, manifest = half_hours(run_s=lambda number: 4000.0 if number == 3 else 600.0)
    assert daemon_of(world, manifest, folder).work() == 0
    assert [number for number, _ in world.begun] == [1, 2, 3, 6, 7, 8, 9, 10, 11, 12]
    assert of_status(manifest, "skipped") == [4, 5]
    assert manifest.starts[3].error == "run 3 was still going"
    # It is said when the start comes, not when the run ends.
    assert [text.split(" ")[1:3] for text in world.said if "3/12 done" in text or "skipped (" in text] == [
        ["4/12", "skipped"], ["5/12", "skipped"], ["3/12", "done"],
    ]  # fmt: skip


def test_after_the_duration_nothing_starts_and_the_running_one_finishes(folder):
    world, manifest = half_hours(run_s=lambda number: 600.0 if number < 12 else 5 * HOUR)
    assert daemon_of(world, manifest, folder).work() == 0
    assert len(world.begun) == 12
    assert manifest.starts[-1].status == "done"
    assert world.true_s == pytest.approx(11 * 1800 + 5 * HOUR)


def test_a_failed_run_is_recorded_and_the_schedule_goes_on(folder):
    world, manifest = half_hours(outcome=lambda number: "failed" if number == 2 else "done")
    assert daemon_of(world, manifest, folder).work() == 1
    assert of_status(manifest, "failed") == [2]
    assert of_status(manifest, "done") == [1, *range(3, 13)]
    assert manifest.starts[1].error == "no memory"
    assert "Run 2/12 failed exp_2: no memory" in world.said


def test_a_run_whose_process_cannot_be_started_has_failed(folder):
    world, manifest = half_hours()

    def begin_run(start):
        if start.number == 4:
            raise OSError(12, "Cannot allocate memory")
        return world.begin_run(start)

    daemon = daemon_of(world, manifest, folder)
    daemon.begin_run = begin_run
    assert daemon.work() == 1
    assert manifest.starts[3].error == "its process could not be started (Cannot allocate memory)"
    assert len(of_status(manifest, "done")) == 11


def test_a_full_disk_does_not_end_the_schedule(folder):
    world, manifest = half_hours()
    saved = []

    def save(where, table):
        if len(saved) < 3:
            saved.append(None)
            raise DiskFull(Path("/"))
        saved.append(copy.deepcopy(table))

    assert daemon_of(world, manifest, folder, save=save).work() == 0
    assert saved[-1] == manifest
    assert sum("table of starts was not saved" in text for text in world.said) == 3


# ------------------------------------------------------------------ clocks
def test_a_clock_that_is_set_back_an_hour_repeats_nothing(folder):
    world, manifest = half_hours()
    world.plan(1800 * 3 + 900, STEP, -HOUR)  # after run 4, while waiting for run 5
    assert daemon_of(world, manifest, folder).work() == 0
    assert [number for number, _ in world.begun] == list(range(1, 13))
    assert all(at == due(manifest.starts[number - 1]) for number, at in world.begun)
    assert world.true_s == pytest.approx(11 * 1800 + 600 + HOUR)
    assert "The clock was set back by 1h; no start is repeated." in world.said


def test_a_clock_that_is_set_back_during_a_run(folder):
    world, manifest = half_hours()
    world.plan(1800 * 3 + 300, STEP, -HOUR)
    assert daemon_of(world, manifest, folder).work() == 0
    assert [number for number, _ in world.begun] == list(range(1, 13))


def test_what_a_suspend_of_three_hours_misses_is_named(folder):
    world, manifest = half_hours()
    world.plan(1800 * 2 + 910, SUSPENDED, 3 * HOUR)  # until 4:15:10, while waiting for run 4 at 1:30
    assert daemon_of(world, manifest, folder).work() == 0
    assert of_status(manifest, "missed") == [4, 5, 6, 7, 8, 9]
    assert [number for number, _ in world.begun] == [1, 2, 3, 10, 11, 12]
    assert {manifest.starts[number - 1].error for number in range(4, 10)} == {
        "the machine was suspended, or its clock was set forward"
    }
    assert any(text.startswith("3h passed unnoticed") for text in world.said)
    assert sum(" missed (Mon 2026-06-01 " in text for text in world.said) == 6


def test_after_a_suspend_only_the_last_start_may_be_late(folder):
    world, manifest = half_hours()
    world.plan(1800 * 2 + 1000, SUSPENDED, 3 * HOUR + 820)  # until 4:30:20, twenty seconds after start 10
    assert daemon_of(world, manifest, folder).work() == 0
    assert of_status(manifest, "missed") == [4, 5, 6, 7, 8, 9]
    assert 20 <= manifest.starts[9].late_s <= GRACE_S
    assert any("Run 10/12 started, " in text and "s late." in text for text in world.said)


def test_a_suspend_during_a_run_skips_what_came_meanwhile(folder):
    world, manifest = half_hours()
    world.plan(1800 * 2 + 300, SUSPENDED, 3 * HOUR)
    assert daemon_of(world, manifest, folder).work() == 0
    passed = of_status(manifest, "skipped") + of_status(manifest, "missed")
    assert sorted(passed) == [4, 5, 6, 7, 8, 9]
    assert [number for number, _ in world.begun] == [1, 2, 3, 10, 11, 12]


def test_a_schedule_that_did_nothing_has_failed(folder):
    world, manifest = half_hours()
    world.wall += timedelta(days=2)
    assert daemon_of(world, manifest, folder).work() == 1
    assert of_status(manifest, "missed") == list(range(1, 13))


# ------------------------------------------------------------------ signals
def test_the_first_signal_lets_the_run_finish(folder):
    world, manifest = half_hours()
    world.plan(1800 * 2 + 100, SIGNAL, signal.SIGTERM)
    assert daemon_of(world, manifest, folder).work() == 130
    assert of_status(manifest, "done") == [1, 2, 3]
    assert world.true_s == pytest.approx(1800 * 2 + 600)
    assert of_status(manifest, "planned") == list(range(4, 13))
    assert world.said[-1].startswith("Stopped: 3 done, 9 not started. To continue: lem schedule --resume one -o ")


def test_a_signal_ends_the_waiting(folder):
    world, manifest = half_hours()
    world.plan(700, SIGNAL, signal.SIGINT)
    assert daemon_of(world, manifest, folder).work() == 130
    assert world.true_s == 700


def test_the_second_signal_interrupts_the_run_and_the_next_daemon_resumes_it(folder):
    world, manifest = half_hours()
    world.plan(1800 * 2 + 100, SIGNAL, signal.SIGINT)
    world.plan(1800 * 2 + 200, SIGNAL, signal.SIGINT)
    assert daemon_of(world, manifest, folder).work() == 130
    assert of_status(manifest, "interrupted") == [3]
    assert world.true_s == pytest.approx(1800 * 2 + 203)
    world.wall += timedelta(hours=1)
    assert daemon_of(world, manifest, folder).work() == 0
    assert [number for number, _ in world.begun] == [1, 2, 3, 3, *range(6, 13)]
    assert of_status(manifest, "missed") == [4, 5]
    assert manifest.starts[2].late_s == 0  # from its first start


def test_a_signal_during_the_last_run_changes_nothing(folder):
    world, manifest = half_hours()
    world.plan(1800 * 11 + 100, SIGNAL, signal.SIGTERM)
    assert daemon_of(world, manifest, folder).work() == 0


def test_a_run_that_someone_else_interrupts_has_failed(folder):
    world, manifest = half_hours(outcome=lambda number: "interrupted" if number == 5 else "done")
    assert daemon_of(world, manifest, folder).work() == 1
    assert manifest.starts[4].error == "it was interrupted by a signal from outside"


# ------------------------------------------------------------------ after a crash
def test_what_a_run_recorded_while_no_daemon_was_there_counts(folder):
    world, manifest = half_hours()
    for number, status in ((1, "done"), (2, "failed"), (3, "running")):
        files.write_outcome(folder, number, RunOutcome(status, f"exp_{number}", error="x" if number == 2 else None))
    manifest.starts[0].status = "running"
    manifest.starts[0].started_at = manifest.starts[0].planned_at
    world.wall += timedelta(hours=2, minutes=10)
    assert daemon_of(world, manifest, folder).work() == 1
    assert [start.status for start in manifest.starts[:5]] == ["done", "failed", "done", "missed", "missed"]
    assert [number for number, _ in world.begun] == [3, *range(6, 13)]


def test_a_run_that_was_cut_off_is_resumed_even_after_the_end(folder):
    world, manifest = half_hours()
    manifest.starts[0].status, manifest.starts[0].started_at = "running", manifest.starts[0].planned_at
    world.wall += timedelta(hours=10)
    assert daemon_of(world, manifest, folder).work() == 0
    assert [number for number, _ in world.begun] == [1]
    assert of_status(manifest, "missed") == list(range(2, 13))


class Killed(BaseException):
    """The daemon is gone at once."""


STEPS = st.tuples(st.floats(1, 6 * HOUR), st.sampled_from([STEP]), st.floats(-2 * HOUR, 2 * HOUR))
SUSPENDS = st.tuples(st.floats(1, 6 * HOUR), st.sampled_from([SUSPENDED]), st.floats(1, 4 * HOUR))
SIGNALS = st.tuples(st.floats(1, 6 * HOUR), st.sampled_from([SIGNAL]), st.sampled_from([signal.SIGTERM, signal.SIGINT]))
KILLS = st.lists(st.integers(0, 400), max_size=4)


@settings(max_examples=60)
@given(
    happenings=st.lists(st.one_of(STEPS, SUSPENDS, SIGNALS), max_size=5),
    kills=KILLS,
    run_s=st.lists(st.floats(1, 2 * HOUR), min_size=12, max_size=12),
)
def test_whatever_happens_no_start_is_repeated_or_lost(happenings, kills, run_s):
    """Kill the daemon at any sleep, and let it go on from the table on disk, in any disorder of clocks and signals."""
    world, manifest = half_hours(run_s=lambda number: run_s[number - 1])
    for after_s, what, value in happenings:
        world.plan(after_s, what, value)
    kept = msgspec.json.encode(manifest)

    def save(where, table):
        nonlocal kept
        kept = msgspec.json.encode(table)

    sleep, left, new = world.sleep, list(kills), set()

    def killing(seconds):
        if left:
            left[0] -= 1
            if left[0] < 0:
                left.pop(0)
                raise Killed
        return sleep(seconds)

    world.sleep = killing
    for _ in range(20):
        daemon = daemon_of(world, msgspec.json.decode(kept, type=ScheduleManifest), Path("/nowhere/one"), save=save)
        begin_run = daemon.begin_run

        def begin(start, begin_run=begin_run):
            is_new = start.number not in new
            assert is_new or start.started_at is not None
            new.add(start.number)
            assert not is_new or 0 <= (world.wall - due(start)).total_seconds() <= GRACE_S + 1
            return begin_run(start)

        daemon.begin_run = begin
        try:
            if daemon.work() != 130:
                break
        except Killed:
            continue
    else:
        pytest.fail("the schedule never ended")
    table = msgspec.json.decode(kept, type=ScheduleManifest).starts
    assert Counter(start.status for start in table).keys() <= {"done", "skipped", "missed"}
    assert {start.number for start in table if start.status == "done"} == new
    assert all(start.error for start in table if start.status in ("skipped", "missed"))
    firsts = list(dict.fromkeys(number for number, _ in world.begun))
    assert firsts == sorted(firsts)


# ------------------------------------------------------------------ the real clock and terminal
def test_the_real_clock_sleeps_until_a_signal_a_child_or_the_time():
    program = """
import os, signal, subprocess, sys, time
from lem.studies.daemon import Clock
clock = Clock()
began = time.monotonic()
assert clock.sleep(0.2) is None and time.monotonic() - began > 0.15
child = subprocess.Popen(["sleep", "0.1"])
assert clock.sleep(20) == signal.SIGCHLD and child.wait() == 0
os.kill(os.getpid(), signal.SIGTERM)  # arrives while not sleeping, and is not lost
time.sleep(0.1)
assert clock.sleep(20) == signal.SIGTERM
assert abs(clock.now().timestamp() - time.time()) < 1
print("good")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "good\n", done.stderr


def test_an_ignored_hangup_stays_ignored():
    program = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
from lem.studies.daemon import Clock
clock = Clock()
os.kill(os.getpid(), signal.SIGHUP)
print(clock.sleep(0.2))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "None\n", done.stderr


def test_a_countdown_appears_only_on_a_terminal(capsys, monkeypatch):
    screen = Screen(None)
    screen.show("Run 1/3 starts at 09:00:00, in 5s")
    assert capsys.readouterr().err == ""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "20")
        screen = Screen(None)
        screen.show("Run 1/3 starts at 09:00:00, in 5s")
        screen.show("Run 1/3 starts at 09:00:00, in 5s")
        terminal.flush()
        assert os.read(ours, 1000) == b"\r\x1b[KRun 1/3 starts at 0"
    os.close(ours)


def test_a_closed_pipe_and_a_lost_log_do_not_end_the_schedule(tmp_path):
    program = """
import sys
from datetime import UTC, datetime
from pathlib import Path
from lem.studies.daemon import Screen
screen = Screen(Path(sys.argv[1]))
for number in range(2000):
    screen.say(datetime.now(UTC), f"line {number} " + "x" * 100)
"""
    log = tmp_path / "schedule.log"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(log)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
    assert len(log.read_text().splitlines()) == 2000
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == f"Warning: cannot write to {tmp_path}: Is a directory.\n"


def test_the_clock_has_a_time_zone():
    assert Clock.now(Clock.__new__(Clock)).utcoffset() == timedelta(0)
