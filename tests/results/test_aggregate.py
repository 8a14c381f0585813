"""From raw files to the tables: which files are refused by name, which are left alone, and concurrent aggregation."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pandas as pd
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from lem.errors import ResultsError
from lem.record import Cut, ErrorInfo
from lem.results.aggregate import aggregate, aggregate_all, read
from lem.results.plan import running
from lem.results.store import Store
from lem.results.tables import Tables
from tests.records import experiment, finished, put, reading, record, requests


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "results")


def shared(store, cycles=1, ranks=2, **of_records):
    """Write an experiment with several processes, four prompts and some cycles."""
    directory = experiment(store, count=4, processes=ranks, cycles=cycles)
    for cycle in range(1, cycles + 1):
        for rank in range(ranks):
            add(directory, rank, cycle, **of_records)
    return directory


def add(directory, rank, cycle=1, attempt=1, positions=None, **values):
    plan = directory.plan()
    rows = requests(list(plan.share(rank)) if positions is None else positions, rank, cycle, attempt)
    energy = (reading(),) if rank == 0 else ()
    known = {"config_sha256": plan.config_sha256, "world_size": plan.processes}
    place = {"rank": rank, "cycle": cycle, "attempt": attempt}
    put(directory, record(rows, energy, **(known | place | values)), rows)


def kinds(outcomes):
    return [outcome.kind for outcome in outcomes]


def table(store, name="experiments"):
    return pd.read_parquet(store.root / name)


# ------------------------------------------------------------------ one experiment
def test_pandas_reads_the_folder_in_one_line_with_units_in_the_metadata(store):
    directory = finished(store)
    aggregate(store, directory)
    assert list(table(store)["experiment_id"]) == [directory.id]
    assert table(store)["energy_j"].sum() == 100.0
    schema = pq.read_schema(store.experiments_table / f"{directory.id}.parquet")
    assert schema.field("energy_j").metadata[b"unit"] == b"J"
    assert schema.field("duration_s").metadata[b"unit"] == b"s"
    assert table(store, "requests")["output_tokens"].sum() == table(store)["output_tokens"].iloc[0]
    assert list(table(store, "cycles")["cycle"]) == [1]
    assert directory.state().status == "aggregated"


def test_aggregating_again_changes_nothing_unless_forced(store):
    directory = finished(store)
    first = aggregate(store, directory)
    file = store.experiments_table / f"{directory.id}.parquet"
    before = file.stat().st_mtime_ns
    assert aggregate(store, directory) == first
    assert file.stat().st_mtime_ns == before
    assert aggregate(store, directory, force=True) == first
    assert file.stat().st_mtime_ns != before


def test_the_row_holds_the_configuration(store):
    made = aggregate(store, finished(store))
    assert json.loads(made.config_json)["model"] == "m"
    assert made.overrides == ["seed=1"]


def test_the_row_says_how_often_it_was_resumed(store):
    directory = finished(store)
    directory.write_state(replace(directory.state(), attempt=3))
    assert read(directory).row.resumed == 2


# ------------------------------------------------------------------ refusals
def refused(directory, match, **how):
    with pytest.raises(ResultsError, match=match):
        read(directory, **how)


def test_strict_names_everything_that_is_missing(store):
    directory = experiment(store, count=4, processes=3, cycles=3)
    add(directory, 0)
    for rank in range(3):
        add(directory, rank, cycle=2, positions=[rank] if rank else [])
    refused(
        directory,
        r"no record from ranks 1, 2 \(of 3 processes\) in cycle 1; 2 of 4 prompts in cycle 2 have no result; "
        r"no record from ranks 0, 1, 2 \(of 3 processes\) "
        r"in cycle 3\. Use --no-strict",
    )
    assert read(directory, strict=False).row.cycles_completed == 0
    with pytest.raises(ResultsError):
        aggregate(store, directory)
    assert Tables(store).location(directory.id) is None


def test_all_attempts_together_are_complete(store):
    directory = shared(store, ranks=1)
    shutil.rmtree(directory.path)
    directory = experiment(store, count=4, processes=2)
    add(directory, 0, attempt=1, status="interrupted", positions=[0])
    add(directory, 0, attempt=2, positions=[2])
    add(directory, 1, attempt=2, positions=[1, 3])
    found = read(directory)
    assert (found.row.status, found.row.duration_s, found.row.energy_j) == ("completed", 8.0, 200.0)
    assert found.cycles[0].attempts == 2


def test_processes_that_did_not_run_together_are_refused(store):
    directory = shared(store, ranks=1)
    shutil.rmtree(directory.path)
    directory = experiment(store, count=4, processes=2)
    add(directory, 0, window_opened_unix_s=1000.0)
    add(directory, 1, window_opened_unix_s=1004.5)
    refused(directory, "windows of processes 0 and 1 in cycle 1 do not overlap")
    warnings = read(directory, strict=False).row.warnings
    assert [w for w in warnings if w.startswith("ranks_apart")]


def test_a_window_lasted_until_it_was_interrupted_even_if_it_was_cut_back_to_its_last_batch(store):
    """On a busy machine, a process may come to its window after the first batch of another one."""
    directory = experiment(store, count=4, processes=2)
    late = {"attempt": 1, "status": "interrupted", "positions": []}
    add(directory, 0, window_opened_unix_s=1004.5, cut=Cut(1, 0.0), **late)
    add(directory, 1, window_opened_unix_s=1000.0, cut=Cut(1, 1.0), **late | {"positions": [1]})
    add(directory, 0, attempt=2, positions=[0, 2], window_opened_unix_s=9000.0)
    add(directory, 1, attempt=2, positions=[3], window_opened_unix_s=9000.0)
    assert read(directory).row.status == "completed"


def test_the_windows_of_different_attempts_need_not_overlap(store):
    directory = experiment(store, count=4, processes=2)
    for attempt, opened_s in ((1, 1000.0), (2, 9000.0)):
        add(directory, 0, attempt=attempt, positions=[0] if attempt == 1 else [2], window_opened_unix_s=opened_s)
        add(directory, 1, attempt=attempt, positions=[1] if attempt == 1 else [3], window_opened_unix_s=opened_s + 3)
    assert read(directory).row.status == "completed"


def test_when_a_killed_process_came_to_its_window_says_nothing(store):
    directory = experiment(store, count=4, processes=2)
    add(directory, 0, window_opened_unix_s=1000.0)
    add(directory, 1, window_opened_unix_s=10.0, status="interrupted", error=ErrorInfo("WorkerDied", "killed"))
    assert read(directory).row.status == "completed"


def test_a_record_of_another_configuration_is_refused(store):
    directory = shared(store)
    other = json.loads(directory.record_file(1, 1, 1).read_text()) | {"config_sha256": "f" * 64}
    directory.record_file(1, 1, 1).write_text(json.dumps(other))
    for strict in (True, False):
        refused(directory, r"process_1_c1_a1\.json was measured with a configuration other than", strict=strict)


def test_a_record_of_another_number_of_processes_is_refused(store):
    directory = shared(store, world_size=4)
    refused(directory, "by one of 4 processes, but the plan has 2")


def test_two_processes_that_took_themselves_for_the_same_one_are_refused(store):
    directory = shared(store)
    shutil.copy(directory.record_file(0, 1, 1), directory.record_file(1, 1, 1))
    refused(directory, r"process_1_c1_a1\.json has the record of process 0", strict=False)


def test_a_prompt_that_was_counted_twice_is_refused(store):
    directory = experiment(store)
    add(directory, 0, attempt=1, positions=[0, 1])
    add(directory, 0, attempt=2, positions=[1, 2])
    refused(directory, "contains prompt 1 of cycle 1 more than once", strict=False)


def test_a_record_of_another_experiment_is_refused(store):
    directory, other = several(store, 2)
    for file in (other.record_file(0, 1, 1), other.journal_file(0, 1)):
        shutil.copy(file, directory.path)
    refused(directory, rf"process_0_c1_a1\.json belongs to another experiment, {other.id}", strict=False)
    assert sorted(kinds(aggregate_all(store, store.ids()))) == ["failed", "written"]
    assert set(table(store, "requests")["experiment_id"]) == {other.id}


def test_a_duration_that_cannot_be_is_refused(store):
    directory = finished(store)
    file = directory.record_file(0, 1, 1)
    file.write_text(file.read_text().replace('"duration_s": 4.0', '"duration_s": -4.0'))
    refused(
        directory, r"phases\.\d\.duration_s is -4, which is impossible: the file was edited or is damaged", strict=False
    )


def test_a_directory_of_another_name_is_refused(store):
    directory = finished(store)
    moved = directory.path.with_name("exp_20260102_030406")
    directory.path.rename(moved)
    refused(store.find(moved.name), "contains experiment exp_20260102_030405", strict=False)


@pytest.mark.parametrize("strict", [True, False])
def test_mixed_backends_are_refused_unless_allowed_and_then_labelled(store, strict):
    directory = experiment(store, count=4, processes=2)
    add(directory, 0)
    add(directory, 1, backend="vllm", config_sha256="f" * 64)
    refused(directory, "mixes the backends simulated and vllm.*--allow-mixed-backends", strict=strict)
    row = read(directory, strict=strict, mixed=True).row
    assert row.backend == "simulated+vllm"
    assert "mixed_backends: the processes used the backends simulated and vllm." in row.warnings


# ------------------------------------------------------------------ all
def several(store, count):
    return [finished(store, datetime(2026, 1, 2, 3, 4, 5) + timedelta(seconds=i)) for i in range(count)]


def test_one_path_and_the_other_give_the_same_rows(store, tmp_path):
    directories = several(store, 3)
    other = Store(tmp_path / "other")
    shutil.copytree(store.root, other.root)
    for directory in directories:
        aggregate(store, directory)
    assert kinds(aggregate_all(other, other.ids())) == ["written"] * 3
    for name in ("experiments", "cycles", "requests"):
        pd.testing.assert_frame_equal(table(store, name), table(other, name))
    assert {d.state().status for d in map(other.directory, other.ids())} == {"aggregated"}


def test_all_takes_those_whose_row_is_missing_or_old(store):
    directories = several(store, 3)
    assert kinds(aggregate_all(store, store.ids()[:2])) == ["written"] * 2
    assert kinds(aggregate_all(store, store.ids())) == ["fresh", "fresh", "written"]
    # It has been resumed since, and was killed before it wrote its row.
    state = replace(directories[0].state(), status="completed", attempt=2)
    directories[0].write_state(state)
    assert sorted(kinds(aggregate_all(store, store.ids()))) == ["fresh", "fresh", "written"]
    assert kinds(aggregate_all(store, store.ids())) == ["fresh"] * 3
    assert kinds(aggregate_all(store, store.ids(), force=True)) == ["written"] * 3
    assert sorted(table(store)["experiment_id"]) == [d.id for d in directories]
    assert table(store).set_index("experiment_id").loc[directories[0].id, "resumed"] == 1


def test_an_interrupted_experiment_is_read_again_once_it_was_resumed(store):
    directory = experiment(store)
    directory.write_state(directory.state().now("interrupted"))
    add(directory, 0, positions=[0], status="interrupted")
    assert kinds(aggregate_all(store, [directory.id])) == ["failed"]
    assert kinds(aggregate_all(store, [directory.id], strict=False)) == ["written"]
    assert kinds(aggregate_all(store, [directory.id], strict=False)) == ["fresh"]
    directory.write_state(replace(directory.state(), attempt=2))
    add(directory, 0, attempt=2, positions=[1, 2])
    assert kinds(aggregate_all(store, [directory.id])) == ["written"]
    assert list(table(store)["status"]) == ["completed"]


def test_what_runs_or_is_still_ending_or_has_not_run_is_left_alone(store):
    at_work, ending, waiting = several(store, 3)
    at_work.write_state(running(1))
    gone = replace(running(1), pid=2**22 + 1, process_started_s=None)
    ending.write_state(gone)
    shutil.rmtree(waiting.path)
    waiting.path.mkdir()
    with ending.hold():
        outcomes = list(aggregate_all(store, store.ids()))
    assert kinds(outcomes) == ["skipped"] * 3
    for outcome, word in zip(outcomes, ("is running", "not exited yet", "not been run"), strict=True):
        assert word in outcome.text
    assert not list(store.root.glob("*/*.parquet"))
    assert at_work.state().status == "running"
    assert kinds(aggregate_all(store, [ending.id])) == ["written"]


def test_one_corrupt_file_is_named_and_stops_nothing_else(store):
    directories = several(store, 4)
    directories[1].record_file(0, 1, 1).write_text('{"half')
    directories[2].journal_file(0, 1).write_text('{"record": 1}\n')
    outcomes = list(aggregate_all(store, store.ids()))
    assert kinds(outcomes) == ["failed", "failed", "written", "written"]
    assert str(directories[1].record_file(0, 1, 1)) in outcomes[0].text
    assert str(directories[2].journal_file(0, 1)) in outcomes[1].text
    assert sorted(table(store)["experiment_id"]) == [directories[0].id, directories[3].id]


def test_a_number_that_no_table_takes_stops_nothing_else(store):
    directories = several(store, 4)
    journal = directories[2].journal_file(0, 1)
    # Each number fits into its column, but the sum of the requests' tokens does not.
    journal.write_text(re.sub(r'"input_tokens":\d+', f'"input_tokens":{2**63 - 1}', journal.read_text()))
    outcomes = list(aggregate_all(store, store.ids()))
    assert sorted(kinds(outcomes)) == ["failed", "written", "written", "written"]
    (failed,) = [outcome.text for outcome in outcomes if outcome.kind == "failed"]
    assert failed.startswith(str(directories[2].path))
    assert sorted(table(store)["experiment_id"]) == [each.id for each in directories if each is not directories[2]]
    with pytest.raises(ResultsError, match=f"{directories[2].id} contains a number that is too large for the tables"):
        aggregate(store, directories[2])


@pytest.mark.parametrize("name", ["requests", "cycles"])
def test_rows_that_are_gone_are_made_anew_with_all_that_shared_their_file(store, name):
    directories = several(store, 4)
    list(aggregate_all(store, store.ids()))
    before = {each: table(store, each) for each in ("experiments", "cycles", "requests")}
    (file,) = (store.root / name).iterdir()
    file.unlink()
    with pytest.raises(ResultsError, match="has rows that other tables lack; run lem aggregate --all"):
        aggregate(store, directories[1], force=True)
    assert kinds(aggregate_all(store, [directories[1].id])) == ["written"] * 4
    for each, rows in before.items():
        pd.testing.assert_frame_equal(table(store, each).sort_values(list(rows)[:6], ignore_index=True), rows)
    assert kinds(aggregate_all(store, store.ids())) == ["fresh"] * 4


@pytest.mark.parametrize("name", ["requests", "cycles"])
def test_rows_that_are_damaged_are_told_until_their_file_is_removed(store, name):
    directories = several(store, 3)
    list(aggregate_all(store, store.ids()))
    (file,) = (store.root / name).iterdir()
    file.write_text("junk")
    late = finished(store, datetime(2026, 2, 2))
    for force in (False, True):
        failed, other = list(aggregate_all(store, store.ids(), force=force))
        assert failed.kind == "failed"
        assert f"{file} cannot be read" in failed.text
        assert late.id in other.text
    file.unlink()
    assert kinds(aggregate_all(store, [directories[0].id])) == ["written"] * 3


def test_a_row_of_what_there_is_does_not_count_as_that_of_a_completed_experiment(store, tmp_path):
    directory = shared(store)
    hidden = [directory.record_file(1, 1, 1), directory.journal_file(1, 1)]
    for file in hidden:
        file.rename(tmp_path / file.name)
    (outcome,) = aggregate_all(store, [directory.id], strict=False)
    assert outcome.text == f"{directory.id}: interrupted"
    assert directory.state().status == "completed"
    assert kinds(aggregate_all(store, [directory.id])) == ["failed"]
    for file in hidden:
        (tmp_path / file.name).rename(file)
    (outcome,) = aggregate_all(store, [directory.id])
    assert outcome.text == f"{directory.id}: completed"
    assert directory.state().status == "aggregated"


COMMAND = """
import sys
from pathlib import Path
import lem.results.aggregate, lem.results.parquet, pyarrow.parquet
from lem.results.store import Store
lem.results.aggregate.WRITTEN_TOGETHER = lem.results.aggregate.READ_TOGETHER = 7
store = Store(Path(sys.argv[1]))
lem.results.parquet.schema(lem.results.aggregate.ExperimentRow)
print("ready", flush=True)
sys.stdin.readline()
for outcome in lem.results.aggregate.aggregate_all(store, store.ids()):
    assert outcome.kind in ("written", "fresh"), outcome
"""


def start(store, count):
    """Start processes that aggregate everything, and release them at the same moment."""
    command = [sys.executable, "-c", COMMAND, str(store.root)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(count)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return processes


def check_each_once(store, directories):
    wanted = sorted(directory.id for directory in directories)
    assert sorted(table(store)["experiment_id"]) == wanted
    assert sorted(table(store, "cycles")["experiment_id"]) == wanted
    assert sorted(table(store, "requests")["experiment_id"]) == sorted(3 * wanted)


def test_two_aggregations_at_once_write_each_row_once(store):
    directories = several(store, 40)
    for process in start(store, 2):
        process.communicate()
        assert process.returncode == 0
    check_each_once(store, directories)
    assert {directory.state().status for directory in directories} == {"aggregated"}


@pytest.mark.processes
def test_nothing_is_lost_or_there_twice_when_it_is_killed(store):
    directories = several(store, 60)
    chance, there = random.Random(1), 0
    for _ in range(6):
        (process,) = start(store, 1)
        time.sleep(chance.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # If it is killed just before its first file, it leaves an empty folder.
        found = table(store)["experiment_id"] if list(store.experiments_table.glob("[!.]*.parquet")) else []
        assert len(found) == len(set(found)) >= there
        there = len(found)
    (process,) = start(store, 1)
    process.communicate()
    assert process.returncode == 0
    check_each_once(store, directories)
