"""The features that a backend may have, and which backend has which: the source of the support matrix.

A feature is a change to an experiment. A backend has the feature if, on a machine that lacks nothing, neither the
backend nor the rules on options object to the change. This module knows neither the engines nor the tests' results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from lem.backends import backend_class
from lem.backends.base import Reported
from lem.machine.host import Host
from lem.spec.conflicts import conflicts
from lem.spec.engines import BACKENDS
from lem.spec.experiment import Experiment
from lem.spec.rules import Objection

P = TypeVar("P")
Changes = Mapping[str, Any]
Answer = Literal["yes", "no", "no effect", "no option"]

# Stand-ins for paths that a user would give: an adapter, a draft model, an arrival trace.
ADAPTER, DRAFT, TRACE = "owner/adapter", "owner/draft", "arrivals.csv"


@dataclass(frozen=True)
class Feature:
    """Something that a backend may be able to do.

    `changes` to an experiment, by dotted path, request it from any backend; `own` holds the changes for backends that
    have their own options for it. A feature with `tells` cannot be requested: it is a value that a backend may report.
    """

    name: str
    meaning: str
    changes: Changes = field(default_factory=dict)
    own: Mapping[str, Changes] = field(default_factory=dict)
    tells: Reported | None = None

    def asked_of(self, backend: str) -> Changes | None:
        """Return the changes that request the feature from a backend; None if the configuration cannot."""
        if self.own:
            return self.own.get(backend)
        return self.changes

    def asked(self, experiment: Experiment, **stand_ins: Any) -> Experiment:
        """Return the experiment that requests the feature from its backend.

        Args:
            experiment: the experiment to change.
            stand_ins: values to use instead of the feature's own, by the last part of their path.

        Raises:
            KeyError: the configuration cannot request it from this backend.
        """
        changes = self.asked_of(experiment.backend.name)
        if changes is None:
            raise KeyError(f"{experiment.backend.name} has no option for {self.name}")
        for path, value in changes.items():
            experiment = changed_at(experiment, path, stand_ins.get(path.rpartition(".")[2], value))
        return experiment

    def overrides(self, backend: str) -> list[str]:
        """Return the changes as overrides of a command line."""
        return [f"{path}={_as_override(value)}" for path, value in (self.asked_of(backend) or {}).items()]


@dataclass(frozen=True)
class Support:
    """A backend's answer, and the codes of the rules that object to the feature."""

    answer: Answer
    codes: tuple[str, ...] = ()


def support(feature: Feature, backend: str, host: Host) -> Support:
    """Return whether a backend has a feature on a machine.

    Objections to the backend's defaults, some of which have to be set, do not count against the feature.
    """
    if feature.asked_of(backend) is None:
        return Support("no option")
    if feature.tells is not None:
        return Support("yes" if feature.tells in backend_class(backend).reports else "no")
    plain = Experiment(model=DRAFT, backend=BACKENDS[backend]())
    anyway = {(each.code, each.path) for each in _objections(plain, host)}
    found = [o for o in _objections(feature.asked(plain), host) if (o.code, o.path) not in anyway]
    for answer, against in (
        ("no", [o.code for o in found if o.severity != "warning"]),
        ("no effect", [o.code for o in found if o.code.startswith("no_effect")]),
    ):
        if against:
            return Support(answer, tuple(dict.fromkeys(against)))  # type: ignore[arg-type]
    return Support("yes")


def features() -> Iterator[Feature]:
    """Yield all features, in order."""
    for group in FEATURES.values():
        yield from group


def feature(name: str) -> Feature:
    """Return the feature with a name; raise KeyError if there is none."""
    return {each.name: each for each in features()}[name]


def changed_at(part: P, path: str, value: Any) -> P:
    """Return a part of a configuration with the value at a dotted path changed."""
    name, _, rest = path.partition(".")
    return replace(part, **{name: changed_at(getattr(part, name), rest, value) if rest else value})  # type: ignore[type-var]


def _objections(experiment: Experiment, host: Host) -> list[Objection]:
    own = backend_class(experiment.backend.name).objections(experiment, None, host)
    return [*conflicts(experiment), *own]


def _as_override(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_as_override(each)}" for key, each in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


SAMPLED = {"decoder.do_sample": True}
CONTINUOUS = {"batching.strategy": "continuous", "batching.batch_size": 4}
STREAMED = {"streaming.enabled": True}
POISSON = {"traffic.pattern": "poisson", "traffic.target_qps": 8.0}


def _spread(strategy: str) -> Changes:
    return {"parallelism.strategy": f"{strategy}_parallel", "parallelism.degree": 2}


def _of_pytorch(name: str, meaning: str, changes: Changes) -> Feature:
    return Feature(name, meaning, own={"pytorch": changes})


def _of_vllm(name: str, meaning: str, changes: Changes, tensorrt: Changes | None = None) -> Feature:
    """Return a feature for which vllm, and possibly tensorrt, has its own option."""
    return Feature(name, meaning, own={"vllm": changes} | ({} if tensorrt is None else {"tensorrt": tensorrt}))


def _drafts(**options: Any) -> Changes:
    return {f"backend.speculative.{name}": value for name, value in options.items()}


FEATURES: dict[str, tuple[Feature, ...]] = {
    "Choosing tokens": (
        Feature("greedy", "The most likely token is always chosen.", tells="tokens"),
        Feature("sampling", "Tokens are drawn at random.", SAMPLED),
        Feature("temperature", "The distribution is flattened or sharpened.", SAMPLED | {"decoder.temperature": 0.5}),
        Feature("top-k", "Only the k most likely tokens can be drawn.", SAMPLED | {"decoder.top_k": 5}),
        Feature("top-p", "Only the most likely tokens, up to a total probability of p, can be drawn.", SAMPLED | {
            "decoder.top_p": 0.8,
        }),
        Feature("min-p", "Tokens far less likely than the most likely one are excluded.", SAMPLED | {
            "decoder.min_p": 0.2,
        }),
        Feature("seed", "The same seed gives the same tokens.", SAMPLED | {"seed": 7}),
        Feature("repetition penalty", "Tokens that have already occurred become less likely.", {
            "decoder.repetition_penalty": 1.5,
        }),
        Feature("no repeated n-grams", "No sequence of n tokens occurs twice.", {"decoder.no_repeat_ngram_size": 2}),
    ),
    "Lengths and prompts": (
        Feature("maximum output", "The output is at most this long.", {"max_output_tokens": 5}),
        Feature("minimum output", "The end token is suppressed up to this length.", {"min_output_tokens": 9}),
        Feature("maximum input", "Longer prompts are cut off at this length.", {"max_input_tokens": 8}),
        Feature("chat template", "Prompts are wrapped as user turns.", {"chat_template": True}),
    ),
    "Batching": (
        Feature("static batches", "Batches of a fixed number of requests, in order.", {
            "batching.strategy": "static", "batching.batch_size": 4,
        }),
        Feature("sorted static batches", "As static batches, but with the longest prompts first.", {
            "batching.strategy": "sorted_static", "batching.batch_size": 4,
        }),
        Feature("dynamic batches", "Batches of as many requests as a token budget allows.", {
            "batching.strategy": "dynamic", "batching.batch_size": 4, "batching.max_tokens_per_batch": 30,
        }),
        Feature("sorted dynamic batches", "As dynamic batches, but with the longest prompts first.", {
            "batching.strategy": "sorted_dynamic", "batching.batch_size": 4, "batching.max_tokens_per_batch": 30,
        }),
        Feature("continuous batching", "As soon as a request finishes, the next one starts.", CONTINUOUS),
    ),
    "Timed tokens": (
        Feature("streaming", "Each token is timed, which gives TTFT and ITL.", STREAMED),
        Feature("streaming, continuous batching", "Tokens are timed with continuous batching.", STREAMED | CONTINUOUS),
    ),
    "Traffic": (
        Feature("constant arrivals", "Requests arrive at a fixed rate, evenly spaced.", {
            "traffic.pattern": "constant", "traffic.target_qps": 8.0,
        }),
        Feature("Poisson arrivals", "Requests arrive at random times, at a given mean rate.", POISSON),
        Feature("fixed concurrency", "The number of requests in the system is fixed.", {
            "traffic.pattern": "concurrency", "traffic.concurrency": 2,
        }),
        Feature("arrivals from a trace", "Requests arrive at the times listed in a file.", {
            "traffic.pattern": "trace", "traffic.trace": TRACE,
        }),
        Feature("arrivals with continuous batching", "Arriving requests start while others are running.", (
            POISSON | CONTINUOUS
        )),
    ),
    "Weights and arithmetic": (
        Feature("float32", "32-bit weights and arithmetic.", {"fp_precision": "float32"}),
        Feature("bfloat16", "16-bit weights and arithmetic, with float32's range.", {"fp_precision": "bfloat16"}),
        Feature("float16", "16-bit weights and arithmetic, with a smaller range.", {"fp_precision": "float16"}),
        Feature("LoRA adapter", "An adapter is applied on top of the weights.", {"adapter": ADAPTER}),
        Feature("bitsandbytes, 8 bits", "Weights are quantized to 8 bits while loading.", {
            "quantization.quantization": True, "quantization.load_in_8bit": True,
        }),
        Feature("bitsandbytes, 4 bits", "Weights are quantized to 4 bits while loading.", {
            "quantization.quantization": True, "quantization.load_in_4bit": True,
        }),
        _of_vllm("the engine's own quantization", "The engine quantizes the weights or reads quantized weights.", {
            "backend.quantization": "fp8",
        }),
        _of_vllm("random weights", "Weights are random instead of being read from the checkpoint.", {
            "backend.load_format": "dummy",
        }),
        _of_vllm("weights in main memory", "Some of the weights stay in main memory.", {
            "backend.cpu_offload_gb": 1.0,
        }),
    ),
    "Several processes and GPUs": (
        Feature("several processes", "The processes share the prompts.", {"num_processes": 2}),
        Feature("data parallel", "Each process has the whole model.", _spread("data")),
        Feature("tensor parallel", "Each layer is split over several processes.", _spread("tensor")),
        Feature("pipeline parallel", "The layers are spread over several GPUs.", _spread("pipeline")),
    ),
    "Attention and cache": (
        _of_pytorch("eager attention", "Attention is computed as plain matrix products.", {
            "backend.attn_implementation": "eager",
        }),
        _of_pytorch("SDPA", "PyTorch's fused attention.", {"backend.attn_implementation": "sdpa"}),
        _of_pytorch("flex attention", "PyTorch's compiled attention.", {
            "backend.attn_implementation": "flex_attention",
        }),
        _of_pytorch("flash attention 2", "Attention from the package flash-attn, in half precision.", {
            "backend.attn_implementation": "flash_attention_2", "fp_precision": "bfloat16",
        }),
        _of_pytorch("flash attention 3", "Flash attention for Hopper GPUs.", {
            "backend.attn_implementation": "flash_attention_3", "fp_precision": "bfloat16",
        }),
        _of_pytorch("static cache", "The cache has its full length from the start.", {
            "backend.cache_implementation": "static",
        }),
        _of_pytorch("no cache", "Each step recomputes the whole sequence.", {"backend.cache_implementation": "none"}),
        _of_vllm("choice of attention kernels", "The attention kernels are chosen by name.", {
            "backend.attention_backend": "FLASH_ATTN",
        }, {
            "backend.attn_backend": "FLASHINFER",
        }),
        _of_vllm("prefix caching", "Prompts share the cache of their common prefix.", {
            "backend.enable_prefix_caching": True,
        }, {"backend.kv_cache.enable_block_reuse": True}),
        _of_vllm("chunked prefill", "Long prompts are processed in pieces.", {"backend.enable_chunked_prefill": True}, {
            "backend.chunked_prefill": True,
        }),
        _of_vllm("cache in bfloat16", "Keys and values are in bfloat16.", {"backend.kv_cache_dtype": "bfloat16"}),
        _of_vllm("cache in fp8", "Keys and values have 8 bits.", {"backend.kv_cache_dtype": "fp8"}, {
            "backend.kv_cache.dtype": "fp8",
        }),
        _of_vllm("block size", "The number of tokens in a block of the cache.", {"backend.block_size": 64}, {
            "backend.kv_cache.tokens_per_block": 64,
        }),
        _of_vllm("size of the cache", "The cache's size in bytes.", {"backend.kv_cache_memory_bytes": 2**25}),
        _of_vllm(
            "share of a GPU's memory",
            "The share that the engine may use (vllm), or the share of the free memory for the cache (tensorrt).",
            {"backend.gpu_memory_utilization": 0.5},
            {"backend.kv_cache.free_gpu_memory_fraction": 0.5},
        ),
        _of_vllm("length of a sequence", "The maximum length of prompt and output together.", {
            "backend.max_model_len": 640,
        }, {
            "backend.max_seq_len": 640,
        }),
        _of_vllm("tokens per step", "The maximum number of tokens in a step.", {
            "backend.max_num_batched_tokens": 5000,
        }, {
            "backend.max_num_tokens": 5000,
        }),
    ),
    "Speculation and compilation": (
        _of_vllm("n-gram speculation", "Draft tokens come from repetitions in the text so far.", _drafts(
            method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1,
        ), _drafts(decoding_type="NGram", max_draft_len=3, max_matching_ngram_size=3)),
        _of_vllm("draft model", "A smaller model drafts the tokens.", _drafts(
            method="draft_model", model=DRAFT, num_speculative_tokens=3,
        )),
        _of_vllm("EAGLE", "A head on the model's hidden states drafts the tokens.", _drafts(
            method="eagle", model=DRAFT, num_speculative_tokens=2,
        )),
        _of_pytorch("torch.compile", "The forward pass is compiled.", {"backend.torch_compile": True}),
        _of_vllm("no compilation", "The model is neither compiled nor captured in CUDA graphs.", {
            "backend.enforce_eager": True,
        }),
        _of_vllm("any other engine argument", "Given by name, and checked against the installed version.", {
            "backend.engine_args": {"max_logprobs": 5},
        }, {"backend.extra_args": {"stream_interval": 4}}),
    ),
    "What the backend reports": (
        Feature("the model", "Its parameter count, size in bytes and dtype, as loaded.", tells="model"),
        Feature("prefill", "The time at which a request's first token was ready.", tells="prefill"),
        Feature("model FLOPs", "FLOPs computed from the model's dimensions.", tells="flops"),
        Feature("cache as allocated", "The size of the largest batch's keys and values, in bytes.", tells="kv_cache"),
        Feature("the engine's counters", "Counts of tokens, cache hits, preemptions and drafts.", tells="counters"),
    ),
}  # fmt: skip
