"""The contract of the energy meters, and what is particular to each; NVML's is in test_gpu.py."""

from __future__ import annotations

import time

import pytest

from lem.energy import make_meter
from lem.energy.replay import ReplayMeter, integral_j, read_trace
from lem.errors import BadInput
from lem.spec import Energy


@pytest.fixture
def trace(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("t_s,power_w,component\n0,100,gpu\n60,100,gpu\n0,30,cpu\n60,30,cpu\n")
    return str(file)


@pytest.fixture(params=["none", "replay", "codecarbon", "auto"])
def meter(request, trace):
    made = make_meter(Energy(name=request.param, trace=trace if request.param == "replay" else None), [])
    made.open()
    yield made
    made.close()


def test_windows_follow_one_another_with_the_same_devices(meter):
    devices = []
    for _ in range(2):
        meter.begin()
        time.sleep(0.1)
        devices.append([(r.component, r.device) for r in meter.end()])
    assert devices[0] == devices[1]


def test_every_reading_is_a_positive_number_or_has_a_reason(meter):
    meter.begin()
    time.sleep(0.3)
    for reading in meter.end():
        assert reading.method
        if reading.energy_j is None:
            assert reading.reason
        else:
            assert reading.energy_j > 0
            assert reading.reason is None


def test_a_longer_window_takes_more(meter):
    def window(seconds):
        meter.begin()
        time.sleep(seconds)
        return sum(r.energy_j or 0 for r in meter.end())

    short, long = window(0.1), window(0.6)
    assert long > 3 * short or long == short == 0


def test_codecarbons_values_are_labelled_as_what_they_are():
    meter = make_meter(Energy(name="codecarbon"), [])
    meter.open()
    meter.begin()
    time.sleep(0.2)
    cpu, dram = meter.end()
    meter.close()
    assert (cpu.component, dram.component) == ("cpu", "dram")
    assert dram.source == "estimate"
    assert cpu.source == ("counter" if "RAPL" in cpu.method else "estimate")
    assert "W rated for" in cpu.method or "RAPL" in cpu.method


def test_replay_is_the_integral_of_its_trace(tmp_path):
    file = tmp_path / "ramp.csv"
    file.write_text("t_s,power_w\n0,0\n10,100\n")
    now_ns = [0]
    meter = ReplayMeter(str(file), clock_ns=lambda: now_ns[0])
    meter.open()
    now_ns[0] = int(2e9)
    meter.begin()
    now_ns[0] = int(6e9)
    (reading,) = meter.end()
    # A ramp of 10 W/s from 20 W to 60 W over 4 s.
    assert reading.energy_j == pytest.approx(160)
    assert reading.source == "replay"


def test_replay_beyond_its_trace_is_null_with_a_reason(tmp_path):
    file = tmp_path / "short.csv"
    file.write_text("t_s,power_w\n0,5\n0.05,5\n")
    meter = ReplayMeter(str(file))
    meter.open()
    meter.begin()
    time.sleep(0.1)
    (reading,) = meter.end()
    assert reading.energy_j is None
    assert "ends before" in reading.reason


def test_a_step_in_the_trace_is_integrated_at_its_samples(tmp_path):
    file = tmp_path / "step.csv"
    file.write_text("t_s,power_w\n0,10\n1,10\n1.0001,110\n3,110\n")
    assert integral_j(read_trace(file)["gpu"], 0.5, 2.0) == pytest.approx(0.5 * 10 + 1.0 * 110, rel=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("time,power_w\n0,1\n", "no column 't_s'"),
        ("t_s,power_w\n0,much\n", "cannot be read"),
        ("t_s,power_w\n0,nan\n", "no power"),
        ("t_s,power_w\n0,-5\n", "no power"),
        ("t_s,power_w\n", "no samples"),
        ("t_s,power_w,component\n0,1,fan\n", "unknown component 'fan'"),
    ],
)
def test_a_faulty_trace_is_named_with_what_is_wrong(tmp_path, content, message):
    file = tmp_path / "trace.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadInput, match=message):
        read_trace(file)


def test_auto_takes_rapl_where_it_can_be_read_and_estimates_only_what_is_left(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, content in {"name": "package-0", "energy_uj": "1000", "max_energy_range_uj": "262143328850"}.items():
        (zone / name).write_text(content + "\n")
    meter = make_meter(Energy(powercap_dir=str(tmp_path)), [])
    meter.open()
    meter.begin()
    (zone / "energy_uj").write_text("5001000\n")
    time.sleep(0.2)
    readings = meter.end()
    meter.close()
    assert [(r.component, r.source) for r in readings] == [("cpu", "counter"), ("dram", "estimate")]
    assert readings[0].energy_j == pytest.approx(5.0)
