"""The RAPL meter on a tree like the kernel's: wrap-arounds, and zones that must not be counted.

test_energy.py runs the meters' contract on the same tree.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lem.energy.rapl import RaplMeter, find_zones, increase_uj, readable, step_uj
from lem.errors import BadInput

# Zone, its name, and its power in the tests with a writer. Two packages with memory; zones that are inside a package or
# show it a second time have different powers, so that counting them would change the sum.
ZONES = {
    "intel-rapl/intel-rapl:0": ("package-0", 600),
    "intel-rapl/intel-rapl:0/intel-rapl:0:0": ("core", 400),
    "intel-rapl/intel-rapl:0/intel-rapl:0:1": ("uncore", 50),
    "intel-rapl/intel-rapl:0/intel-rapl:0:2": ("dram", 60),
    "intel-rapl/intel-rapl:1": ("package-1", 450),
    "intel-rapl/intel-rapl:1/intel-rapl:1:0": ("core", 300),
    "intel-rapl/intel-rapl:1/intel-rapl:1:1": ("dram", 45),
    "intel-rapl/intel-rapl:2": ("psys", 1300),
    "intel-rapl-mmio/intel-rapl-mmio:0": ("package-0", 600),
    "intel-rapl-mmio/intel-rapl-mmio:0/intel-rapl-mmio:0:0": ("dram", 60),
}
COUNTED = ["intel-rapl:0 package-0", "intel-rapl:1 package-1", "intel-rapl:0:2 dram", "intel-rapl:1:1 dram"]
# Intel's usual range: 262 kJ.
USUAL_RANGE_UJ = 262_143_328_850
# 500 J: the first package wraps at least twice in 2 s, and the meter may pause for 0.5 s.
RANGE_UJ = 500_000_000
START_UJ = 450_000_000

# Counts at constant power until its stdin closes; `truth` is the count without wrapping.
WRITER = """
import json, os, select, sys, time
from pathlib import Path

truth, turn_uj, start_uj, powers_w = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])

def replace(path, text):
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)

begun_s = time.perf_counter()
while not select.select([sys.stdin], [], [], 0.004)[0]:
    passed_s = time.perf_counter() - begun_s
    for directory, power_w in powers_w.items():
        replace(Path(directory, "energy_uj"), f"{(start_uj + int(power_w * passed_s * 1e6)) % turn_uj}\\n")
    replace(truth, repr(passed_s))
"""


def build(root: Path, range_uj: int = RANGE_UJ, energy_uj: int = START_UJ) -> Path:
    """Make a tree as in sysfs: zones nested below devices/, and beside one another as links below class/."""
    devices, flat = root / "devices/virtual/powercap", root / "class/powercap"
    flat.mkdir(parents=True)
    for path, (name, _) in ZONES.items():
        zone = devices / path
        zone.mkdir(parents=True)
        (zone / "name").write_text(f"{name}\n")
        (zone / "max_energy_range_uj").write_text(f"{range_uj}\n")
        (zone / "energy_uj").write_text(f"{energy_uj}\n")
        (flat / zone.name).symlink_to(Path("../../devices/virtual/powercap") / path)
    for control_type in ("intel-rapl", "intel-rapl-mmio"):
        (flat / control_type).symlink_to(Path("../../devices/virtual/powercap") / control_type)
    return flat


@pytest.fixture
def tree(tmp_path):
    """A tree whose counters stand still."""
    return build(tmp_path)


@contextmanager
def counting(root: Path, range_uj: int = RANGE_UJ) -> Iterator[tuple[Path, Callable[[], float]]]:
    """Create a tree whose counters advance; yield it and a function that returns for how many seconds they have run."""
    flat, truth = build(root, range_uj), root / "truth"
    powers_w = {str(root / "devices/virtual/powercap" / path): power_w for path, (_, power_w) in ZONES.items()}
    arguments = [str(truth), str(range_uj + step_uj(range_uj)), str(START_UJ), json.dumps(powers_w)]
    with subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdin=subprocess.PIPE) as writer:
        while not truth.exists():
            assert writer.poll() is None
            time.sleep(0.01)
        yield flat, lambda: float(truth.read_text())
        writer.stdin.close()


@pytest.fixture
def running(tmp_path):
    """A tree whose counters advance, and a function that returns for how many seconds they have run."""
    with counting(tmp_path) as tree_and_seconds:
        yield tree_and_seconds


@pytest.fixture
def opened():
    """Open meters, which are closed at the end."""
    meters = []

    def open_(*args, **kwargs):
        meters.append(RaplMeter(*map(str, args), **kwargs))
        meters[-1].open()
        return meters[-1]

    yield open_
    for meter in meters:
        meter.close()


def advance(tree: Path, zone: str, by_uj: int) -> None:
    file = tree / zone / "energy_uj"
    file.write_text(f"{(int(file.read_text()) + by_uj) % (RANGE_UJ + 1)}\n")


def advance_all(tree: Path, by_uj: int) -> None:
    for path in ZONES:
        advance(tree, Path(path).name, by_uj)


def test_so_far_is_exact_and_changes_nothing(tree, opened):
    meter = opened(tree)
    meter.begin()
    assert [r.energy_j for r in meter.so_far()] == [None] * 4
    for _ in range(3):
        advance_all(tree, RANGE_UJ - 1)  # two wrap-arounds
        meter.so_far()
    assert [r.energy_j for r in meter.so_far()] == [3 * (RANGE_UJ - 1) / 1e6] * 4
    advance_all(tree, 1_000_000)
    assert [r.energy_j for r in meter.end()] == [3 * (RANGE_UJ - 1) / 1e6 + 1] * 4


def test_joules_over_several_wrap_arounds_are_the_writers(running, opened):
    tree, seconds = running
    meter = opened(tree, poll_s=0.05)
    meter.begin()
    begun_s = seconds()
    time.sleep(2.0)
    readings = meter.end()
    passed_s = seconds() - begun_s
    assert passed_s > 1.8
    powers_w = {f"{Path(path).name} {name}": power_w for path, (name, power_w) in ZONES.items()}
    assert [r.device for r in readings] == COUNTED
    for reading in readings:
        assert reading.energy_j == pytest.approx(powers_w[reading.device] * passed_s, rel=0.03)
    # Nothing is counted twice: the CPU energy is the sum of the two packages.
    cpu_j = sum(r.energy_j for r in readings if r.component == "cpu")
    assert cpu_j == pytest.approx((600 + 450) * passed_s, rel=0.03)


def test_wrap_arounds_that_were_not_read_are_null_with_a_reason(running, opened):
    meter = opened(running[0], poll_s=3600)
    meter.begin()
    time.sleep(0.8)
    for reading in meter.end():
        assert reading.energy_j is None
        assert "may have wrapped around unnoticed" in reading.reason


def test_the_gap_allowed_is_measured_by_the_meters_clock(tree, opened):
    now_ns = [0]
    meter = opened(tree, poll_s=3600, clock_ns=lambda: now_ns[0])
    for gap_ns, is_known in ((490_000_000, True), (510_000_000, False)):
        meter.begin()
        advance_all(tree, 1000)
        now_ns[0] += gap_ns
        assert {r.energy_j is not None for r in meter.end()} == {is_known}


def test_readings_say_what_they_are(tree, opened):
    meter = opened(tree)
    meter.begin()
    advance_all(tree, 2_500_000)
    readings = meter.end()
    assert [r.device for r in readings] == COUNTED
    assert [r.component for r in readings] == ["cpu", "cpu", "dram", "dram"]
    for reading in readings:
        assert (reading.source, reading.scope, reading.resolution_j) == ("counter", "package", 1e-6)
        assert reading.device in reading.method
        assert reading.energy_j == 2.5


def test_a_wrap_around_is_exact(tree, opened):
    meter = opened(tree)
    meter.begin()
    advance_all(tree, RANGE_UJ - 1)
    assert [r.energy_j for r in meter.end()] == [(RANGE_UJ - 1) / 1e6] * 4


@pytest.mark.parametrize(
    ("range_uj", "step"),
    [(262_143_328_850, 61), (65_532_610_987, 15), (5_000_000, 1)],  # Intel's usual range, AMD's, and a test's
)
def test_a_whole_turn_of_a_counter_is_its_range_and_a_step(range_uj, step):
    assert step_uj(range_uj) == step
    assert increase_uj(range_uj, 0, range_uj) == step
    assert increase_uj(range_uj - 10 * step, 4 * step, range_uj) == 15 * step
    assert increase_uj(7, 7, range_uj) == 0


def test_a_counter_that_is_reset_is_null_and_not_almost_a_whole_turn(tmp_path, opened):
    tree = build(tmp_path, USUAL_RANGE_UJ)
    meter = opened(tree)
    meter.begin()
    for zone in ("intel-rapl:0", "intel-rapl:1"):
        (tree / zone / "energy_uj").write_text(f"{START_UJ + 5_000_000 if zone.endswith('1') else 1000}\n")
    reset, sound, *_ = meter.end()
    assert reset.energy_j is None
    assert "was reset" in reset.reason
    assert sound.energy_j == 5.0


def test_core_uncore_psys_and_the_second_tree_are_not_zones(tree):
    assert [zone.label for zone in find_zones(str(tree))] == COUNTED


@pytest.mark.parametrize("root", ["class/powercap", "devices/virtual/powercap/intel-rapl"])
def test_a_zone_is_found_once_in_the_flat_and_in_the_nested_layout(tree, tmp_path, root):
    assert [zone.label for zone in find_zones(str(tmp_path / root))] == COUNTED


def test_zones_are_in_the_order_of_their_numbers(tmp_path):
    for number in range(12):
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir()
        (zone / "name").write_text(f"package-{number // 2}-die-{number % 2}")
    assert [zone.directory.name for zone in find_zones(str(tmp_path))] == [f"intel-rapl:{n}" for n in range(12)]


def test_a_zone_that_vanishes_in_the_window_is_null_with_a_reason(tree, opened):
    meter = opened(tree)
    meter.begin()
    advance_all(tree, 1_000_000)
    shutil.rmtree((tree / "intel-rapl:1:1").resolve())
    *others, gone = meter.end()
    assert [r.energy_j for r in others] == [1.0, 1.0, 1.0]
    assert gone.device == "intel-rapl:1:1 dram"
    assert gone.energy_j is None
    assert "could not be read: No such file" in gone.reason


def test_a_zone_that_returns_has_no_value_for_the_window_but_for_the_next(tree, opened):
    meter = opened(tree, poll_s=0.02)
    file = tree / "intel-rapl:0/energy_uj"
    meter.begin()
    file.rename(file.with_suffix(".away"))
    time.sleep(0.3)
    file.with_suffix(".away").rename(file)
    assert meter.end()[0].energy_j is None
    meter.begin()
    advance_all(tree, 1_000_000)
    assert meter.end()[0].energy_j == 1.0


@pytest.mark.parametrize("content", ["", "unknown\n"])
def test_a_counter_that_is_not_a_number_is_null_with_a_reason(tree, opened, content):
    meter = opened(tree)
    meter.begin()
    (tree / "intel-rapl:0/energy_uj").write_text(content)
    reading = meter.end()[0]
    assert reading.energy_j is None
    assert "could not be read" in reading.reason


def test_a_counter_that_stands_still_is_null_not_zero(tree, opened):
    meter = opened(tree)
    meter.begin()
    for reading in meter.end():
        assert reading.energy_j is None
        assert "did not advance" in reading.reason


def test_close_ends_the_thread(tree):
    before = set(threading.enumerate())
    meter = RaplMeter(str(tree))
    meter.open()
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon
    meter.begin()
    begun_s = time.perf_counter()
    meter.close()
    assert not thread.is_alive()
    assert time.perf_counter() - begun_s < 1
    meter.close()


def test_a_machine_without_rapl_learns_what_to_use(tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        assert not readable(str(directory))
        with pytest.raises(BadInput, match=r"no RAPL counters.*energy=codecarbon"):
            RaplMeter(str(directory)).open()


def test_a_tree_with_psys_alone_has_no_rapl(tmp_path):
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    (zone / "name").write_text("psys")
    (zone / "energy_uj").write_text("1")
    assert not readable(str(tmp_path))


def test_readable_with_a_package(tree):
    assert readable(str(tree))


def test_one_package_is_enough_and_the_other_is_null(tree, opened):
    (tree / "intel-rapl:1/energy_uj").unlink()
    assert readable(str(tree))
    meter = opened(tree)
    meter.begin()
    advance(tree, "intel-rapl:0", 1_000_000)
    first, second, *_ = meter.end()
    assert first.energy_j == 1.0
    assert second.energy_j is None


AS_NOBODY = """
import os, sys
from lem.energy.rapl import RaplMeter, readable
from lem.errors import BadInput

if os.geteuid() == 0:  # root reads whatever the mode says
    try:
        os.setuid(65534)
    except OSError:
        sys.exit(77)
assert not readable(sys.argv[1])
try:
    RaplMeter(sys.argv[1]).open()
except BadInput as error:
    print(error)
"""


def test_counters_only_for_root_are_named_with_the_remedy():
    # This is not in pytest's own directory, which another user may not enter.
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        tree = build(Path(directory))
        for path in ZONES:
            (tree / Path(path).name / "energy_uj").chmod(0o400 if os.geteuid() == 0 else 0)
        done = subprocess.run([sys.executable, "-c", AS_NOBODY, str(tree)], capture_output=True, text=True)
        if done.returncode == 77:
            pytest.skip("root may not become another user here")
        assert done.returncode == 0, done.stderr
        assert "CVE-2020-8694" in done.stdout
        assert f"sudo chmod a+r {tree}/intel-rapl:*/energy_uj" in done.stdout
