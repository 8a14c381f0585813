"""Schedules in archives and merges: the copy tells the same as the original, and is kept apart from others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from lem.results import combine, schedule_show
from lem.results import schedule as files
from lem.results.aggregate import aggregate_all
from lem.results.codec import to_json
from lem.results.files import write_atomically
from lem.results.schedule import RunOutcome, folder_of, load_schedule, read_outcome, write_manifest, write_outcome
from lem.results.schedule_answer import answer
from lem.results.store import Store
from lem.results.tables import Tables
from lem.spec.campaign import CampaignCell
from lem.studies.scheduled_run import What
from tests.records import plan
from tests.results.campaigns import campaign
from tests.results.test_archive import contents
from tests.results.test_combine import directory
from tests.results.test_delete import killed_at
from tests.results.test_schedule_answer import energies, manifest, measure, start


def scheduled(root, name="nights", done=4, planned=2, factor=1.0):
    """Write a results directory with a schedule of which some runs are done, and with all files of its runs."""
    store = Store(root)
    of = manifest([start(i + 1, "done" if i < done else "planned") for i in range(done + planned)], name)
    for each, energy_j in zip(of.starts[:done], energies(done), strict=True):
        measure(store, of, each, energy_j * factor)
    keep(store, of)
    return store, of


def keep(store, of):
    """Write the files of a schedule, and the rows of its experiments."""
    folder = folder_of(store, of.name)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    for each in of.starts:
        if each.experiment_id:
            write_outcome(folder, each.number, RunOutcome("done", each.experiment_id))
            files.run_log(folder, each.number).write_text("measured\n")
    experiment = plan().experiment
    here = replace(experiment, io=replace(experiment.io, results_dir=str(store.root.resolve())))
    write_atomically(folder / files.WHAT, to_json(What(here)))
    write_manifest(folder, of)
    list(aggregate_all(store, store.ids(), strict=False))


def told(store, name):
    """Return what a results directory tells about a schedule, without the names of its experiments and its own."""
    found = schedule_show.as_plain(answer(store, load_schedule(store, name)))
    runs = [run | {"experiment_id": None} for run in found["runs"]]
    for run in runs:
        run["experiments"] = [each | {"experiment_id": None} for each in run["experiments"]]
    return found | {"schedule": None, "runs": runs}


def listed(lem, name, where):
    """Return the experiments that `lem results list` finds in a schedule."""
    done = lem("results", "list", "--schedule", name, "--json", "-o", where)
    return [row["experiment_id"] for row in json.loads(done.out)]


@pytest.mark.parametrize("is_packed", [False, True], ids=["from a directory", "from an archive"])
def test_a_schedule_tells_the_same_in_another_directory(lem, tmp_path, is_packed):
    store, of = scheduled(tmp_path / "one")
    if is_packed:
        done = lem("results", "archive", "--all", "-o", "one", "--output", "one.zip")
        assert done.out.startswith("one.zip: 4 experiments, 1 schedule, ")
        assert (done.code, done.err) == (0, "")
        assert lem("results", "archive", "--check", "one.zip").out.startswith("one.zip is intact: 4 experiments, 1 sch")
    source = "one.zip" if is_packed else "one"
    done = lem("results", "merge", source, "-o", "both")
    assert (done.out, done.err, done.code) == (f"{source}: 4 experiments copied, schedules: nights\n", "", 0)
    shutil.rmtree(store.root / "raw")  # what is told now is read from the copy
    both = Store(tmp_path / "both")
    assert [value for run in told(both, "nights")["runs"] for value in run["experiments"]]
    assert listed(lem, "nights", "both") == [each.experiment_id for each in of.starts[:4]]
    assert lem("results", "show", "nights", "-o", "both").code == 0
    assert lem("results", "report", "--schedule", "nights", "--results-dir", "both", "-o", "page.html").code == 0
    assert "nights" in (tmp_path / "page.html").read_text()
    here, there = folder_of(store, "nights"), folder_of(both, "nights")
    for name in ("schedule.json", "runs/1.log"):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    assert read_outcome(there, 4) == read_outcome(here, 4)
    # The runs that are still to come are stored beside the copy.
    kept = json.loads((there / files.WHAT).read_text())
    assert kept["experiment"]["io"]["results_dir"] == str(both.root.resolve())
    assert lem("schedule", "--resume", "nights", "-o", "both", "--dry-run").code == 0
    before = contents(both.root)
    assert lem("results", "merge", source, "-o", "both").out == f"{source}: 0 experiments copied; 4 already there\n"
    assert contents(both.root) == before


def test_one_schedule_is_archived_with_what_belongs_to_it(lem, tmp_path):
    store, of = scheduled(tmp_path / "one")
    directory(tmp_path / "two")
    campaign(store, "compared")
    of.starts[4] = start(5)
    cell = measure(store, of, of.starts[4], 60.0)
    own = replace(cell.plan(), campaign=CampaignCell("compared", "a", 1, 1))
    write_atomically(cell.path / "spec.json", to_json(own))
    keep(store, of)
    lem("results", "merge", "two", "-o", "one")
    done = lem("results", "archive", "--schedule", "nights", "-o", "one", "--output", "one.zip")
    assert done.out.startswith("one.zip: 5 experiments, 1 campaign, 1 schedule, ")
    done = lem("results", "archive", "--schedule", "night", "-o", "one", "--output", "two.zip")
    assert done.err.startswith("Error: There is no schedule 'night' in one. Did you mean 'nights'?")


def test_schedules_of_one_name_are_kept_apart(lem, tmp_path):
    one, _ = scheduled(tmp_path / "one")
    two, _ = scheduled(tmp_path / "two", factor=2.0)
    done = lem("results", "merge", "one", "two", "-o", "both")
    assert (
        "  schedule nights is called nights_2 here, because the target already has another schedule nights\n"
        in done.out
    )
    both = Store(tmp_path / "both")
    assert told(both, "nights") == told(one, "nights")
    assert told(both, "nights_2") == told(two, "nights")
    of_two = listed(lem, "nights_2", "both")
    assert of_two == [start.experiment_id for start in load_schedule(both, "nights_2").starts[:4]]
    assert [read_outcome(folder_of(both, "nights_2"), n).experiment_id for n in (1, 2, 3, 4)] == of_two
    assert {both.directory(each).plan().schedule.schedule for each in of_two} == {"nights_2"}
    assert {row.schedule for row in Tables(both).rows()[0]} == {"nights", "nights_2"}
    before = contents(both.root)
    assert lem("results", "merge", "two", "one", "-o", "both").code == 0
    assert contents(both.root) == before


def test_a_schedule_and_a_campaign_of_one_name_are_kept_apart(lem, tmp_path):
    scheduled(tmp_path / "one")
    campaign(Store(tmp_path / "two"), "nights")
    done = lem("results", "merge", "one", "two", "-o", "both")
    assert "campaign nights is called nights_2 here, because the target already has a schedule nights" in done.out
    done = lem("results", "merge", "two", "one", "-o", "other")
    assert "schedule nights is called nights_2 here, because the target already has a campaign nights" in done.out
    for each, where in (("nights", "both"), ("nights_2", "both"), ("nights", "other"), ("nights_2", "other")):
        assert lem("results", "show", each, "-o", where).code == 0


def test_a_schedule_that_has_gone_on_is_brought_up_to_date(lem, tmp_path):
    one, of = scheduled(tmp_path / "one")
    of.starts[4].status = "running"
    write_outcome(folder_of(one, "nights"), 5, RunOutcome("running", "exp_20260302_999999"))
    keep(one, of)
    assert lem("results", "merge", "one", "-o", "both").code == 0
    both = Store(tmp_path / "both")
    # The experiment of the run was not copied, so the copy would begin it anew.
    assert read_outcome(folder_of(both, "nights"), 5) is None
    of.starts[4] = start(5)
    measure(one, of, of.starts[4], 60.0)
    keep(one, of)
    with files.held(folder_of(both, "nights")):
        done = lem("results", "merge", "one", "-o", "both")
        assert "Another process is working through schedule 'nights'" in done.err
        assert done.code == 1
    assert lem("results", "merge", "one", "-o", "both").out.endswith("already there, schedules: nights\n")
    assert told(both, "nights") == told(one, "nights")
    assert load_schedule(both, "nights").counts() == "5 done, 1 not started"


def test_a_damaged_schedule_is_left_out(lem, tmp_path):
    one, _ = scheduled(tmp_path / "one")
    (folder_of(one, "nights") / files.TABLE).write_text("{}")
    done = lem("results", "merge", "one", "-o", "both")
    assert done.code == 1
    assert "schedule.json is damaged" in done.err
    assert files.names(Store(tmp_path / "both")) == []
    assert len(Store(tmp_path / "both").ids()) == 4


@pytest.mark.processes
def test_a_merge_that_was_killed_leaves_whole_schedules_and_is_finished_by_doing_it_again(tmp_path):
    sources = [scheduled(tmp_path / "one")[0], scheduled(tmp_path / "two", factor=2.0)[0]]
    kills = 0
    for number in range(0, 2_000, 97):
        both = Store(tmp_path / "both")
        if not killed_at(number, lambda both=both: list(combine.merge(both, [each.root for each in sources]))):
            break
        kills += 1
        for name in files.names(both):  # a listed schedule has all files of its runs
            assert [read_outcome(folder_of(both, name), n).status for n in (1, 2, 3, 4)] == ["done"] * 4
        assert not [left for done in combine.merge(both, [each.root for each in sources]) for left in done.left_out]
        assert files.names(both) == ["nights", "nights_2"]
        assert [told(both, "nights"), told(both, "nights_2")] == [told(each, "nights") for each in sources]
        shutil.rmtree(both.root)
    assert kills > 3
