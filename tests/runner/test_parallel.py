"""Several processes, and one model on several devices: the prompts are shared, and everything is counted once.

The tests use real processes over gloo, with the pytorch backend on the CPU. Tests that need two GPUs are marked `gpu`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pandas as pd
import pytest

from lem.backends import make_backend
from lem.backends.placement import split_over_ranks, spread
from lem.backends.pytorch import Pytorch, check_devices
from lem.errors import RunError
from lem.machine import gpu
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.quantities import timestamp
from lem.record import ProcessRecord
from lem.results.directory import ExperimentDir
from lem.results.plan import Plan, PromptsInfo
from lem.runner.launch import worker_command
from lem.spec.engines import PytorchBackend, SimulatedBackend
from lem.spec.experiment import Experiment, Parallelism
from lem.spec.processes import gpus_needed
from lem.workload import tiny
from tests.conftest import command
from tests.models_for_tests import gpt2, mixtral, qwen2

pytestmark = pytest.mark.processes

WATTS = 50.0
PROMPTS = 41


# ------------------------------------------------------------------ two processes on the CPU
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with a power trace of constant power, and a config file."""
    path = tmp_path_factory.mktemp("parallel")
    (path / "trace.csv").write_text(f"t_s,power_w\n0,{WATTS}\n100000,{WATTS}\n")
    (path / "my.yaml").write_text(
        "model: tiny\nmax_output_tokens: 8\nbatching: {batch_size: 4}\nwarmup: {prompts: 1}\n"
        "energy: {name: replay, idle_s: 0.2, trace: trace.csv}\n"
    )
    return path


def run(folder, results, *overrides):
    """Run an experiment over 41 prompts; return its row, its request rows and its directory."""
    done = command(
        "experiment", "my.yaml", "-d", "sample", "-n", str(PROMPTS), "-y", "-o", results, *overrides, cwd=folder
    )
    assert done.code == 0, done.out + done.err
    return read(folder / results)


def read(results):
    (row,) = pd.read_parquet(results / "experiments").to_dict("records")
    requests = pd.read_parquet(results / "requests").sort_values("request").reset_index(drop=True)
    (path,) = (results / "raw").iterdir()
    return row, requests, ExperimentDir(path)


@pytest.fixture(scope="module")
def alone(folder):
    return run(folder, "alone")


@pytest.fixture(scope="module")
def shared(folder):
    return run(folder, "shared", "num_processes=2", "parallelism.strategy=data_parallel", "parallelism.degree=2")


@pytest.fixture(scope="module")
def split(folder):
    return run(folder, "split", "parallelism.strategy=tensor_parallel", "parallelism.degree=2")


def test_two_processes_run_each_prompt_exactly_once(shared):
    row, requests, _ = shared
    assert requests["request"].tolist() == list(range(PROMPTS))
    assert requests["rank"].tolist() == [i % 2 for i in range(PROMPTS)]
    assert (row["requests_completed"], row["requests_planned"]) == (PROMPTS, PROMPTS)


@pytest.mark.parametrize("other", ["shared", "split"])
def test_totals_are_those_of_one_process(alone, other, request):
    (row, requests, _), (expected, rows, _) = request.getfixturevalue(other), alone
    same = ["request", "input_tokens", "output_tokens", "finish_reason", "input_truncated"]
    assert requests[same].equals(rows[same])
    for total in ("input_tokens", "output_tokens", "flops", "parameters", "weights_bytes", "requests_completed"):
        assert row[total] == expected[total] > 0


@pytest.mark.parametrize("fixture", ["alone", "shared", "split"])
def test_energy_is_power_times_window_once(fixture, request):
    row, _, directory = request.getfixturevalue(fixture)
    window = [record.phase("measured") for record in directory.records()]
    assert row["energy_j"] == pytest.approx(WATTS * window[0].duration_s, rel=0.02)
    assert [len(each.energy) for each in window] == [1, 0][: len(window)]


@pytest.mark.parametrize("fixture", ["shared", "split"])
def test_processes_open_and_close_their_windows_together(fixture, request):
    first, second = request.getfixturevalue(fixture)[2].records()
    for name in ("load", "measured"):
        assert first.phase(name).duration_s == pytest.approx(second.phase(name).duration_s, abs=0.3)
    assert first.window_opened_unix_s == pytest.approx(second.window_opened_unix_s, abs=0.3)


def test_processes_that_run_one_model_count_its_prompts_once(split):
    _, requests, directory = split
    assert set(requests["rank"]) == {0}
    assert [record.requests_completed for record in directory.records()] == [PROMPTS, 0]
    assert all(record.memory.peak_bytes > 2**20 for record in directory.records())
    assert [record.engine.settings["parallelism"] for record in directory.records()] == ["tensor_parallel 2"] * 2


def test_the_key_value_cache_is_that_of_the_whole_model(alone, split):
    assert split[0]["kv_cache_bytes"] == alone[0]["kv_cache_bytes"] > 0


def threads(directory: ExperimentDir) -> list[str]:
    return [record.engine.settings["torch_threads"] for record in directory.records()]


def test_threads_are_what_the_environment_says(shared):
    assert threads(shared[2]) == ["1", "1"]  # the tests set OMP_NUM_THREADS


# ------------------------------------------------------------------ one model over processes
TOKENS = """
    import json, sys
    from dataclasses import replace
    from lem.backends import make_backend
    from lem.runner.ranks import join, named_by_launcher
    from lem.spec.experiment import Batching, Decoder, Experiment, Parallelism, PytorchBackend
    degree = named_by_launcher().size
    ranks = join(degree, share_a_model=degree > 1)
    strategy = Parallelism(strategy="tensor_parallel" if degree > 1 else "none", degree=degree)
    model, adapter, out = sys.argv[1:]
    found = []
    for changes in ({}, {"decoder": Decoder(do_sample=True)}, {"adapter": adapter}):
        wanted = Experiment(
            model=model, max_output_tokens=8, max_input_tokens=60, backend=PytorchBackend(device="cpu"),
            batching=Batching(batch_size=2), parallelism=strategy, **changes,
        )
        backend = make_backend(wanted)
        backend.local_rank = ranks.local_rank
        backend.start()
        backend.load()
        prompts = backend.encode(["How do tides work?", "Write a haiku about rain.", "What is a river?"])
        tokens = [g.token_ids for batch in backend.generate(prompts) for g in batch]
        info, sizes = backend.model_info(), backend.architecture()
        found.append([
            tokens, info.parameters, info.weights_bytes, sizes.body_weights, sizes.head_weights,
            [vars(part) for part in sizes.attention], backend.peak_memory().kv_cache_bytes,
        ])
    open(f"{out}/{degree}_{ranks.rank}", "w").write(json.dumps(found))
    ranks.close()
"""


def test_a_model_split_over_processes_writes_and_weighs_the_same(tmp_path):
    """This includes experts, sampling and an adapter; all processes see all prompts."""
    import textwrap

    model = mixtral(tmp_path / "mixtral")
    adapter = lora(model, tmp_path / "lora")
    (tmp_path / "code.py").write_text(textwrap.dedent(TOKENS))
    for degree in ("1", "2"):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", degree]
        done = subprocess.run(
            [*launcher, "code.py", str(model), str(adapter), "."], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    expected, *found = (json.loads((tmp_path / name).read_text()) for name in ("1_0", "2_0", "2_1"))
    greedy, sampled, adapted = expected
    assert greedy[0] != sampled[0] != adapted[0] != greedy[0]
    assert found == [expected, expected]


def lora(model, folder):
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    wanted = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), wanted).save_pretrained(folder)
    return folder


def config_of(folder):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def test_a_model_without_a_plan_is_refused_with_its_type(tmp_path):
    with pytest.raises(RunError, match="no tensor-parallel plan for models of type gpt2"):
        split_over_ranks(config_of(gpt2(tmp_path)), 2)


def test_heads_that_cannot_be_shared_evenly_are_refused(tmp_path):
    config = config_of(qwen2(tmp_path))
    assert split_over_ranks(config, 2).tp_size == 2
    with pytest.raises(RunError, match=r"attention heads \(4\) cannot be divided evenly among 3"):
        split_over_ranks(config, 3)
    with pytest.raises(RunError, match=r"key/value heads \(2\) cannot be divided evenly among 4"):
        split_over_ranks(config, 4)


# ------------------------------------------------------------------ one model over the GPUs of a process
def hollow(folder):
    """Return a model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(folder))


def shares(model, places, devices):
    """Return the bytes of weights on each device, with a shared weight counted where it first occurs."""
    sizes, seen = [0] * devices, set()
    for name, place in places.items():
        for weight in model.get_submodule(name).parameters():
            sizes[place] += 0 if id(weight) in seen else weight.nbytes
            seen.add(id(weight))
    return sizes


@pytest.mark.parametrize("degree", [2, 3, 4, 8])
def test_layers_are_spread_in_order_and_evenly(degree):
    from accelerate.utils import check_device_map

    model = hollow(tiny.path())
    places = spread(model, degree)
    check_device_map(model, places)  # accelerate: no module is left without a device
    assert list(places.values()) == sorted(places.values())
    sizes = shares(model, places, degree)
    largest = max(sum(p.nbytes for p in model.get_submodule(name).parameters()) for name in places)
    assert sum(sizes) == sum(p.nbytes for p in model.parameters())
    assert all(abs(size - sum(sizes) / degree) <= largest for size in sizes)
    assert min(sizes) > 0


def test_what_may_not_be_split_stays_together_and_a_tied_output_goes_to_its_embedding(tmp_path):
    places = spread(hollow(gpt2(tmp_path)), 2)
    assert {name for name in places if ".h." in name} == {"transformer.h.0", "transformer.h.1"}
    assert places["lm_head"] == places["transformer.wte"] == 0
    assert places["transformer.h.1"] == 1


def test_more_gpus_than_layers_are_refused(tmp_path):
    with pytest.raises(RunError, match="over at most 5 of the 8 GPUs"):
        spread(hollow(qwen2(tmp_path)), 8)


def test_a_model_that_does_not_say_what_may_be_split_is_refused(tmp_path):
    model = hollow(qwen2(tmp_path))
    model._no_split_modules = set()
    with pytest.raises(RunError, match="Qwen2ForCausalLM"):
        spread(model, 2)


# ------------------------------------------------------------------ which GPUs
def on_gpus(strategy="none", degree=1, **changes):
    parallel = Parallelism(strategy=strategy, degree=degree)
    return Experiment(model="tiny", backend=PytorchBackend(device="cuda"), parallelism=parallel, **changes)


EIGHT = Host(tuple(Gpu(i, f"GPU-{i}", "NVIDIA", 80 * 2**30) for i in range(8)))


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (on_gpus(), 1),
        (on_gpus(num_processes=4), 4),
        (on_gpus("data_parallel", 3), 3),
        (on_gpus("tensor_parallel", 2), 2),
        (on_gpus("pipeline_parallel", 5), 5),
    ],
)
def test_the_first_visible_gpus_are_in_use_as_many_as_all_processes_need(wanted, count):
    assert gpus_needed(wanted) == count
    backend = make_backend(wanted)
    backend.local_rank = count - 1
    # Each process names the GPUs of all processes, because the metering process meters them for the node.
    assert [device.index for device in backend.gpus_in_use(EIGHT)] == list(range(count))


class Cuda:
    """The parts of torch that asking for devices needs: GPUs with these UUIDs."""

    def __init__(self, *uuids):
        self._uuids = uuids
        self.cuda = self

    def is_available(self):
        return True

    def device_count(self):
        return len(self._uuids)

    def device(self, kind, index=0):
        import torch

        return torch.device(kind, index)

    def set_device(self, device):
        self.current = device.index

    def get_device_properties(self, device):
        return type("Properties", (), {"uuid": self._uuids[device.index]})


def devices(wanted, rank, *uuids):
    backend = make_backend(wanted)
    assert isinstance(backend, Pytorch)
    backend.local_rank = rank
    cuda = Cuda(*uuids)
    own = backend._own_devices(cuda)
    check_devices(cuda, own, backend.gpus_in_use(EIGHT))
    assert cuda.current == own[0].index
    return [str(device) for device in own]


def test_each_process_has_the_gpu_of_its_own_number_and_a_pipeline_has_all():
    assert devices(on_gpus(num_processes=3), 2, "0", "1", "2") == ["cuda:2"]
    assert devices(on_gpus("tensor_parallel", 2), 1, "0", "1") == ["cuda:1"]
    assert devices(on_gpus("pipeline_parallel", 2), 0, "0", "1") == ["cuda:0", "cuda:1"]


def test_a_gpu_that_cuda_does_not_show_is_an_error():
    with pytest.raises(RunError, match="needs 2 GPUs, but CUDA shows it only 1"):
        devices(on_gpus(num_processes=2), 1, "0")


@pytest.mark.parametrize(
    ("wanted", "rank"), [(on_gpus(num_processes=2), 1), (on_gpus("pipeline_parallel", 2), 0)], ids=["rank", "pipeline"]
)
def test_each_gpu_that_computes_must_be_the_one_that_is_metered(wanted, rank):
    with pytest.raises(RunError, match="CUDA's GPU 1 is 7, but the driver's is GPU-1"):
        devices(wanted, rank, "0", "7")


# ------------------------------------------------------------------ the launchers' command lines
def planned(processes):
    wanted = Experiment(model="any", backend=SimulatedBackend(gpus=2), num_processes=processes)
    info = PromptsInfo(4, "0" * 64, "p", None, None, 4, 0)
    return Plan("exp", timestamp(), wanted, info, processes=processes, replicas=processes)


def test_accelerates_own_parser_understands_the_command_line(monkeypatch, tmp_path):
    """This also works if the launcher's configuration file says otherwise."""
    from accelerate.commands import launch
    from accelerate.commands.config import config_args

    theirs = config_args.ClusterConfig(
        compute_environment="LOCAL_MACHINE", distributed_type="MULTI_GPU", mixed_precision="bf16", use_cpu=False,
        debug=False, num_processes=7, gpu_ids="4,5", main_process_port=1234, num_machines=1,
    )  # fmt: skip
    theirs.to_yaml_file(tmp_path / "default_config.yaml")
    monkeypatch.setattr(launch, "default_config_file", str(tmp_path / "default_config.yaml"))
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "default_config.yaml"))
    python, dash_m, module, *arguments = worker_command(planned(3), EIGHT, tmp_path / "scratch")
    assert (python, dash_m, module) == (sys.executable, "-m", "accelerate.commands.launch")
    parsed = launch.launch_command_parser().parse_args([*arguments, "raw/exp", "--attempt", "2"])
    parsed, _, _ = launch._validate_launch_command(parsed)
    assert (parsed.multi_gpu, parsed.num_processes, parsed.num_machines) == (True, 3, 1)
    assert (parsed.gpu_ids, parsed.mixed_precision, parsed.dynamo_backend) == ("all", "no", "no")
    assert (parsed.module, parsed.training_script) == (True, "lem.runner.worker")
    assert parsed.training_script_args == ["raw/exp", "--attempt", "2"]
    assert (parsed.main_process_port, parsed.log_dir) == (0, str(tmp_path / "scratch"))
    environment = launch.prepare_multi_gpu_env(parsed)
    assert environment.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
    assert parsed.main_process_port > 0


# ------------------------------------------------------------------ the direct form
FLAGS = ("--config", "my.yaml", "--dataset", "sample", "-n", str(PROMPTS))
SIMULATED = ("--model", "any", "backend=simulated", "--dataset", "sample", "energy=none")


def torchrun(module, *arguments, cwd, processes=2, **options):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "-m", module]
    return subprocess.run([*launcher, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, **options)


def test_direct_form_does_what_the_command_does(folder, alone):
    module = "llenergymeasure.orchestration.launcher"
    done = torchrun(module, *FLAGS, "-o", "direct", cwd=folder)
    assert done.returncode == 0, done.stderr
    row, requests, directory = read(folder / "direct")
    assert row["experiment_id"] in done.stdout
    assert "J/token" in done.stdout
    assert requests["rank"].tolist() == [i % 2 for i in range(PROMPTS)]
    assert requests["output_tokens"].tolist() == alone[1]["output_tokens"].tolist()
    assert row["energy_j"] == pytest.approx(WATTS * directory.records()[0].phase("measured").duration_s, rel=0.02)
    plan, state = directory.plan(), directory.state()
    assert (plan.processes, plan.experiment.num_processes, state.status) == (2, 2, "aggregated")
    assert plan.config_file == "my.yaml"


def test_a_worker_as_its_own_process_is_the_direct_form_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lem.cli.direct", *SIMULATED, "-n", "3"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "results")[0]["requests_completed"] == 3


def test_accelerate_that_starts_a_single_process_is_detected(tmp_path):
    if gpu.visible():
        pytest.skip("accelerate starts several processes on GPUs")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "-m", "lem.cli.direct"]
    done = subprocess.run([*launcher, *SIMULATED], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1  # accelerate's progress, which shows that of its process
    assert "non-zero exit status 2" in done.stderr
    assert "Error: accelerate launch was asked for several processes but started only one" in done.stderr
    assert "torch.distributed.run --nproc_per_node" in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["num_processes=3"], "num_processes: the configuration sets the number of processes to 3, but the launcher"),
        (["num_processes=1"], "to 1, but the launcher started 2. Start 1, or change num_processes."),
        (["parallelism.strategy=pipeline_parallel"], "Start 1, or change parallelism.strategy."),
        (["nonsense=1"], "nonsense"),
    ],
)
def test_direct_form_refuses_what_cannot_run_and_dismisses_others(tmp_path, monkeypatch, capfd, overrides, sentence):
    from lem.cli import direct

    published = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(direct, "publish", published.append)
    assert direct.main([*SIMULATED, *overrides]) == 2
    assert sentence in capfd.readouterr().err
    assert published == [direct.NOTHING]
    assert not (tmp_path / "results").exists()


def test_interrupted_direct_form_is_kept_and_resumed_by_the_command(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "lem.cli.direct"]
    process = subprocess.Popen(
        [*launcher, *SIMULATED, "-n", "40", "backend.decode_s_per_token=0.01", "max_output_tokens=20"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("Prompts ") and not line.startswith("Prompts 0/"):
            os.killpg(process.pid, signal.SIGINT)
            break
    _, said = process.communicate(timeout=60)
    (path,) = (tmp_path / "results" / "raw").iterdir()
    directory = ExperimentDir(path)
    assert f"lem experiment --resume {directory.id}" in said
    assert "lem/runner/" not in said, "of lem's own there are sentences, no traceback"
    assert directory.state().status == "interrupted"
    before = [row for part in directory.parts() for row in part.requests]
    assert 0 < len(before) < 40
    resumed = command("experiment", "--resume", directory.id, "-y", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    after = [row for part in directory.parts() for row in part.requests]
    assert sorted(row.request for row in after) == list(range(40))
    assert set(before) <= set(after)


# ------------------------------------------------------------------ on GPUs
@pytest.mark.gpu
@pytest.mark.skipif(len(gpu.visible()) < 2, reason="fewer than two NVIDIA GPUs are visible")
@pytest.mark.parametrize("strategy", ["data_parallel", "tensor_parallel", "pipeline_parallel"])
def test_two_gpus_write_what_one_writes_and_are_both_metered(folder, strategy):
    metered = ("energy={name: nvml}", "energy.trace=null", "fp_precision=float32")
    one = run(folder, f"gpu-one-{strategy}", *metered)
    two = run(folder, f"gpu-two-{strategy}", *metered, f"parallelism.strategy={strategy}", "parallelism.degree=2")
    assert two[1]["output_tokens"].tolist() == one[1]["output_tokens"].tolist()
    for total in ("flops", "parameters", "weights_bytes"):
        assert two[0][total] == one[0][total]
    owner: ProcessRecord = two[2].records()[0]
    readings = [r.device for r in owner.phase("measured").energy if r.component == "gpu"]
    assert readings == [device.uuid for device in gpu.visible()[:2]]
    assert two[0]["peak_memory_bytes"] > 0
