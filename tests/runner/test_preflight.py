"""Preflight as a whole: all objections at once, the effect of --force and presets, and that it leaves nothing behind.

The tests of single rules are in test_rules.py.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

from lem.config.inventory import summaries
from lem.errors import ConfigError
from lem.machine.gpu import Gpu, pick
from lem.machine.host import Host
from lem.runner.preflight import objections, preflight
from lem.spec.engines import PytorchBackend, SimulatedBackend
from lem.spec.experiment import Dataset, Decoder, Energy, Experiment, Io, Traffic
from lem.workload import tiny

CPU = Host(())
GPUS = tuple(Gpu(i, f"GPU-{i}", "NVIDIA", 80 * 2**30, compute_capability=(9, 0)) for i in range(3))
SAMPLE = Dataset(path="builtin:sample", sample_size=2)
UNUSED_TEMPERATURE = Decoder(temperature=0.5)


def simulated(**options):
    return Experiment(**{"model": "any", "backend": SimulatedBackend(), "dataset": SAMPLE, **options})


def codes(found):
    return [objection.code for objection in found]


# ------------------------------------------------------------------ all at once
def test_options_model_prompts_and_files_are_reported_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    wanted = simulated(
        model=None,
        dataset=Dataset(path="nowhere.txt"),
        min_output_tokens=200,
        decoder=UNUSED_TEMPERATURE,
        energy=Energy(name="nvml"),
        io=Io(results_dir=str(tmp_path / "file" / "results")),
    )
    with pytest.raises(ConfigError) as refused:
        preflight(wanted, CPU)
    text = str(refused.value)
    for part in ("No model", "nowhere.txt", "[min_above_max]", "[no_effect_sampling]", "[no_gpu]"):
        assert part in text
    assert "[results_unwritable] " not in text  # nothing overrides that
    assert "[results_unwritable]" in text
    assert len(refused.value.problems) == 6


@pytest.mark.parametrize(
    ("rows", "reason"),
    [(None, "does not exist"), ("at\n1\n", "has no column t_s"), ("t_s\n1\n", "has fewer arrivals (1)")],
)
def test_a_bad_trace_of_arrivals_is_reported_once(tmp_path, rows, reason):
    trace = tmp_path / "trace.csv"
    if rows is not None:
        trace.write_text(rows)
    with pytest.raises(ConfigError) as refused:
        preflight(simulated(traffic=Traffic(pattern="trace", trace=str(trace))), CPU)
    (problem,) = refused.value.problems
    assert reason in problem
    assert problem.endswith(" [traffic_trace]")


def test_force_leaves_only_what_is_impossible():
    wanted = simulated(decoder=UNUSED_TEMPERATURE)
    with pytest.raises(ConfigError, match=r"\[no_effect_sampling\] \(use --force to run it anyway\)"):
        preflight(wanted, CPU)
    assert "no_effect_sampling" in codes(preflight(wanted, CPU, force=True).warnings)
    wanted.min_output_tokens = 200
    with pytest.raises(ConfigError) as refused:
        preflight(wanted, CPU, force=True)
    assert [problem.rpartition(" ")[2] for problem in refused.value.problems] == ["[min_above_max]"]


@pytest.mark.parametrize(
    ("times", "why"),
    [("0\nnan", "line 3: nan"), ("0\n1e300", "line 3: 1e+300 s"), ("0", "than the run has requests (2)")],
)
def test_a_trace_that_cannot_be_run_is_refused_once_with_its_rule(tmp_path, times, why):
    file = tmp_path / "trace.csv"
    file.write_text(f"t_s\n{times}\n")
    with pytest.raises(ConfigError) as refused:
        preflight(simulated(traffic=Traffic(pattern="trace", trace=str(file))), CPU)
    (problem,) = refused.value.problems
    assert why in problem
    assert problem.endswith("[traffic_trace]")


def test_objections_need_neither_model_nor_prompts():
    wanted = simulated(model=None, backend=PytorchBackend(), dataset=Dataset(path="no/such"), min_output_tokens=200)
    assert codes(objections(wanted, CPU)) == ["min_above_max"]


# ------------------------------------------------------------------ GPUs by name
def test_a_gpu_is_picked_by_its_place_among_the_visible_or_by_a_uuid_that_fits_one_only():
    visible = [GPUS[2], GPUS[0]]
    assert pick(0, visible) is GPUS[2]
    assert pick("GPU-0", visible) is GPUS[0]
    for entry in (2, -1, "GPU-1", "GPU-", "0", "", "MIG-1"):
        assert pick(entry, visible) is None


def test_rules_about_gpus_look_at_the_named_ones_only():
    old = Gpu(3, "GPU-old", "Tesla T4", 2**34, compute_capability=(7, 5))
    host = Host((*GPUS, old))
    on_old = simulated(backend=PytorchBackend(), fp_precision="bfloat16", gpus=["GPU-old"])
    (found,) = objections(on_old, host)
    assert found.code == "bfloat16_emulated"
    assert "Tesla T4 (compute capability 7.5)" in found.fact
    assert objections(simulated(backend=PytorchBackend(), fp_precision="bfloat16", gpus=[1]), host) == []


def test_each_missing_gpu_is_reported_once_and_nothing_follows_from_it():
    wanted = simulated(backend=PytorchBackend(), gpus=[0, 7, "GPU-9", 0], num_processes=3)
    assert codes(objections(wanted, Host(GPUS))) == ["unknown_gpu", "unknown_gpu", "repeated_gpu"]


TWO_INSTANCES = """
    devices 2
    device 0 compute_capability 7 5
    device 1 compute_capability 9 0
    device 1 mig 1g.10gb 9728
    device 1 mig 1g.10gb 9728
"""
PICKED = """
    import json
    from lem.machine import gpu
    visible = gpu.visible()
    picked = gpu.pick("MIG-1-0", visible)
    found = picked and [picked.compute_capability, picked.mig_uuid]
    print(json.dumps([[g.compute_capability for g in visible], found]))
"""


def test_an_instance_of_a_visible_gpu_can_be_picked_and_has_its_compute_capability(driver):
    assert driver(PICKED, TWO_INSTANCES) == [[[7, 5], [9, 0]], [[9, 0], "MIG-1-0"]]
    for variable, picked in [("MIG-1-0", [[9, 0], "MIG-1-0"]), ("MIG-1-1", None)]:
        assert driver(PICKED, TWO_INSTANCES, CUDA_VISIBLE_DEVICES=variable) == [[[9, 0]], picked]


def test_a_compute_capability_that_the_driver_does_not_report_is_none(driver):
    code = "import json; from lem.machine import gpu; print(json.dumps(gpu.visible()[0].compute_capability))"
    assert driver(code, "device 0 unsupported nvmlDeviceGetCudaComputeCapability") is None


def test_zeus_is_asked_itself_where_no_nvidia_gpu_is_visible():
    pytest.importorskip("zeus")
    wanted = simulated(backend=PytorchBackend(), energy=Energy(name="zeus"))
    assert codes(objections(wanted, CPU)) == ["no_gpu_in_use"]
    assert objections(wanted, Host(GPUS)) == []


# ------------------------------------------------------------------ presets
@pytest.mark.parametrize("backend", ["simulated", "pytorch"])
@pytest.mark.parametrize(
    "override",
    [
        "model=any",
        "batching.strategy=static",
        "warmup.until_cv=0.1",
        "energy=none",
        "energy=codecarbon",
        "fp_precision=float32",
        "decoder=creative",
        "decoder=deterministic",
    ],
)
def test_a_presets_values_stand_in_the_way_of_no_override(backend, override):
    from lem.config.compose import prepare

    presets = [choice.name for choice in summaries("preset")]
    assert "benchmark" in presets
    for preset in presets:
        composed = prepare(None, [f"preset={preset}", f"backend={backend}", "dataset=sample", override]).experiment()
        assert {objection.severity for objection in objections(composed, CPU)} <= {"warning"}


def test_warnings_are_shown_with_their_codes(lem):
    benchmark = ("--preset", "benchmark", "--backend", "simulated", "-m", "any", "-d", "sample")
    finished = lem("experiment", *benchmark, "--dry-run")
    assert finished.code == 0
    shown = " ".join(finished.err.split())
    assert "Warning: fp_precision: it would have no effect: no model runs." in shown
    assert "[no_effect_on_simulation]" in shown


# ------------------------------------------------------------------ the results directory
def test_looking_at_the_results_directory_leaves_nothing_behind(tmp_path):
    wanted = simulated(io=Io(results_dir=str(tmp_path / "a" / "b")))
    assert objections(wanted, CPU) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", ["results", "results/raw", "results/experiments"])
def test_a_file_where_results_go_is_impossible(tmp_path, taken):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("")
    (found,) = objections(simulated(io=Io(results_dir=str(tmp_path / "results"))), CPU)
    assert found.code == "results_unwritable"
    assert taken in found.fact


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@pytest.mark.parametrize("folder", ["/proc/results", "/proc/self/results", "/sys/a/b"])
def test_the_kernels_own_file_systems_are_impossible_even_for_root(folder):
    (found,) = objections(simulated(io=Io(results_dir=folder)), CPU)
    assert found.code == "results_unwritable"
    assert found.fact.startswith(str(Path(folder).parent).removesuffix("/a"))


def test_a_link_to_nowhere_is_impossible(tmp_path):
    (tmp_path / "link").symlink_to("/no-directory-of-this-name/results")
    for folder in (tmp_path / "link", tmp_path / "link" / "more"):
        (found,) = objections(simulated(io=Io(results_dir=str(folder))), CPU)
        assert found.fact == f"{tmp_path}/link is a link to /no-directory-of-this-name/results, which cannot be found."


def test_a_link_to_a_directory_is_fine(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert objections(simulated(io=Io(results_dir=str(tmp_path / "link"))), CPU) == []


def become_nobody():
    if os.geteuid() == 0:  # root may write anywhere
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def codes_of_results_in(folder):
    return codes(objections(simulated(io=Io(results_dir=f"{folder}/results")), CPU))


@pytest.mark.parametrize(("mode", "found"), [(0o777, []), (0o555, ["results_unwritable"]), (0, ["results_unwritable"])])
def test_a_directory_without_permission_is_impossible(mode, found):
    # This is not in tmp_path, whose parent directories are closed to other users.
    folder = tempfile.mkdtemp()
    try:
        os.chmod(folder, mode)
        with multiprocessing.get_context("fork").Pool(1, initializer=become_nobody) as process:
            assert process.apply(codes_of_results_in, [folder]) == found
    finally:
        os.chmod(folder, 0o755)
        os.rmdir(folder)


# ------------------------------------------------------------------ models that lack weights
@pytest.fixture
def headless(tmp_path):
    """Return a copy of the model tiny without its output projection."""
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(tiny.path(), tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


RUN_HEADLESS = ("experiment", "--model", "headless", "-d", "sample", "-n", "2", "--max-tokens", "4", "-y")


@pytest.mark.engines
def test_a_model_that_lacks_weights_is_refused_before_the_run(headless, lem):
    for options in ((), ("--dry-run",)):
        refused = lem(*RUN_HEADLESS, *options, "energy=none")
        assert refused.code == 2
        assert "headless lacks lm_head.weight. Choose a complete checkpoint" in refused.err
        assert "[weights_missing] (use --force to run it anyway)" in refused.err
    assert not Path("results").exists()


@pytest.mark.engines
def test_a_forced_run_of_a_model_that_lacks_weights_says_that_they_are_random(headless, lem):
    assert lem(*RUN_HEADLESS, "--force", "energy=none").code == 0
    listed = json.loads(lem("results", "list", "--json").out)
    assert listed[0]["random_weights"] is True
    (record,) = (json.loads(file.read_text()) for file in Path("results").rglob("process_*.json"))
    assert record["model"]["weights_missing"] == ["lm_head.weight"]
    assert [each["code"] for each in record["warnings"]].count("random_weights") == 1


@pytest.mark.engines
def test_a_run_that_was_not_forced_fails_where_only_the_loader_finds_that_weights_are_missing(
    headless, lem, monkeypatch
):
    monkeypatch.setattr("lem.backends.fit.foreseen", lambda *_: None)
    failed = lem(*RUN_HEADLESS, "energy=none")
    assert failed.code == 1
    assert (
        "headless lacks weights, which transformers has initialized at random: lm_head.weight."
        in failed.err + failed.out
    )
