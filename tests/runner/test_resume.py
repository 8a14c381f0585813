"""Resuming unfinished experiments: which one is found, what runs, what stays the same, and what is refused."""

from __future__ import annotations

import json
import os
import pty
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace

from lem.record import RequestRecord
from lem.results.directory import ExperimentDir
from lem.results.plan import State, running
from lem.results.store import Store
from tests.conftest import SIMULATED, begin

pytestmark = pytest.mark.processes

AGAIN = ("experiment", *SIMULATED, "-n", "8", "warmup.prompts=0", "-o", "results")


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def claim_of(pid: int, host: str | None = None, started_s: float = 1.0) -> State:
    return State("running", 1, "2026-01-02T03:04:05+00:00", host or socket.gethostname(), pid, started_s)


def only(results: Path) -> ExperimentDir:
    (path,) = (results / "raw").iterdir()
    return ExperimentDir(path)


def forget_end(directory: ExperimentDir, lines: int = 4) -> None:
    """Leave the files as a SIGKILL after some batches would: the first lines of the journals, no records, no rows."""
    store = Store(directory.path.parent.parent)
    for journal in directory.path.glob("journal_*"):
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:lines]))
    for file in [*directory.path.glob("process_*"), *store.root.glob(f"*/{directory.id}.parquet")]:
        file.unlink()
    (directory.path / "aggregated.json").unlink(missing_ok=True)
    directory.write_state(claim_of(dead_pid()))
    store.mark_unfinished(directory.id, directory.plan().fingerprint)


@pytest.fixture
def killed(lem, tmp_path) -> ExperimentDir:
    """An experiment of eight prompts that was killed when three were finished."""
    assert lem(*AGAIN).code == 0
    directory = only(tmp_path / "results")
    forget_end(directory)
    return directory


def rows_of(directory: ExperimentDir) -> dict[int, RequestRecord]:
    rows = [row for part in directory.parts() for row in part.requests]
    assert len({(row.cycle, row.request) for row in rows}) == len(rows)
    return {row.request: row for row in rows}


def listing(lem) -> list[dict]:
    return json.loads(lem("results", "list", "--all", "--json", "-o", "results").out)


def snapshot(directory: ExperimentDir) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.path.iterdir()}


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder read-only even for root, by mounting it on itself; skip the test where mounting is not allowed."""
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True, capture_output=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


# ------------------------------------------------------------------ which experiment
def test_the_beginning_of_an_id_is_enough(lem, killed):
    before = rows_of(killed)
    done = lem("experiment", "-y", "--resume", killed.id[:9], "-o", "results")
    assert done.code == 0, done.err
    after = rows_of(killed)
    assert sorted(after) == list(range(8))
    assert all(after[request] == row for request, row in before.items())
    assert {after[request].attempt for request in range(3, 8)} == {2}
    (row,) = listing(lem)
    assert (row["status"], row["resumed"], row["requests_completed"]) == ("completed", 1, 8)


def test_an_unknown_id_is_refused_with_the_nearest(lem, killed):
    typo = killed.id[:-1] + ("1" if killed.id[-1] != "1" else "2")
    done = lem("experiment", "--resume", typo, "-o", "results")
    assert done.code == 2
    assert killed.id in done.err


def test_an_empty_id_resumes_nothing(lem, killed):
    """The id is empty, as from an unset shell variable; every id begins with the empty string."""
    done = lem("experiment", "-y", "--resume", "", "-o", "results")
    assert (done.code, "id is empty" in done.err) == (2, True)
    assert len(rows_of(killed)) == 3


def test_a_beginning_that_fits_several_is_refused(lem, killed):
    (killed.path.parent / "exp_20200101_000000").mkdir()
    done = lem("experiment", "--resume", "exp_20", "-o", "results")
    assert done.code == 2
    assert "matches 2 experiments" in done.err


def test_anything_else_that_would_decide_what_runs_is_refused(lem, killed):
    for other in (
        ("seed=3",), ("-m", "tiny"), ("--fresh",), ("--multirun",), ("my.yaml",), ("-n", "9"), ("--cycles", "2"),
        ("--preset", "quick-test"), ("-d", "sample"),
    ):  # fmt: skip
        done = lem("experiment", "--resume", killed.id, "-o", "results", *other)
        assert (done.code, "leave out" in done.err) == (2, True), other
    assert len(rows_of(killed)) == 3


def test_a_complete_one_says_so(lem, tmp_path):
    assert lem(*AGAIN).code == 0
    directory = only(tmp_path / "results")
    before = snapshot(directory)
    done = lem("experiment", "--resume", directory.id, "-o", "results")
    assert (done.code, "is complete" in done.out) == (0, True)
    assert snapshot(directory) == before


def test_one_that_was_killed_before_its_row_was_written_gets_it(lem, tmp_path):
    assert lem(*AGAIN).code == 0
    directory = only(tmp_path / "results")
    (tmp_path / "results" / "experiments" / f"{directory.id}.parquet").unlink()
    directory.write_state(directory.state().now("completed"))
    assert lem("experiment", "-y", "--resume", directory.id, "-o", "results").code == 0
    assert [row["status"] for row in listing(lem)] == ["completed"]


@pytest.mark.parametrize("with_record", [True, False])
def test_one_that_was_killed_after_its_last_batch_is_complete(lem, tmp_path, with_record):
    assert lem(*AGAIN).code == 0
    directory = only(tmp_path / "results")
    record = next(directory.path.glob("process_*")).read_text()
    forget_end(directory, lines=100)
    if with_record:
        directory.record_file(0, 1, 1).write_text(record)
    done = lem("experiment", "-y", "--resume", directory.id, "-o", "results")
    assert done.code == 0, done.err
    assert not list(directory.path.glob("*_a2*")), "nothing was left to run"
    (row,) = listing(lem)
    assert (row["status"], row["requests_completed"]) == ("completed", 8)
    assert any(w.startswith("window_cut") for w in row["warnings"]) is not with_record


def test_a_dry_run_prints_what_is_left_and_does_nothing(lem, killed):
    before = snapshot(killed)
    done = lem("experiment", "--resume", killed.id, "--dry-run", "-o", "results")
    assert done.code == 0
    assert "3 of 8 prompts" in done.out
    assert snapshot(killed) == before


# ------------------------------------------------------------------ the process that runs it
def test_a_running_one_is_left_alone(lem, killed):
    killed.write_state(running(1))
    before, began_s = snapshot(killed), time.monotonic()
    done = lem("experiment", "-y", "--resume", killed.id, "-o", "results")
    assert done.code == 2
    assert f"is already running as process {os.getpid()}" in done.err
    assert time.monotonic() - began_s < 5
    assert snapshot(killed) == before
    assert lem("experiment", "-y", "--resume", killed.id, "--force", "-o", "results").code == 2


def test_a_running_one_is_not_resumed_by_the_same_command(lem, killed):
    killed.write_state(running(1))
    assert lem(*AGAIN).code == 0
    assert len(rows_of(killed)) == 3
    assert len(listing(lem)) == 2


def test_the_claim_of_another_host_stands_until_it_is_taken_over(lem, killed):
    killed.write_state(claim_of(1, "another-host"))
    done = lem("experiment", "-y", "--resume", killed.id, "-o", "results")
    assert done.code == 2
    assert "as process 1 on another-host" in done.err
    assert "--force" in done.err
    done = lem("experiment", "-y", "--resume", killed.id, "--force", "-o", "results")
    assert done.code == 0, done.err
    assert sorted(rows_of(killed)) == list(range(8))


def test_a_process_that_has_the_pid_of_a_former_one_is_not_taken_for_it(lem, killed):
    killed.write_state(claim_of(os.getpid(), started_s=5.0))
    assert killed.state().status == "interrupted"
    assert lem("experiment", "-y", "--resume", killed.id, "-o", "results").code == 0


def test_setting_the_clock_ends_no_claim(killed, monkeypatch):
    killed.write_state(running(1))
    # The system's answer about an old process after the clock was set back by an hour.
    created_s, booted_s = psutil.Process().create_time() - 3600, psutil.boot_time() - 3600
    monkeypatch.setattr(psutil.Process, "create_time", lambda *_: created_s)
    monkeypatch.setattr(psutil, "boot_time", lambda: booted_s)
    assert killed.state().status == "running"


def test_of_two_that_resume_it_at_once_one_does(killed, tmp_path):
    both = [begin("experiment", "-y", "--resume", killed.id, "-o", "results", cwd=tmp_path) for _ in range(2)]
    printed = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) in ([0, 2], [0, 0]), printed
    assert sorted(rows_of(killed)) == list(range(8))
    assert {row.attempt for row in rows_of(killed).values()} == {1, 2}


def test_a_zombie_does_not_run(killed):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started_s = psutil.Process(process.pid).create_time() - psutil.boot_time()
    killed.write_state(replace(running(1), pid=process.pid, process_started_s=started_s))
    assert killed.state().status == "running"
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it is now a zombie
    assert killed.state().status == "interrupted"
    process.communicate()


@pytest.mark.parametrize("content", [None, '{"status": "runn'])
def test_without_a_readable_state_nothing_is_run_twice(lem, killed, content):
    (killed.path / "state.json").unlink()
    if content is not None:
        (killed.path / "state.json").write_text(content)
    before = rows_of(killed)
    done = lem("experiment", "-y", "--resume", killed.id, "-o", "results")
    assert done.code == 0, done.err
    after = rows_of(killed)
    assert sorted(after) == list(range(8))
    assert all(after[request] == row for request, row in before.items())
    assert listing(lem)[0]["resumed"] == 1


def test_a_late_process_of_a_former_attempt_does_nothing(killed):
    killed.write_state(running(2))
    done = subprocess.run(
        [sys.executable, "-m", "lem.runner.worker", str(killed.path), "--attempt", "1"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "attempt 2" in done.stderr
    assert len(rows_of(killed)) == 3


# ------------------------------------------------------------------ the same configuration
def test_the_configuration_and_the_prompts_are_those_it_began_with(lem, tmp_path):
    (tmp_path / "my.yaml").write_text("max_output_tokens: 9\nbatching:\n  batch_size: 1\n")
    (tmp_path / "prompts.txt").write_text("".join(f"{'word ' * n}\n" for n in range(1, 9)))
    began = (
        "experiment", "my.yaml", "--preset", "throughput", "--backend", "simulated", "-m", "any", "-p", "prompts.txt",
        "energy=none", "warmup.prompts=0", "--seed", "11", "-y", "--force",
    )  # fmt: skip
    assert lem(*began, "-o", "whole").code == 0
    assert lem(*began, "-o", "results").code == 0
    directory = only(tmp_path / "results")
    forget_end(directory)
    (tmp_path / "my.yaml").write_text("max_output_tokens: 2000\n")
    (tmp_path / "prompts.txt").unlink()
    # It was accepted when it began, so inadvisable options need no second --force.
    done = lem("experiment", "-y", "--resume", directory.id, "-o", "results")
    assert done.code == 0, done.err

    def lasting(rows):
        return {n: (r.input_tokens, r.output_tokens, r.finish_reason) for n, r in rows.items()}

    assert lasting(rows_of(directory)) == lasting(rows_of(only(tmp_path / "whole")))
    (row,) = pq.read_table(tmp_path / "results" / "experiments").to_pylist()
    (whole,) = pq.read_table(tmp_path / "whole" / "experiments").to_pylist()
    same = ("overrides", "seed", "prompts_sha256", "requests_planned", "output_tokens", "input_tokens", "batch_size")
    without_place = [{k: v for k, v in json.loads(r["config_json"]).items() if k != "io"} for r in (row, whole)]
    assert without_place[0] == without_place[1]
    assert [row[name] for name in same if name != "overrides"] == [whole[name] for name in same if name != "overrides"]


def test_the_same_command_resumes_and_fresh_starts_a_new_one(lem, killed):
    assert lem(*AGAIN, "--fresh").code == 0
    assert len(rows_of(killed)) == 3
    done = lem(*AGAIN)
    assert done.code == 0
    assert f"Resuming {killed.id}" in done.err
    assert len(rows_of(killed)) == 8
    assert len(listing(lem)) == 2
    assert lem(*AGAIN).code == 0, "with nothing unfinished it is a new one"
    assert len(listing(lem)) == 3


def test_another_configuration_does_not_resume_it(lem, killed):
    assert lem(*AGAIN, "--seed", "5").code == 0
    assert len(rows_of(killed)) == 3


def on_a_terminal(arguments: tuple[str, ...], answers: str, cwd: Path) -> tuple[int, str]:
    """Run lem as on a terminal on which the answers are typed; return its exit code and its output."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lem", *(a for a in arguments if a != "-y")],
        cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"},
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    os.write(ours, answers.encode())
    shown = b""
    while True:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end of the terminal is closed
            break
    os.close(ours)
    return process.wait(), shown.decode()


def test_a_person_is_asked_whether_to_resume(lem, killed, tmp_path):
    code, shown = on_a_terminal(AGAIN, "n\nn\n", tmp_path)
    assert (code, "is unfinished" in shown, "Start over" in shown) == (0, True, True)
    assert len(rows_of(killed)) == 3
    code, shown = on_a_terminal(AGAIN, "y\n", tmp_path)
    assert (code, f"Resuming {killed.id}" in shown) == (0, True)
    assert len(rows_of(killed)) == 8


def test_an_interrupted_question_runs_nothing(lem, killed, tmp_path):
    # The end of the input arrives in the same way as Ctrl-C, and needs no controlling terminal.
    code, shown = on_a_terminal(AGAIN, "\x04", tmp_path)
    assert (code, "Nothing was run." in shown, "Traceback" in shown) == (130, True, False)
    assert len(rows_of(killed)) == 3
    assert len(listing(lem)) == 1


# ------------------------------------------------------------------ damaged files
def test_a_line_that_was_being_written_counts_for_nothing(lem, killed):
    with killed.journal_file(0, 1).open("a") as journal:
        journal.write('{"done": [{"request": 3, "bat')
    assert sorted(rows_of(killed)) == [0, 1, 2]
    assert lem("experiment", "-y", "--resume", killed.id, "-o", "results").code == 0
    assert sorted(rows_of(killed)) == list(range(8))


def test_a_damaged_line_is_named_and_hides_no_other_experiment(lem, killed):
    assert lem(*AGAIN, "--fresh").code == 0
    journal = killed.journal_file(0, 1)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([lines[0], lines[1][:20] + "\n", *lines[2:]]))
    done = lem("experiment", "-y", "--resume", killed.id, "-o", "results")
    assert done.code in (1, 2)
    assert f"{journal.name} cannot be read: line 2 is damaged" in done.err
    done = lem("aggregate", "--all", "--no-strict", "-o", "results")
    assert done.code == 1
    assert "line 2 is damaged" in done.err
    assert "completed" in [row["status"] for row in listing(lem)]


def test_a_missing_plan_is_named(lem, killed):
    (killed.path / "spec.json").unlink()
    done = lem("experiment", "-y", "--resume", killed.id, "-o", "results")
    assert done.code == 2
    assert "spec.json cannot be read" in done.err
    assert lem("results", "list", "--all", "--json", "-o", "results").code == 0


def test_a_mark_of_a_deleted_experiment_disturbs_nothing(lem, killed, tmp_path):
    for file in killed.path.iterdir():
        file.unlink()
    killed.path.rmdir()
    assert lem(*AGAIN).code == 0
    assert len(list((tmp_path / "results" / "raw").iterdir())) == 1


def test_scratch_files_of_killed_processes_are_cleaned_away(lem, killed, tmp_path):
    left = [
        killed.path / ".process_0_c1_a1.json-abc",
        killed.path / ".state.json-x_y",
        tmp_path / "results" / "unfinished" / f".{killed.id}-12",
        tmp_path / "results" / "experiments" / f".{killed.id}.parquet-zz",
    ]
    for file in left:
        file.write_text("half")
        os.utime(file, (1, 1))
    assert len(listing(lem)) == 1
    assert sorted(rows_of(killed)) == [0, 1, 2]
    assert lem("experiment", "-y", "--resume", killed.id, "-o", "results").code == 0
    assert [file for file in left if file.exists()] == []


def test_a_results_directory_that_became_read_only_is_named(lem, killed, tmp_path):
    with read_only(tmp_path / "results"):
        done = lem("experiment", "-y", "--resume", killed.id, "-o", "results")
    assert done.code in (1, 2)
    assert "Error: " in done.err
    assert "results" in done.err
    assert lem("experiment", "-y", "--resume", killed.id, "-o", "results").code == 0


# ------------------------------------------------------------------ a trace of arrivals
TIMES_S = (5.0, 5.01, 5.03, 5.06, 5.1, 5.15, 5.21, 5.28)
TRACE = (*AGAIN, "traffic.pattern=trace", "traffic.trace=arrivals.csv", "batching.batch_size=1")


def write_trace(folder: Path, times_s: Sequence[float]) -> None:
    (folder / "arrivals.csv").write_text("t_s\n" + "".join(f"{t}\n" for t in times_s))


@pytest.fixture
def killed_with_trace(lem, tmp_path) -> ExperimentDir:
    """An experiment of eight prompts with arrivals from a trace, killed when three were finished."""
    write_trace(tmp_path, TIMES_S)
    done = lem(*TRACE)
    assert done.code == 0, done.err
    directory = only(tmp_path / "results")
    forget_end(directory)
    return directory


@pytest.mark.parametrize("times_s", [[9.0 + i for i in range(8)], [1.0], None], ids=["others", "too_few", "none"])
def test_the_arrivals_are_those_that_the_experiment_started_with(lem, killed_with_trace, tmp_path, times_s):
    (tmp_path / "arrivals.csv").unlink()
    if times_s is not None:
        write_trace(tmp_path, times_s)
    done = lem("experiment", "-y", "--resume", killed_with_trace.id, "-o", "results")
    assert done.code == 0, done.err
    rows = rows_of(killed_with_trace)
    arrived_s = [rows[request].arrived_s for request in range(3, 8)]
    # The clock of the arrivals continues through both windows.
    (opened_s,) = [r.arrivals_from_s for r in killed_with_trace.records() if r.attempt == 2]
    from_first_s = [t - TIMES_S[0] for t in TIMES_S]
    assert opened_s >= from_first_s[2]
    assert arrived_s == pytest.approx([t - opened_s for t in from_first_s[3:]], abs=1e-6)


def test_the_same_trace_is_resumed_and_other_content_is_another_experiment(lem, killed_with_trace, tmp_path):
    write_trace(tmp_path, [t + 0.5 * (t > 5.2) for t in TIMES_S])
    assert lem(*TRACE).code == 0
    assert len(rows_of(killed_with_trace)) == 3
    assert len(list((tmp_path / "results" / "raw").iterdir())) == 2

    write_trace(tmp_path, TIMES_S)
    assert lem(*TRACE).code == 0
    assert len(rows_of(killed_with_trace)) == 8
    assert len(list((tmp_path / "results" / "raw").iterdir())) == 2


def test_an_experiment_without_arrivals_of_its_own_reads_the_file(lem, killed_with_trace, tmp_path):
    """As in an experiment that began before arrivals were stored."""
    spec = killed_with_trace.path / "spec.json"
    plan = json.loads(spec.read_text())
    del plan["arrivals_sha256"]
    spec.write_text(json.dumps(plan))
    (killed_with_trace.path / "arrivals.json").unlink()
    resume = ("experiment", "-y", "--resume", killed_with_trace.id, "-o", "results")
    (tmp_path / "arrivals.csv").rename(tmp_path / "elsewhere.csv")
    refused = lem(*resume)
    assert (refused.code, "arrivals.csv does not exist" in refused.err) == (2, True)
    (tmp_path / "elsewhere.csv").rename(tmp_path / "arrivals.csv")
    assert lem(*resume).code == 0
    assert len(rows_of(killed_with_trace)) == 8


@pytest.mark.parametrize("content", ["[0.0, 1.", "[0.0, 1.0]", None], ids=["damaged", "others", "missing"])
def test_arrivals_that_are_not_those_of_the_plan_are_named_before_anything_runs(lem, killed_with_trace, content):
    file = killed_with_trace.path / "arrivals.json"
    file.unlink() if content is None else file.write_text(content)
    done = lem("experiment", "-y", "--resume", killed_with_trace.id, "-o", "results")
    assert done.code == 2
    assert re.search(r"arrivals\.json (cannot be read|does not contain)", done.err)
    assert len(rows_of(killed_with_trace)) == 3
