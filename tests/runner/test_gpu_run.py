"""Whole runs on a machine with GPUs, with a stand-in for the driver's library."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

from lem.quantities import timestamp
from lem.results.aggregate import read
from lem.results.directory import ExperimentDir
from lem.results.plan import Plan, PromptsInfo
from lem.results.store import Store
from lem.spec.engines import SimulatedBackend
from lem.spec.experiment import Energy, Experiment
from lem.workload.prompts import sha256_of
from tests.conftest import command, raw_record
from tests.energy.test_rapl import USUAL_RANGE_UJ, counting
from tests.nvml_standin import environment, scenario

pytestmark = pytest.mark.processes


@pytest.fixture
def run(standin, tmp_path):
    """Run a simulated experiment of a few seconds on a scenario; return its row and its raw record."""

    def go(text: str, *overrides: str, code: int = 0, **env: str):
        variables = environment(standin, scenario(tmp_path / "scenario.txt", text), **env)
        done = command(
            "experiment", "--backend", "simulated", "-m", "any", "-d", "sample", "-n", "30", "-y", "energy=nvml",
            "energy.idle_s=0.5", "backend.decode_s_per_token=0.0006", "warmup.prompts=2", *overrides,
            cwd=tmp_path, **variables,
        )  # fmt: skip
        assert done.code == code, done.out + done.err
        (row,) = pd.read_parquet(tmp_path / "results" / "experiments").to_dict("records")
        return row, raw_record(tmp_path / "results")

    return go


def codes(row):
    return {warning.partition(":")[0] for warning in row["warnings"]}


def test_joules_are_power_times_time_of_the_gpus_in_use_and_no_others(run, tmp_path):
    text = "devices 8\n" + "".join(f"device {i} tick_ms 100\ndevice {i} power constant 200\n" for i in range(8))
    row, record = run(text, "backend.gpus=4")
    assert row["energy_j"] == pytest.approx(4 * 200 * row["duration_s"], rel=0.02)
    assert (row["energy_source"], row["energy_components"], row["energy_scope"]) == ("counter", "gpu", "device")
    assert row["trace_energy_j"] == pytest.approx(row["energy_j"], rel=0.02)
    assert row["counter_tick_s"] == pytest.approx(0.1, rel=0.1)
    assert row["idle_power_before_w"] == pytest.approx(800, rel=0.02)
    assert row["energy_idle_adjusted_j"] == pytest.approx(0, abs=0.04 * row["energy_j"])
    assert 0 < row["prefill_duration_s"] < row["duration_s"]
    assert pd.isna(row["prefill_energy_j"]), "prefills of milliseconds"
    assert pd.isna(row["decode_energy_j"])
    assert "shorter" in row["prefill_reason"]
    assert len(record["environment"]["devices_before"]) == 4
    power = pd.read_parquet(next(tmp_path.glob("results/raw/*/power_0_c1_a1.parquet")))
    assert set(power["device"]) == {f"GPU-{i:08d}" for i in range(4)}
    assert power["power_w"].eq(200).all()
    assert not codes(row) & {"counter_trace_mismatch", "identity_violated", "energy_missing"}


@pytest.mark.parametrize("averages", [False, True])
def test_long_prefills_have_an_energy_with_a_bound_unless_the_sensor_averages_over_a_second(run, averages):
    text = "device 0 tick_ms 100\ndevice 0 power constant 200\n"
    text += "device 0 no_instant\ndevice 0 average_s 1" if averages else "device 0 power_update_ms 100"
    row, _ = run(text, "backend.gpus=1", "-n", "4", "batching.batch_size=2", "backend.prefill_s_per_token=0.1")
    assert row["prefill_duration_s"] > 2.5
    if averages:
        assert pd.isna(row["prefill_energy_j"])
        assert "that may be up to 1.25 s old" in row["prefill_reason"]
        return
    assert row["prefill_energy_j"] == pytest.approx(200 * row["prefill_duration_s"], rel=0.02)
    assert row["prefill_energy_j"] + row["decode_energy_j"] == pytest.approx(row["energy_j"])
    assert row["prefill_energy_uncertainty_j"] == 0


def test_cuda_visible_devices_decides_which(run):
    text = "devices 3\n" + "".join(f"device {i} power constant {100 * (i + 1)}\n" for i in range(3))
    row, record = run(text, "backend.gpus=1", CUDA_VISIBLE_DEVICES="GPU-00000002,0")
    assert row["energy_j"] == pytest.approx(300 * row["duration_s"], rel=0.02)
    assert record["phases"][-1]["energy"][0]["device"] == "GPU-00000002"


def test_a_gpu_that_is_lost_in_mid_run_is_null_with_a_reason(run):
    row, record = run("devices 1\ndevice 0 tick_ms 100\ndevice 0 lost_after_s 2.5", "backend.gpus=1")
    assert pd.isna(row["energy_j"])
    assert pd.isna(row["energy_per_output_token_j"])
    assert "energy_missing" in codes(row)
    assert "lost" in record["phases"][-1]["energy"][0]["reason"]
    assert row["output_tokens"] > 0


ONE_GPU = "devices 1\ndevice 0 tick_ms 100\ndevice 0 power constant 300"


@pytest.mark.parametrize("energy", ["codecarbon", "rapl"])
def test_a_meter_that_reads_no_gpu_says_so_in_the_row_and_the_headline(run, tmp_path, energy):
    with counting(tmp_path / "powercap", USUAL_RANGE_UJ) as (tree, _):
        row, _ = run(ONE_GPU, "backend.gpus=1", f"energy={energy}", f"energy.powercap_dir={tree}", "--force")
    assert "gpu" not in row["energy_components"]
    assert row["energy_without_gpu"]
    assert "energy_without_gpu" in codes(row)
    (shown,) = [
        line for line in command("results", "show", row["experiment_id"], cwd=tmp_path).out.splitlines()
        if line.startswith("Energy  ")
    ]  # fmt: skip
    assert shown.endswith("without the GPU)")


def test_a_meter_that_reads_the_gpu_as_well_says_nothing(run):
    row, _ = run(ONE_GPU, "backend.gpus=1", "energy=auto")
    assert (row["energy_components"], row["energy_without_gpu"]) == ("gpu", False)
    assert not codes(row) & {"energy_without_gpu", "power_implausible"}


def test_more_power_than_the_limit_is_a_doubt(run):
    row, _ = run(f"{ONE_GPU}\ndevice 0 power_limit 280", "backend.gpus=1", "backend.decode_s_per_token=0.002")
    assert row["average_power_w"] == pytest.approx(300, rel=0.02)
    assert "power_implausible" in codes(row)


def test_a_mig_instance_is_labelled_as_shared(run):
    row, _ = run("devices 1\ndevice 0 mig 1g.10gb 9728", "backend.gpus=1", CUDA_VISIBLE_DEVICES="MIG-0-0")
    assert row["energy_scope"] == "shared_device"
    assert "energy_shared" in codes(row)


def test_the_state_of_the_machine_becomes_warnings(run):
    text = """
        devices 1
        device 0 temperature 45
        device 0 throttle 0x40 1
        device 0 process 4242 100 stranger
    """
    row, record = run(text, "backend.gpus=1")
    assert {"throttled", "foreign_process", "short_window", "simulated"} <= codes(row)
    (state,) = record["environment"]["devices_after"]
    assert state["temperature_c"] == 45
    assert state["foreign_processes"][0]["pid"] == 4242


def test_what_happened_during_the_window_only_becomes_warnings_too(run):
    # The window opens about 2 s after the first query of the driver, after idling twice for 0.5 s.
    text = """
        devices 1
        device 0 tick_ms 100
        device 0 throttle 0x4 1.5 600
        device 0 violation 74 1
        device 0 visitor 1.5 600 4242 100 stranger
        device 0 process self 100 ours
    """
    row, record = run(text, "backend.gpus=1", "-n", "60")
    (during,) = record["devices_during"]
    assert during["throttled_s"]["power"] == pytest.approx(during["duration_s"], rel=0.3)
    assert during["reasons"] == {"sw_power_cap": 1.0}
    assert [process["pid"] for process in during["foreign_processes"]] == [4242]
    assert {"throttled", "foreign_process"} <= codes(row)
    assert during["duration_s"] == pytest.approx(row["duration_s"], rel=0.1)


def test_a_hot_gpu_is_waited_for_until_patience_ends(run):
    row, _ = run("devices 1\ndevice 0 temperature 80", "backend.gpus=1", "cooldown.to_c=50", "cooldown.max_s=1")
    assert row["status"] == "completed"
    assert "not_cooled_down" in codes(row)


def several(count):
    """Return a scenario of GPUs, the i-th of which draws 100 · (i + 1) watts."""
    return f"devices {count}\n" + "".join(f"device {i} power constant {100 * (i + 1)}\n" for i in range(count))


@pytest.mark.parametrize(
    ("overrides", "env", "metered"),
    [
        (["gpus=[2,3]"], {}, [2, 3]),
        (["gpus=[GPU-00000003,1]"], {}, [3, 1]),
        (["gpus=[1,0]"], {"CUDA_VISIBLE_DEVICES": "3,2,0"}, [2, 3]),
        (["gpus=[GPU-00000002,0]"], {"CUDA_VISIBLE_DEVICES": "GPU-00000001,GPU-00000002"}, [2, 1]),
    ],
)
def test_gpus_narrow_what_is_metered_to_those_named(run, overrides, env, metered):
    row, record = run(several(4), "backend.gpus=2", *overrides, **env)
    devices = [reading["device"] for reading in record["phases"][-1]["energy"]]
    assert devices == [f"GPU-{i:08d}" for i in metered]
    assert row["energy_j"] == pytest.approx(sum(100 * (i + 1) for i in metered) * row["duration_s"], rel=0.02)


@pytest.mark.parametrize(
    ("overrides", "env"),
    [(["gpus=[MIG-0-1]"], {}), (["gpus=[0]"], {"CUDA_VISIBLE_DEVICES": "MIG-0-1"})],
    ids=["named", "visible"],
)
def test_a_mig_instance_may_be_chosen_either_way(run, overrides, env):
    text = "devices 2\ndevice 0 power constant 150\ndevice 0 mig 1g.10gb 9728\ndevice 0 mig 1g.10gb 9728"
    row, record = run(text, "backend.gpus=1", *overrides, **env)
    (reading,) = record["phases"][-1]["energy"]
    assert (reading["device"], reading["scope"]) == ("GPU-00000000", "shared_device")
    assert row["energy_j"] == pytest.approx(150 * row["duration_s"], rel=0.02)


def test_the_other_processes_of_a_run_are_not_strangers_and_the_first_one_watches_all_gpus(run, tmp_path):
    text = (
        several(3)
        + """
        device 0 siblings 100
        device 2 siblings 100
        device 2 visitor 1.5 600 4242 100 stranger
        device 2 throttle 0x4 1.5 600
        device 2 violation 74 1
    """
    )
    row, _ = run(text, "backend.gpus=2", "num_processes=2", "gpus=[0,2]", "-n", "60")
    first, second = sorted(
        ExperimentDir(next((tmp_path / "results" / "raw").iterdir())).records(), key=lambda r: r.rank
    )
    watched = {window.uuid: window for window in first.devices_during}
    strangers = {uuid: [p.pid for p in window.foreign_processes] for uuid, window in watched.items()}
    assert strangers == {"GPU-00000000": [], "GPU-00000002": [4242]}
    assert not watched["GPU-00000000"].throttled_s
    assert watched["GPU-00000002"].throttled_s["power"] == pytest.approx(watched["GPU-00000002"].duration_s, rel=0.3)
    assert second.devices_during == ()
    for record in (first, second):
        states = (*record.environment.devices_before, *record.environment.devices_after)
        assert {p.pid for state in states for p in state.foreign_processes or ()} <= {4242}
    assert len([w for w in row["warnings"] if w.startswith("foreign_process")]) == 1
    assert [w for w in row["warnings"] if w.startswith("throttled")] == [
        "throttled: GPU-00000002: clocks held down by power for 100% of the window."
    ]


def test_two_processes_meter_each_gpu_once(run):
    # This runs through accelerate's launcher, because the experiment uses GPUs.
    row, record = run(several(3), "backend.gpus=2", "num_processes=2", "gpus=[2,0]")
    assert (row["requests_completed"], row["requests_planned"]) == (30, 30)
    assert {reading["device"] for reading in record["phases"][-1]["energy"]} == {"GPU-00000002", "GPU-00000000"}
    assert row["energy_j"] == pytest.approx(400 * row["duration_s"], rel=0.02)


def test_two_processes_on_one_gpu_count_its_joules_once(standin, tmp_path):
    store = Store(tmp_path)
    directory = store.claim()
    experiment = Experiment(
        model="any",
        backend=SimulatedBackend(gpus=1, decode_s_per_token=0.01),
        energy=Energy(name="nvml", idle_s=0),
        num_processes=2,
    )
    texts = [f"prompt {i}" for i in range(7)]
    info = PromptsInfo(7, sha256_of(texts), "p", None, None, 7, 0)
    plan = Plan(directory.id, timestamp(), experiment, info, processes=2, replicas=2)
    directory.write_plan(plan, texts)
    variables = environment(standin, scenario(tmp_path / "scenario.txt", "devices 1\ndevice 0 power constant 300"))
    both = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lem.runner.worker"]
    done = subprocess.run([*both, str(directory.path)], env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = read(directory, strict=True)
    assert sorted(request.request for request in found.requests) == list(range(7))
    assert {request.rank for request in found.requests} == {0, 1}
    assert [len(record.phases[-1].energy) for record in directory.records()] == [1, 0]
    assert found.row.energy_j == pytest.approx(300 * found.row.duration_s, rel=0.02)


def test_more_gpus_than_there_are_is_refused(standin, tmp_path):
    variables = environment(standin, scenario(tmp_path / "scenario.txt", "devices 2"))
    done = command(
        "experiment", "--backend", "simulated", "-m", "any", "-d", "sample", "-y", "backend.gpus=3",
        cwd=tmp_path, **variables,
    )  # fmt: skip
    assert done.code == 2
    assert "GPUs needed: 3, visible: 2" in done.err
    assert done.out == ""


def test_a_gpu_that_an_engine_without_cuda_leaves_alone_is_warned_about(standin, tmp_path):
    import torch

    if torch.version.cuda is not None:
        pytest.skip("this build of torch would use the GPU")
    variables = environment(standin, scenario(tmp_path / "scenario.txt", "devices 1\n"))
    arguments = ("-m", "tiny", "-d", "sample", "-n", "2", "--max-tokens", "4", "-y", "energy=none")
    done = command("experiment", *arguments, cwd=tmp_path, **variables)
    assert done.code == 0, done.err
    (row,) = pd.read_parquet(tmp_path / "results" / "experiments").to_dict("records")
    assert "gpu_unused" in codes(row)
    assert raw_record(tmp_path / "results")["engine"]["device"] == "cpu"
