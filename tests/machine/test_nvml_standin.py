"""The stand-in for the driver's library answers the real binding as its scenario says."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest

from tests.nvml_standin import environment, scenario

ASK = """
import json, pynvml as n
n.nvmlInit()
def error(call, *arguments):
    try:
        return call(*arguments)
    except n.NVMLError as refused:
        return str(refused)
gpus = [n.nvmlDeviceGetHandleByIndex(i) for i in range(n.nvmlDeviceGetCount())]
"""


def test_without_a_scenario_there_is_one_default_device(standin):
    code = f"{ASK}\nprint(len(gpus), n.nvmlDeviceGetName(gpus[0]), n.nvmlDeviceGetMemoryInfo(gpus[0]).total)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(standin), capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"1 Stand-in GPU {80 * 2**30}"


def test_the_machine(driver):
    text = "driver 570.12  # with a comment\ncuda 12080\n\ndevices 3"
    found = driver(
        ASK + "print(json.dumps([n.nvmlSystemGetDriverVersion(), n.nvmlSystemGetCudaDriverVersion(),"
        "n.nvmlSystemGetCudaDriverVersion_v2(), len(gpus)]))",
        text,
    )
    assert found == ["570.12", 12080, 12080, 3]


@pytest.mark.parametrize(
    "text", ["devces 2", "device 0 power triangle 1 2", "device 1 tick_ms 100", "devices 99", "device 0 unsupported"]
)
def test_a_scenario_that_is_not_understood_ends_the_process(standin, tmp_path, text):
    file = scenario(tmp_path / "scenario.txt", text)
    done = subprocess.run([sys.executable, "-c", ASK], env=environment(standin, file), capture_output=True, text=True)
    assert done.returncode == 70
    assert str(file) in done.stderr


def test_what_a_device_is(driver):
    found = driver(
        ASK
        + """
gpu = gpus[1]
memory, memory_v2 = n.nvmlDeviceGetMemoryInfo(gpu), n.nvmlDeviceGetMemoryInfo(gpu, version=n.nvmlMemory_v2)
print(json.dumps({
    "name": n.nvmlDeviceGetName(gpu),
    "uuid": n.nvmlDeviceGetUUID(gpu),
    "index": n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByUUID("GPU-00000001")),
    "memory": [[m.total, m.free, m.used] for m in (memory, memory_v2)],
    "compute_capability": n.nvmlDeviceGetCudaComputeCapability(gpu),
    "bus": [n.nvmlDeviceGetPciInfo(gpu).busId, n.nvmlDeviceGetPciInfo(gpu).bus],
    "mig": n.nvmlDeviceGetMigMode(gpu),
    "strangers": [error(n.nvmlDeviceGetHandleByUUID, "GPU-9"), error(n.nvmlDeviceGetHandleByIndex, 9)],
}))
""",
        """
        devices 2
        device 1 name NVIDIA H100 80GB HBM3
        device 1 memory_mib 81559 559
        device 1 compute_capability 8 6
        """,
    )
    mib = 2**20
    assert found == {
        "name": "NVIDIA H100 80GB HBM3",
        "uuid": "GPU-00000001",
        "index": 1,
        "memory": [[81559 * mib, 81000 * mib, 559 * mib]] * 2,
        "compute_capability": [8, 6],
        "bus": ["00000000:02:00.0", 2],
        "mig": [0, 0],
        "strangers": ["Not Found", "Invalid Argument"],
    }


STATE = (
    ASK
    + """
gpu = gpus[0]
print(json.dumps({
    "temperature": [n.nvmlDeviceGetTemperature(gpu, 0), n.nvmlDeviceGetTemperatureV(gpu, 0)],
    "clocks": [n.nvmlDeviceGetClockInfo(gpu, kind) for kind in (n.NVML_CLOCK_SM, n.NVML_CLOCK_MEM)],
    "max_clocks": [n.nvmlDeviceGetMaxClockInfo(gpu, kind) for kind in (n.NVML_CLOCK_GRAPHICS, n.NVML_CLOCK_MEM)],
    "limits": [n.nvmlDeviceGetPowerManagementLimit(gpu), n.nvmlDeviceGetEnforcedPowerLimit(gpu),
               n.nvmlDeviceGetPowerManagementDefaultLimit(gpu)],
    "persistence": n.nvmlDeviceGetPersistenceMode(gpu),
    "reasons": [n.nvmlDeviceGetCurrentClocksEventReasons(gpu), n.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)],
    "ecc": error(n.nvmlDeviceGetEccMode, gpu),
    "processes": [[p.pid, p.usedGpuMemory] for p in n.nvmlDeviceGetComputeRunningProcesses(gpu)],
    "names": [error(n.nvmlSystemGetProcessName, pid) for pid in (11, 12)],
}))
"""
)


def test_how_a_device_is_doing(driver):
    text = """
        device 0 temperature 71
        device 0 clocks 1200 1500
        device 0 max_clocks 1980 2619
        device 0 power_limit 350 700
        device 0 persistence 0
        device 0 throttle 0x24
        device 0 ecc 0
        device 0 process 11 100 python train.py
        device 0 process 12 -
    """
    assert driver(STATE, text) == {
        "temperature": [71, 71],
        "clocks": [1200, 1500],
        "max_clocks": [1980, 2619],
        "limits": [350000, 350000, 700000],
        "persistence": 0,
        "reasons": [0x24, 0x24],
        "ecc": [0, 0],
        "processes": [[11, 100 * 2**20], [12, None]],
        "names": ["python train.py", "Not Found"],
    }


def test_what_comes_later_or_not_at_all(driver):
    found = driver(STATE, "device 0 throttle 0x24 60\ndevice 0 ecc none")
    assert (found["reasons"], found["ecc"], found["processes"]) == ([0, 0], "Not Supported", [])


def test_mig_instances(driver):
    found = driver(
        ASK
        + """
instances = [n.nvmlDeviceGetMigDeviceHandleByIndex(gpus[1], k) for k in range(2)]
by_uuid = n.nvmlDeviceGetHandleByUUID("MIG-1-1")
print(json.dumps({
    "modes": [n.nvmlDeviceGetMigMode(gpu) for gpu in gpus],
    "room": n.nvmlDeviceGetMaxMigDeviceCount(gpus[1]),
    "third": error(n.nvmlDeviceGetMigDeviceHandleByIndex, gpus[1], 2),
    "uuids": [n.nvmlDeviceGetUUID(m) for m in instances],
    "names": [n.nvmlDeviceGetName(m) for m in instances],
    "memory": [n.nvmlDeviceGetMemoryInfo(m).total for m in instances],
    "parent": n.nvmlDeviceGetIndex(n.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(by_uuid)),
    "is_mig": [n.nvmlDeviceIsMigDeviceHandle(m).value for m in (gpus[1], by_uuid)],
    "energy": error(n.nvmlDeviceGetTotalEnergyConsumption, by_uuid),
}))
""",
        """
        devices 2
        device 1 mig 1g.10gb 9728
        device 1 name NVIDIA A100
        device 1 mig 3g.40gb 40192
        """,
    )
    assert found == {
        "modes": [[0, 0], [1, 1]],
        "room": 7,
        "third": "Not Found",
        "uuids": ["MIG-1-0", "MIG-1-1"],
        "names": ["NVIDIA A100 MIG 1g.10gb", "NVIDIA A100 MIG 3g.40gb"],
        "memory": [9728 * 2**20, 40192 * 2**20],
        "parent": 1,
        "is_mig": [0, 1],
        "energy": "Not Supported",
    }


READINGS = (
    ASK
    + """
def field(gpu, number):
    (value,) = n.nvmlDeviceGetFieldValues(gpu, [number])
    return [value.nvmlReturn, value.value.uiVal]
print(json.dumps([[
    error(n.nvmlDeviceGetTotalEnergyConsumption, gpu),
    error(n.nvmlDeviceGetPowerUsage, gpu),
    field(gpu, n.NVML_FI_DEV_POWER_INSTANT),
    error(n.nvmlDeviceGetTemperature, gpu, 0),
] for gpu in gpus]))
"""
)


def test_readings_that_a_device_does_not_have(driver):
    text = """
        devices 2
        device 0 power constant 250
        device 1 no_counter
        device 1 no_power
        device 1 no_instant
        device 1 unsupported nvmlDeviceGetTemperature
    """
    first, second = driver(READINGS, text)
    assert first[0] > 0
    assert first[1:] == [250_000, [0, 250_000], 40]
    assert second == ["Not Supported", "Not Supported", [3, 0], "Not Supported"]


def test_other_fields_are_not_supported_one_by_one(driver):
    code = (
        ASK + "both = n.nvmlDeviceGetFieldValues(gpus[0], [n.NVML_FI_DEV_POWER_INSTANT, n.NVML_FI_DEV_POWER_AVERAGE])\n"
        "print(json.dumps([[v.fieldId, v.nvmlReturn] for v in both]))"
    )
    assert driver(code) == [[186, 0], [185, 3]]


def test_what_lasts_only_for_a_while_and_is_counted(driver):
    found = driver(
        ASK
        + """
import time
def look():
    fields = n.nvmlDeviceGetFieldValues(gpus[0], [n.NVML_FI_DEV_PERF_POLICY_POWER, n.NVML_FI_DEV_PERF_POLICY_THERMAL])
    return [n.nvmlDeviceGetCurrentClocksEventReasons(gpus[0]), [f.nvmlReturn for f in fields],
            fields[0].value.ullVal / 1e9, [p.pid for p in n.nvmlDeviceGetComputeRunningProcesses(gpus[0])]]
looks = []
for _ in range(3):
    looks.append(look())
    time.sleep(0.5)
print(json.dumps(looks))
""",
        "device 0 throttle 0x4 0.3 0.7\ndevice 0 violation 74 0.5\ndevice 0 visitor 0.3 0.7 7 -",
    )
    assert [look[0] for look in found] == [0, 4, 0]
    assert [look[1] for look in found] == [[0, 3]] * 3
    assert [look[2] for look in found] == pytest.approx([0, 0.1, 0.2], abs=0.05)
    assert [look[3] for look in found] == [[], [7], []]


def test_a_counter_may_take_its_time_and_tick_at_another_phase(driver):
    code = (
        ASK
        + """
import time
def poll(gpu):
    begun, value, ended = time.monotonic(), n.nvmlDeviceGetTotalEnergyConsumption(gpu), time.monotonic()
    return [begun, ended, value]
print(json.dumps([poll(gpus[0]) for _ in range(60)]))
"""
    )
    polls = driver(code, "device 0 tick_ms 100 30\ndevice 0 counter_ms 4\ndevice 0 power constant 100")
    assert all(ended - begun > 0.004 for begun, ended, _ in polls)
    for begun, ended, value in polls:
        ticked_s = [0.1 * math.floor((t - 0.03) / 0.1) + 0.03 for t in (begun, ended)]
        assert 1e5 * ticked_s[0] - 1.1 <= value <= 1e5 * ticked_s[1] + 1.1


def test_power_may_be_renewed_now_and_then(driver):
    code = (
        ASK
        + """
import time
found = []
for _ in range(100):
    found.append(n.nvmlDeviceGetFieldValues(gpus[0], [n.NVML_FI_DEV_POWER_INSTANT])[0].value.uiVal)
    time.sleep(0.005)
print(json.dumps(found))
"""
    )
    text = "device 0 power ramp 0 1000 100\ndevice 0 power_update_ms 200"
    assert 2 <= len(set(driver(code, text))) <= 6


def test_a_lost_device_and_its_instances_answer_nothing_and_the_others_do(driver):
    found = driver(
        ASK
        + """
import time
mig = n.nvmlDeviceGetMigDeviceHandleByIndex(gpus[0], 0)
time.sleep(0.6)
print(json.dumps([
    error(n.nvmlDeviceGetName, gpus[0]), error(n.nvmlDeviceGetPowerUsage, gpus[0]), error(n.nvmlDeviceGetUUID, mig),
    error(n.nvmlDeviceGetFieldValues, gpus[0], [n.NVML_FI_DEV_POWER_INSTANT]),
    n.nvmlDeviceGetPowerUsage(gpus[1]), n.nvmlDeviceGetCount(),
]))
""",
        "devices 2\ndevice 0 lost_after_s 0.5\ndevice 0 mig 1g.10gb 9728",
    )
    assert found == ["GPU is lost"] * 4 + [100_000, 2]


def test_the_library_may_refuse_and_counts_its_users(driver):
    code = """
import json, pynvml as n
def error(call):
    try:
        return call()
    except n.NVMLError as refused:
        return str(refused)
first = error(n.nvmlInit)
answers = [first]
if first is None:
    n.nvmlInit(); n.nvmlShutdown()
    answers.append(n.nvmlDeviceGetCount())
    n.nvmlShutdown()
    answers += [error(n.nvmlDeviceGetCount), error(n.nvmlShutdown)]
print(json.dumps(answers))
"""
    assert driver(code) == [None, 1, "Uninitialized", "Uninitialized"]
    assert driver(code, "init_fails 9") == ["Driver Not Loaded"]


# ------------------------------------------------------------------ power over time
def ramp_j(low_w, high_w, period_s, t):
    periods, rest = divmod(t, period_s)
    return periods * period_s * (low_w + high_w) / 2 + low_w * rest + (high_w - low_w) * rest**2 / (2 * period_s)


def square_j(low_w, high_w, frequency_hz, t):
    periods, rest = divmod(t, 1 / frequency_hz)
    half_s = 0.5 / frequency_hz
    return periods * half_s * (low_w + high_w) + low_w * min(rest, half_s) + high_w * max(rest - half_s, 0)


CURVES = {
    "constant 300": lambda t: 300 * t,
    "ramp 100 700 0.77": lambda t: ramp_j(100, 700, 0.77, t),
    "ramp 700 100 1": lambda t: ramp_j(700, 100, 1, t),
    "square 80 650 3.3": lambda t: square_j(80, 650, 3.3, t),
}
TICK_S = 0.1
COUNTERS = (
    ASK
    + """
import time
def read(gpu):
    while True:  # until no tick falls between the clock and the counter
        before, counter, after = time.monotonic(), n.nvmlDeviceGetTotalEnergyConsumption(gpu), time.monotonic()
        if before // 0.1 == after // 0.1:
            return [before, counter]
print(json.dumps([[read(gpu), time.sleep(0.23), read(gpu)] for gpu in gpus]))
"""
)


def test_the_counter_is_the_integral_up_to_the_last_tick(driver):
    lines = [f"devices {len(CURVES)}"]
    lines += [f"device {i} power {curve}\ndevice {i} tick_ms 100" for i, curve in enumerate(CURVES)]
    windows = driver(COUNTERS, "\n".join(lines))
    for ((begun_s, begun_mj), _, (ended_s, ended_mj)), integral_j in zip(windows, CURVES.values(), strict=True):
        ticks_s = [math.floor(t / TICK_S) * TICK_S for t in (begun_s, ended_s)]
        assert ticks_s[1] > ticks_s[0]
        assert ended_mj - begun_mj == pytest.approx(1e3 * (integral_j(ticks_s[1]) - integral_j(ticks_s[0])), abs=1.1)


def test_the_counter_stands_still_between_ticks(driver):
    code = ASK + "print(json.dumps([n.nvmlDeviceGetTotalEnergyConsumption(gpus[0]) for _ in range(2000)]))"
    values = driver(code, "device 0 tick_ms 100")
    assert len(set(values)) <= 3
    steps = {after - before for before, after in itertools.pairwise(values)} - {0}
    assert all(step == pytest.approx(10_000, abs=1) for step in steps)


def test_instant_power_follows_the_curve_and_usage_its_mean(driver):
    found = driver(
        ASK
        + """
import time
def instant(gpu):
    return n.nvmlDeviceGetFieldValues(gpu, [n.NVML_FI_DEV_POWER_INSTANT])[0].value.uiVal
print(json.dumps([[time.monotonic(), instant(gpus[0]), time.monotonic(), n.nvmlDeviceGetPowerUsage(gpus[0])]
                  for _ in range(50)]))
""",
        "device 0 power ramp 0 1000 5\ndevice 0 average_s 5",
    )
    for before_s, instant_mw, after_s, usage_mw in found:
        low, high = (1e6 * ((t % 5) / 5) for t in (before_s, after_s))
        assert low - 1 <= instant_mw <= high + 1 or low > high  # the ramp may drop between reading the two clocks
        assert usage_mw == pytest.approx(500_000, abs=2)  # a whole period


def test_a_reloaded_driver_counts_from_zero(driver):
    code = (
        ASK + "import time\nread = lambda: n.nvmlDeviceGetTotalEnergyConsumption(gpus[0])\n"
        "before = read(); time.sleep(0.7); print(json.dumps([before, read()]))"
    )
    before, after = driver(code, "device 0 power constant 1000\ncounter_reset_after_s 0.5")
    assert 190_000 < after < 2_000_000 < before  # the machine has been up for longer than that
