"""Objections to an experiment on the pytorch backend, found before anything heavy is loaded.

The checks look at the options, the host, the model's config.json and the headers of the weight files. They load no
weights.
Importing transformers takes seconds, so checks that need it run in a process of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from lem.backends import checkpoint_objections, pytorch_continuous, transformers_source
from lem.backends.objections import checkpoint_dtype, model_objections, needs_own_code, unused_gpus
from lem.backends.placement import split_over_ranks
from lem.errors import RunError
from lem.machine.gpu import Gpu
from lem.machine.host import Host
from lem.spec.engines import PytorchBackend
from lem.spec.experiment import Experiment
from lem.spec.processes import gpus_needed, process_counts
from lem.spec.rules import Objection
from lem.workload import apart, weights
from lem.workload.models import Model
from lem.workload.weights import summary

# The packages of attention kernels that do not come with PyTorch, and the oldest GPUs that the kernels support.
ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
ATTENTION_CAPABILITY = {"flash_attention_2": (8, 0), "flash_attention_3": (9, 0)}
BFLOAT16_CAPABILITY = (8, 0)
COMPILE_CAPABILITY = (7, 0)
# The packages that transformers needs for each quantization method, and the methods that it does not support on a CPU.
QUANTIZERS = {
    "aqlm": ("aqlm",), "auto-round": ("auto_round",), "awq": ("gptqmodel",), "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",), "eetq": ("kernels",), "fp_quant": ("fp_quant",),
    "gptq": ("optimum", "gptqmodel"), "higgs": ("flute",), "hqq": ("hqq",), "quanto": ("optimum.quanto",),
    "quark": ("quark",), "sinq": ("sinq",), "spqr": ("spqr_quant",), "torchao": ("torchao",), "vptq": ("vptq",),
}  # fmt: skip
QUANTIZERS_ON_GPU = frozenset(["eetq", "fbgemm_fp8", "fp_quant", "higgs", "spqr", "vptq"])
# Models whose recurrent state or positions advance over padding (tested with transformers 5.23).
PADDING_UNMASKED = frozenset([
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "minimax", "mvp", "pegasus",
    "plbart", "prophetnet", "rwkv", "trocr", "whisper", "xlnet",
])  # fmt: skip


def objections(experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
    """Return all objections; if `model` is None, the checks that need the model are skipped."""
    options = experiment.backend
    assert isinstance(options, PytorchBackend)
    gpus = host.gpus if options.device != "cpu" else ()
    used = gpus[: gpus_needed(experiment)]
    return [
        *_device(options, host, used),
        *_parallelism(experiment, gpus),
        *_tensor_parallel(experiment, options, model, host),
        *_attention(options, experiment, model, host, used),
        *_continuous(experiment, options, model),
        *_packages(experiment, host),
        *model_objections(experiment, model),
        *(_model(experiment, model, host, used) if model is not None else ()),
        *_precision(experiment, model, used),
    ]


def _device(options: PytorchBackend, host: Host, used: Sequence[Gpu]) -> Iterator[Objection]:
    if options.device == "cuda" and not host.gpus:
        yield Objection("no_gpu", "backend.device", "no NVIDIA GPU is visible.")
    if options.torch_compile and (old := _older_than(COMPILE_CAPABILITY, used)):
        fact = f"torch.compile needs compute capability {_dotted(COMPILE_CAPABILITY)}; {old} is too old."
        yield Objection("compile_unsupported", "backend.torch_compile", fact)
    if options.cache_implementation == "none":
        fact = "without a cache, every step recomputes the whole sequence, but lem's FLOPs count each token only once."
        yield Objection("no_cache", "backend.cache_implementation", fact)


def _parallelism(experiment: Experiment, gpus: Sequence[Gpu]) -> Iterator[Objection]:
    strategy, (processes, _) = experiment.parallelism.strategy, process_counts(experiment)
    if strategy == "tensor_parallel" and experiment.quantization.quantization:
        fact = "weights quantized by bitsandbytes cannot be split across processes."
        yield Objection("tensor_parallel_quantized", "quantization.quantization", fact)
    if strategy == "pipeline_parallel" and not gpus:
        fact = "pipeline_parallel spreads the layers over GPUs, but the run is on the CPU."
        yield Objection("pipeline_needs_gpus", "parallelism.strategy", fact)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not gpus and processes > cores:
        path = "num_processes" if strategy == "none" else "parallelism.degree"
        fact = f"{processes} processes share {cores} processor cores, so they slow each other down."
        yield Objection("more_processes_than_cores", path, fact)
    yield from unused_gpus(experiment, gpus)


def _tensor_parallel(
    experiment: Experiment, options: PytorchBackend, model: Model | None, host: Host
) -> Iterator[Objection]:
    """Object if transformers, given the model's config and the visible GPUs, cannot split the model as requested."""
    parallelism = experiment.parallelism
    if parallelism.strategy != "tensor_parallel" or parallelism.degree == 1:
        return
    if options.device == "cpu" and host.gpus:
        fact = "transformers splits a model over GPUs if any are visible."
        yield Objection("tensor_parallel_beside_gpus", "backend.device", fact)
    if model is None or ("auto_map" in model.config and not experiment.trust_remote_code):
        return
    trusted = experiment.trust_remote_code
    reason = apart.call("transformers", _why_unsplittable, model.path, model.revision, trusted, parallelism.degree)
    if reason is not None:
        yield Objection("tensor_parallel_unsplittable", "parallelism.strategy", reason)


def _why_unsplittable(path: str, revision: str | None, trusted: bool, degree: int) -> str | None:
    """Return why transformers cannot split a model over processes; None if it can or if that is unknown."""
    import transformers

    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trusted)
        split_over_ranks(config, degree)
    except RunError as error:
        return str(error)
    except (OSError, ValueError):
        return None  # the error on loading will say why
    return None


# ------------------------------------------------------------------ capabilities of GPUs
def _older_than(capability: tuple[int, int], gpus: Sequence[Gpu]) -> str | None:
    """Return the name and compute capability of a GPU known to be below `capability`; None if there is no such GPU."""
    for gpu in gpus:
        if gpu.compute_capability is not None and gpu.compute_capability < capability:
            return f"{gpu.name} (compute capability {_dotted(gpu.compute_capability)})"
    return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _attention(
    options: PytorchBackend, experiment: Experiment, model: Model | None, host: Host, used: Sequence[Gpu]
) -> Iterator[Objection]:
    kernel, path = options.attn_implementation, "backend.attn_implementation"
    package = ATTENTION_PACKAGES.get(kernel)
    if package is None:
        return
    if not host.has(package):
        yield Objection("missing_package", path, f"{kernel} needs the package {package}.")
    if not used:
        yield Objection("attention_needs_gpu", path, f"{kernel} runs only on NVIDIA GPUs.")
    elif old := _older_than(ATTENTION_CAPABILITY[kernel], used):
        fact = f"{kernel} needs compute capability {_dotted(ATTENTION_CAPABILITY[kernel])}; {old} is too old."
        yield Objection("attention_unsupported", path, fact)
    if checkpoint_dtype(experiment, model) == "float32":
        yield Objection("attention_float32", path, f"{kernel} does not support float32.")


def _precision(experiment: Experiment, model: Model | None, used: Sequence[Gpu]) -> Iterator[Objection]:
    quantization = experiment.quantization
    if not used and experiment.fp_precision == "float16":
        yield Objection("float16_on_cpu", "fp_precision", "most CPUs emulate float16, which is slow.")
    old = _older_than(BFLOAT16_CAPABILITY, used)
    if old is None:
        return
    fact = f"{old} has no hardware support for bfloat16."
    if checkpoint_dtype(experiment, model) == "bfloat16":
        yield Objection("bfloat16_emulated", "fp_precision", fact)
    if quantization.quantization and quantization.load_in_4bit and quantization.bnb_4bit_compute_dtype == "bfloat16":
        yield Objection("bfloat16_emulated", "quantization.bnb_4bit_compute_dtype", fact)


# ------------------------------------------------------------------ continuous batching
def _continuous(experiment: Experiment, options: PytorchBackend, model: Model | None) -> Iterator[Objection]:
    if experiment.batching.strategy != "continuous":
        return
    code, strategy, cache = "no_continuous_batching", experiment.parallelism.strategy, options.cache_implementation
    yield from _unavailable(model)
    if options.attn_implementation == "flex_attention":
        fact = "flex_attention cannot use the paged cache of continuous batching; sdpa, eager and flash attention can."
        yield Objection(code, "backend.attn_implementation", fact)
    if cache != "dynamic":
        yield Objection(
            code,
            "backend.cache_implementation",
            f"continuous batching uses a paged cache, so this option must be dynamic, not {cache}.",
        )
    if options.torch_compile:
        fact = "every step of continuous batching has a different shape and would be recompiled."
        yield Objection(code, "backend.torch_compile", fact)
    if strategy in ("tensor_parallel", "pipeline_parallel"):
        fact = f"the pytorch backend cannot batch continuously with {strategy}; the vllm backend can."
        yield Objection(code, "parallelism.strategy", fact)


def _unavailable(model: Model | None) -> Iterator[Objection]:
    code, path = "continuous_unavailable", "batching.strategy"
    if pytorch_continuous.is_too_old():
        oldest, version = _dotted(pytorch_continuous.OLDEST), pytorch_continuous.version()
        fact = f"transformers {version} is too old for continuous batching (pip install 'transformers>={oldest}')."
        yield Objection(code, path, fact)
    if model is None:
        return
    kind, config = str(model.config.get("model_type")), model.text_config
    if pytorch_continuous.can_run(kind) is False:
        fact = f"transformers cannot replace the attention of a {kind} model, so it cannot use a paged cache."
        yield Objection(code, path, fact)
    elif (reason := pytorch_continuous.unpaged(config)) is not None:
        yield Objection(code, path, reason)
    strange = sorted(set(config.get("layer_types") or ()) - pytorch_continuous.LAYER_TYPES)
    if strange:
        fact = f"{model.name} has layers of type {', '.join(strange)}, for which transformers has no paged cache."
        yield Objection(code, path, fact)


# ------------------------------------------------------------------ models
def _model(experiment: Experiment, model: Model, host: Host, used: Sequence[Gpu]) -> Iterator[Objection]:
    kind, known = model.config.get("model_type"), transformers_source.language_models()
    other_task = isinstance(kind, str) and bool(known) and kind not in known
    if other_task and not needs_own_code(model):
        yield from _unsupported(model, str(kind))
    yield from checkpoint_objections.padding(model)
    yield from _quantized(model, host, used)
    yield from _padding(experiment, model)
    yield from checkpoint_objections.weights_of(experiment, model)
    reads_both_ways = transformers_source.READS_BOTH_WAYS in (transformers_source.modeling(str(kind)) or "")
    if reads_both_ways and not model.config.get("is_decoder"):
        yield Objection("not_a_decoder", "model", f"models of type {kind} read text in both directions.")


def _unsupported(model: Model, kind: str) -> Iterator[Objection]:
    if model.config.get("is_encoder_decoder"):
        return  # another objection covers this case
    if kind in transformers_source.model_types():
        fact = f"transformers has no text generation class for a {kind} model."
    else:
        fact = f"transformers {transformers_source.version()} does not know models of type {kind}."
    yield Objection("model_unsupported", "model", fact)


def _quantized(model: Model, host: Host, used: Sequence[Gpu]) -> Iterator[Objection]:
    config = model.quantization_config
    by_bitsandbytes = config.get("load_in_8bit") or config.get("load_in_4bit")
    method = str(config.get("quant_method") or ("bitsandbytes" if by_bitsandbytes else None))
    packages = [name for name in QUANTIZERS.get(method, ()) if not host.has(name)]
    if packages:
        fact = f"the weights are quantized with {method}, which needs {' and '.join(packages)}."
        yield Objection("missing_quantizer", "model", fact)
    if method in QUANTIZERS_ON_GPU and not used:
        yield Objection("missing_quantizer", "model", f"weights quantized with {method} run only on a GPU.")
    folder = model.folder
    if not config and folder is not None and (integers := weights.of_integers(folder)):
        fact = f"{model.name} stores weights as integers ({summary(integers)}), but config.json names no quantization."
        yield Objection("weights_unscaled", "model", fact)


def _padding(experiment: Experiment, model: Model) -> Iterator[Objection]:
    batching, kind = experiment.batching, model.text_config.get("model_type")
    if kind in PADDING_UNMASKED and batching.strategy != "continuous" and batching.batch_size > 1:
        fact = (
            f"transformers does not mask padding in a {kind} model, so padding changes the output of shorter prompts."
        )
        yield Objection("padding_changes_tokens", "batching.batch_size", fact)


# ------------------------------------------------------------------ packages
def _packages(experiment: Experiment, host: Host) -> Iterator[Objection]:
    if experiment.adapter is not None and not host.has("peft"):
        yield Objection("missing_package", "adapter", "LoRA adapters need the package peft (pip install 'lem[lora]').")
    if experiment.quantization.quantization and not host.has("bitsandbytes"):
        fact = "quantized weights need the package bitsandbytes (pip install 'lem[bitsandbytes]')."
        yield Objection("missing_package", "quantization.quantization", fact)
