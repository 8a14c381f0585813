"""Translates lem's options into TensorRT-LLM's arguments and sampling parameters, and reports unsuitable options.

This module imports neither TensorRT-LLM nor torch: the options that the installed version accepts are read from its
source code. It knows nothing about requests in flight or about time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.backends import tensorrt_source
from lem.backends.checkpoint_objections import damaged_weights, weights_of
from lem.backends.objections import (
    EngineArguments,
    checkpoint_dtype,
    model_objections,
    set_by_lem,
    unused_gpus,
    without_method,
)
from lem.machine.host import Host
from lem.spec.engines import TensorrtBackend
from lem.spec.experiment import Experiment
from lem.spec.processes import runs_in_one_process
from lem.spec.rules import Objection
from lem.workload.models import Model

# The argument of `LLM` for each option, and for each part (a group of options, passed as one nested config).
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
# Names of arguments in earlier versions.
FORMER_NAMES = {"speculative_model": "speculative_model_dir"}
OWN_TOKENIZER = ("tokenizer", "tokenizer_mode", "custom_tokenizer", "skip_tokenizer_init")
# Arguments that lem sets, and what sets each: an option, or lem for the given reason.
OF_LEM = {
    "model": "model",
    **dict.fromkeys(OWN_TOKENIZER, "lem, which uses the model's own tokenizer"),
    **dict.fromkeys(("revision", "tokenizer_revision"), "revision"),
    "trust_remote_code": "trust_remote_code",
    "dtype": "fp_precision",
    "max_batch_size": "batching.batch_size",
    "max_beam_width": "lem, which samples each output once",
    **dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size"), "parallelism"),
    **dict.fromkeys(("enable_lora", "lora_config"), "adapter"),
    "generation_config": "decoder",
    "return_perf_metrics": "lem, which reads the times of requests",
    "backend": "lem, which uses TensorRT-LLM's PyTorch backend",
    "encode_only": "lem, which generates text",
    "mpi_session": "lem",
}
# Arguments that name Python code that the engine loads and runs, and fields that do so within an argument.
CODE = ("ray_worker_extension_cls",)
CODE_INSIDE = ("connector_module",)
# Arguments of earlier versions. Those in OF_BUILDING configured the building of TensorRT engines; DROPPED maps every
# such argument to what to use instead.
OF_BUILDING = (
    "build_config",
    "fast_build",
    "enable_build_cache",
    "embedding_parallel_mode",
    "extended_runtime_perf_knob_config",
)
DROPPED = {
    **dict.fromkeys(OF_BUILDING, "its PyTorch backend builds no TensorRT engine"),
    "calib_config": "set model to a checkpoint that is already quantized",
    "quant_config": "set model to a checkpoint that is already quantized; for the cache, use backend.kv_cache.dtype",
    "pytorch_backend_config": "its fields are now separate arguments; set them in backend.extra_args",
    "enable_overlap_scheduler": "use backend.overlap_scheduler",
    "use_cuda_graph": "use backend.cuda_graphs",
    **dict.fromkeys(
        ("cuda_graph_batch_sizes", "cuda_graph_max_batch_size", "cuda_graph_padding_enabled"),
        "use cuda_graph_config in backend.extra_args",
    ),
    **dict.fromkeys(
        ("torch_compile_enabled", "torch_compile_fullgraph"), "use torch_compile_config in backend.extra_args"
    ),
    **dict.fromkeys(("moe_backend", "moe_max_num_tokens", "moe_load_balancer"), "use moe_config in backend.extra_args"),
    "kv_cache_dtype": "use backend.kv_cache.dtype",
    "autotuner_enabled": "use enable_autotuner in backend.extra_args",
    **dict.fromkeys(("enable_trtllm_sampler", "sampler_type"), "TorchSampler is the only sampler"),
    "mixed_sampler": "requests in a batch may always have different sampling options",
}
ARGUMENTS = EngineArguments("TensorRT-LLM", "backend.extra_args", tensorrt_source, DROPPED)
# The values at which sampling options are off. Any other value needs a sampler that supports the option.
NEUTRAL = {"min_p": 0.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
# The only sampler of earlier versions that supports all sampling options.
OLD_SAMPLER = "TRTLLMSampler"
# A request's seed is derived from the experiment's seed and the prompt, and must fit into 64 bits.
PROMPTS_PER_SEED = 2**31


# ------------------------------------------------------------------ translation
@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: the directory with its files, and its rank."""

    folder: Path
    rank: int


def engine_arguments(experiment: Experiment, model: Model, adapter: Adapter | None) -> dict[str, Any]:
    """Return the arguments of TensorRT-LLM's `LLM` as plain values, omitting options that are null.

    Args:
        experiment: an experiment that has passed preflight.
        model: the model that preflight found.
        adapter: the adapter, if any.
    """
    options, spread = _options(experiment), experiment.parallelism
    own: dict[str, Any] = {
        "model": model.path,
        "revision": model.revision,
        "tokenizer_revision": model.revision,
        "skip_tokenizer_init": True,
        "trust_remote_code": experiment.trust_remote_code,
        "dtype": checkpoint_dtype(experiment, model) or "auto",
        "max_batch_size": experiment.batching.batch_size,
        "return_perf_metrics": True,
        **({f"{spread.strategy}_size": spread.degree} if runs_in_one_process(experiment) and spread.degree > 1 else {}),
    }
    if adapter is not None:
        folder, rank = str(adapter.folder), adapter.rank
        own["lora_config"] = {"lora_dir": [folder], "max_lora_rank": rank, "max_loras": 1, "max_cpu_loras": 1}
    return own | merged(given(options), options.extra_args or {})


def given(options: TensorrtBackend) -> dict[str, Any]:
    """Return the arguments of `LLM` for the options that are not null; each nested config is a mapping."""
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
    """Merge two sets of arguments, including nested configs that are in both; preflight rejects duplicate fields."""
    both = {name: {**ours[name], **extra[name]} for name in ours if isinstance(extra.get(name), Mapping)}
    return {**ours, **extra, **both}


def speculative_class(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Return the name of a drafting method's config class, and the fields for it; None if the class is unknown."""
    name = tensorrt_source.decoding_types().get(str(config.get("decoding_type")))
    if name is None:
        return None
    known = tensorrt_source.arguments(name)
    fields = {_known_as(field, known): value for field, value in config.items() if field != "decoding_type"}
    return name, fields


def _known_as(field: str, known: Mapping[str, Any]) -> str:
    """Return the name that a field has in the installed version; earlier versions name some fields differently."""
    former = FORMER_NAMES.get(field, field)
    return former if former in known and field not in known else field


def sampling_parameters(experiment: Experiment, index: int, end_tokens: frozenset[int]) -> dict[str, Any]:
    """Return the arguments of TensorRT-LLM's SamplingParams for the prompt with the given index.

    The engine accepts a single end token, which it suppresses until `min_tokens` is reached; any other end tokens are
    passed as stop words. The engine decodes greedily if a request has no temperature, top_k or top_p. With sampling,
    every request has a top_p, because earlier versions decode greedily if they are given only a temperature.
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
    """Return the sampling options that are in use and that the samplers of some versions ignore."""
    decoder = experiment.decoder
    names = [name for name, neutral in NEUTRAL.items() if getattr(decoder, name) != neutral]
    return [name for name in names if decoder.do_sample or name != "min_p"]


def _options(experiment: Experiment) -> TensorrtBackend:
    assert isinstance(experiment.backend, TensorrtBackend)
    return experiment.backend


# ------------------------------------------------------------------ objections
def objections(experiment: Experiment, model: Model | None, host: Host) -> list[Objection]:
    """Return all objections; if `model` is None, the checks that need the model are skipped."""
    options = _options(experiment)
    return [
        *_installation(host),
        *_checkpoint(experiment, model),
        *_sampling(experiment),
        *_seeds(experiment),
        *_end_tokens(experiment, model),
        *_speculation(experiment),
        *_extra_args(options),
        *(() if experiment.trust_remote_code else _code(options)),
        *_parts(options),
        *_cache(options),
        *unused_gpus(experiment, host.gpus),
        *model_objections(experiment, model, limit="max_seq_len"),
        *_weights(experiment, model, options),
    ]


def _code(options: TensorrtBackend) -> Iterator[Objection]:
    """Object to arguments that name code to be run, because the configuration may come from someone else."""
    for path in code_arguments(options):
        yield Objection("engine_arg_code", path, "this option names Python code that TensorRT-LLM would load and run.")


def code_arguments(options: TensorrtBackend) -> dict[str, Any]:
    """Return the paths and values of the arguments that name code that TensorRT-LLM would load and run."""
    return {
        f"backend.extra_args.{name}": value
        for name, value in sorted((options.extra_args or {}).items())
        if name in CODE or (isinstance(value, dict) and not value.keys().isdisjoint(CODE_INSIDE))
    }


def _weights(experiment: Experiment, model: Model | None, options: TensorrtBackend) -> Iterator[Objection]:
    load_format = str((options.extra_args or {}).get("load_format") or "auto").lower()
    if load_format == "auto":
        yield from weights_of(experiment, model, of_any_name=True)
    elif load_format != "dummy":
        yield from damaged_weights(model)


def _installation(host: Host) -> Iterator[Objection]:
    if not host.has(tensorrt_source.PACKAGE):
        fact = "the tensorrt backend needs TensorRT-LLM (pip install 'lem[tensorrt]'; see docs/how-to/tensorrt.md)."
        yield Objection("missing_package", "backend", fact)
    if not host.gpus:
        yield Objection("no_gpu", "backend", "TensorRT-LLM runs only on NVIDIA GPUs, and none is visible.")


def _checkpoint(experiment: Experiment, model: Model | None) -> Iterator[Objection]:
    if checkpoint_dtype(experiment, model) == "float32":
        whose = "float32 is requested" if experiment.fp_precision == "float32" else "the checkpoint is in float32"
        fact = f"most of TensorRT-LLM's kernels do not support float32, but {whose}."
        yield Objection("float32_on_tensorrt", "fp_precision", fact)
    if experiment.quantization.quantization:
        fact = "TensorRT-LLM cannot quantize with bitsandbytes while loading."
        yield Objection("quantized_by_tensorrt", "quantization.quantization", fact)


def _sampling(experiment: Experiment) -> Iterator[Objection]:
    """Object to sampling options that the installed version accepts but its sampler ignores."""
    asked = [(name, f"decoder.{name}", NEUTRAL[name]) for name in changed_sampling(experiment)]
    if experiment.min_output_tokens:
        asked.append(("min_length", "min_output_tokens", 0))
    if not asked or (_options(experiment).extra_args or {}).get("sampler_type") == OLD_SAMPLER:
        return
    read = tensorrt_source.sampling_options_read()
    for name, path, neutral in asked:
        if read and name not in read:
            fact = (
                f"the sampler of TensorRT-LLM {tensorrt_source.version()} ignores this option "
                f"({neutral:g} turns the option off)."
            )
            yield Objection("sampler_ignores", path, fact)


def _seeds(experiment: Experiment) -> Iterator[Objection]:
    """Object to sampling that cannot be reproduced, because requests that run together do not have their own seeds."""
    if not experiment.decoder.do_sample:
        return
    read = tensorrt_source.sampling_options_read()
    if experiment.batching.batch_size > 1 or (read and not read & {"seed", "random_seed"}):
        fact = "TensorRT-LLM samples concurrent requests from one random stream, so the tokens cannot be reproduced."
        yield Objection("seeds_of_batches", "seed", fact)


def _end_tokens(experiment: Experiment, model: Model | None) -> Iterator[Objection]:
    file = Path("" if model is None else model.path) / "generation_config.json"
    if not experiment.min_output_tokens or model is None or not file.is_file():
        return
    ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    if isinstance(ids, list) and len(set(ids)) > 1:
        yield several_end_tokens(len(set(ids)))


def several_end_tokens(count: int) -> Objection:
    """Return an objection to min_output_tokens for a model with several end tokens."""
    fact = f"TensorRT-LLM can suppress only one end token, but the model has {count}."
    return Objection("one_end_token_held_off", "min_output_tokens", fact)


def _speculation(experiment: Experiment) -> Iterator[Objection]:
    options = _options(experiment)
    wanted, types = options.speculative, tensorrt_source.decoding_types()
    if wanted.decoding_type is None:
        yield from without_method(wanted, "decoding_type")
    elif wanted.decoding_type in types:
        known = tensorrt_source.arguments(types[wanted.decoding_type])
        for field, value in vars(wanted).items():
            if field != "decoding_type" and value is not None and _known_as(field, known) not in known:
                fact = f"{wanted.decoding_type} has no option {field} in TensorRT-LLM {tensorrt_source.version()}."
                yield Objection("unknown_engine_arg", f"backend.speculative.{field}", fact)
    else:
        path = "backend.speculative.decoding_type"
        yield from ARGUMENTS.unknown_value(path, wanted.decoding_type, sorted(types))
    drafts = wanted.decoding_type is not None or (options.extra_args or {}).get("speculative_config")
    if drafts and experiment.decoder.no_repeat_ngram_size:
        fact = "TensorRT-LLM does not reliably ban n-grams while drafting tokens."
        yield Objection("speculation_ngram_ban", "decoder.no_repeat_ngram_size", fact)


# ------------------------------------------------------------------ arguments
def _extra_args(options: TensorrtBackend) -> Iterator[Objection]:
    def more(path: str, name: str, value: Any) -> Iterator[Objection]:
        if isinstance(value, Mapping):
            yield from _fields_of(name, value, options)
        elif isinstance(value, str):
            yield from ARGUMENTS.unknown_value(path, value, tensorrt_source.choices(name))

    yield from ARGUMENTS.objections(options.extra_args, lambda name, value: _owner(name, value, options), more)


def about_key(name: str) -> str | None:
    """Return a message about a key that is not an option of the backend; None if it never was an engine argument."""
    return ARGUMENTS.about_key(name, _owner(name, None, TensorrtBackend()))


def _owner(name: str, value: Any, options: TensorrtBackend) -> str | None:
    """Return the option that sets an argument, or "lem" and a reason (see `set_by_lem`); None if nothing sets it.

    The result is also None for a nested config, such as `kv_cache_config`, that is given as a mapping: its fields are
    added to the fields that lem sets. It is None for `cuda_graph_config` if `backend.cuda_graphs` is null.
    """
    if name in PARTS.values() and isinstance(value, Mapping):
        return None
    if name == "cuda_graph_config" and options.cuda_graphs is None:
        return None
    of_options = {argument: f"backend.{option}" for option, argument in (DIRECT | PARTS).items()}
    return of_options.get(name) or OF_LEM.get(name)


def _fields_of(name: str, config: Mapping[str, Any], options: TensorrtBackend) -> Iterator[Objection]:
    """Object to a nested config's fields if lem has an option for them, or if the config has no such field."""
    option = {argument: option for option, argument in PARTS.items()}.get(name)
    named = set(vars(getattr(options, option))) if option else set()
    if name == "speculative_config" and options.speculative.decoding_type is None:
        named = set()  # no option sets any field: the mapping is the whole config
    known = _fields_known(name, {**given(options).get(name, {}), **config})
    for field in config:
        path = f"backend.extra_args.{name}.{field}"
        if field in named:
            yield set_by_lem(path, f"backend.{option}.{field}")
        elif known and field not in known:
            yield ARGUMENTS.unknown(path, field, known)


def _fields_known(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of a nested config; empty if they cannot be determined."""
    if name != "speculative_config":
        part = tensorrt_source.part(name)
        return {} if part is None else tensorrt_source.arguments(part)
    types = tensorrt_source.decoding_types()
    return tensorrt_source.arguments(types.get(str(config.get("decoding_type")), tensorrt_source.SPECULATION))


def _parts(options: TensorrtBackend) -> Iterator[Objection]:
    """Yield objections to options and values that the installed version does not support."""
    known = tensorrt_source.arguments()
    for option, argument in DIRECT.items():
        if known and argument not in known and getattr(options, option) is not None:
            yield ARGUMENTS.unknown(f"backend.{option}", argument)
    for option in ("kv_cache", "scheduler"):
        part = tensorrt_source.part(PARTS[option])
        if part is None:
            continue
        fields = tensorrt_source.arguments(part)
        for field, value in vars(getattr(options, option)).items():
            path = f"backend.{option}.{field}"
            if value is not None and field not in fields:
                yield ARGUMENTS.unknown(path, f"{PARTS[option]}.{field}")
            elif isinstance(value, str):
                yield from ARGUMENTS.unknown_value(path, value, tensorrt_source.choices(field, part))


def _cache(options: TensorrtBackend) -> Iterator[Objection]:
    """Object to a prefix cache that cannot be emptied between the warm-up and the window."""
    taken = tensorrt_source.generate_arguments()
    if taken and "cache_salt" not in taken and options.kv_cache.enable_block_reuse is not False:
        fact = f"TensorRT-LLM {tensorrt_source.version()} cannot drop the prefixes cached during the warm-up."
        yield Objection("prefixes_not_forgotten", "backend.kv_cache.enable_block_reuse", fact)
