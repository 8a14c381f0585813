"""Events on GPUs during a window, through the real binding on a stand-in for the driver's library."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lem.machine.watch import Watch
from tests.nvml_standin import environment, scenario

WATCH = """
import json, time
from msgspec.structs import asdict
from lem.machine import gpu
from lem.machine.watch import Watch
with gpu.nvml():  # the stand-in's clock starts
    watch = Watch(gpu.visible(), lambda: {11})
    time.sleep(0.2)
    before = [gpu.state(each.uuid, [11]) for each in gpu.visible()]
    watch.begin(); time.sleep(2.5); found = watch.end()
    after = [gpu.state(each.uuid, [11]) for each in gpu.visible()]
print(json.dumps({
    "during": [asdict(each) for each in found],
    "outside": [[s.throttle_reasons, s.foreign_processes] for s in (*before, *after)],
}, default=asdict))
"""

BUSY_ONLY_INSIDE = """
devices 2
device 0 throttle 0x4 1 2
device 0 violation 74 1
device 0 violation 75 0
device 0 process 11 100 ours
device 0 visitor 1.2 1.8 4242 100 stranger
"""


@pytest.fixture(scope="module")
def found(standin, tmp_path_factory):
    file = scenario(tmp_path_factory.mktemp("watch") / "scenario.txt", BUSY_ONLY_INSIDE)
    done = subprocess.run(
        [sys.executable, "-c", WATCH], env=environment(standin, file), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_nothing_of_it_is_seen_before_or_after(found):
    assert found["outside"] == [[[], []]] * 4


def test_the_drivers_counters_say_for_how_long(found):
    first, second = found["during"]
    assert first["throttled_s"] == {"power": pytest.approx(1.0, abs=0.01)}
    assert second["throttled_s"] is None, "this GPU does not count"
    assert 2.5 <= first["duration_s"] < 4


def test_reasons_are_sampled_in_between(found):
    first, second = found["during"]
    assert first["reasons"] == {"sw_power_cap": pytest.approx(1.0 / first["duration_s"], abs=0.2)}
    assert second["reasons"] == {}


def test_who_came_and_went_is_remembered_and_ours_are_not(found):
    first, second = found["during"]
    assert [(p["pid"], p["name"]) for p in first["foreign_processes"]] == [(4242, "stranger")]
    assert second["foreign_processes"] == []


def test_without_gpus_nothing_is_watched():
    watch = Watch()
    watch.begin()
    assert watch.end() == ()
    assert watch.end() == ()
