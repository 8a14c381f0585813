"""The contract of the energy meters, and tests of individual meters; those of NVML are in test_gpu.py."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from lem.energy import make_meter
from lem.energy.base import CombinedMeter, NoMeter, OnlyComponents
from lem.energy.rapl import RaplMeter
from lem.energy.replay import ReplayMeter, integral_j, read_trace
from lem.errors import BadInput
from lem.machine import gpu
from lem.results.merging import headline, is_estimated
from lem.spec.conflicts import WITHOUT_SENSORS
from lem.spec.experiment import Energy
from lem.workload.clock import VirtualClock
from tests.energy.test_rapl import RANGE_UJ, USUAL_RANGE_UJ, counting
from tests.nvml_standin import environment, scenario

CONTRACT_METERS = "CONTRACT_METERS"
HERE = ("none", "replay", "simulated", "codecarbon", "auto", "rapl")
# Scenarios for the stand-in driver, which needs a separate process in which this file's contract runs again.
ON_STANDIN = {
    "nvml": """
        devices 4
        device 0 power constant 300
        device 0 tick_ms 100
        device 1 power square 100 400 50
        device 2 no_counter
        device 2 power constant 200
        device 3 no_counter
        device 3 no_power
        device 3 no_instant
    """,
    "auto-gpu": "device 0 power constant 300\ndevice 0 tick_ms 100",
    "zeus": "devices 2\ndevice 0 power constant 300\ndevice 1 power constant 200",
}
UNREADABLE = "GPU-00000003"


@pytest.fixture(scope="module", params=os.environ.get(CONTRACT_METERS, " ".join(HERE)).split())
def meter(request, tmp_path_factory):
    name = request.param.partition("-")[0]
    options = {"name": name}
    if name == "replay":
        options["trace"] = str(tmp_path_factory.mktemp("replay") / "trace.csv")
        Path(options["trace"]).write_text("t_s,power_w,component\n0,100,gpu\n600,100,gpu\n0,30,cpu\n600,30,cpu\n")
    with ExitStack() as imitations:
        if name == "rapl" or request.param == "auto-gpu":
            range_uj = RANGE_UJ if name == "rapl" else USUAL_RANGE_UJ
            tree, _ = imitations.enter_context(counting(tmp_path_factory.mktemp("powercap"), range_uj))
            options["powercap_dir"] = str(tree)
        made = make_meter(Energy(**options), gpu.visible() if request.param in ON_STANDIN else [])
        if name == "rapl":  # these counters wrap around within a second
            made = RaplMeter(options["powercap_dir"], poll_s=0.05)
        made.open()
        made.contract_name = request.param
        yield made
        made.close()


def devices(readings):
    return [(r.component, r.device, r.source, r.scope, r.method) for r in readings]


def is_steady(reading):
    """All imitations are constant; codecarbon's estimate from the CPU's load differs from one window to the next."""
    return (reading.component, reading.scope) != ("cpu", "machine")


class TestContract:
    """The behaviour that every meter guarantees, including the one that reads nothing."""

    def test_windows_follow_one_another_with_the_same_devices(self, meter):
        seen = []
        for _ in range(2):
            meter.begin()
            time.sleep(0.1)
            seen.append(devices(meter.end()))
        assert seen[0] == seen[1]
        assert bool(seen[0]) == (meter.contract_name != "none")

    def test_a_longer_window_takes_more_and_what_is_not_read_has_a_reason(self, meter):
        def window(seconds):
            meter.begin()
            time.sleep(seconds)
            return meter.end()

        for short, long in zip(window(0.15), window(0.8), strict=True):
            assert short.method
            if short.device == UNREADABLE:
                assert (short.energy_j, long.energy_j) == (None, None)
                assert short.reason
            else:
                assert (2 if is_steady(short) else 0) * short.energy_j < long.energy_j
                assert short.energy_j > 0
                assert short.reason is None

    def test_so_far_grows_to_at_most_what_the_window_took(self, meter):
        looks = []
        meter.begin()
        for _ in range(12):
            looks.append(meter.so_far())
            time.sleep(0.1)
        for ended, *column in zip(meter.end(), *looks, strict=True):
            assert {devices([reading])[0] for reading in (ended, *column)} == set(devices([ended]))
            assert all((reading.energy_j is None) != (reading.reason is None) for reading in column)
            grown = [reading.energy_j for reading in column if reading.energy_j is not None]
            # Once energy is known, it stays known: unknown readings come first.
            assert [reading.energy_j for reading in column[len(column) - len(grown) :]] == grown
            assert grown == sorted(grown)
            if ended.device == UNREADABLE:
                assert grown == []
            else:
                least = 0.6 if is_steady(ended) else 0
                assert least * ended.energy_j < grown[-1] <= ended.energy_j * (1 + 1e-9)

    def test_a_window_ends_at_its_first_mark(self, meter):
        def window(*waits_s):
            meter.begin()
            begun_s = time.perf_counter()
            for wait_s in waits_s:
                time.sleep(wait_s)
                meter.mark()
            passed_s = time.perf_counter() - begun_s - sum(waits_s[1:])
            return [r.energy_j / passed_s for r in meter.end() if r.energy_j is not None and is_steady(r)]

        # If the imitation is held up for a moment, that spoils one comparison; an end that is too late spoils all.
        attempts = ((window(0.4, 0.3, 0.1), window(0.4)) for _ in range(3))
        assert any(twice == pytest.approx(once, rel=0.1) for twice, once in attempts)

    def test_so_far_changes_nothing_of_what_the_window_took(self, meter):
        def power_w(look):
            meter.begin()
            begun_s = time.perf_counter()
            while (passed_s := time.perf_counter() - begun_s) < 0.8:
                look()
                time.sleep(0.02)
            return [r.energy_j / passed_s for r in meter.end() if r.energy_j is not None and is_steady(r)]

        # If the imitation is held up for a moment, that spoils one comparison; a disturbance spoils all.
        attempts = ((power_w(meter.so_far), power_w(lambda: None)) for _ in range(3))
        assert any(looked_at == pytest.approx(left_alone, rel=0.05) for looked_at, left_alone in attempts)

    def test_so_far_is_cheap(self, meter):
        meter.begin()
        time.sleep(0.1)
        times_s = []
        for _ in range(100):
            begun_s = time.perf_counter()
            meter.so_far()
            times_s.append(time.perf_counter() - begun_s)
        meter.end()
        print(f"{meter.contract_name}: so_far takes {statistics.median(times_s) * 1e6:.0f} µs")
        assert statistics.median(times_s) < 0.002


CONTRACT_TESTS = [name for name in vars(TestContract) if name.startswith("test_")]


@pytest.mark.processes
@pytest.mark.parametrize("name", ON_STANDIN)
def test_the_contract_holds_on_the_stand_in_driver(standin, tmp_path, name):
    if name.startswith("zeus"):
        pytest.importorskip("zeus", reason="the extra zeus is not installed")
    file = scenario(tmp_path / "scenario.txt", ON_STANDIN[name])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qs", "-p", "no:cacheprovider", f"{__file__}::TestContract"],
        env=environment(standin, file, **{CONTRACT_METERS: name}),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert f"{len(CONTRACT_TESTS)} passed in" in done.stdout


def test_a_meter_without_so_far_leaves_the_combination_without_it():
    class Silent(NoMeter):
        def so_far(self):
            return None

    assert CombinedMeter(NoMeter(), NoMeter()).so_far() == ()
    assert CombinedMeter(NoMeter(), Silent()).so_far() is None
    assert OnlyComponents(Silent(), "cpu").so_far() is None


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


@pytest.mark.parametrize("name", WITHOUT_SENSORS)
def test_a_meter_without_sensors_follows_the_clock_that_it_is_given(tmp_path, name):
    (tmp_path / "trace.csv").write_text("t_s,power_w\n0,100\n100000,100\n")
    trace = {"trace": str(tmp_path / "trace.csv")} if name == "replay" else {}
    meter = make_meter(Energy(name=name, **trace), [])
    meter.clock = VirtualClock()
    meter.open()
    meter.begin()
    meter.clock.sleep(5000)
    assert [reading.energy_j for reading in meter.so_far()] == [reading.energy_j for reading in meter.end()]
    meter.begin()
    meter.clock.sleep(0.5)
    meter.mark()
    meter.clock.sleep(10)
    assert [reading.energy_j for reading in meter.end()] == ([] if name == "none" else [pytest.approx(50, rel=1e-9)])


def test_simulated_energy_is_power_times_time_and_is_called_simulated():
    meter = make_meter(Energy(name="simulated", power_w=321.5), [])
    meter.clock = VirtualClock()
    meter.open()
    meter.begin()
    meter.clock.sleep(20)
    (reading,) = meter.end()
    assert reading.energy_j == pytest.approx(6430, rel=1e-12)
    assert (reading.source, reading.is_measured) == ("simulated", False)
    assert "321.5 W" in reading.method
    assert is_estimated(headline([reading]).source)


def test_replay_is_the_integral_of_its_trace(tmp_path):
    file = tmp_path / "ramp.csv"
    file.write_text("t_s,power_w\n0,0\n10,100\n")
    meter = ReplayMeter(str(file))
    meter.clock = VirtualClock()
    meter.open()
    meter.clock.sleep(2)
    meter.begin()
    meter.clock.sleep(4)
    (reading,) = meter.end()
    # A ramp of 10 W/s, from 20 W to 60 W over 4 s.
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
    assert reading.reason.startswith("the trace ends at 0.050 s, before the window's end at 0.1")


def test_a_trace_that_begins_after_the_window_is_null_with_that_reason(tmp_path):
    file = tmp_path / "late.csv"
    file.write_text("t_s,power_w\n5,5\n60,5\n")
    meter = ReplayMeter(str(file))
    meter.open()
    meter.begin()
    (reading,) = meter.end()
    assert reading.energy_j is None
    assert reading.reason.startswith("the trace begins at 5.000 s, after the window's beginning at 0.00")


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    file = tmp_path / "spreadsheet.csv"
    file.write_text("t_s,power_w\n0,7\n1,7\n", encoding="utf-8-sig")
    assert integral_j(read_trace(file)["gpu"], 0, 1) == pytest.approx(7)


def test_a_module_and_its_gpu_in_one_trace_are_not_added_up(tmp_path):
    file = tmp_path / "module.csv"
    file.write_text("t_s,power_w,component\n0,100,gpu\n60,100,gpu\n0,130,module\n60,130,module\n")
    meter = ReplayMeter(str(file))
    meter.clock = VirtualClock()
    meter.open()
    meter.begin()
    meter.clock.sleep(10)
    energy = headline(meter.end())
    assert (energy.energy_j, energy.components) == (pytest.approx(1300), "module")


def test_a_step_in_the_trace_is_integrated_at_its_samples(tmp_path):
    file = tmp_path / "step.csv"
    file.write_text("t_s,power_w\n0,10\n1,10\n1.0001,110\n3,110\n")
    assert integral_j(read_trace(file)["gpu"], 0.5, 2.0) == pytest.approx(0.5 * 10 + 1.0 * 110, rel=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("t_s;power_w\n0;1\n", "separated by semicolons; separate them with commas"),
        ("t_s,power_w\n0\n", "fewer values than the header has columns"),
        ("time,power_w\n0,1\n", "no column 't_s'"),
        ("t_s,power_w\n0,much\n", "cannot be read"),
        ("t_s,power_w\n0,nan\n", "not a valid sample"),
        ("t_s,power_w\n0,-5\n", "not a valid sample"),
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
