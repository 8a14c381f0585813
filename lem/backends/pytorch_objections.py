"""What speaks against an experiment on the pytorch backend, found before anything heavy is loaded.

Looks at the options, the host, and the model's config.json; loads no weights. Only where a model is to be split over
processes is transformers asked whether it can.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from lem.backends import pytorch_continuous
from lem.backends.objections import checkpoint_dtype, model_objections, unused_gpus
from lem.backends.placement import split_over_ranks
from lem.errors import RunError
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.spec.engines import PytorchBackend
from lem.spec.experiment import Experiment
from lem.spec.processes import gpus_needed, process_counts
from lem.spec.rules import Objection
from lem.workload.models import Model

# Packages behind the attention kernels that do not come with PyTorch, and the oldest GPUs that they run on.
ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
ATTENTION_CAPABILITY = {"flash_attention_2": (8, 0), "flash_attention_3": (9, 0)}
BFLOAT16_CAPABILITY = (8, 0)
COMPILE_CAPABILITY = (7, 0)


def objections(experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
    """Return all objections; `model` is None when none was found, which has been objected to already."""
    options = experiment.backend
    assert isinstance(options, PytorchBackend)
    gpus = host.gpus if options.device != "cpu" else ()
    used = gpus[: gpus_needed(experiment)]
    return [
        *_device_objections(options, host),
        *_parallelism_objections(experiment, gpus),
        *_tensor_parallel_objections(experiment, model, host),
        *_attention_objections(options, experiment, model, host, used),
        *_compile_objections(options, used),
        *_cache_objections(options),
        *_continuous_objections(experiment, options, model),
        *_package_objections(experiment, host),
        *model_objections(experiment, model),
        *_precision_objections(experiment, model, used),
    ]


def _device_objections(options: PytorchBackend, host: Host) -> Iterator[Objection]:
    if options.device == "cuda" and not host.gpus:
        yield Objection("no_gpu", "backend.device", "no NVIDIA GPU is visible.", "Use backend.device=auto or cpu.")


def _parallelism_objections(experiment: Experiment, gpus: Sequence[Gpu]) -> Iterator[Objection]:
    strategy, (processes, _) = experiment.parallelism.strategy, process_counts(experiment)
    if strategy == "tensor_parallel" and experiment.quantization.quantization:
        yield Objection(
            "tensor_parallel_quantized",
            "quantization.quantization",
            "bitsandbytes' weights cannot be split over processes.",
            "Use pipeline_parallel or data_parallel, or leave quantization off.",
        )
    if strategy == "pipeline_parallel" and not gpus:
        reason = "pipeline_parallel spreads the layers over GPUs, and the run is on the CPU."
        yield Objection("pipeline_needs_gpus", "parallelism.strategy", reason, "Choose another strategy.")
    if not gpus and processes > _cores():
        path = "num_processes" if strategy == "none" else "parallelism.degree"
        reason = f"{processes} processes share {_cores()} processor cores and slow each other."
        yield Objection("more_processes_than_cores", path, reason, "Lower it.")
    yield from unused_gpus(experiment, gpus)


def _tensor_parallel_objections(experiment: Experiment, model: Model | None, host: Host) -> Iterator[Objection]:
    """Object to a model that cannot be split over the processes; transformers and the model's config know."""
    parallelism = experiment.parallelism
    if parallelism.strategy != "tensor_parallel" or parallelism.degree == 1:
        return
    assert isinstance(experiment.backend, PytorchBackend)
    if experiment.backend.device == "cpu" and host.gpus:
        reason = "transformers splits a model over the GPUs where any is visible."
        remedy = "Hide them: CUDA_VISIBLE_DEVICES='' lem …, or leave backend.device out."
        yield Objection("tensor_parallel_beside_gpus", "backend.device", reason, remedy)
    if model is None or ("auto_map" in model.config and not experiment.trust_remote_code):
        return
    import transformers  # seconds, but only where a model is to be split

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=experiment.trust_remote_code
        )
        split_over_ranks(config, parallelism.degree)
    except RunError as error:
        yield Objection("tensor_parallel_unsplittable", "parallelism.strategy", str(error), "")
    except (OSError, ValueError):
        return  # transformers does not know the model: loading it says why


def _cores() -> int:
    """Return the processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ------------------------------------------------------------------ what a GPU can do
def _older_than(capability: tuple[int, int], gpus: Sequence[Gpu]) -> str | None:
    """Return the name of a GPU of a lesser compute capability, with it; None when there is none or it is not known."""
    for gpu in gpus:
        if gpu.compute_capability is not None and gpu.compute_capability < capability:
            return f"{gpu.name} (compute capability {_dotted(gpu.compute_capability)})"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _attention_objections(
    options: PytorchBackend, experiment: Experiment, model: Model | None, host: Host, used: Sequence[Gpu]
) -> Iterator[Objection]:
    kernel, path = options.attn_implementation, "backend.attn_implementation"
    package = ATTENTION_PACKAGES.get(kernel)
    if package is None:
        return
    if not host.has(package):
        reason = f"{kernel} needs the package {package}."
        yield Objection("missing_package", path, reason, "Install it, or use sdpa.")
    if not used:
        yield Objection("attention_needs_gpu", path, f"{kernel} runs on NVIDIA GPUs only.", "Use sdpa or eager.")
    elif old := _older_than(ATTENTION_CAPABILITY[kernel], used):
        reason = f"{kernel} needs compute capability {_dotted(ATTENTION_CAPABILITY[kernel])}, the GPU is a {old}."
        yield Objection("attention_unsupported", path, reason, "Use sdpa.")
    if checkpoint_dtype(experiment, model) == "float32":
        yield Objection("attention_float32", path, f"{kernel} has no float32.", "Use fp_precision float16 or bfloat16.")


def _compile_objections(options: PytorchBackend, used: Sequence[Gpu]) -> Iterator[Objection]:
    if options.torch_compile and (old := _older_than(COMPILE_CAPABILITY, used)):
        reason = f"torch.compile needs compute capability {_dotted(COMPILE_CAPABILITY)}, the GPU is a {old}."
        yield Objection("compile_unsupported", "backend.torch_compile", reason, "Leave it off.")


def _precision_objections(experiment: Experiment, model: Model | None, used: Sequence[Gpu]) -> Iterator[Objection]:
    quantization = experiment.quantization
    if not used and experiment.fp_precision == "float16":
        yield Objection(
            "float16_on_cpu",
            "fp_precision",
            "most CPUs emulate float16, which is slow.",
            "Use float32 or bfloat16 for numbers that matter.",
        )
    old = _older_than(BFLOAT16_CAPABILITY, used)
    if old is None:
        return
    reason = f"a {old} has no bfloat16 arithmetic."
    if checkpoint_dtype(experiment, model) == "bfloat16":
        yield Objection("bfloat16_emulated", "fp_precision", reason, "Use float16.")
    if quantization.quantization and quantization.load_in_4bit and quantization.bnb_4bit_compute_dtype == "bfloat16":
        yield Objection("bfloat16_emulated", "quantization.bnb_4bit_compute_dtype", reason, "Use float16.")


def _cache_objections(options: PytorchBackend) -> Iterator[Objection]:
    if options.cache_implementation == "none":
        yield Objection(
            "no_cache",
            "backend.cache_implementation",
            "without a cache every step recomputes the whole sequence; FLOPs count each token once.",
            "Use dynamic unless that is what you study.",
        )


# ------------------------------------------------------------------ continuous batching
def _continuous_objections(experiment: Experiment, options: PytorchBackend, model: Model | None) -> Iterator[Objection]:
    if experiment.batching.strategy != "continuous":
        return
    yield from _unavailable(model)
    strategy, cache = experiment.parallelism.strategy, options.cache_implementation
    if options.attn_implementation == "flex_attention":
        reason, remedy = "flex_attention does not read a cache of pages.", "Use auto, sdpa, eager or flash attention."
        yield Objection("no_continuous_batching", "backend.attn_implementation", reason, remedy)
    if cache != "dynamic":
        reason = f"continuous batching has a cache of pages, and {cache} is asked for."
        yield Objection("no_continuous_batching", "backend.cache_implementation", reason, "Leave it out.")
    if options.torch_compile:
        reason = "each step of continuous batching has another shape, and would be compiled anew."
        yield Objection(
            "no_continuous_batching", "backend.torch_compile", reason, "Leave it off, or use static batching."
        )
    if strategy in ("tensor_parallel", "pipeline_parallel"):
        reason = f"this backend has no continuous batching with {strategy}."
        yield Objection("no_continuous_batching", "parallelism.strategy", reason, "Use data_parallel, or backend=vllm.")


def _unavailable(model: Model | None) -> Iterator[Objection]:
    path, remedy = "batching.strategy", "Choose static, or backend=vllm."
    if pytorch_continuous.is_too_old():
        oldest = ".".join(map(str, pytorch_continuous.OLDEST))
        reason = f"transformers {pytorch_continuous.version()} is installed; continuous batching here needs {oldest}."
        yield Objection(
            "continuous_unavailable", path, reason, f"pip install 'transformers>={oldest}', or choose static."
        )
    if model is None:
        return
    kind = str(model.config.get("model_type"))
    if pytorch_continuous.can_run(kind) is False:
        reason = f"transformers cannot exchange the attention of a {kind} model, so there can be no cache of pages."
        yield Objection("continuous_unavailable", path, reason, remedy)
    strange = sorted(set(model.config.get("layer_types") or ()) - pytorch_continuous.LAYER_TYPES)
    if strange:
        reason = f"{model.name} has layers of {', '.join(strange)}, for which transformers has no cache of pages."
        yield Objection("continuous_unavailable", path, reason, remedy)


# ------------------------------------------------------------------ packages and adapters
def _package_objections(experiment: Experiment, host: Host) -> Iterator[Objection]:
    if experiment.adapter is not None and not host.has("peft"):
        reason = "LoRA adapters need the package peft."
        yield Objection("missing_package", "adapter", reason, "pip install 'lem[lora]'.")
    if experiment.quantization.quantization and not host.has("bitsandbytes"):
        yield Objection(
            "missing_package",
            "quantization.quantization",
            "quantized weights need the package bitsandbytes.",
            "pip install 'lem[bitsandbytes]'.",
        )
