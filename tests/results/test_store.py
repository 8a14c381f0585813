"""A results directory: ids, atomic files, reading back."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from lem.errors import ResultsError
from lem.results.codec import arrivals_sha256, to_json
from lem.results.files import replacing, write_atomically
from lem.results.plan import State
from lem.results.store import Store
from lem.workload.prompts import sha256_of
from tests.records import experiment, finished, put, record, requests


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
    with pytest.raises(ResultsError, match="empty"):
        store.find("")
    with pytest.raises(ResultsError, match="matches 2 experiments"):
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


# ------------------------------------------------------------------ leftovers of processes
def test_a_record_comes_with_its_rows(tmp_path):
    directory = experiment(Store(tmp_path), cycles=2)
    for cycle in (1, 2):
        put(directory, record(cycle=cycle), requests(cycle=cycle))
    parts = directory.parts()
    assert [part.record.cycle for part in parts] == [1, 2]
    assert [[row.request for row in part.requests] for part in parts] == [[0, 1, 2], [0, 1, 2]]
    assert directory.finished() == {1: {0, 1, 2}, 2: {0, 1, 2}}


def test_a_journal_stands_in_for_a_missing_record(tmp_path):
    directory = finished(Store(tmp_path))
    directory.record_file(0, 1, 1).unlink()
    (part,) = directory.parts()
    assert (part.record.status, part.record.requests_completed) == ("interrupted", 3)
    assert part.record.phase("measured").duration_s == part.requests[-1].end_s


def test_a_damaged_record_is_named(tmp_path):
    directory = finished(Store(tmp_path))
    directory.record_file(0, 1, 1).write_text('{"format_version": 1, "half')
    with pytest.raises(ResultsError, match=r"process_0_c1_a1\.json cannot be read"):
        directory.records()


def test_a_damaged_journal_is_named(tmp_path):
    directory = finished(Store(tmp_path))
    lines = directory.journal_file(0, 1).read_text().splitlines(keepends=True)
    directory.journal_file(0, 1).write_text("".join([lines[0], "{\n", *lines[2:]]))
    with pytest.raises(ResultsError, match=r"journal_0_a1\.jsonl cannot be read: line 2 is damaged"):
        directory.records()


def test_rows_that_are_gone_are_missed(tmp_path):
    directory = finished(Store(tmp_path))
    lines = directory.journal_file(0, 1).read_text().splitlines(keepends=True)
    directory.journal_file(0, 1).write_text("".join(lines[:-1]))
    with pytest.raises(ResultsError, match=r"journal_0_a1\.jsonl has 2 rows of cycle 1, but the record says 3 req"):
        directory.records()
    directory.journal_file(0, 1).unlink()
    with pytest.raises(ResultsError, match=r"journal_0_a1\.jsonl has 0 rows of cycle 1, but the record"):
        directory.records()


def test_a_directory_that_is_gone_is_named(tmp_path):
    with pytest.raises(ResultsError, match="exp_20260102_030405 cannot be read"):
        Store(tmp_path).directory("exp_20260102_030405").records()


# ------------------------------------------------------------------ recording that rows exist
def test_that_there_are_rows_can_be_said_of_many_at_once(tmp_path, monkeypatch):
    directories = [experiment(Store(tmp_path)) for _ in range(3)]
    for directory in directories:
        directory.write_state(State("completed", 1, "then"))
    source = tmp_path / "source"
    source.write_text(to_json(State("aggregated", 1, "now")))
    directories[0].link_aggregated(source)
    directories[2].mark_aggregated(State("aggregated", 1, "before"))
    directories[2].link_aggregated(source)

    def refuse(*_):
        raise OSError

    monkeypatch.setattr(os, "link", refuse)  # as on file systems without links
    directories[1].link_aggregated(source)
    source.unlink()
    assert [directory.state() for directory in directories] == [State("aggregated", 1, "now")] * 3
    directories[0].mark_aggregated(State("aggregated", 1, "later"))
    assert directories[1].state().updated_at == "now"


def test_a_state_that_is_gone_is_known_from_the_rows(tmp_path):
    directory = finished(Store(tmp_path))
    directory.mark_aggregated(State("aggregated", 1, "now"))
    (directory.path / "state.json").write_text("{")
    assert directory.state() == State("aggregated", 1, "now")
    directory.mark_aggregated(State("running", 1, "now"))
    assert directory.state().status == "interrupted"


def test_what_else_lies_beside_experiments_is_no_hindrance(tmp_path):
    directory = experiment(Store(tmp_path))
    (directory.path.parent / "loop").symlink_to("loop")
    (directory.path.parent / "exp_20260102_030405_7").write_text("a file")
    assert Store(tmp_path).ids() == [directory.id]


@pytest.mark.parametrize("content", ['{"text": "another"}\n', '{"text": "a', "{}\n", None])
def test_prompts_that_are_not_those_of_the_plan_are_refused(tmp_path, content):
    directory = experiment(Store(tmp_path))
    texts = ["one", "two", "three"]
    plan = directory.plan()
    directory.write_plan(replace(plan, prompts=replace(plan.prompts, sha256=sha256_of(texts))), texts)
    assert directory.prompts() == texts
    file = directory.path / "prompts.jsonl"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ResultsError, match=r"prompts\.jsonl (cannot be read|does not contain)"):
        directory.prompts()


@pytest.mark.parametrize("content", ["[0.0, 9.0]", "[0.0", '["a"]', None])
def test_arrivals_that_are_not_those_of_the_plan_are_refused(tmp_path, content):
    directory = experiment(Store(tmp_path))
    times_s = [0.0, 0.5]
    directory.write_plan(replace(directory.plan(), arrivals_sha256=arrivals_sha256(times_s)), ["a"], times_s)
    assert directory.arrivals_s() == times_s
    directory.write_plan(
        replace(directory.plan(), prompts=replace(directory.plan().prompts, sha256="")), ["a"], times_s
    )
    directory.check_inputs()
    file = directory.path / "arrivals.json"
    file.unlink() if content is None else file.write_text(content)
    with pytest.raises(ResultsError, match=r"arrivals\.json (cannot be read|does not contain)"):
        directory.check_inputs()


def test_rows_of_a_former_attempt_and_a_damaged_note_of_rows_count_for_nothing(tmp_path):
    directory = experiment(Store(tmp_path))
    directory.write_state(State("completed", 1, "then"))
    directory.mark_aggregated(State("aggregated", 1, "now"))
    assert directory.state().status == "aggregated"
    for state in (State("interrupted", 2, "later"), State("completed", 2, "later")):
        directory.write_state(state)
        assert directory.state() == state
    directory.mark_aggregated(State("aggregated", 2, "now"))
    (directory.path / "aggregated.json").write_text("{")
    assert directory.state() == State("completed", 2, "later")


def test_processes_that_are_still_there_hold_an_experiment(tmp_path):
    directory = experiment(Store(tmp_path))
    assert not directory.is_held()
    with directory.hold():
        assert directory.is_held()
    assert not directory.is_held()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:-30], "Invalid JSON: EOF while parsing"),
        (lambda text: text.replace('"cycles": 1', '"cycles": 500'), "experiment.cycles: Input should be less than"),
    ],
)
def test_a_damaged_plan_is_named_with_the_first_reason_in_a_line(tmp_path, damage, reason):
    directory = experiment(Store(tmp_path / "results"))
    spec = directory.path / "spec.json"
    spec.write_text(damage(spec.read_text()))
    with pytest.raises(ResultsError) as caught:
        directory.plan()
    assert str(caught.value).startswith(f"{spec} cannot be read: {reason}")
    assert "For" not in str(caught.value)
