"""What a checkup finds: on the stand-in driver, on trees like the kernel's, and where things are missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from lem.backends import backend_class
from lem.machine.host import Host
from lem.runner import checkup as module
from lem.runner.checkup import OF_ENGINES, checkup
from lem.runner.finding import CHECKS, GROUPS, Checkup, Finding, in_order
from lem.spec.engines import BACKENDS
from lem.spec.rules import EXPERIMENT_RULES
from lem.warning_codes import WARNINGS
from tests.energy.test_rapl import build
from tests.hosts import EVERY_PACKAGE, FakeHost

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
NOTHING = Host(gpus=())


def found(results_dir, host=NOTHING, **places) -> Checkup:
    return checkup(host, Path(results_dir), **places)


def only(checked: Checkup, check: str) -> Finding:
    (finding,) = [each for each in checked.findings if each.check == check]
    return finding


# ------------------------------------------------------------------ on the stand-in driver
CHECKUP = """
    import json
    from pathlib import Path
    from lem.cli.findings import as_plain
    from lem.machine import host
    from lem.runner.checkup import checkup
    print(json.dumps(as_plain(checkup(host.look(), Path("results")))))
"""


@pytest.fixture
def on(driver):
    """Return a function that checks a scenario up, and returns all findings about GPUs: check, device -> finding."""

    def run(text: str, **env: str):
        plain = driver(CHECKUP, text, **env)
        return plain, {(each["check"], each["device"]): each for each in plain["findings"]}

    return run


def test_a_gpu_in_good_order_needs_no_remedy(on):
    plain, findings = on("device 0 tick_ms 100\ndevice 0 persistence 1\ndevice 0 power_limit 700 700")
    gpu = [each for each in findings.values() if each["device"] == 0]
    assert {each["check"] for each in gpu} == {
        "gpu_energy", "gpu_power", "mig", "persistence", "power_limit", "clocks", "gpu_processes",
    }  # fmt: skip
    assert {(each["status"], each["remedy"]) for each in gpu} == {("ok", None)}
    assert findings["driver", None]["values"] == {"driver_version": "580.65.06", "cuda_version": "13.0"}
    assert (plain["can_measure"], plain["energy"], plain["measured"]) == (True, "measured", ["gpu"])


def test_the_counters_tick_is_measured(on):
    _, findings = on("device 0 tick_ms 40")
    energy = findings["gpu_energy", 0]
    assert energy["values"]["tick_s"] == pytest.approx(0.04, rel=0.1)
    assert energy["fact"].startswith("energy counter, tick 4")


@pytest.mark.parametrize(
    ("scenario", "check", "status", "fact", "remedy"),
    [
        ("persistence 0", "persistence", "limited", "off: ", "sudo nvidia-smi -pm 1"),
        ("power_limit 350 700", "power_limit", "limited", "350 W; the default is 700 W.", "nvidia-smi -pl 700"),
        ("mig 1g.10gb 9728", "mig", "limited", "on.", WARNINGS["energy_shared"].remedy),
        ("mig 1g.10gb 9728\ndevice 0 tick_ms 100", "gpu_energy", "limited", "energy counter, tick 1",
         WARNINGS["energy_shared"].remedy),
        ("process 4242 100 python train.py", "gpu_processes", "limited", "1 process: 4242 (python train.py).",
         WARNINGS["foreign_process"].remedy),
        ("throttle 0x24", "clocks", "limited", "SM at", WARNINGS["throttled"].remedy),
        ("no_instant", "gpu_power", "limited", "only nvmlDeviceGetPowerUsage", "reports instant power"),
        ("no_counter", "gpu_energy", "limited", "integral of sampled power", WARNINGS["energy_integrated"].remedy),
        ("tick_ms 0", "gpu_energy", "limited", "energy counter, tick unknown: each edge",
         WARNINGS["short_window"].remedy),
        ("no_counter\ndevice 0 no_power\ndevice 0 no_instant", "gpu_energy", "missing", "no energy counter (",
         "Run nvidia-smi to see the cause"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_gpu_is_said_with_its_remedy(on, scenario, check, status, fact, remedy):
    _, findings = on(f"device 0 {scenario}")
    finding = findings[check, 0]
    assert finding["status"] == status
    assert finding["fact"].startswith(fact)
    assert remedy in finding["remedy"]


def test_clocks_that_are_held_are_named_and_those_held_by_a_setting_are_no_fault(on):
    _, throttled = on("device 0 clocks 1200 1500\ndevice 0 max_clocks 1980 2619\ndevice 0 throttle 0x26")
    assert throttled["clocks", 0]["fact"] == "SM at 1200 of 1980 MHz, throttled now: sw_power_cap, sw_thermal_slowdown."
    _, held = on("device 0 clocks 1200 1500\ndevice 0 max_clocks 1980 2619\ndevice 0 throttle 0x02")
    assert held["clocks", 0]["status"] == "ok"
    assert held["clocks", 0]["fact"] == "SM at 1200 of 1980 MHz, held by a setting: applications_clocks_setting."


def test_what_the_driver_does_not_report_is_missing_and_not_zero(on):
    unsupported = ("PersistenceMode", "EnforcedPowerLimit", "CurrentClocks", "ComputeRunningProcesses")
    _, findings = on("\n".join(f"device 0 unsupported nvmlDeviceGet{what}" for what in unsupported))
    for check in ("persistence", "power_limit", "clocks", "gpu_processes"):
        assert findings[check, 0]["status"] == "missing"
        assert "does not report" in findings[check, 0]["fact"]
    assert findings["power_limit", 0]["values"]["power_limit_w"] is None


def test_a_lost_gpu_is_named_beside_the_others(on):
    plain, findings = on("devices 2\ndevice 0 tick_ms 100\ndevice 1 lost_after_s 0")
    assert findings["visible_gpus", 1]["fact"] == "does not answer: GPU is lost."
    assert findings["visible_gpus", None]["values"] == {"visible": 1, "present": 2}
    assert plain["measured"] == ["gpu"]


def test_one_of_two_gpus_that_cannot_be_read_leaves_no_measured_energy(on):
    plain, _ = on("devices 2\ndevice 1 no_counter\ndevice 1 no_power\ndevice 1 no_instant")
    assert plain["measured"] == []


def test_hidden_gpus_are_no_gpus(on):
    plain, findings = on("devices 2", CUDA_VISIBLE_DEVICES="")
    assert findings["visible_gpus", None]["fact"] == "CUDA_VISIBLE_DEVICES hides all GPUs."
    assert not [device for _, device in findings if device is not None]
    assert plain["measured"] == []
    _, one = on("devices 2\ndevice 1 name Second", CUDA_VISIBLE_DEVICES="1")
    assert one["visible_gpus", None]["fact"] == "1 of 2: Second."
    assert {device for _, device in one} == {None, 1}


@pytest.mark.parametrize(
    ("scenario", "fact"),
    [("init_fails 18", "the NVIDIA driver does not answer: "), ("devices 0", "580.65.06, CUDA up to 13.0.")],
)
def test_a_driver_without_gpus_and_one_that_does_not_start(on, scenario, fact):
    _, findings = on(scenario)
    assert findings["driver", None]["fact"].startswith(fact)
    assert not [device for _, device in findings if device is not None]


# ------------------------------------------------------------------ the processor's energy
def test_readable_counters_measure_cpu_and_memory(tmp_path):
    checked = found(tmp_path, powercap_dir=str(build(tmp_path / "sys")))
    assert only(checked, "rapl").fact == "RAPL is readable: 2 packages, with memory."
    assert only(checked, "codecarbon").status == "ok"
    assert (checked.measured, checked.estimated) == (("cpu", "dram"), ())


def test_counters_without_memory_leave_an_estimate_of_it(tmp_path):
    tree = build(tmp_path / "sys")
    for name in tree.glob("intel-rapl:*/name"):
        if name.read_text() == "dram\n":
            name.write_text("core\n")
    checked = found(tmp_path, powercap_dir=str(tree))
    assert (checked.measured, checked.estimated) == (("cpu",), ("dram",))
    assert "estimates the memory's energy" in only(checked, "codecarbon").fact


def test_no_counters_are_the_meters_own_objection(tmp_path):
    checked = found(tmp_path, powercap_dir=str(tmp_path / "none"))
    rapl = only(checked, "rapl")
    assert (rapl.status, rapl.remedy) == ("missing", EXPERIMENT_RULES["rapl_unreadable"].remedy)
    assert rapl.fact.startswith("this machine has no RAPL counters: ")
    assert (checked.measured, checked.estimated) == ((), ("cpu", "dram"))
    assert only(checked, "codecarbon").remedy == WARNINGS["energy_estimated"].remedy


AS_NOBODY = """
import os, sys
from pathlib import Path
from lem.machine.host import Host
from lem.runner.checkup import checkup

def check():
    return checkup(Host(gpus=()), Path(sys.argv[2]), powercap_dir=sys.argv[1])

check()  # imports everything, as nobody may not be allowed to
os.setgroups([]), os.setgid(65534), os.setuid(65534)
os.environ["HOME"] = "/nonexistent"
checked = check()
for each in checked.findings:
    print(each.check, each.status, each.fact)
print(checked.obstacles)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without permissions")
def test_a_user_without_permissions_is_told_which():
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        tree = build(Path(name) / "sys")
        for counter in tree.glob("*/energy_uj"):
            counter.chmod(0o400)
        arguments = [str(tree), str(Path(name) / "results")]
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, *arguments], capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines()}
    assert "rapl missing since CVE-2020-8694" in lines["rapl"]
    assert "sudo chmod a+r" in lines["rapl"]
    assert lines["results_dir"] == f"results_dir missing {name} is not writable."
    assert "the results directory cannot be written to" in done.stdout.splitlines()[-1]


# ------------------------------------------------------------------ the machine
def cpus(folder: Path, *governors: str) -> str:
    for number, governor in enumerate(governors):
        cpufreq = folder / f"cpu{number}" / "cpufreq"
        cpufreq.mkdir(parents=True)
        (cpufreq / "scaling_governor").write_text(f"{governor}\n")
    (folder / "cpufreq").mkdir(parents=True)
    return str(folder)


@pytest.mark.parametrize(
    ("governors", "status", "fact"),
    [
        (("performance",) * 3, "ok", "performance."),
        (("powersave",) * 3, "limited", "powersave, so the CPU's"),
        (("performance", "powersave", "powersave"), "limited", "performance on 1 core, powersave on 2 cores, so"),
        ((), "missing", "the kernel exposes no control"),
    ],
)
def test_the_governor(tmp_path, governors, status, fact):
    governor = only(found(tmp_path, cpu_dir=cpus(tmp_path / "cpu", *governors)), "governor")
    assert governor.status == status
    assert governor.fact.startswith(fact)
    assert (governor.remedy is None) == (status == "ok")


@pytest.mark.parametrize(("load", "status"), [(0.05, "ok"), (0.5, "limited"), (None, "missing")])
def test_other_load(tmp_path, monkeypatch, load, status):
    monkeypatch.setattr("lem.machine.host.load_per_core", lambda: load)
    assert only(found(tmp_path), "load").status == status


def test_slurm(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert only(found(tmp_path), "scheduler").status == "ok"
    (tmp_path / "sbatch").write_text("#!/bin/sh\n")
    (tmp_path / "sbatch").chmod(0o755)
    outside = only(found(tmp_path), "scheduler")
    assert (outside.status, "srun --exclusive" in outside.remedy) == ("limited", True)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert only(found(tmp_path), "scheduler").fact == "inside Slurm job 77."


# ------------------------------------------------------------------ engines
def test_every_backend_that_runs_a_model_is_checked():
    assert set(OF_ENGINES) == set(BACKENDS) - {"simulated"}
    for name in OF_ENGINES:
        assert name in CHECKS
        assert backend_class(name)


def test_a_machine_without_packages_says_how_to_install_each(tmp_path):
    checked = found(tmp_path, FakeHost((), lacks=EVERY_PACKAGE))
    for check, package, extra in (
        ("vllm", "vLLM", "vllm"),
        ("tensorrt", "TensorRT-LLM", "tensorrt"),
        ("adapters", "peft", "lora"),
        ("quantization", "bitsandbytes", "bitsandbytes"),
    ):
        finding = only(checked, check)
        assert (finding.status, finding.fact) == ("missing", f"{package} is not installed.")
        assert (finding.remedy or "").startswith(f"pip install 'lem[{extra}]'")
        assert extra in EXTRAS
    missing = [each.check for each in checked.findings if each.group == "engines" and each.status == "missing"]
    assert missing == ["pytorch", "vllm", "tensorrt", "launcher", "adapters", "quantization"]
    assert checked.engines == ("openai",)
    assert checked.obstacles == ["no meter can read or estimate energy"]


def test_an_engine_built_for_the_cpu_beside_a_gpu_is_limited(tmp_path):
    from tests.hosts import H100, gpus

    built_for_cpu = FakeHost(gpus(H100), builds_for_cpu=True)
    assert only(found(tmp_path, built_for_cpu), "pytorch").remedy == WARNINGS["gpu_unused"].remedy
    assert only(found(tmp_path, FakeHost(gpus(H100), builds_for_cpu=False)), "pytorch").status == "ok"


# ------------------------------------------------------------------ models and files
def test_the_hub_is_not_asked_in_offline_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub = only(found(tmp_path), "hub")
    assert (hub.status, hub.values["is_switched_off"]) == ("limited", True)
    assert hub.remedy == "Unset HF_HUB_OFFLINE to download others."


def test_a_hub_that_cannot_be_reached_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://user:secret@127.0.0.1:9")
    hub = only(found(tmp_path), "hub")
    assert (hub.status, hub.values["host"]) == ("limited", "127.0.0.1")
    assert "cannot be reached (Connection refused)" in hub.fact
    assert "secret" not in repr(hub)


def test_a_results_directory_that_cannot_be_is_an_obstacle(tmp_path):
    (tmp_path / "file").touch()
    checked = found(tmp_path / "file" / "results")
    results = only(checked, "results_dir")
    assert (results.status, results.remedy) == ("missing", EXPERIMENT_RULES["results_unwritable"].remedy)
    assert checked.obstacles == ["the results directory cannot be written to"]
    assert not [each for each in checked.findings if each.check == "disk"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_results_directory_where_none_can_be_created_is_an_obstacle():
    checked = found("/proc/results")
    results = only(checked, "results_dir")
    assert results.status == "missing"
    assert results.fact == "/proc is in the kernel's file system proc, where no directories can be created."
    assert checked.obstacles == ["the results directory cannot be written to"]


def test_a_home_that_is_not_known_is_an_obstacle_and_no_crash(tmp_path):
    assert only(found("~nobody-of-this-name/results"), "results_dir").status == "missing"


def test_nothing_is_created(tmp_path):
    assert only(found(tmp_path / "a" / "b"), "results_dir").fact == f"{tmp_path}/a/b: will be created."
    assert not (tmp_path / "a").exists()


@dataclass
class Usage:
    free: int


def test_a_disk_that_is_almost_full_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: Usage(500_000_000))
    checked = found(tmp_path)
    assert only(checked, "disk").fact == "0.5 GB are free for results."
    assert only(checked, "disk").status == only(checked, "model_cache").status == "limited"

    def fails(_):
        raise PermissionError

    monkeypatch.setattr(module.shutil, "disk_usage", fails)
    assert only(found(tmp_path), "disk").status == "missing"


# ------------------------------------------------------------------ the catalogue
def test_findings_are_in_the_order_of_the_catalogue_and_every_group_has_checks(tmp_path):
    checked = found(tmp_path)
    places = [list(CHECKS).index(each.check) for each in checked.findings]
    assert places == sorted(places)
    assert {group for group, _ in CHECKS.values()} == set(GROUPS)
    ordered = in_order(
        [Finding("mig", "ok", "", device=1), Finding("driver", "ok", ""), Finding("mig", "ok", "", device=0)]
    )
    assert [(each.check, each.device) for each in ordered] == [("driver", None), ("mig", 0), ("mig", 1)]


def test_another_check_cannot_be_made():
    with pytest.raises(KeyError):
        Finding("weather", "ok", "fine")


def test_every_check_is_on_its_page():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "doctor.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert set(CHECKS) <= set(named)
