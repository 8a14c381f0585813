"""Files whose times come from another clock than this machine's, as on a file system that several nodes share."""

from __future__ import annotations

import fcntl
import os
import time

import pytest

from lem.results.files import remove_if_abandoned

HOUR_S = 3600.0


@pytest.mark.parametrize("ahead_s", [-HOUR_S, 0.0, HOUR_S])
def test_a_scratch_file_is_as_old_as_the_file_systems_clock_says(tmp_path, monkeypatch, ahead_s):
    monkeypatch.setattr(time, "time", lambda real=time.time: real() + ahead_s)  # the clock of this machine
    fresh, old, locked = tmp_path / ".fresh", tmp_path / ".old", tmp_path / ".locked"
    for file in (fresh, old, locked):
        file.touch()
    for file in (old, locked):
        written_s = fresh.stat().st_mtime - 10
        os.utime(file, (written_s, written_s))
    with locked.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for file in (fresh, old, locked):
            remove_if_abandoned(file)
    assert sorted(os.listdir(tmp_path)) == [".fresh", ".locked"]
