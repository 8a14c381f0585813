"""The codecarbon meter on its own: other programs' settings have no effect, and impossible setups are reported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from lem.energy.codecarbon import CodecarbonMeter
from lem.errors import BadInput
from tests.conftest import command, raw_record

# Prints how codecarbon obtains the processor's power, and the memory's power.
PROBE = """
import json
from lem.energy.codecarbon import CodecarbonMeter
meter = CodecarbonMeter()
meter.open()
meter.begin()
cpu, dram = meter.end()
print(json.dumps([cpu.method, meter._ram_power_w, meter._tracker._pue, meter._tracker._tracking_mode]))
meter.close()
"""
FORCED = "[codecarbon]\nforce_cpu_power = 500\nforce_ram_power = 100\nemissions_endpoint = http://127.0.0.1:9\n"
VARIABLES = {
    "CODECARBON_FORCE_CPU_POWER": "700",
    "CODECARBON_FORCE_RAM_POWER": "300",
    "CODECARBON_FORCE_MODE_CPU_LOAD": "false",
    "codecarbon_rapl_prefer_psys": "true",
    "CODECARBON_OUTPUT_DIR": "/nowhere",
    "CODECARBON_LOG_LEVEL": "loud",
}


# A user namespace in which this user is in no list of users.
SOMEBODY = ("unshare", "--user", "--map-user=54321")


def probed(cwd, *prefix, **env):
    known = {name: value for name, value in os.environ.items() if not name.lower().startswith("codecarbon_")}
    known.pop("HOME", None)
    probe = [*prefix, sys.executable, "-c", PROBE]
    done = subprocess.run(probe, cwd=cwd, env=known | env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The meter's readings without any settings."""
    empty = tmp_path_factory.mktemp("empty")
    return probed(empty, HOME=str(empty))


@pytest.mark.processes
def test_settings_of_other_programs_change_nothing(tmp_path, undisturbed):
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
        (folder / ".codecarbon.config").write_text(FORCED)
    assert probed(here, HOME=str(home), **VARIABLES) == undisturbed


@pytest.mark.processes
@pytest.mark.parametrize("content", [b"force_cpu_power = 500\n", b"[codecarbon]\n\xff\xfe\n", b"[codecarbon\n=\n"])
def test_damaged_settings_are_not_even_read(tmp_path, undisturbed, content):
    (tmp_path / ".codecarbon.config").write_bytes(content)
    assert probed(tmp_path, HOME=str(tmp_path)) == undisturbed


@pytest.mark.processes
def test_a_user_without_a_home_and_a_passwd_entry_has_the_same_meter(tmp_path, undisturbed):
    if shutil.which("unshare") is None or subprocess.run([*SOMEBODY, "true"], capture_output=True).returncode:
        pytest.skip("user namespaces are not available here")
    home = "import pathlib; pathlib.Path.home()"
    without = {name: value for name, value in os.environ.items() if name != "HOME"}
    lost = subprocess.run([*SOMEBODY, sys.executable, "-c", home], env=without, capture_output=True, text=True)
    assert "Could not determine home directory" in lost.stderr
    assert probed(tmp_path, *SOMEBODY) == undisturbed


def test_the_cpu_has_the_name_that_codecarbon_would_find():
    import cpuinfo

    found = subprocess.run(
        [sys.executable, "-c", "import cpuinfo; print(cpuinfo.get_cpu_info()['brand_raw'])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    find_out = cpuinfo.get_cpu_info
    meter = CodecarbonMeter()
    meter.open()
    try:
        assert meter._cpu()._model == found.stdout.strip()
    finally:
        meter.close()
    assert cpuinfo.get_cpu_info is find_out


def test_without_a_name_from_the_kernel_codecarbon_asks_as_usual(monkeypatch):
    import cpuinfo
    from codecarbon.core import hardware_cache
    from codecarbon.core.util import detect_cpu_model

    hardware_cache.clear_cache()
    detect_cpu_model.cache_clear()
    monkeypatch.setattr("lem.energy.codecarbon.kernels_cpu_model", lambda: None)
    monkeypatch.setattr(cpuinfo, "get_cpu_info", lambda: {"brand_raw": "Some ARM processor"})
    meter = CodecarbonMeter()
    meter.open()
    try:
        assert meter._cpu()._model == "Some ARM processor"
    finally:
        meter.close()
        hardware_cache.clear_cache()
        detect_cpu_model.cache_clear()


def test_a_tracker_that_does_not_start_is_named(monkeypatch):
    from codecarbon import OfflineEmissionsTracker

    def broken(self, *args, **kwargs):
        raise AttributeError("no attribute '_tasks'")

    monkeypatch.setattr(OfflineEmissionsTracker, "start_task", broken)
    with pytest.raises(
        BadInput, match=r"codecarbon could not start its tracker \(AttributeError: no attribute '_tasks'"
    ):
        CodecarbonMeter().open()


def test_what_has_been_sampled_so_far_says_which_seconds_it_covers():
    meter = CodecarbonMeter()
    meter.open()
    meter.begin()
    began_s = time.perf_counter()
    time.sleep(2.5)
    cpu, dram = meter.so_far()
    passed_s = time.perf_counter() - began_s
    meter.end()
    meter.close()
    assert dram.covered_s is None  # up to now
    if cpu.source == "counter":
        assert (cpu.energy_j, cpu.covered_s) == (None, None)
    else:
        assert 0.5 < cpu.covered_s <= passed_s + 0.1
        assert cpu.energy_j > 0


@pytest.mark.processes
def test_a_meter_that_is_named_and_does_not_work_is_refused_before_the_run(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "codecarbon.py").write_text("raise ImportError('it was installed by halves')\n")
    simulated = ("--backend", "simulated", "--model", "any", "-d", "sample", "-y", "energy=codecarbon")
    done = command("experiment", *simulated, cwd=tmp_path, PYTHONPATH=str(tmp_path / "broken"))
    assert done.code == 2
    assert "codecarbon could not start its tracker (ImportError: it was installed by halves)." in done.err
    assert "use energy=none" in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "results").exists()


@pytest.mark.processes
def test_a_run_whose_meter_does_not_work_ends_before_the_model_is_loaded(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "codecarbon.py").write_text("raise ImportError('it was installed by halves')\n")
    simulated = ("--backend", "simulated", "--model", "any", "-d", "sample", "-y", "energy=auto")
    done = command("experiment", *simulated, cwd=tmp_path, PYTHONPATH=str(tmp_path / "broken"))
    assert done.code == 1
    assert "codecarbon could not start its tracker (ImportError: it was installed by halves)." in done.out
    assert "Use energy=none" in done.out
    assert "Traceback" not in done.err
    record = raw_record(tmp_path / "results")
    assert (record["status"], record["phases"]) == ("failed", [])


def test_the_tracker_reads_settings_from_where_lem_keeps_it_from_them():
    """A new version of codecarbon that reads its settings elsewhere must be noticed here."""
    from codecarbon import emissions_tracker

    assert callable(emissions_tracker.get_hierarchical_config)
