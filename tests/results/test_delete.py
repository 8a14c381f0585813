"""`lem results delete`: what it deletes is gone, what it does not is untouched, whenever it is killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from datetime import datetime, timedelta

import pandas as pd
import pytest

from lem.results import delete
from lem.results.aggregate import aggregate_all
from lem.results.plan import running
from lem.results.store import Store
from lem.results.tables import KINDS
from tests.records import experiment, finished, power
from tests.results.campaigns import campaign

FIRST = datetime(2026, 1, 2, 3, 4, 5)


@pytest.fixture
def store(tmp_path):
    """Four experiments: three whose rows share a file, and one with files of its own."""
    store = Store(tmp_path / "results")
    for number, count in ((0, 3), (3, 1)):
        for i in range(count):
            power(finished(store, FIRST + timedelta(seconds=number + i)))
        assert {one.kind for one in aggregate_all(store, store.ids())} <= {"written", "fresh"}
    store.mark_unfinished(store.ids()[0], "a mark")
    return store


def rows(store):
    """Return the ids of the experiments in each table."""
    return {name: sorted(set(pd.read_parquet(store.root / name)["experiment_id"])) for name in KINDS}


def assert_whole(store, ids):
    assert store.ids() == ids
    assert rows(store) == dict.fromkeys(KINDS, ids)


# ------------------------------------------------------------------ the command
def test_files_rows_and_marks_are_deleted_and_nothing_else(lem, store):
    first, second, third, fourth = store.ids()
    done = lem("results", "delete", first, fourth, "-y")
    assert done.code == 0
    assert done.out.startswith(f"{first}  completed\n{fourth}  completed\nDeleted 2 experiments (")
    assert_whole(store, [second, third])
    assert store.marked() == []
    assert not (store.root / delete.FOLDER).exists()
    assert lem("results", "list").code == 0
    assert lem("aggregate", "--all").out == "Skipped because their rows are up to date: 2.\n"


def test_an_experiment_of_which_only_the_row_is_left_is_deleted(lem, store):
    first, *others = store.ids()
    shutil.rmtree(store.directory(first).path)
    assert lem("results", "delete", first, "-y").code == 0
    assert_whole(store, others)


def test_by_status(lem, store):
    ids = store.ids()
    planned = experiment(store, datetime(2026, 2, 1))
    (planned.path / "state.json").unlink()
    done = lem("results", "delete", "--status", "planned", "-y")
    assert done.code == 0
    assert done.out.startswith(f"{planned.id}  planned\n")
    assert_whole(store, ids)
    assert lem("results", "delete", "--status", "failed", "-y").out.startswith("No matching experiments")


def test_a_dry_run_and_a_missing_yes_delete_nothing(lem, store):
    ids = store.ids()
    done = lem("results", "delete", *ids, "--dry-run")
    assert done.code == 0
    assert "Would delete 4 experiments (" in done.out
    done = lem("results", "delete", *ids)
    assert done.code == 2
    assert "add --yes" in done.err
    assert_whole(store, ids)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "Say what to delete: give the ids of experiments, --campaign or --status."),
        (["exp_2099"], "There is no experiment 'exp_2099' in"),
        (["exp_2026"], "'exp_2026' matches 4 experiments"),
        (["../raw"], "There is no experiment '../raw' in"),
        (["--campaign", "none"], "There is no campaign 'none' in"),
        (["--campaign", "../x"], "'../x' is neither the name nor the directory of a campaign."),
        (["--status", "fialed"], "--status: 'fialed' is not one of"),
    ],
)
def test_bad_input_deletes_nothing(lem, store, arguments, error):
    ids = store.ids()
    done = lem("results", "delete", *arguments, "-y")
    assert done.code == 2
    assert done.err.startswith(f"Error: {error}")
    assert_whole(store, ids)


def test_a_running_experiment_is_not_deleted(lem, store):
    ids = store.ids()
    directory = store.directory(ids[1])
    before = directory.state()
    directory.write_state(running(2))
    for more in ([], ["--force"]):
        done = lem("results", "delete", *ids, "-y", *more)
        assert done.code == 2
        assert "is running and cannot be deleted; stop it first." in done.err
    directory.write_state(before)
    assert_whole(store, ids)


def test_an_experiment_whose_processes_are_still_ending_is_not_deleted(lem, store):
    ids = store.ids()
    with store.directory(ids[0]).hold():
        done = lem("results", "delete", ids[0], "-y")
    assert done.code == 2
    assert "is running and cannot be deleted; stop it first." in done.err
    assert_whole(store, ids)


def test_links_are_not_followed(lem, store, tmp_path):
    """Neither a crafted link in place of the folder, nor a link in place of an experiment's directory."""
    ids = store.ids()
    mine = tmp_path / "mine" / ids[0]
    mine.mkdir(parents=True)
    (store.root / delete.FOLDER).symlink_to(tmp_path / "mine")
    assert lem("results", "list").code == 0
    assert lem("results", "delete", ids[0], "-y").code == 2
    assert_whole(store, ids)
    (store.root / delete.FOLDER).unlink()
    kept = tmp_path / "kept"
    store.directory(ids[1]).path.rename(kept)
    store.directory(ids[1]).path.symlink_to(kept)
    assert lem("results", "delete", ids[1], "-y").code == 0
    assert (mine.is_dir(), (kept / "spec.json").is_file()) == (True, True)
    assert not (store.root / delete.FOLDER).exists()
    assert_whole(store, [ids[0], *ids[2:]])


# ------------------------------------------------------------------ campaigns
def test_a_cell_is_deleted_only_with_its_campaign_or_by_force(lem, store):
    others = store.ids()
    cells = campaign(store, "compared")
    done = lem("results", "delete", cells[0], "-y")
    assert done.code == 2
    assert f"{cells[0]} is a cell of campaign 'compared'" in done.err
    assert lem("results", "delete", "--campaign", "compared", "--status", "completed", "-y").code == 2
    assert store.ids() == [*others, *cells]
    assert lem("results", "delete", cells[0], "--force", "-y").code == 0
    done = lem("results", "delete", "--campaign", "compared", "-y")
    assert done.code == 0
    assert "Deleted 3 experiments and campaign compared (" in done.out
    assert_whole(store, others)
    assert not (store.root / "campaigns" / "compared").exists()


def test_a_campaign_that_is_being_measured_keeps_all_its_cells(lem, store):
    cells = campaign(store, "compared")
    before = store.ids()
    with delete._unused(store.root / "campaigns" / "compared"):  # as the process that measures it does
        done = lem("results", "delete", "--campaign", "compared", "-y")
    assert done.code == 2
    assert store.ids() == before
    assert set(cells) < set(before)


# ------------------------------------------------------------------ killed
def killed_at(number, work):
    """Do something in a process that is killed at its nth change of a file; return whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            left = number

            def count(event, arguments):
                nonlocal left
                is_write = (
                    event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
                )
                if is_write or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.mark.processes
def test_a_kill_at_any_moment_leaves_an_experiment_whole_or_gone(store, tmp_path):
    """One of a shared file, and the one with files of its own, are deleted."""
    first, second, third, fourth = store.ids()
    kills = 0
    for number in range(0, 400, 2):
        copy = Store(tmp_path / "copy")
        shutil.copytree(store.root, copy.root)
        deletion = delete.planned(copy, [second, fourth], None, None, force=False)
        if not killed_at(number, deletion.carry_out):
            break
        kills += 1
        delete.finish(copy)  # as the next command does
        left = copy.ids()
        assert {first, third} <= set(left)
        assert_whole(copy, left)
        for each in left:
            names = {*os.listdir(copy.directory(each).path)} - {".lock"}
            assert names == {*os.listdir(store.directory(each).path)}
        shutil.rmtree(copy.root)
    assert_whole(copy, [first, third])
    assert kills > 10
