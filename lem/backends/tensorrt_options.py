"""From lem's options to TensorRT-LLM's: arguments of LLM, sampling parameters, and what speaks against an experiment.

Imports neither TensorRT-LLM nor torch; what the installed version accepts is read off its source. Knows no request and
no time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.backends import tensorrt_source
from lem.backends.objections import checkpoint_dtype, model_objections, unused_gpus
from lem.errors import did_you_mean
from lem.machine.host import Host
from lem.spec.engines import TensorrtBackend, TensorrtSpeculation
from lem.spec.experiment import Experiment
from lem.spec.processes import changed, runs_in_one_process
from lem.spec.rules import Objection, without_effect
from lem.workload.models import Model

# Options and the arguments of LLM that they are; those of a part, and the argument that the part is.
DIRECT = {
    "max_seq_len": "max_seq_len",
    "max_num_tokens": "max_num_tokens",
    "attn_backend": "attn_backend",
    "chunked_prefill": "enable_chunked_prefill",
    "overlap_scheduler": "disable_overlap_scheduler",
    "cuda_graphs": "cuda_graph_config",
    "force_dynamic_quantization": "force_dynamic_quantization",
    "moe_expert_parallel_size": "moe_expert_parallel_size",
}
PARTS = {"kv_cache": "kv_cache_config", "scheduler": "scheduler_config", "speculative": "speculative_config"}
SPECULATION = ("decoding_type", "speculative_model", "max_draft_len", "max_matching_ngram_size")
# What an argument was called before.
FORMER_NAMES = {"speculative_model": "speculative_model_dir"}
# Arguments that lem gives by itself, and what gives them.
OF_LEM = {
    "model": "model",
    "tokenizer": "model (prompts are tokenized by its own tokenizer)",
    "tokenizer_mode": "model (prompts are tokenized by its own tokenizer)",
    "tokenizer_revision": "revision",
    "custom_tokenizer": "model (prompts are tokenized by its own tokenizer)",
    "skip_tokenizer_init": "model (prompts are tokenized by its own tokenizer)",
    "revision": "revision",
    "trust_remote_code": "trust_remote_code",
    "dtype": "fp_precision",
    "max_batch_size": "batching.batch_size",
    "max_beam_width": "decoder (lem samples each output once)",
    "tensor_parallel_size": "parallelism",
    "pipeline_parallel_size": "parallelism",
    "enable_lora": "adapter",
    "lora_config": "adapter",
    "generation_config": "decoder",
    "return_perf_metrics": "lem itself, which reads the times of requests",
    "backend": "lem itself, which uses the PyTorch flow",
    "encode_only": "lem itself, which generates",
    "mpi_session": "lem itself",
}
# Arguments of former versions, and what there is instead.
ENGINE_BUILT = "Leave it out: the PyTorch flow builds no TensorRT engine."
DROPPED = {
    "build_config": ENGINE_BUILT,
    "fast_build": ENGINE_BUILT,
    "enable_build_cache": ENGINE_BUILT,
    "embedding_parallel_mode": ENGINE_BUILT,
    "extended_runtime_perf_knob_config": ENGINE_BUILT,
    "calib_config": "Leave it out: name a checkpoint that is quantized already.",
    "quant_config": "Leave it out: name a checkpoint that is quantized already; backend.kv_cache.dtype is the cache's.",
    "pytorch_backend_config": "Leave it out: its fields are arguments of their own, for backend.extra_args.",
    "enable_overlap_scheduler": "Set backend.overlap_scheduler.",
    "use_cuda_graph": "Set backend.cuda_graphs.",
    "cuda_graph_batch_sizes": "Set cuda_graph_config in backend.extra_args.",
    "cuda_graph_max_batch_size": "Set cuda_graph_config in backend.extra_args.",
    "cuda_graph_padding_enabled": "Set cuda_graph_config in backend.extra_args.",
    "torch_compile_enabled": "Set torch_compile_config in backend.extra_args.",
    "torch_compile_fullgraph": "Set torch_compile_config in backend.extra_args.",
    "moe_backend": "Set moe_config in backend.extra_args.",
    "moe_max_num_tokens": "Set moe_config in backend.extra_args.",
    "moe_load_balancer": "Set moe_config in backend.extra_args.",
    "kv_cache_dtype": "Set backend.kv_cache.dtype.",
    "autotuner_enabled": "Set enable_autotuner in backend.extra_args.",
    "enable_trtllm_sampler": "Leave it out: TorchSampler is the only sampler.",
    "sampler_type": "Leave it out: TorchSampler is the only sampler.",
    "mixed_sampler": "Leave it out: requests of a batch may be sampled differently.",
}
# Requests whose sampling options differ from these need a sampler that looks at them.
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
# The one sampler of former versions that takes all sampling options.
OLD_SAMPLER = "TRTLLMSampler"
# Seeds of requests differ in the experiment's seed and in the prompt, and fit into 64 bits.
PROMPTS_PER_SEED = 2**31


# ------------------------------------------------------------------ translation
@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: where its files are, and its rank."""

    folder: Path
    rank: int


def engine_arguments(experiment: Experiment, model: Model, adapter: Adapter | None) -> dict[str, Any]:
    """Return the arguments of TensorRT-LLM's LLM as plain values; what is null is left to TensorRT-LLM.

    Args:
        experiment: without objections.
        model: as it was found.
        adapter: None without one.
    """
    options = _options(experiment)
    degree = experiment.parallelism.degree if runs_in_one_process(experiment) else 1
    size = {"tensor_parallel": "tensor_parallel_size", "pipeline_parallel": "pipeline_parallel_size"}
    own = {
        "model": model.path,
        "revision": model.revision,
        "tokenizer_revision": model.revision,
        "skip_tokenizer_init": True,
        "trust_remote_code": experiment.trust_remote_code,
        "dtype": checkpoint_dtype(experiment, model) or "auto",
        "max_batch_size": experiment.batching.batch_size,
        "return_perf_metrics": True,
        **({size[experiment.parallelism.strategy]: degree} if degree > 1 else {}),
        **({} if adapter is None else {"lora_config": _lora(adapter)}),
    }
    return own | merged(given(options), options.extra_args or {})


def _lora(adapter: Adapter) -> dict[str, Any]:
    return {"lora_dir": [str(adapter.folder)], "max_lora_rank": adapter.rank, "max_loras": 1, "max_cpu_loras": 1}


def given(options: TensorrtBackend) -> dict[str, Any]:
    """Return the options that are not null, as arguments of LLM; those of a part as a mapping of their own."""
    found: dict[str, Any] = {}
    for option, argument in DIRECT.items():
        value = getattr(options, option)
        if value is not None:
            found[argument] = _translated(option, value)
    for option, argument in PARTS.items():
        part = {name: value for name, value in vars(getattr(options, option)).items() if value is not None}
        if part:
            found[argument] = part
    return found


def _translated(option: str, value: Any) -> Any:
    if option == "overlap_scheduler":
        return not value
    if option == "cuda_graphs":
        return {} if value else None
    return value


def merged(ours: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return both, a part that is in both with the fields of both; no field is in both, which has been objected to."""
    both = {name: {**ours[name], **extra[name]} for name in ours if isinstance(extra.get(name), Mapping)}
    return {**ours, **extra, **both}


def speculative_class(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the class of arguments of a way to draft tokens, and its fields; None when it is not known."""
    name = tensorrt_source.decoding_types().get(str(config.get("decoding_type")))
    if name is None:
        return None
    known = tensorrt_source.arguments(name)
    fields = {_known_as(field, known): value for field, value in config.items() if field != "decoding_type"}
    return name, fields


def _known_as(field: str, known: Mapping[str, Any]) -> str:
    """Return a field's name in the installed version."""
    former = FORMER_NAMES.get(field)
    return former if former in known and field not in known and former is not None else field


def sampling_parameters(experiment: Experiment, index: int, end_tokens: frozenset[int]) -> dict[str, Any]:
    """Return the arguments of TensorRT-LLM's SamplingParams for the prompt at a position.

    One end token is the engine's own, which it holds off for `min_tokens`; others stop as words do. Greedy decoding is
    that of a request without temperature, top_k and top_p; with sampling top_p is always given, since former versions
    take a temperature alone for greedy.
    """
    decoder = experiment.decoder
    first, *others = sorted(end_tokens) or [-1]
    asked: dict[str, Any] = {
        "max_tokens": experiment.max_output_tokens,
        "end_id": first,
        "pad_id": max(first, 0),
        "detokenize": False,
        "return_perf_metrics": True,
    }
    if others:
        asked |= {"stop_token_ids": others, "include_stop_str_in_output": True}
    if experiment.min_output_tokens:
        asked["min_tokens"] = experiment.min_output_tokens
    asked |= {name: getattr(decoder, name) for name in changed_sampling(experiment)}
    if not decoder.do_sample:
        return asked
    seed = experiment.seed * PROMPTS_PER_SEED + index
    return asked | {"temperature": decoder.temperature, "top_p": decoder.top_p, "top_k": decoder.top_k, "seed": seed}


def changed_sampling(experiment: Experiment) -> list[str]:
    """Return the sampling options that not every version's sampler looks at, and that are to do something."""
    decoder = experiment.decoder
    names = [name for name, neutral in NEUTRAL.items() if getattr(decoder, name) != neutral]
    return [name for name in names if decoder.do_sample or name != "min_p"]


def _options(experiment: Experiment) -> TensorrtBackend:
    assert isinstance(experiment.backend, TensorrtBackend)
    return experiment.backend


# ------------------------------------------------------------------ objections
def objections(experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
    """Return all objections; `model` is None when none was found, which has been objected to already."""
    options = _options(experiment)
    return [
        *_installation(host),
        *_precision(experiment, model),
        *_quantization(experiment),
        *_sampling(experiment),
        *_seeds(experiment),
        *_end_tokens(experiment, model),
        *_speculation(options),
        *_drafts_and_bans(experiment),
        *_extra_args(options),
        *_parts(options),
        *_cache(options),
        *_length(options, model),
        *unused_gpus(experiment, host.gpus),
        *model_objections(experiment, model, at_most=options.max_seq_len),
    ]


def _installation(host: Host) -> Iterator[Objection]:
    if not host.has(tensorrt_source.PACKAGE):
        reason = "the tensorrt backend needs the package tensorrt-llm."
        yield Objection("missing_package", "backend", reason, "pip install 'lem[tensorrt]' as docs/tensorrt.md says.")
    if not host.gpus:
        reason = "TensorRT-LLM runs on NVIDIA GPUs only, and none is visible."
        yield Objection("no_gpu", "backend", reason, "Run on a GPU, or choose another backend.")


def _precision(experiment: Experiment, model: Model | None) -> Iterator[Objection]:
    if checkpoint_dtype(experiment, model) == "float32":
        whose = "it is asked for" if experiment.fp_precision == "float32" else "the checkpoint is float32"
        reason = f"most of TensorRT-LLM's kernels have no float32, and {whose}."
        yield Objection("float32_on_tensorrt", "fp_precision", reason, "Use bfloat16 or float16.")


def _quantization(experiment: Experiment) -> Iterator[Objection]:
    if experiment.quantization.quantization:
        reason = "TensorRT-LLM does not load bitsandbytes' weights."
        remedy = "Leave it out, and name a checkpoint that is quantized already (FP8, NVFP4, AWQ)."
        yield Objection("quantized_by_tensorrt", "quantization.quantization", reason, remedy)


def _sampling(experiment: Experiment) -> Iterator[Objection]:
    """Object to sampling options that the installed sampler takes and does not look at."""
    asked = [(name, f"decoder.{name}", NEUTRAL[name]) for name in changed_sampling(experiment)]
    if experiment.min_output_tokens:
        asked.append(("min_length", "min_output_tokens", 0))
    if not asked or (_options(experiment).extra_args or {}).get("sampler_type") == OLD_SAMPLER:
        return
    read = tensorrt_source.sampling_options_read()
    for name, path, neutral in asked:
        if read and name not in read:
            reason = f"the sampler of TensorRT-LLM {tensorrt_source.version()} does not look at it."
            yield Objection("sampler_ignores", path, reason, f"Set it to {neutral:g}, or update.")


def _seeds(experiment: Experiment) -> Iterator[Objection]:
    """Object to sampling that does not repeat itself: only a request that is sampled alone has a seed of its own."""
    if not experiment.decoder.do_sample:
        return
    read = tensorrt_source.sampling_options_read()
    if experiment.batching.batch_size > 1 or (read and not read & {"seed", "random_seed"}):
        reason = "TensorRT-LLM draws the tokens of a batch from one stream of random numbers: they do not repeat."
        yield Objection("seeds_of_batches", "seed", reason, "Decode greedily, or use batching.batch_size=1.")


def _end_tokens(experiment: Experiment, model: Model | None) -> Iterator[Objection]:
    file = Path("" if model is None else model.path) / "generation_config.json"
    if not experiment.min_output_tokens or model is None or not file.is_file():
        return
    ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    if isinstance(ids, list) and len(set(ids)) > 1:
        reason, remedy = several_end_tokens(len(set(ids)))
        yield Objection("one_end_token_held_off", "min_output_tokens", reason, remedy)


def several_end_tokens(count: int) -> tuple[str, str]:
    """Return why not all of several end tokens can be held off, and what to do."""
    return f"TensorRT-LLM can hold off one end token, and the model has {count}.", "Set it to 0."


# ------------------------------------------------------------------ speculation
def _speculation(options: TensorrtBackend) -> Iterator[Objection]:
    wanted = options.speculative
    if wanted.decoding_type is None:
        for name in changed(wanted, *SPECULATION):
            yield without_effect(
                "no_effect_speculation",
                f"backend.speculative.{name}",
                "nothing drafts tokens.",
                "Set backend.speculative.decoding_type, for example to NGram, or leave it out.",
            )
        return
    types = tensorrt_source.decoding_types()
    if types and wanted.decoding_type not in types:
        hint = did_you_mean(wanted.decoding_type, types) or f" There are {', '.join(sorted(types))}."
        reason = f"TensorRT-LLM {tensorrt_source.version()} has no {wanted.decoding_type}.{hint}"
        yield Objection("unknown_engine_value", "backend.speculative.decoding_type", reason, "Correct it.")
    elif types:
        yield from _speculative_fields(wanted, types[wanted.decoding_type])


def _speculative_fields(wanted: TensorrtSpeculation, name: str) -> Iterator[Objection]:
    known = tensorrt_source.arguments(name)
    for field in SPECULATION[1:]:
        if getattr(wanted, field) is not None and _known_as(field, known) not in known:
            reason = f"{wanted.decoding_type} has no {field} in TensorRT-LLM {tensorrt_source.version()}."
            yield Objection("unknown_engine_arg", f"backend.speculative.{field}", reason, "Leave it out.")


def _drafts_and_bans(experiment: Experiment) -> Iterator[Objection]:
    """Object to banning n-grams among drafted tokens, which some ways to draft refuse and others do not keep to."""
    options = _options(experiment)
    drafts = options.speculative.decoding_type is not None or (options.extra_args or {}).get("speculative_config")
    if drafts and experiment.decoder.no_repeat_ngram_size:
        reason = "TensorRT-LLM does not ban n-grams reliably while tokens are drafted."
        remedy = "Set it to 0, or leave speculation off."
        yield Objection("speculation_ngram_ban", "decoder.no_repeat_ngram_size", reason, remedy)


# ------------------------------------------------------------------ arguments
def _extra_args(options: TensorrtBackend) -> Iterator[Objection]:
    """Object to arguments that are lem's to give, that have been dropped, or that the installed one does not have."""
    known = tensorrt_source.arguments()
    for name, value in (options.extra_args or {}).items():
        path = f"backend.extra_args.{name}"
        if option := _option_for(name, value, options):
            yield Objection("engine_arg_of_lem", path, f"{name} is given by {option}.", "Leave it out here.")
        elif is_dropped(name):
            yield Objection("dropped_engine_arg", path, f"TensorRT-LLM has no {name} any more.", DROPPED[name])
        elif known and name not in known:
            yield _unknown(path, name, known)
        elif isinstance(value, Mapping):
            yield from _fields_of(name, value, options)
        elif isinstance(value, str):
            yield from _value(path, name, value)


def about_key(name: str) -> str | None:
    """Return a sentence about a key that is none of the backend's; None where LLM has no such argument."""
    if is_dropped(name):
        return f"TensorRT-LLM has no {name} any more. {DROPPED[name]}"
    if option := _option_for(name, None, TensorrtBackend()):
        return f"this argument of TensorRT-LLM is given by {option}."
    if name in tensorrt_source.arguments():
        return f"it is an argument of TensorRT-LLM; write backend.extra_args={{{name}: …}}."
    return None


def is_dropped(name: str) -> bool:
    """Tell whether an argument is one of former versions, and not of the installed one."""
    return name in DROPPED and name not in tensorrt_source.arguments()


def _option_for(name: str, value: Any, options: TensorrtBackend) -> str | None:
    """Return what gives an argument in lem; None when nothing else does. Of a part other fields may be added."""
    if name in PARTS.values() and isinstance(value, Mapping):
        return None
    if name == "cuda_graph_config" and options.cuda_graphs is None:
        return None
    of_options = {argument: f"backend.{option}" for option, argument in (DIRECT | PARTS).items()}
    return of_options.get(name) or OF_LEM.get(name)


def _fields_of(name: str, fields: Mapping[str, Any], options: TensorrtBackend) -> Iterator[Objection]:
    """Object to fields of a part that have an option, or that the part does not have."""
    option = {argument: option for option, argument in PARTS.items()}.get(name)
    named = set(vars(getattr(options, option))) if option else set()
    if name == "speculative_config" and options.speculative.decoding_type is None:
        named = set()  # all of it stands here
    known = _fields_known(name, {**given(options).get(name, {}), **fields})
    for field in fields:
        path = f"backend.extra_args.{name}.{field}"
        if field in named:
            reason = f"{field} is given by backend.{option}.{field}."
            yield Objection("engine_arg_of_lem", path, reason, "Leave it out here.")
        elif known and field not in known:
            yield _unknown(path, field, known)


def _fields_known(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of a part; empty when they cannot be told."""
    if name != "speculative_config":
        part = tensorrt_source.part(name)
        return {} if part is None else tensorrt_source.arguments(part)
    types = tensorrt_source.decoding_types()
    return tensorrt_source.arguments(types.get(str(config.get("decoding_type")), tensorrt_source.SPECULATION))


def _unknown(path: str, name: str, known: Mapping[str, Any]) -> Objection:
    reason = f"TensorRT-LLM {tensorrt_source.version()} has no such argument.{did_you_mean(name, sorted(known))}"
    return Objection("unknown_engine_arg", path, reason, "Correct or remove it.")


def _value(path: str, name: str, value: str, of: str = tensorrt_source.ARGUMENTS) -> Iterator[Objection]:
    """Object to a name that the installed version does not know."""
    there = tensorrt_source.choices(name, of)
    if there and value not in there:
        hint = did_you_mean(value, there) or f" There are {', '.join(there)}."
        reason = f"TensorRT-LLM {tensorrt_source.version()} has no {value}.{hint}"
        yield Objection("unknown_engine_value", path, reason, "Correct it, or leave it out.")


def _parts(options: TensorrtBackend) -> Iterator[Objection]:
    """Object to options that the installed version does not have, and to values that it does not know."""
    known = tensorrt_source.arguments()
    for option, argument in DIRECT.items():
        if known and argument not in known and getattr(options, option) is not None:
            yield _missing(f"backend.{option}", argument)
    for option in ("kv_cache", "scheduler"):
        part = tensorrt_source.part(PARTS[option])
        fields = {} if part is None else tensorrt_source.arguments(part)
        for field, value in vars(getattr(options, option)).items():
            path = f"backend.{option}.{field}"
            if part is not None and value is not None and field not in fields:
                yield _missing(path, f"{PARTS[option]}.{field}")
            elif part is not None and isinstance(value, str):
                yield from _value(path, field, value, part)


def _missing(path: str, argument: str) -> Objection:
    reason = f"TensorRT-LLM {tensorrt_source.version()} has no argument {argument}."
    return Objection("unknown_engine_arg", path, reason, "Leave it out, or update TensorRT-LLM.")


def _cache(options: TensorrtBackend) -> Iterator[Objection]:
    """Object to a cache of prefixes that cannot be forgotten between the warm-up and the window."""
    taken = tensorrt_source.generate_arguments()
    if taken and "cache_salt" not in taken and options.kv_cache.enable_block_reuse is not False:
        reason = f"TensorRT-LLM {tensorrt_source.version()} cannot forget what the warm-up has left in it."
        path = "backend.kv_cache.enable_block_reuse"
        yield Objection("prefixes_not_forgotten", path, reason, "Set it to false, or update TensorRT-LLM.")


def _length(options: TensorrtBackend, model: Model | None) -> Iterator[Objection]:
    positions = None if model is None else model.config.get("max_position_embeddings")
    if options.max_seq_len is not None and isinstance(positions, int) and options.max_seq_len > positions:
        reason = f"the model has {positions} positions."
        yield Objection("too_few_positions", "backend.max_seq_len", reason, "Lower it, or leave it out.")
