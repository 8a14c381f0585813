"""`lem results merge`: experiments and campaigns of several machines in one directory, each once, none lost."""

from __future__ import annotations

import json
import os
import shutil
from datetime import datetime, timedelta

import pandas as pd
import pytest

from lem.results import combine
from lem.results.aggregate import aggregate_all, read
from lem.results.campaign import answer, folder_of, read_cells, read_definition
from lem.results.plan import running
from lem.results.store import Store
from lem.results.tables import KINDS, Tables
from tests.records import experiment, finished, power
from tests.results.campaigns import campaign
from tests.results.test_archive import contents
from tests.results.test_delete import killed_at

AT = datetime(2026, 1, 2, 3, 4, 5)


def directory(root, energies=(100.0, 200.0), rows=True):
    """Write a results directory with an experiment for each energy; all directories use the same ids."""
    from tests.records import phases, reading

    store = Store(root)
    for number, energy_j in enumerate(energies):
        at = AT + timedelta(seconds=number)
        power(finished(store, at, phases=phases(energy=(reading(energy_j=energy_j),))))
    if rows:
        assert {one.kind for one in aggregate_all(store, store.ids())} == {"written"}
    return store


def energies(store):
    return {row.experiment_id: row.energy_j for row in Tables(store).rows()[0]}


def assert_consistent(store):
    """Check that the files of each experiment name it, that their rows agree with them, and that no table has more."""
    ids = store.ids()
    for name in KINDS:
        assert sorted(set(pd.read_parquet(store.root / name)["experiment_id"])) == sorted(ids)
    for each in ids:
        assert read(store.directory(each)).row == Tables(store).row(each, Tables(store).location(each))
        file = store.directory(each).power_file(0, 1, 1)
        assert not file.exists() or set(pd.read_parquet(file)["experiment_id"]) == {each}


def test_two_directories_with_the_same_ids(lem, tmp_path):
    one, two = directory(tmp_path / "one"), directory(tmp_path / "two", (300.0, 200.0))
    before = contents(one.root), contents(two.root)
    done = lem("results", "merge", "one", "two", "-o", "both")
    assert done.code == 0
    first, second = one.ids()
    assert done.out == (
        f"one: 2 experiments copied\n"
        f"two: 1 experiment copied; 1 already there\n"
        f"  {first} is called {first}_2 here, because the target already has another {first}\n"
    )
    both = Store(tmp_path / "both")
    assert energies(both) == {first: 100.0, first + "_2": 300.0, second: 200.0}
    assert_consistent(both)
    assert (contents(one.root), contents(two.root)) == before
    assert lem("results", "list", "-o", "both").code == 0
    assert lem("results", "show", f"{first}_2", "-o", "both").code == 0
    assert lem("aggregate", "--all", "-o", "both").out == "Skipped because their rows are up to date: 3.\n"
    assert lem("aggregate", "--all", "--force", "-o", "both").code == 0


def test_merging_again_changes_nothing(lem, tmp_path):
    directory(tmp_path / "one")
    two = directory(tmp_path / "two", (300.0, 200.0))
    campaign(two, "compared")
    campaign(Store(tmp_path / "one"), "compared", energy_j=500.0)
    assert lem("results", "merge", "one", "two", "-o", "both").code == 0
    before = contents(tmp_path / "both")
    done = lem("results", "merge", "two", "one", "-o", "both")
    assert done.out == "two: 0 experiments copied; 6 already there\none: 0 experiments copied; 6 already there\n"
    assert contents(tmp_path / "both") == before


def test_campaigns_of_one_name_are_kept_apart(lem, tmp_path):
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    campaign(one, "compared")
    campaign(two, "compared", energy_j=500.0)
    done = lem("results", "merge", "one", "two", "-o", "both")
    assert (
        "campaign compared is called compared_2 here, because the target already has another campaign compared"
        in done.out
    )
    both = Store(tmp_path / "both")
    assert_consistent(both)
    for source, name in ((one, "compared"), (two, "compared_2")):
        found, was = (
            answer(read_definition(folder), read_cells(store, folder))
            for store, folder in ((both, folder_of(both, name)), (source, folder_of(source, "compared")))
        )
        assert [pair.ratio for pair in found.pairs] == [pair.ratio for pair in was.pairs]
        assert all(pair.ratio is not None for pair in found.pairs)
        ids = [cell.experiment_id for cell in found.cells]
        assert json.loads(lem("results", "list", "--json", "--campaign", name, "-o", "both").out)[0]["campaign"] == name
        assert {both.directory(each).plan().campaign.name for each in ids} == {name}
        assert lem("results", "show", name, "-o", "both").code == 0
        assert set(pd.read_parquet(folder_of(both, name) / "pairs.parquet")["campaign"]) == {name}
    entries = json.loads((folder_of(both, "compared_2") / "experiments.json").read_text())
    assert all(os.path.isdir(entry["directory"]) for entry in entries)
    assert all(entry["log"].startswith(f"{entry['directory']}/") for entry in entries)


def test_a_campaign_that_has_gone_on_is_brought_up_to_date(lem, tmp_path):
    one = Store(tmp_path / "one")
    campaign(one, "compared")
    file = folder_of(one, "compared") / "experiments.json"
    whole = file.read_text()
    file.write_text(json.dumps([*json.loads(whole)[:2], *[e | {"experiment_id": None} for e in json.loads(whole)[2:]]]))
    assert lem("results", "merge", "one", "-o", "both").code == 0
    file.write_text(whole)
    assert lem("results", "merge", "one", "-o", "both").out.endswith("already there, campaigns: compared\n")
    entries = json.loads((folder_of(Store(tmp_path / "both"), "compared") / "experiments.json").read_text())
    assert all(entry["experiment_id"] for entry in entries)


def test_experiments_without_rows_or_without_files(lem, tmp_path):
    one = directory(tmp_path / "one")
    shutil.rmtree(one.directory(one.ids()[0]).path)
    two = directory(tmp_path / "two", (300.0,), rows=False)
    unfinished = experiment(two, datetime(2026, 5, 1))
    (unfinished.path / "state.json").unlink()
    two.mark_unfinished(unfinished.id, "a fingerprint")
    for _ in range(2):
        assert lem("results", "merge", "one", "two", "-o", "both").code == 0
    both = Store(tmp_path / "both")
    assert both.ids() == ["exp_20260102_030405_2", "exp_20260102_030406", unfinished.id]
    assert energies(both) == {"exp_20260102_030405": 100.0, "exp_20260102_030406": 200.0}
    assert both.marked_by_fingerprint() == {"a fingerprint": [unfinished.id]}


def test_an_archive_is_merged_like_a_directory(lem, tmp_path):
    one = directory(tmp_path / "one")
    campaign(one, "compared")
    assert lem("results", "archive", "--all", "-o", "one", "--output", "one.zip").code == 0
    assert lem("results", "merge", "one.zip", "-o", "both").code == 0
    assert energies(Store(tmp_path / "both")) == energies(one)
    assert_consistent(Store(tmp_path / "both"))
    assert sorted(os.listdir(tmp_path / "both")) == sorted(
        [".merging.lock", ".tables.lock", "campaigns", "cycles", "experiments", "raw", "requests"]
    )


def test_what_runs_or_holds_a_link_is_left_out(lem, tmp_path):
    one = directory(tmp_path / "one", (1.0, 2.0, 3.0))
    first, second, third = one.ids()
    one.directory(first).write_state(running(2))
    (one.directory(second).path / "worker_0.log").symlink_to("/etc/hostname")
    done = lem("results", "merge", "one", "-o", "both")
    assert done.code == 1
    assert f"{first} is running or waiting for a Slurm job; merge again when it has ended." in done.err
    assert f"{second}/worker_0.log is a link" in done.err
    assert Store(tmp_path / "both").ids() == [third]
    assert list(energies(Store(tmp_path / "both"))) == [third]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["none"], "none is neither a results directory nor an archive."),
        (["empty"], "empty is not a results directory: it has neither raw/ nor experiments/."),
        (["one", "-o", "one"], "one and the target one overlap"),
        (["one", "-o", "one/inside"], "one and the target one/inside overlap"),
        (["one", "text"], "text is not an intact archive"),
    ],
)
def test_bad_input_is_one_sentence_and_merges_nothing(lem, tmp_path, arguments, error):
    one = directory(tmp_path / "one", (1.0,))
    before = contents(one.root)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("text")
    done = lem("results", "merge", *arguments)
    assert done.code == 2
    assert done.err.startswith(f"Error: {error}")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "results" / "raw").exists()
    assert contents(one.root) == before


def test_only_one_merge_at_a_time(lem, tmp_path):
    directory(tmp_path / "one", (1.0,))
    with combine._only_merge(Store(tmp_path / "both")):
        assert "Another merge into both is running" in lem("results", "merge", "one", "-o", "both").err


@pytest.mark.processes
def test_a_merge_that_was_killed_is_finished_by_doing_it_again(tmp_path):
    one, two = directory(tmp_path / "one", (1.0,)), directory(tmp_path / "two", (2.0, 1.0))
    campaign(two, "compared")
    sources = [one.root, two.root]
    kills = 0
    for number in range(0, 2_000, 29):
        both = Store(tmp_path / "both")
        if not killed_at(number, lambda both=both: list(combine.merge(both, sources))):
            break
        kills += 1
        for each in both.ids():  # an experiment is there as a whole or not at all
            assert read(both.directory(each)).row.status == "completed"
        assert not [left for done in combine.merge(both, sources) for left in done.left_out]
        assert_consistent(both)
        assert sorted(energies(both).values())[:3] == [1.0, 1.0, 2.0]
        assert len(both.ids()) == 7
        shutil.rmtree(both.root)
    assert kills > 5
