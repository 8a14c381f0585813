"""Archives: they read back equal, and one that was tampered with is refused."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest

from lem.errors import ResultsError
from lem.results import archive
from lem.results.aggregate import aggregate_all
from lem.results.plan import running
from lem.results.store import Store
from lem.results.tables import KINDS
from tests.records import finished, power
from tests.results.campaigns import campaign


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "results")
    for i in range(3):
        power(finished(store, datetime(2026, 1, 2, 3, 4, 5) + timedelta(seconds=i)))
    assert {one.kind for one in aggregate_all(store, store.ids())} == {"written"}
    return store


def contents(root):
    """Return the content of each file of a directory, except for locks."""
    files = [path for path in Path(root).rglob("*") if path.is_file() and "lock" not in path.name]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


# ------------------------------------------------------------------ writing and reading back
def test_an_archive_of_everything_reads_back_as_it_was(lem, store, tmp_path):
    campaign(store, "compared")
    done = lem("results", "archive", "--all", "--output", "all.zip")
    assert done.code == 0
    assert done.out.startswith("all.zip: 7 experiments, 1 campaign, ")
    assert lem("results", "archive", "--check", "all.zip").out.startswith(
        "all.zip is intact: 7 experiments, 1 campaign"
    )
    (tmp_path / "back").mkdir()
    archive.unpack(tmp_path / "all.zip", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(store.root)


def test_some_experiments_come_with_their_rows_alone(lem, store, tmp_path):
    first, _, third = store.ids()
    assert lem("results", "archive", first, third, "--output", "two.zip").code == 0
    (tmp_path / "back").mkdir()
    archive.unpack(tmp_path / "two.zip", tmp_path / "back")
    assert Store(tmp_path / "back").ids() == [first, third]
    for name in KINDS:
        whole, back = (pd.read_parquet(root / name) for root in (store.root, tmp_path / "back"))
        wanted = whole[whole["experiment_id"].isin([first, third])].reset_index(drop=True)
        pd.testing.assert_frame_equal(back, wanted)


def test_a_running_experiment_is_refused_or_left_out(lem, store):
    first = store.directory(store.ids()[0])
    first.write_state(running(2))
    done = lem("results", "archive", first.id, "--output", "x.zip")
    assert (done.code, Path("x.zip").exists()) == (2, False)
    done = lem("results", "archive", "--all", "--output", "x.zip")
    assert done.code == 1
    assert done.err == f"Warning: {first.id} is running or waiting for a Slurm job, so it cannot be archived yet.\n"
    assert done.out.startswith("x.zip: 2 experiments, ")


def test_the_content_of_a_link_is_not_archived(lem, store, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (store.directory(store.ids()[0]).path / "worker_0.log").symlink_to(secret)
    done = lem("results", "archive", "--all", "--output", "x.zip")
    assert done.code == 2
    assert "is a link" in done.err
    assert not (tmp_path / "x.zip").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--all"], "Give the file to write: --output FILE.zip."),
        (
            ["--output", "x.zip"],
            "Give one of these: the ids of the experiments to archive, --campaign NAME, --schedule NAME or --all.",
        ),
        (["exp_2026", "--all", "--output", "x.zip"], "Give one of these: the ids of the experiments to archive"),
        (["--campaign", "none", "--output", "x.zip"], "There is no campaign 'none' in"),
        (["--all", "--output", "results"], "--output: results is a directory"),
        (["--all", "--check", "x.zip"], "--check only reads an archive; leave out ids, --campaign, --schedule, "),
        (["--check", "none.zip"], "none.zip cannot be read: No such file or directory."),
        (["--check", "pipe"], "pipe is not a plain file."),
        (["--check", "text"], "text is not an intact archive: File is not a zip file;"),
        (["--all", "--output", "x.zip", "-o", "nowhere"], "There are no experiments in nowhere."),
    ],
)
def test_bad_input_is_one_sentence(lem, store, tmp_path, arguments, error):
    (tmp_path / "text").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    done = lem("results", "archive", *arguments)
    assert done.code == 2
    assert done.err.startswith(f"Error: {error}")
    assert done.err.count("\n") == 1


# ------------------------------------------------------------------ tampering
@pytest.fixture
def packed(store, tmp_path):
    archive.write(store, archive.content(store, [store.ids()[0]], None, everything=False), tmp_path / "good.zip")
    return tmp_path / "good.zip"


def tampered(packed, change):
    """Write a copy of an archive after a change to its members, and return its path."""
    with zipfile.ZipFile(packed) as source:
        members = {info.filename: (info, source.read(info)) for info in source.infolist()}
    change(members)
    copy = packed.with_name("bad.zip")
    with zipfile.ZipFile(copy, "w") as target:
        for name, (info, content) in members.items():
            info.filename = name
            target.writestr(info, content)
    return copy


def with_manifest(change):
    def changed(members):
        info, content = members.pop(archive.MANIFEST)
        manifest = json.loads(content)
        change(manifest, members)
        members[archive.MANIFEST] = (info, json.dumps(manifest).encode())

    return changed


def renamed(name):
    """Give a member another name, in the manifest as well."""

    def change(manifest, members):
        old = next(each for each in members if each.endswith("state.json"))
        members[name] = members.pop(old)
        manifest["files"][name] = manifest["files"].pop(old)

    return with_manifest(change)


def flip(members):
    name = next(each for each in members if each.endswith("prompts.jsonl"))
    info, content = members[name]
    members[name] = (info, bytes([content[0] ^ 1]) + content[1:])


def lose(members):
    del members[next(each for each in members if each.endswith("state.json"))]


def slip_in(members):
    members["raw/exp_20260102_030405/more.txt"] = (zipfile.ZipInfo("x"), b"more")


def link(members):
    info, _ = members[next(each for each in members if each.endswith("state.json"))]
    info.external_attr = (stat.S_IFLNK | 0o777) << 16


def grow(members):
    name = next(each for each in members if each.endswith("prompts.jsonl"))
    members[name] = (members[name][0], members[name][1] * 1000)


def no_manifest(members):
    del members[archive.MANIFEST]


@with_manifest
def of_the_future(manifest, members):
    manifest["format_version"] = 99


@with_manifest
def huge(manifest, members):
    next(iter(manifest["files"].values()))["size_bytes"] = 1 << 60


TAMPERING = {
    "a flipped byte": (flip, "is not the file that MANIFEST.json describes"),
    "a missing file": (lose, "is missing"),
    "an additional file": (slip_in, "is not in its manifest"),
    "a link": (link, "does not belong in a results directory"),
    "a longer file": (grow, "is not the file that MANIFEST.json describes"),
    "no manifest": (no_manifest, "it has no MANIFEST.json"),
    "a later format": (of_the_future, "bad.zip has the archive format 99, which this version of lem cannot read"),
    "a huge file": (huge, "it holds more files or bytes than a results directory can have"),
    **{
        f"the path {name}": (renamed(name), "does not belong in a results directory")
        for name in (
            "../evil", "/etc/evil", "raw/../../evil", "raw/exp_20260102_030405/../../../evil", "raw/x/evil", "evil",
            "raw\\evil", "raw/exp_20260102_030405/", "raw/exp_20260102_030405/.lock", "experiments/evil.parquet",
            "experiments/exp_20260102_030405.parquet/x", "campaigns/../evil", "unfinished/evil",
            "raw/exp_20260102_030405/\x1b[31m", "schedules/../evil", "schedules/evil", "schedules/nights/.lock",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize(("change", "error"), TAMPERING.values(), ids=TAMPERING.keys())
def test_tampering_is_found_and_nothing_is_written_elsewhere(packed, tmp_path, lem, change, error):
    bad = tampered(packed, change)
    done = lem("results", "archive", "--check", str(bad))
    assert done.code == 2
    assert error in done.err
    remedy = "use a newer lem" if change is of_the_future else "get a new copy of it from its source"
    assert done.err.endswith(f"; {remedy}.\n")
    before = set(tmp_path.rglob("*"))
    done = lem("results", "merge", str(bad), "-o", "target")
    assert done.code == 2
    new = set(tmp_path.rglob("*")) - before
    assert all(tmp_path / "target" in (path, *path.parents) for path in new)
    assert Store(tmp_path / "target").ids() == []
    assert not (tmp_path.parent / "evil").exists()


def test_what_does_not_fit_on_the_disk_is_not_unpacked(packed, tmp_path, monkeypatch):
    (tmp_path / "back").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(ResultsError, match=r"needs .*, but only 100 B are free\."):
        archive.unpack(packed, tmp_path / "back")
    assert list((tmp_path / "back").iterdir()) == []
