"""`lem gpus`, and the states of devices, through the real binding on a stand-in for the driver's library."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.cli.test_cli import HEAVY, modules_after
from tests.conftest import command
from tests.nvml_standin import environment, scenario

MACHINE = """
    driver 580.65.06
    cuda 12080
    devices 3
    device 0 name NVIDIA A100-PCIE-40GB
    device 0 memory_mib 40536
    device 0 power_limit 250
    device 1 name NVIDIA A100-PCIE-40GB
    device 1 memory_mib 40536
    device 1 unsupported nvmlDeviceGetEnforcedPowerLimit
    device 1 mig 1g.5gb 4864
    device 1 mig 2g.10gb 9856
    device 2 name NVIDIA A100-PCIE-40GB
    device 2 memory_mib 40536
    device 2 mig 3g.20gb 19968
"""
TREE = """\
GPU Topology (3 device(s) detected)
├── [0] NVIDIA A100-PCIE-40GB (40GB) - Full GPU, power limit 250 W, GPU-00000000
├── [1] NVIDIA A100-PCIE-40GB (40GB) - MIG Enabled (2 instances), GPU-00000001
│   ├── 1g.5gb, 4864 MiB, MIG-1-0
│   └── 2g.10gb, 9856 MiB, MIG-1-1
└── [2] NVIDIA A100-PCIE-40GB (40GB) - MIG Enabled (1 instance), power limit 400 W, GPU-00000002
    └── 3g.20gb, 19968 MiB, MIG-2-0
Driver 580.65.06, CUDA up to 12.8
"""
HIDDEN = ", hidden by CUDA_VISIBLE_DEVICES"


@pytest.fixture
def gpus(standin, tmp_path, monkeypatch):
    """Return a function that runs `lem gpus` on a scenario."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def run(text: str, *arguments: str, **env: str):
        file = scenario(tmp_path / "scenario.txt", text)
        done = command("gpus", *arguments, cwd=tmp_path, **environment(standin, file, **env))
        assert (done.code, done.err) == (0, "")
        return done.out

    return run


@pytest.fixture
def no_driver(monkeypatch):
    """Skip if the machine has a driver."""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    code = "import ctypes; ctypes.CDLL('libnvidia-ml.so.1')"
    if subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0:
        pytest.skip("this machine has an NVIDIA driver")


# ------------------------------------------------------------------ the tree
def test_the_tree_with_mig_instances_under_their_gpus(gpus):
    assert gpus(MACHINE) == TREE


@pytest.mark.parametrize(
    ("variable", "hidden"),
    [
        ("0", ["GPU-00000001", "GPU-00000002"]),
        ("2,0", ["GPU-00000001"]),
        ("GPU-00000001", ["GPU-00000000", "GPU-00000002"]),
        ("MIG-1-1", ["GPU-00000000", "MIG-1-0", "GPU-00000002"]),
        ("MIG-1-1,2", ["GPU-00000000", "MIG-1-0"]),
        ("1,7,0", ["GPU-00000000", "GPU-00000002"]),  # CUDA stops at the first entry that matches no device
        ("", ["GPU-00000000", "GPU-00000001", "GPU-00000002"]),
    ],
)
def test_what_the_variable_hides_is_marked_and_shown(gpus, variable, hidden):
    shown = gpus(MACHINE, CUDA_VISIBLE_DEVICES=variable)
    marked = [line.removesuffix(HIDDEN).split()[-1] for line in shown.splitlines() if line.endswith(HIDDEN)]
    assert marked == hidden
    assert shown.replace(HIDDEN, "") == TREE


def test_a_lost_gpu_is_shown_as_such_beside_the_others(gpus):
    first, lost, last = gpus("devices 3\ndevice 1 lost_after_s 0").splitlines()[1:4]
    assert lost == "├── [1] does not respond: GPU is lost"
    assert first.startswith("├── [0] Stand-in GPU (80GB) - Full GPU")
    assert last.startswith("└── [2] Stand-in GPU (80GB) - Full GPU")


def test_what_a_driver_does_not_report_is_left_out(gpus):
    text = "\n".join(
        f"device 0 unsupported nvmlDeviceGet{what}"
        for what in ("MemoryInfo", "EnforcedPowerLimit", "MigMode", "MaxMig")
    )
    assert gpus(text).splitlines()[1] == "└── [0] Stand-in GPU - Full GPU, GPU-00000000"


def test_a_driver_without_devices_is_one_sentence(gpus):
    assert gpus("devices 0\ndriver 570.1") == "The NVIDIA driver 570.1 reports no GPU.\n"


def test_a_driver_that_does_not_start_is_one_sentence(gpus):
    assert gpus("init_fails 9").startswith(
        "No GPUs to show: this machine has no NVIDIA driver, or the driver does not respond"
    )


@pytest.mark.usefixtures("no_driver")
def test_no_driver_is_one_sentence(lem):
    done = lem("gpus")
    assert done.code == 0
    assert done.out.startswith("No GPUs to show")
    assert len(done.out.splitlines()) == 1


# ------------------------------------------------------------------ as JSON
def test_json_has_everything_with_its_unit(gpus):
    shown = json.loads(gpus(MACHINE, "--json", CUDA_VISIBLE_DEVICES="0,MIG-1-1"))
    assert (shown["driver_version"], shown["cuda_version"]) == ("580.65.06", "12.8")
    first, second, third = shown["gpus"]
    assert first == {
        "index": 0,
        "uuid": "GPU-00000000",
        "name": "NVIDIA A100-PCIE-40GB",
        "memory_bytes": 40536 * 2**20,
        "power_limit_w": 250.0,
        "mig": False,
        "visible": True,
        "instances": [],
        "reason": None,
    }
    assert (second["power_limit_w"], second["mig"], second["visible"]) == (None, True, True)
    assert [(i["uuid"], i["profile"], i["visible"]) for i in second["instances"]] == [
        ("MIG-1-0", "1g.5gb", False),
        ("MIG-1-1", "2g.10gb", True),
    ]
    assert second["instances"][1]["memory_bytes"] == 9856 * 2**20
    assert second["instances"][1]["name"] == "NVIDIA A100-PCIE-40GB MIG 2g.10gb"
    assert (third["visible"], third["instances"][0]["visible"]) == (False, False)


def test_json_of_a_lost_gpu_is_null_with_a_reason(gpus):
    (lost,) = json.loads(gpus("device 0 lost_after_s 0", "--json"))["gpus"]
    assert lost["reason"] == "GPU is lost"
    assert {lost[name] for name in ("uuid", "name", "memory_bytes", "power_limit_w", "mig")} == {None}


@pytest.mark.usefixtures("no_driver")
def test_json_without_a_driver(lem):
    assert json.loads(lem("gpus", "--json").out) == {"driver_version": None, "cuda_version": None, "gpus": []}


# ------------------------------------------------------------------ the state of a device
STATES = """
    import json
    from msgspec import to_builtins
    from lem.machine import gpu
    print(json.dumps([to_builtins(gpu.state(f"GPU-{i:08d}")) for i in range(gpu_count)]))
"""


def states(driver, text: str, gpu_count: int = 1):
    return driver(STATES.replace("gpu_count", str(gpu_count)), text)


def test_the_state_of_a_device(driver):
    (state,) = states(
        driver,
        """
        device 0 temperature 71
        device 0 clocks 1200 1500
        device 0 max_clocks 1980 2619
        device 0 power_limit 350 700
        device 0 persistence 0
        device 0 throttle 0x25
        device 0 process self 500 python
        device 0 process 11 100 python train.py
        device 0 process 12 -
        """,
    )
    assert state == {
        "uuid": "GPU-00000000",
        "sm_clock_mhz": 1200,
        "memory_clock_mhz": 1500,
        "max_sm_clock_mhz": 1980,
        "temperature_c": 71,
        "power_limit_w": 350.0,
        "default_power_limit_w": 700.0,
        "persistence": False,
        "ecc": True,
        "mig": False,
        "throttle_reasons": ["sw_power_cap", "sw_thermal_slowdown"],  # being idle (1) is not a reason
        "foreign_processes": [
            {"pid": 11, "used_bytes": 100 * 2**20, "name": "python train.py"},
            {"pid": 12, "used_bytes": None, "name": None},
        ],
    }


@pytest.mark.parametrize(
    ("mask", "reasons"),
    [
        ("0", []),
        ("1", []),
        ("0x02", ["applications_clocks_setting"]),
        ("0x48", ["hw_slowdown", "hw_thermal_slowdown"]),
        ("0x90", ["sync_boost", "hw_power_brake_slowdown"]),
    ],
)
def test_throttle_reasons_are_named(driver, mask, reasons):
    assert states(driver, f"device 0 throttle {mask}")[0]["throttle_reasons"] == reasons


def test_an_older_driver_knows_throttle_reasons_by_their_older_name(driver):
    text = "device 0 throttle 4\ndevice 0 unsupported nvmlDeviceGetCurrentClocksEventReasons"
    assert states(driver, text)[0]["throttle_reasons"] == ["sw_power_cap"]


def test_what_the_driver_does_not_report_is_none(driver):
    unsupported = (
        "ClockInfo", "MaxClockInfo", "Temperature", "EnforcedPowerLimit", "PowerManagementDefaultLimit",
        "PersistenceMode", "MigMode", "CurrentClocks", "ComputeRunningProcesses",
    )  # fmt: skip
    text = "\n".join(f"device 0 unsupported nvmlDeviceGet{what}" for what in unsupported) + "\ndevice 0 ecc none"
    (state,) = states(driver, text)
    assert state.pop("uuid") == "GPU-00000000"
    assert set(state.values()) == {None}


def test_one_silent_field_leaves_the_others(driver):
    (state,) = states(driver, "device 0 ecc none")
    assert state["ecc"] is None
    assert all(value is not None for name, value in state.items() if name != "ecc")


def test_lost_and_unknown_devices_have_a_state_of_nones(driver):
    for state in states(driver, "devices 1\ndevice 0 lost_after_s 0", gpu_count=2):
        state.pop("uuid")
        assert set(state.values()) == {None}


def test_a_device_in_mig_mode_says_so(driver):
    plain, mig = states(driver, "devices 2\ndevice 1 mig 1g.10gb 9728", gpu_count=2)
    assert (plain["mig"], mig["mig"]) == (False, True)


@pytest.mark.usefixtures("no_driver")
def test_without_a_driver_a_state_is_all_none():
    from lem.machine import gpu
    from lem.record import DeviceState

    assert gpu.state("GPU-1") == DeviceState("GPU-1")
    assert gpu.topology() is None


# ------------------------------------------------------------------ robustness
def test_the_command_imports_nothing_heavy_but_the_binding(standin, tmp_path, monkeypatch):
    for name, value in environment(standin, scenario(tmp_path / "scenario.txt", MACHINE)).items():
        monkeypatch.setenv(name, value)
    assert not modules_after("gpus", cwd=tmp_path) & (set(HEAVY) - {"pynvml"})


def test_the_variable_is_read_and_never_written(driver):
    asked = driver(
        """
        import json, os
        from lem.machine import gpu
        from lem.cli.listing import show_gpus
        import contextlib, io
        with contextlib.redirect_stdout(io.StringIO()):
            show_gpus(); show_gpus(as_json=True)
        gpu.visible(); gpu.state("GPU-00000000")
        print(json.dumps(os.environ["CUDA_VISIBLE_DEVICES"]))
        """,
        MACHINE,
        CUDA_VISIBLE_DEVICES="2, MIG-1-1",
    )
    assert asked == "2, MIG-1-1"
    before = dict(os.environ)
    from lem.machine import gpu

    gpu.topology()
    assert dict(os.environ) == before


def test_no_line_ends_in_a_space(gpus):
    assert not [line for line in gpus(MACHINE, CUDA_VISIBLE_DEVICES="0").splitlines() if line != line.rstrip()]
