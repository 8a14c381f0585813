"""Stopping runs: Ctrl-C, SIGTERM, kill -9, no memory, no space; no measurement is lost, and no process is left."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from lem.results.directory import ExperimentDir
from lem.results.journal import DIED
from lem.runner.window import METER_POLL_NS
from tests.conftest import (
    SIMULATED,
    Finished,
    begin,
    command,
    fill,
    kill_group,
    raw_record,
    small_disk,
    wait_for,
    workers_of,
)

pytestmark = pytest.mark.processes

SLOW = ("backend.decode_s_per_token=0.002",)
# The files that a run leaves in its experiment's directory.
OF_A_RUN = ("process_", "journal_", "state", "aggregated")
TRACE = "t_s,power_w\n0,100\n100000,100\n"


@pytest.fixture
def running(tmp_path):
    """Start a run of a few seconds; return it and its worker once the worker is measuring."""
    process = begin("experiment", *SIMULATED, "-n", "40", *SLOW, cwd=tmp_path)
    wait_for(process, "Prompts ")
    (worker,) = workers_of(process)
    time.sleep(0.5)
    yield process, worker
    kill_group(process)


def only(folder: Path) -> ExperimentDir:
    (path,) = (folder / "results" / "raw").iterdir()
    return ExperimentDir(path)


def requests_of(directory: ExperimentDir) -> list[tuple[int, int]]:
    return sorted((row.cycle, row.request) for part in directory.parts() for row in part.requests)


def the_row(folder: Path) -> dict:
    (row,) = pq.read_table(folder / "results" / "experiments").to_pylist()
    return row


def kept(folder: Path) -> tuple[dict, dict]:
    return raw_record(folder / "results"), the_row(folder)


def resume_all(folder: Path, prompts: int, cycles: int = 1) -> dict:
    """Resume until complete; return the row, in which each prompt counts once."""
    directory = only(folder)
    done = command("experiment", "-y", "--resume", directory.id, cwd=folder)
    assert done.code == 0, done.err
    assert requests_of(directory) == [(c, n) for c in range(1, cycles + 1) for n in range(prompts)]
    row = the_row(folder)
    assert (row["status"], row["error"], row["requests_completed"]) == ("completed", None, prompts)
    return row


def forget_all(directory: ExperimentDir) -> None:
    """Leave an experiment in the state in which it was planned."""
    for name in [name for name in os.listdir(directory.path) if name.startswith(OF_A_RUN)]:
        (directory.path / name).unlink()
    for table in ("requests", "cycles", "experiments"):
        shutil.rmtree(directory.path.parent.parent / table)


def codes(row: dict) -> set[str]:
    return {warning.partition(":")[0] for warning in row["warnings"]}


# ------------------------------------------------------------------ asked to stop
@pytest.mark.parametrize(
    ("how", "to"),
    [(signal.SIGINT, "all"), (signal.SIGTERM, "all"), (signal.SIGTERM, "parent"), (signal.SIGHUP, "all")],
)
def test_an_interrupted_run_keeps_what_it_measured_and_exits_with_130(running, tmp_path, how, to):
    process, worker = running
    if to == "all":
        os.killpg(process.pid, how)  # as a terminal and a scheduler do
    else:
        process.send_signal(how)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not worker.is_running()
    record, row = kept(tmp_path)
    assert record["status"] == row["status"] == "interrupted"
    # The worker received SIGTERM, whichever signal its parent received.
    what = "Ctrl-C" if how == signal.SIGINT else how.name
    assert record["error"]["message"] == row["error"] == f"stopped by {what}"
    (cut,) = [warning["text"] for warning in record["warnings"] if warning["code"] == "window_cut"]
    assert "energy" not in cut, "nothing metered it"
    assert re.fullmatch(r"the window ends with its last finished request, \S+ s before the run was interrupted\.", cut)
    assert 0 < record["requests_completed"] < 40
    assert row["requests_completed"] == record["requests_completed"]
    assert row["output_tokens"] in (None, record["output_tokens"])
    # The printed command resumes the run.
    (resume,) = re.findall(r"lem (experiment --resume \S+)", err)
    assert command(*resume.split(), "-y", "--dry-run", cwd=tmp_path).code == 0


# Makes a command send itself a signal when it imports a module, and when it exits.
SIGNALLED_AT_AN_IMPORT = """
import os, sys

class Signalled:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Signalled())
"""
SIGNALLED_AT_EXIT = "import atexit, os\natexit.register(os.kill, os.getpid(), {number})\n"


def with_code_at_the_start(folder: Path, code: str, *arguments: str) -> Finished:
    """Run a command that runs some code before anything else."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(code)
    return command(*arguments, cwd=folder, PYTHONPATH=str(folder / "site"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("lem.runner.preflight", ("experiment", *SIMULATED)),
        ("hydra", ("experiment", *SIMULATED)),
        ("lem.results.browse", ("results", "list")),
    ],
)
def test_a_signal_before_anything_runs_ends_a_command_with_130_and_leaves_nothing(tmp_path, module, arguments, number):
    code = SIGNALLED_AT_AN_IMPORT.format(module=module, number=int(number))
    done = with_code_at_the_start(tmp_path, code, *arguments)
    assert done.code == 130
    assert done.err.strip() == ("" if number == signal.SIGINT else f"Stopped by {number.name}.")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_a_command_exits_does_not_change_its_exit_code(tmp_path, number):
    done = with_code_at_the_start(tmp_path, SIGNALLED_AT_EXIT.format(number=int(number)), "presets")
    assert (done.code, done.err) == (0, "")


def test_the_command_that_resumes_names_the_results_directory(tmp_path):
    process = begin("experiment", *SIMULATED, "-n", "20", *SLOW, "-o", "my results", cwd=tmp_path)
    wait_for(process, "Prompts ")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    (resume,) = re.findall(r"lem experiment --resume .*", err)
    assert subprocess.run(
        f"{sys.executable} -m lem {resume.removeprefix('lem ')} -y", shell=True, cwd=tmp_path, capture_output=True
    ).returncode == 0  # fmt: skip


def test_ctrl_c_ends_a_sweep_with_all_its_remaining_cells(tmp_path):
    process = begin("experiment", *SIMULATED, "-n", "100", *SLOW, "--multirun", "seed=1,2,3", cwd=tmp_path)
    wait_for(process, "Prompts ")
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(list(tmp_path.glob("results/raw/*"))) == 1
    assert "The same command resumes" in err
    assert "--resume" not in err, "one way to go on is enough"


def test_ctrl_c_after_the_end_changes_no_exit_code(tmp_path):
    """Python takes time to exit, and a signal that is not ignored kills it meanwhile."""
    code = "import atexit, os, signal; atexit.register(os.kill, os.getpid(), signal.SIGINT)"
    code += "; from lem.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "results", "list"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_waiting_parent_sleeps(running):
    process, _ = running
    parent = psutil.Process(process.pid)
    before = sum(parent.cpu_times()[:2])
    time.sleep(2)
    # A parent that busy-waits would have used two seconds.
    assert sum(parent.cpu_times()[:2]) - before < 0.4


# ------------------------------------------------------------------ killed
def test_a_killed_worker_leaves_a_failed_record_that_says_how_it_died(running, tmp_path):
    process, worker = running
    worker.kill()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "SIGKILL" in out
    record, row = kept(tmp_path)
    assert record["status"] == row["status"] == "failed"
    assert "SIGKILL" in record["error"]["message"]
    (cut,) = [warning["text"] for warning in record["warnings"] if warning["code"] == "window_cut"]
    assert "killed an unknown time after its last finished request" in cut
    assert 0 < record["requests_completed"] < 40
    resume_all(tmp_path, 40)


def test_a_killed_parent_ends_its_worker(running, tmp_path):
    process, worker = running
    process.kill()
    process.wait()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert raw_record(tmp_path / "results")["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["Loading", "Idle, loaded", "Warm-up 0", "Prompts 0/12 in cycle 2", "Prompts 12/12 in cycle 1"]
)
@pytest.mark.parametrize("whom", ["worker", "all"])
def test_a_worker_may_be_killed_at_any_point_of_its_life(tmp_path, moment, whom):
    (tmp_path / "trace.csv").write_text(TRACE)
    process = begin(
        "experiment", *SIMULATED[:-2], "-y", "-n", "12", "-c", "2", *SLOW, "warmup.prompts=3",
        "energy=replay", "energy.trace=trace.csv", "energy.idle_s=0.3", cwd=tmp_path,
    )  # fmt: skip
    wait_for(process, moment)
    if whom == "worker":
        for worker in workers_of(process):
            worker.kill()
        out, err = process.communicate(timeout=20)
        assert (process.returncode, "SIGKILL" in out) == (1, True), out + err
    else:
        kill_group(process)
    listed = command("results", "list", "--all", "--json", cwd=tmp_path)
    assert listed.code == 0, listed.err
    assert len(json.loads(listed.out)) == 1
    before = requests_of(only(tmp_path))
    row = resume_all(tmp_path, 12, cycles=2)
    assert row["resumed"] == 1
    assert set(before) <= set(requests_of(only(tmp_path)))
    died = [r for r in only(tmp_path).records() if r.error is not None and r.error.type == DIED]
    assert ("window_cut" in codes(row)) is any(r.phase("measured") is not None for r in died)


KILLED_WHILE_WRITING = """
import os, signal, sys
from lem.runner import worker
real = os.fsync
def fsync(file):
    if ".process_" in os.readlink(f"/proc/self/fd/{file}"):
        os.kill(os.getpid(), signal.SIGKILL)
    real(file)
os.fsync = fsync
worker.main([sys.argv[1]])
"""


def test_a_worker_killed_while_it_writes_its_record_has_lost_nothing(lem, tmp_path):
    assert lem("experiment", *SIMULATED, "-n", "5").code == 0
    directory = only(tmp_path)
    forget_all(directory)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, directory.path], capture_output=True, text=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list(directory.path.glob(".process_*"))
    assert len(requests_of(directory)) == 5
    time.sleep(1.1)
    resume_all(tmp_path, 5)
    assert not list(directory.path.glob(".process_*"))


STOPPED_WHILE_WRITING = """
import os, signal, sys
from lem.runner import worker
real, left = os.write, [4]
def write(file, line):
    if b'"done"' not in line[:8]:
        return real(file, line)
    left[0] -= 1
    if left[0]:
        return real(file, line)
    length = int(float(sys.argv[2]) * len(line))
    written = real(file, line[:length]) if length else 0
    os.kill(os.getpid(), signal.SIGTERM)
    return written
os.write = write
sys.exit(worker.main([sys.argv[1]]))
"""


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_signal_in_the_middle_of_a_line_leaves_it_whole_and_a_record_that_fits(lem, tmp_path, share):
    assert lem("experiment", *SIMULATED, "-n", "8").code == 0
    directory = only(tmp_path)
    forget_all(directory)
    code = [sys.executable, "-c", STOPPED_WHILE_WRITING, directory.path, str(share)]
    stopped = subprocess.run(code, capture_output=True, text=True)
    assert stopped.returncode == 130, stopped.stderr
    (part,) = directory.parts()
    assert 4 <= len(part.requests) == part.record.requests_completed < 8
    window = part.record.phase("measured")
    assert window is not None
    assert window.duration_s == pytest.approx(part.requests[-1].end_s, abs=0.02)
    resume_all(tmp_path, 8)


@pytest.mark.slow
def test_a_worker_without_memory_leaves_a_record_that_says_so(tmp_path):
    process = begin(
        "experiment", "--model", "tiny", "-d", "sample", "-n", "150", "energy=none", "-y", "--max-tokens", "4",
        "batching.batch_size=150", "warmup.prompts=0", "backend.device=cpu", cwd=tmp_path,
    )  # fmt: skip
    # This is enough memory for the engine and the model, but not for a batch of this size.
    resource.prlimit(process.pid, resource.RLIMIT_AS, (1_300 << 20, 1_300 << 20))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert "Traceback" not in err
    record, row = kept(tmp_path)
    assert record["status"] == row["status"] == "failed"
    assert "memory" in record["error"]["message"]
    resume_all(tmp_path, 150)


# ------------------------------------------------------------------ energy
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_energy_is_that_of_the_windows_and_never_of_the_gap(tmp_path, how):
    (tmp_path / "trace.csv").write_text(TRACE)
    began_unix_s = time.time()
    process = begin(
        "experiment", *SIMULATED[:-2], "-y", "-n", "30", *SLOW, "energy=replay", "energy.trace=trace.csv",
        "energy.idle_s=0", cwd=tmp_path,
    )  # fmt: skip
    wait_for(process, "Prompts ")
    time.sleep(2)
    os.killpg(process.pid, how)
    process.communicate(timeout=20)
    time.sleep(3)
    resumed_unix_s = time.time()
    row = resume_all(tmp_path, 30)
    records = only(tmp_path).records()
    windows = [next(phase for phase in record.phases if phase.name == "measured") for record in records]
    assert len(windows) == 2
    assert row["duration_s"] == pytest.approx(sum(window.duration_s for window in windows))
    # The meter was last read at most this long before the last batch, and before the batch after that.
    longest_batch_s = max(r.latency_s for part in only(tmp_path).parts() for r in part.requests)
    behind_s = METER_POLL_NS / 1e9 + longest_batch_s
    missing_s = row["duration_s"] - row["energy_j"] / 100
    assert -0.01 <= missing_s <= behind_s
    assert records[0].window_opened_unix_s > began_unix_s
    assert records[0].window_opened_unix_s + windows[0].duration_s < resumed_unix_s - 3
    assert records[1].window_opened_unix_s > resumed_unix_s
    assert row["resumed"] == 1
    assert {"resumed", "window_cut"} <= codes(row)


# ------------------------------------------------------------------ the disk
@pytest.mark.parametrize("pages", [0, *(pytest.param(pages, marks=pytest.mark.slow) for pages in (1, 2, 4, 8))])
def test_a_disk_that_fills_up_costs_nothing_that_was_written(tmp_path, pages):
    prompts = 80 + 25 * pages
    with small_disk(tmp_path / "disk") as disk:
        process = begin(
            "experiment", *SIMULATED, "-n", str(prompts), "backend.decode_s_per_token=0.0005",
            "-o", "results", cwd=disk,
        )  # fmt: skip
        wait_for(process, "Prompts ")
        time.sleep(0.3)
        filler = fill(disk, pages)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 1, out + err
        assert "no space left" in (out + err).lower()
        assert "Traceback" not in err
        before = requests_of(only(disk))
        assert 0 < len(before) < prompts
        listed = command("results", "list", "--all", "--json", cwd=disk)
        assert listed.code == 0, listed.err
        full = command("experiment", "-y", "--resume", only(disk).id, cwd=disk)
        assert (full.code, "Traceback" in full.err) == (1, False), full.err
        assert "no space left" in (full.out + full.err).lower()
        filler.unlink()
        assert set(before) <= set(requests_of(only(disk)))
        resume_all(disk, prompts)


def test_a_directory_that_is_deleted_while_it_runs_is_named(running, tmp_path):
    process, worker = running
    shutil.rmtree(only(tmp_path).path)
    worker.terminate()
    out, err = process.communicate(timeout=20)
    assert process.returncode in (1, 130)
    assert "Traceback" not in err
    assert "results/raw/exp_" in out + err
