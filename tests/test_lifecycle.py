"""Runs that are stopped: Ctrl-C, SIGTERM, kill -9; nothing measured is lost and nobody is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import SIMULATED, raw_record


@pytest.fixture
def running(tmp_path):
    """Start a run of some seconds; return it with its worker once the worker measures."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lem.cli", "experiment", *SIMULATED, "-n", "200", "backend.decode_s_per_token=0.002"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stderr:
        if line.startswith("Prompts"):
            break
    (worker,) = psutil.Process(process.pid).children()
    time.sleep(0.5)
    yield process, worker
    process.kill()
    process.communicate()


def kept(tmp_path):
    record = raw_record(tmp_path / "results")
    (row,) = json.loads(
        subprocess.run(
            [sys.executable, "-m", "lem.cli", "results", "list", "--json"],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        ).stdout
    )  # fmt: skip
    return record, row


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_keeps_what_it_measured_and_exits_with_130(running, tmp_path, how):
    process, worker = running
    if how != signal.SIGTERM:
        os.killpg(process.pid, how)  # as a terminal does it: to all at once
    else:
        process.send_signal(how)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert not worker.is_running()
    record, row = kept(tmp_path)
    assert record["status"] == row["status"] == "interrupted"
    assert 0 < record["requests_completed"] < 200
    assert row["requests_completed"] == record["requests_completed"]
    assert row["output_tokens"] == record["output_tokens"] > 0


def test_a_killed_worker_leaves_a_failed_record_that_says_how_it_died(running, tmp_path):
    process, worker = running
    worker.kill()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "SIGKILL" in out
    record, row = kept(tmp_path)
    assert record["status"] == row["status"] == "failed"


def test_a_killed_parent_takes_its_worker_along(running, tmp_path):
    process, worker = running
    process.kill()
    process.wait()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert raw_record(tmp_path / "results")["status"] == "interrupted"


def test_ctrl_c_ends_a_sweep_with_all_that_was_to_come(tmp_path):
    process = subprocess.Popen(
        [
            sys.executable, "-m", "lem.cli", "experiment", *SIMULATED, "-n", "100",
            "backend.decode_s_per_token=0.002", "--multirun", "seed=1,2,3",
        ],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("Prompts"):
            break
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert len(list(tmp_path.glob("results/raw/*"))) == 1


def test_the_waiting_parent_sleeps(running):
    process, _ = running
    parent = psutil.Process(process.pid)
    before = sum(parent.cpu_times()[:2])
    time.sleep(2)
    # A parent that spins would have used two seconds.
    assert sum(parent.cpu_times()[:2]) - before < 0.4
