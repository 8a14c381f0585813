"""GPU discovery and the NVML meter, through the real binding on a stand-in for the driver's library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """Build the stand-in and return a function that runs Python code on it and returns what it prints as JSON."""
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(library), str(HERE / "nvml_standin.c")], check=True)

    def run(code: str, **env: str):
        clean = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, "LD_LIBRARY_PATH": str(folder), **env},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    return run


VISIBLE = """
import json
from lem import gpu
print(json.dumps([[g.index, g.uuid, g.mig_uuid] for g in gpu.visible()]))
"""

WINDOW = """
import json, time
from dataclasses import asdict
from lem import gpu
from lem.energy.nvml import NvmlMeter
meter = NvmlMeter(gpu.visible())
meter.open()
meter.begin(); start = time.perf_counter()
time.sleep(0.5)
readings = meter.end(); seconds = time.perf_counter() - start
meter.close()
print(json.dumps({"readings": [asdict(r) for r in readings], "seconds": seconds}))
"""


def test_all_gpus_are_visible_without_the_variable(driver):
    assert driver(VISIBLE, STANDIN_GPUS="3") == [[i, f"GPU-{i:08d}", None] for i in range(3)]


@pytest.mark.parametrize(
    ("variable", "indices"),
    [
        ("2,0", [2, 0]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("GPU-00000003,GPU-00000001", [3, 1]),
        ("1,9,0", [1]),  # CUDA stops at the first entry that names no device
    ],
)
def test_the_variable_chooses_and_orders_gpus(driver, variable, indices):
    assert [index for index, *_ in driver(VISIBLE, STANDIN_GPUS="4", CUDA_VISIBLE_DEVICES=variable)] == indices


def test_a_mig_uuid_stands_for_its_parent_and_is_remembered(driver):
    assert driver(VISIBLE, STANDIN_GPUS="2", CUDA_VISIBLE_DEVICES="MIG-0") == [[0, "GPU-00000000", "MIG-0"]]


def test_a_window_is_power_times_time_for_each_gpu(driver):
    window = driver(WINDOW, STANDIN_GPUS="2", STANDIN_POWER_W="300")
    assert [r["device"] for r in window["readings"]] == ["GPU-00000000", "GPU-00000001"]
    for reading in window["readings"]:
        assert reading["energy_j"] == pytest.approx(300 * window["seconds"], rel=0.02)
        assert (reading["component"], reading["source"], reading["scope"]) == ("gpu", "counter", "device")


def test_only_visible_gpus_are_metered(driver):
    window = driver(WINDOW, STANDIN_GPUS="8", CUDA_VISIBLE_DEVICES="5,6")
    assert [r["device"] for r in window["readings"]] == ["GPU-00000005", "GPU-00000006"]


def test_two_instances_of_one_gpu_are_one_counter_labelled_as_shared(driver):
    (reading,) = driver(WINDOW, STANDIN_GPUS="1", CUDA_VISIBLE_DEVICES="MIG-0,MIG-0")["readings"]
    assert reading["scope"] == "shared_device"


def test_a_gpu_without_a_counter_is_null_with_a_reason_and_not_zero(driver):
    first, second = driver(WINDOW, STANDIN_GPUS="2", STANDIN_NO_COUNTER="1")["readings"]
    assert first["energy_j"] > 0
    assert second["energy_j"] is None
    assert "Not Supported" in second["reason"]


def test_a_gpu_lost_during_the_window_is_null_with_a_reason(driver):
    (reading,) = driver(WINDOW, STANDIN_GPUS="1", STANDIN_LOST_AFTER_S="0")["readings"]
    assert reading["energy_j"] is None
    assert "lost" in reading["reason"]


def test_auto_joins_the_gpu_counter_and_the_cpu_estimate(driver):
    components = driver(
        """
import json, time
from lem import gpu
from lem.energy import make_meter
from lem.spec import Energy
meter = make_meter(Energy(), gpu.visible())
meter.open(); meter.begin(); time.sleep(1.2); readings = meter.end(); meter.close()
print(json.dumps([[r.component, r.source] for r in readings]))
""",
        STANDIN_GPUS="1",
    )
    assert components[0] == ["gpu", "counter"]
    assert [component for component, _ in components] == ["gpu", "cpu", "dram"]


def test_without_a_driver_there_are_no_gpus():
    done = subprocess.run(
        [sys.executable, "-c", "from lem import gpu; print(gpu.installed())"],
        env={**os.environ, "LD_LIBRARY_PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GPU-" in done.stdout:
        pytest.skip("this machine has an NVIDIA driver")
    assert done.stdout.strip() == "[]"
