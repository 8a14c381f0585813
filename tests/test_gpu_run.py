"""Whole runs on a machine with GPUs, as far as that goes without one: the driver's library is a stand-in."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

from lem.aggregate import read_row
from lem.plan import Plan, PromptsInfo, timestamp
from lem.spec import Energy, Experiment, SimulatedBackend
from lem.store import Store
from tests.conftest import command, raw_record
from tests.standin import environment, scenario


@pytest.fixture
def run(standin, tmp_path):
    """Run a simulated experiment of some seconds on a scenario; return its row and its raw record."""

    def go(text: str, *overrides: str, code: int = 0, **env: str):
        variables = environment(standin, scenario(tmp_path / "scenario.txt", text), **env)
        done = command(
            "experiment", "--backend", "simulated", "-m", "any", "-d", "sample", "-n", "30", "-y", "energy=nvml",
            "energy.idle_s=0.5", "backend.decode_s_per_token=0.0006", "warmup.prompts=2", *overrides,
            cwd=tmp_path, **variables,
        )  # fmt: skip
        assert done.code == code, done.out + done.err
        (row,) = pd.read_parquet(tmp_path / "results" / "experiments").to_dict("records")
        return row, raw_record(tmp_path / "results")

    return go


def codes(row):
    return {warning.partition(":")[0] for warning in row["warnings"]}


def test_joules_are_power_times_time_of_the_gpus_in_use_and_no_others(run, tmp_path):
    text = "devices 8\n" + "".join(f"device {i} tick_ms 100\ndevice {i} power constant 200\n" for i in range(8))
    row, record = run(text, "backend.gpus=4")
    assert row["energy_j"] == pytest.approx(4 * 200 * row["duration_s"], rel=0.02)
    assert (row["energy_source"], row["energy_components"], row["energy_scope"]) == ("counter", "gpu", "device")
    assert row["trace_energy_j"] == pytest.approx(row["energy_j"], rel=0.02)
    assert row["counter_tick_s"] == pytest.approx(0.1, rel=0.1)
    assert row["idle_power_before_w"] == pytest.approx(800, rel=0.02)
    assert row["energy_idle_adjusted_j"] == pytest.approx(0, abs=0.04 * row["energy_j"])
    assert row["prefill_energy_j"] == pytest.approx(800 * row["prefill_duration_s"], rel=0.05)
    assert row["prefill_energy_j"] + row["decode_energy_j"] == pytest.approx(row["energy_j"])
    assert len(record["environment"]["devices_before"]) == 4
    power = pd.read_parquet(next(tmp_path.glob("results/raw/*/power_0.parquet")))
    assert set(power["device"]) == {f"GPU-{i:08d}" for i in range(4)}
    assert power["power_w"].eq(200).all()
    assert not codes(row) & {"counter_trace_mismatch", "identity_violated", "energy_missing"}


def test_cuda_visible_devices_decides_which(run):
    text = "devices 3\n" + "".join(f"device {i} power constant {100 * (i + 1)}\n" for i in range(3))
    row, record = run(text, "backend.gpus=1", CUDA_VISIBLE_DEVICES="GPU-00000002,0")
    assert row["energy_j"] == pytest.approx(300 * row["duration_s"], rel=0.02)
    assert record["phases"][-1]["energy"][0]["device"] == "GPU-00000002"


def test_a_gpu_that_is_lost_in_mid_run_is_null_with_a_reason(run):
    row, record = run("devices 1\ndevice 0 tick_ms 100\ndevice 0 lost_after_s 2.5", "backend.gpus=1")
    assert pd.isna(row["energy_j"])
    assert pd.isna(row["energy_per_output_token_j"])
    assert "energy_missing" in codes(row)
    assert "lost" in record["phases"][-1]["energy"][0]["reason"]
    assert row["output_tokens"] > 0


def test_a_mig_instance_is_labelled_as_shared(run):
    row, _ = run("devices 1\ndevice 0 mig 1g.10gb 9728", "backend.gpus=1", CUDA_VISIBLE_DEVICES="MIG-0-0")
    assert row["energy_scope"] == "shared_device"
    assert "energy_shared" in codes(row)


def test_the_state_of_the_machine_becomes_doubts(run):
    text = """
        devices 1
        device 0 temperature 45
        device 0 throttle 0x40 1
        device 0 process 4242 100 stranger
    """
    row, record = run(text, "backend.gpus=1")
    assert {"throttled", "foreign_process", "short_window", "simulated"} <= codes(row)
    (state,) = record["environment"]["devices_after"]
    assert state["temperature_c"] == 45
    assert state["foreign_processes"][0]["pid"] == 4242


def test_a_hot_gpu_is_waited_for_until_patience_ends(run):
    row, _ = run("devices 1\ndevice 0 temperature 80", "backend.gpus=1", "cooldown.to_c=50", "cooldown.max_s=1")
    assert row["status"] == "completed"
    assert "not_cooled_down" in codes(row)


def test_two_processes_share_the_prompts_and_one_of_them_meters(standin, tmp_path):
    prompts = [f"prompt {i}" for i in range(7)]
    store = Store(tmp_path)
    directory = store.claim()
    experiment = Experiment(
        model="any", backend=SimulatedBackend(gpus=1, decode_s_per_token=0.001), energy=Energy(name="nvml", idle_s=0)
    )
    info = PromptsInfo(7, "0" * 64, "p", None, None, 7, 0)
    directory.write_plan(Plan(directory.id, timestamp(), experiment, info, processes=2), prompts)
    variables = environment(standin, scenario(tmp_path / "scenario.txt", "devices 1\ndevice 0 power constant 300"))
    worker = [sys.executable, "-m", "lem.worker", str(directory.path), "--rank"]
    both = [subprocess.Popen([*worker, rank], env=variables) for rank in "01"]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    row, requests = read_row(directory)
    assert sorted(request.request for request in requests) == list(range(7))
    assert row.requests_completed == row.requests_planned == 7
    assert [len(record.phases[-1].energy) for record in directory.records()] == [1, 0]
    owner = directory.records()[0].phases[-1]
    assert row.energy_j == pytest.approx(300 * owner.duration_s, rel=0.05)


def test_more_gpus_than_there_are_is_refused(standin, tmp_path):
    variables = environment(standin, scenario(tmp_path / "scenario.txt", "devices 2"))
    done = command(
        "experiment", "--backend", "simulated", "-m", "any", "-d", "sample", "-y", "backend.gpus=3",
        cwd=tmp_path, **variables,
    )  # fmt: skip
    assert done.code == 2
    assert "3 GPUs are asked for, 2 are visible" in done.err
    assert done.out == ""
