"""Starting workers and ending them: no process is left, whatever happens to the parent or to a worker."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from lem.machine.processes import without_launchers
from lem.results.directory import ExperimentDir
from lem.runner.stopping import signals_held, signals_raise
from tests.conftest import SIMULATED, begin, command, kill_group, wait_for, workers_of

pytestmark = pytest.mark.processes

SLOW = ("backend.decode_s_per_token=0.002", "warmup.prompts=0")
LATE_S = 10.0


def only(results: Path) -> ExperimentDir:
    (path,) = (results / "raw").iterdir()
    return ExperimentDir(path)


def of_run(folder: Path) -> list[psutil.Process]:
    """Return the running processes of runs in a folder, whatever their parents, groups and sessions."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(folder) and process.pid != os.getpid():
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(folder: Path, within_s: float = LATE_S) -> bool:
    until_s = time.monotonic() + within_s
    while left := of_run(folder):
        if time.monotonic() > until_s:
            for process in left:
                process.kill()
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def planned(lem, tmp_path) -> ExperimentDir:
    """An experiment that has a plan but has not run."""
    assert lem("experiment", *SIMULATED, "-n", "4", "-o", "results").code == 0
    directory = only(tmp_path / "results")
    for file in [*directory.path.glob("process_*"), *directory.path.glob("journal_*"), directory.path / "state.json"]:
        file.unlink()
    return directory


@pytest.mark.parametrize("missing", ["reader and writer", "writer"])
def test_a_worker_whose_parent_is_gone_before_it_starts_ends_at_once(planned, tmp_path, missing):
    for name in ("progress", "lifeline"):
        os.mkfifo(tmp_path / name)
    reader = os.open(tmp_path / "progress", os.O_RDONLY | os.O_NONBLOCK) if missing == "writer" else None
    worker = subprocess.Popen(
        [sys.executable, "-m", "lem.runner.worker", str(planned.path), "--attempt", "1",
         "--progress", str(tmp_path / "progress"), "--lifeline", str(tmp_path / "lifeline")],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _, err = worker.communicate(timeout=LATE_S)
    finally:
        worker.kill()
        if reader is not None:
            os.close(reader)
    assert worker.returncode == 130, err
    assert sum(len(part.requests) for part in planned.parts()) == 0


SIGNALLED_WHILE_REPORTING = """
import os, signal, sys
from lem.runner import worker

class Stderr:
    def write(self, text):
        sent.append(text)
        if len(sent) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def flush(self):
        pass

sent = []
sys.stderr = Stderr()
code = worker.main(sys.argv[1:])
sys.stdout.write("".join(sent))
sys.exit(code)
"""


@pytest.mark.parametrize("progress", ["gone", "none"])
def test_a_signal_that_arrives_while_an_end_is_reported_makes_no_traceback(tmp_path, progress):
    """With a FIFO whose parent is gone, the end is an interruption; without a FIFO, it is an error."""
    arguments = ["--progress", str(tmp_path / "fifo")] if progress == "gone" else []
    worker = subprocess.run(
        [sys.executable, "-c", SIGNALLED_WHILE_REPORTING, str(tmp_path), *arguments],
        capture_output=True, text=True, timeout=LATE_S,
    )  # fmt: skip
    assert worker.returncode == 130, worker.stderr
    assert "Traceback" not in worker.stdout + worker.stderr


def test_a_parent_that_does_not_read_does_not_hold_up_the_work(tmp_path):
    from lem.runner.progress import Event, PipeReport

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    report = PipeReport(writer, period_s=0.0)
    for done in range(5_000):  # more than fits into the pipe
        report(Event("measured", done, 20_000))
    os.set_blocking(reader, False)
    os.read(reader, 1 << 20)
    report(Event("measured", 20_000, 20_000))
    assert b"20000" in os.read(reader, 1 << 20), "events arrive again when there is room"


def test_the_pipes_of_a_killed_parent_are_removed_by_the_next(tmp_path):
    (tmp_path / "tmp").mkdir()
    process = begin("experiment", *SIMULATED, "-n", "20", *SLOW, cwd=tmp_path, TMPDIR=str(tmp_path / "tmp"))
    wait_for(process, "Prompts ")
    kill_group(process)
    assert len(list((tmp_path / "tmp").glob("lem-*"))) == 1
    resume = ("experiment", "-y", "--resume", only(tmp_path / "results").id)
    assert command(*resume, cwd=tmp_path, TMPDIR=str(tmp_path / "tmp")).code == 0
    assert not list((tmp_path / "tmp").glob("lem-*"))


def test_a_worker_that_ignores_signals_is_killed_after_its_grace(tmp_path):
    process = begin("experiment", *SIMULATED, "-n", "200", *SLOW, cwd=tmp_path)
    wait_for(process, "Prompts ")
    (worker,) = workers_of(process)
    worker.suspend()  # a stopped process reacts to no signal but SIGKILL
    began_s = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert 5 < time.monotonic() - began_s < 12
    assert gone(tmp_path)
    state = only(tmp_path / "results").state()
    assert state.status == "interrupted"
    (record,) = only(tmp_path / "results").records()
    assert record.error.message == "stopped by Ctrl-C. The worker was killed, because it did not end within 8 s."


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_while_its_worker_starts_says_who_stopped_it(tmp_path, number):
    process = begin("experiment", *SIMULATED, "-n", "4", cwd=tmp_path)
    while not (workers := workers_of(process)):
        assert process.poll() is None
    os.killpg(process.pid, number)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert workers
    (record,) = only(tmp_path / "results").records()
    assert record.error.message == f"stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}"


SIGNALLED_WHILE_STARTING = """
import os, runpy, signal, subprocess, sys
number, *sys.argv[1:] = sys.argv[1:]
start = subprocess.Popen

def popen(command, **options):
    process = start(command, **options)
    if "lem.runner.worker" in command:
        started.append(process)
        os.kill(os.getpid(), int(number))
    return process

started = []
subprocess.Popen = popen
try:
    runpy.run_module("lem", run_name="__main__", alter_sys=True)
finally:
    print([process.returncode is not None for process in started])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_moment_when_a_worker_starts_leaves_a_record_and_no_worker(tmp_path, number):
    arguments = [str(int(number)), "experiment", *SIMULATED, "-n", "4"]
    script = [sys.executable, "-c", SIGNALLED_WHILE_STARTING, *arguments]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130, done.stderr
    assert done.stdout.splitlines()[-1] == "[True]", "the worker has ended before the command does"
    (record,) = only(tmp_path / "results").records()
    assert record.error.message == f"stopped by {'Ctrl-C' if number == signal.SIGINT else number.name}"


def test_a_signal_that_is_ignored_stays_ignored_for_processes_that_start_meanwhile():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals_held():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_worker_in_this_process_sets_outlasts_the_block():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with signals_raise():
            raising = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGHUP) != raising
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_ctrl_c_is_immediate(tmp_path):
    process = begin("experiment", *SIMULATED, "-n", "200", *SLOW, cwd=tmp_path)
    wait_for(process, "Prompts ")
    time.sleep(1)
    (worker,) = workers_of(process)
    worker.suspend()
    before = sum(len(part.requests) for part in only(tmp_path / "results").parts())
    began_s = time.monotonic()
    for _ in range(2):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert time.monotonic() - began_s < 4
    (record,) = only(tmp_path / "results").records()
    assert record.error.message == (
        "stopped by Ctrl-C. The worker was killed at once, because the run was interrupted a second time."
    )
    assert "Traceback" not in err
    assert "--resume" in err
    assert gone(tmp_path)
    assert sum(len(part.requests) for part in only(tmp_path / "results").parts()) >= before > 0


@pytest.mark.slow
def test_an_impatient_user_loses_nothing(tmp_path):
    process = begin("experiment", *SIMULATED, "-n", "60", *SLOW, cwd=tmp_path)
    wait_for(process, "Prompts ")
    time.sleep(1)
    before = sum(len(part.requests) for part in only(tmp_path / "results").parts())
    for _ in range(8):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.05)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert gone(tmp_path)
    directory = only(tmp_path / "results")
    assert directory.state().status == "interrupted"
    assert sum(len(part.requests) for part in directory.parts()) >= before > 0
    done = command("experiment", "-y", "--resume", directory.id, cwd=tmp_path)
    assert done.code == 0, done.err


# ------------------------------------------------------------------ several processes
def seed_with(lengths_wanted) -> int:
    """Return a seed with which the simulated outputs have the wanted lengths."""
    for seed in range(100_000):
        lengths = [min(random.Random(f"{seed}:{i}").randint(1, 256), 128) for i in range(4)]
        if lengths_wanted(lengths):
            return seed
    raise AssertionError


def two_ranks(folder: Path, *more: str, **env: str) -> subprocess.Popen[str]:
    (folder / "trace.csv").write_text("t_s,power_w\n0,100\n10000,100\n")
    return begin(
        "experiment", *SIMULATED[:-2], "energy=replay", "energy.trace=trace.csv", "energy.idle_s=0", "-y",
        "num_processes=2", "warmup.prompts=0", *more, cwd=folder, **env,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ctrl-c", "slurm", "sigkill"])
def test_energy_of_one_that_waits_for_the_others_is_not_lost(tmp_path, how):
    # The first process finishes in less than a second; the second finishes its prompts after about 2 s and 8 s.
    seed = seed_with(lambda n: n[0] + n[2] < 16 and 30 < n[1] < 50 and n[3] > 120)
    process = two_ranks(tmp_path, "-n", "4", "--seed", str(seed), "backend.decode_s_per_token=0.05")
    wait_for(process, "Prompts ")
    time.sleep(4.5)
    if how == "sigkill":
        everyone = [*workers_of(process), *psutil.Process(process.pid).children()]
        for each in everyone:
            each.kill()
        kill_group(process)
    elif how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:  # to every process of the job at once
        for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            each.terminate()
    process.communicate(timeout=15)
    assert process.returncode == (-9 if how == "sigkill" else 130)
    assert gone(tmp_path)
    directory = only(tmp_path / "results")
    done = command("experiment", "-y", "--resume", directory.id, cwd=tmp_path)
    assert done.code == 0, done.err
    (row,) = pq.read_table(tmp_path / "results" / "experiments").to_pylist()
    assert (row["status"], row["requests_completed"], row["resumed"]) == ("completed", 4, 1)
    # A constant 100 W; the time between two readings of the meter, at most a second, may be missing.
    assert row["duration_s"] > 8
    assert row["energy_j"] == pytest.approx(100 * row["duration_s"], abs=130)
    assert {w.partition(":")[0] for w in row["warnings"]} >= {"resumed", "window_cut"}


def test_ten_seconds_after_ctrl_c_no_process_of_two_is_left(tmp_path):
    (tmp_path / "tmp").mkdir()
    process = two_ranks(tmp_path, "-n", "14", "backend.decode_s_per_token=0.005", TMPDIR=str(tmp_path / "tmp"))
    wait_for(process, "Prompts ")
    time.sleep(1)
    assert len(workers_of(process)) == 2
    began_s = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=15)
    assert process.returncode == 130
    assert gone(tmp_path, within_s=LATE_S - (time.monotonic() - began_s))
    assert not list((tmp_path / "tmp").iterdir())
    (resume,) = [line[line.index("lem experiment") :] for line in err.splitlines() if "--resume" in line]
    done = command(*resume.split()[1:], "-y", cwd=tmp_path)
    assert done.code == 0, done.err
    rows = [row for part in only(tmp_path / "results").parts() for row in part.requests]
    assert sorted(row.request for row in rows) == list(range(14))


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed(tmp_path):
    process = two_ranks(tmp_path, "-n", "41", "backend.decode_s_per_token=0.005")
    wait_for(process, "Prompts ")
    assert len(workers_of(process)) == 2
    process.kill()  # to this process alone: torch's launcher and the workers notice only by the lifeline
    process.communicate()
    assert gone(tmp_path)


@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_one_of_two_is_named_before_there_is_a_window(tmp_path, which):
    process = two_ranks(tmp_path, "-n", "41", "energy.idle_s=30")
    wait_for(process, "Idle")
    time.sleep(1)  # until both are past the barrier at the beginning of the phase
    assert len(workers_of(process)) == 2
    workers_of(process)[which].kill()
    process.communicate(timeout=60)
    assert process.returncode == 1
    directory = only(tmp_path / "results")
    assert directory.state().status == "failed"
    assert "ended by SIGKILL" in (directory.state().error or "")
    assert gone(tmp_path)


@pytest.mark.slow
def test_a_killed_one_of_two_is_named(tmp_path):
    process = two_ranks(tmp_path, "-n", "41", "backend.decode_s_per_token=0.005")
    wait_for(process, "Prompts ")
    time.sleep(0.5)
    workers_of(process)[1].kill()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SIGKILL" in " ".join(out.split())
    assert gone(tmp_path)
    done = command("experiment", "-y", "--resume", only(tmp_path / "results").id, cwd=tmp_path)
    assert done.code == 0, done.err


# Variables of a shell that runs under a launcher: torchrun's, accelerate's, MPI's and Slurm's.
OF_A_LAUNCHER = {
    "RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1", "NODE_RANK": "1",
    "MASTER_ADDR": "10.255.255.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x", "PET_NNODES": "2",
    "PET_MASTER_ADDR": "10.255.255.1", "ACCELERATE_MIXED_PRECISION": "fp8", "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "3", "PMI_RANK": "3", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77",
}  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_a_launcher_around_lem_says_nothing_to_its_workers(tmp_path, processes):
    several = (f"num_processes={processes}",) if processes > 1 else ()
    done = command("experiment", *SIMULATED, "-n", "4", *several, cwd=tmp_path, **OF_A_LAUNCHER)
    assert done.code == 0, done.out + done.err
    records = only(tmp_path / "results").records()
    assert [(record.rank, record.world_size) for record in records] == [(rank, processes) for rank in range(processes)]
    assert records[0].environment.slurm["SLURM_JOB_ID"] == "77"


def test_only_a_launchers_variables_are_withheld():
    own = {
        "RANKS": "1",
        "MY_WORLD_SIZE": "2",
        "NCCL_DEBUG": "INFO",
        "CUDA_VISIBLE_DEVICES": "1",
        "OMP_NUM_THREADS": "2",
    }
    assert without_launchers(OF_A_LAUNCHER | own) == own | {k: v for k, v in OF_A_LAUNCHER.items() if "SLURM" in k}
