"""Tests on a real NVIDIA GPU: `pytest -m gpu`; on other machines they are skipped, with the reason."""

from __future__ import annotations

import json
import time

import pytest

from lem.energy.nvml import NvmlMeter
from lem.machine import gpu
from tests.conftest import command, raw_record

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu.visible(), reason="no NVIDIA GPU is visible"),
]


def test_a_run_on_the_gpu_is_metered_by_its_counter(tmp_path):
    done = command(
        "experiment", "-m", "tiny", "-d", "sample", "-n", "200", "--max-tokens", "64", "batching.batch_size=8", "-y",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.out + done.err
    (row,) = json.loads(command("results", "list", "--json", cwd=tmp_path).out)
    assert (row["energy_components"], row["energy_source"]) == ("gpu", "counter")
    assert row["gpu_energy_j"] == row["energy_j"] > 0
    assert 20 < row["average_power_w"] < 1500
    assert row["peak_memory_scope"] == "GPU allocator, measured window"
    readings = raw_record(tmp_path / "results")["phases"][-1]["energy"]
    assert [r["device"] for r in readings if r["component"] == "gpu"] == [gpu.visible()[0].uuid]


def test_lem_gpus_shows_the_device(tmp_path):
    shown = command("gpus", cwd=tmp_path)
    assert shown.code == 0
    assert gpu.visible()[0].name in shown.out


def test_counter_and_trace_agree_on_a_real_load():
    import torch

    meter = NvmlMeter(gpu.visible()[:1])
    meter.open()
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    meter.begin()
    until_s = time.monotonic() + 20
    while time.monotonic() < until_s:
        for _ in range(50):
            a @ a
        torch.cuda.synchronize()
    (reading,) = meter.end()
    meter.close()
    assert reading.source == "counter"
    assert reading.trace_energy_j == pytest.approx(reading.energy_j, rel=0.05)
