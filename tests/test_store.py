"""A results directory: ids, atomic files, reading back."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from lem.errors import ResultsError
from lem.store import Store, replacing, write_atomically


def claim(root: str) -> str:
    return Store(Path(root)).claim(datetime(2026, 1, 2, 3, 4, 5)).id


def test_ids_of_the_same_second_are_distinct_across_processes(tmp_path):
    with ProcessPoolExecutor(4) as pool:
        ids = list(pool.map(claim, [str(tmp_path)] * 20))
    assert len(set(ids)) == 20
    assert "exp_20260102_030405" in ids


def test_ids_are_listed_oldest_first(tmp_path):
    for _ in range(11):
        claim(str(tmp_path))
    ids = Store(tmp_path).ids()
    assert ids[0] == "exp_20260102_030405"
    assert ids[-1] == "exp_20260102_030405_11"


def test_an_id_is_found_by_its_beginning_when_that_is_unique(tmp_path):
    store = Store(tmp_path)
    first = store.claim(datetime(2026, 1, 2, 3, 4, 5))
    store.claim(datetime(2026, 2, 2, 3, 4, 5))
    assert store.find("exp_202601").id == first.id
    with pytest.raises(ResultsError, match="fits 2 experiments"):
        store.find("exp_2026")
    with pytest.raises(ResultsError, match=r"no experiment 'exp_20260102_030406'.*Nearest: exp_20260102_030405"):
        store.find("exp_20260102_030406")


def test_a_whole_id_is_found_beside_longer_ones(tmp_path):
    store = Store(tmp_path)
    for _ in range(2):
        claim(str(tmp_path))
    assert store.find("exp_20260102_030405").id == "exp_20260102_030405"


def test_an_id_cannot_lead_out_of_the_directory(tmp_path):
    (tmp_path / "exp_outside").mkdir()
    (tmp_path / "results" / "raw").mkdir(parents=True)
    with pytest.raises(ResultsError):
        Store(tmp_path / "results").find("../../exp_outside")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "record.json"
    write_atomically(file, "old")

    def break_off():
        with replacing(file) as scratch:
            scratch.write_text("half of the ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_a_results_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="cannot be used"):
        Store(tmp_path / "file").claim()


def test_a_damaged_record_is_named(tmp_path):
    directory = Store(tmp_path).claim()
    directory.process_file(0).write_text('{"format_version": 1, "half')
    with pytest.raises(ResultsError, match=r"process_0\.json cannot be read"):
        directory.records()
