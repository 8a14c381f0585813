"""The arguments and some of the values that the installed TensorRT-LLM accepts, read from its source code.

Importing TensorRT-LLM takes many seconds and looks for GPUs, whereas parsing the files with its arguments takes 0.1 s.
If the source has an unknown layout, the accepted arguments are unknown, and only the engine can reject an argument.
This module knows nothing about experiments. It was written for `tensorrt_llm/llmapi/llm_args.py` of the 1.x series, at
the commits named in docs/how-to/tensorrt.md.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path

PACKAGE, DISTRIBUTION = "tensorrt_llm", "tensorrt-llm"
ARGUMENTS = "TorchLlmArgs"
SPECULATION = "DecodingBaseConfig"
# The files that define argument classes; over time, LoraConfig has been in each of them except the last two.
FILES = (
    "llmapi/llm_args.py",
    "_torch/peft/lora/config.py",
    "lora_helper.py",
    "lora_manager.py",
    "llmapi/llm.py",
    "sampling_params.py",
)
# The location of the sampler's code: a single file in earlier versions, now a folder.
SAMPLERS = ("_torch/pyexecutor/sampler.py", "_torch/pyexecutor/sampler/*.py")
# The file that creates requests; a request keeps an option in its sampling_config or as an attribute py_<option>.
REQUESTS = ("_torch/pyexecutor/llm_request.py",)
SAMPLING_CONFIG, KEPT = "sampling_config", "py_"
GENERATE = "generate_async"


@dataclass(frozen=True)
class Argument:
    """A field of an argument class: its annotation and its default. `default` is None if the field is required."""

    annotation: ast.expr
    default: ast.expr | None


def version() -> str:
    """Return the version of the installed TensorRT-LLM."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"


# ------------------------------------------------------------------ arguments
def arguments(of: str = ARGUMENTS) -> dict[str, Argument]:
    """Return the arguments of a class, including those of its base classes; empty if unknown."""
    defined = _definitions().get(of)
    if not isinstance(defined, ast.ClassDef):
        return {}
    found: dict[str, Argument] = {}
    for base in reversed(defined.bases):
        found |= arguments(base.id) if isinstance(base, ast.Name) else {}
    return found | dict(_fields(defined))


def _fields(defined: ast.ClassDef) -> Iterator[tuple[str, Argument]]:
    for node in defined.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
            if not name.startswith("_") and "ClassVar" not in ast.unparse(node.annotation):
                yield name, Argument(node.annotation, _default(node.value))


def _default(value: ast.expr | None) -> ast.expr | None:
    """Return a field's default, taken out of Field(…) if necessary; None if the field is required."""
    if not isinstance(value, ast.Call) or _called(value) not in ("Field", "PydanticField"):
        return value
    named = {keyword.arg: keyword.value for keyword in value.keywords}
    return named.get("default", value.args[0] if value.args else named.get("default_factory"))


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def part(name: str) -> str | None:
    """Return the class of the nested config that an argument of `LLM` takes; None unless exactly one class fits."""
    argument = arguments().get(name)
    if argument is None:
        return None
    classes = [found for found in _classes(argument.annotation) if arguments(found)]
    return classes[0] if len(classes) == 1 else None


def _classes(annotation: ast.expr) -> list[str]:
    """Return the classes named in a type annotation, following aliases."""
    found: list[str] = []
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name):
            defined = _definitions().get(node.id)
            if isinstance(defined, ast.ClassDef):
                found.append(node.id)
            elif isinstance(defined, ast.expr) and not isinstance(defined, ast.Constant):
                found += _classes(defined)
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------ values
def choices(argument: str, of: str = ARGUMENTS) -> tuple[str, ...]:
    """Return the values that an argument's type lists; empty if it lists none or allows any string, or if unknown."""
    found = arguments(of).get(argument)
    return () if found is None else tuple(dict.fromkeys(_values(found.annotation)))


def _values(annotation: ast.expr) -> Iterator[str]:
    """Yield the strings of a Literal or the values of an enumeration; nothing for a type that allows any string."""
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    if "str" in names:
        return
    if "Literal" in names:
        yield from (n.value for n in ast.walk(annotation) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    for name in _classes(annotation):
        defined = _definitions()[name]
        for member in defined.body if isinstance(defined, ast.ClassDef) else ():
            if isinstance(member, ast.Assign) and isinstance(member.value, ast.Constant):
                yield str(member.value.value)


def decoding_types() -> dict[str, str]:
    """Return the drafting methods and the class of each method's config; empty if unknown."""
    found = {}
    for name, defined in _definitions().items():
        if isinstance(defined, ast.ClassDef) and SPECULATION in _bases(name):
            for node in defined.body:
                if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "decoding_type":
                    default = _default(node.value)
                    if isinstance(default, ast.Constant):
                        found[str(default.value)] = name
    return found


def _bases(name: str) -> list[str]:
    defined = _definitions().get(name)
    bases = defined.bases if isinstance(defined, ast.ClassDef) else ()
    direct = [base.id for base in bases if isinstance(base, ast.Name)]
    return direct + [further for base in direct for further in _bases(base)]


# ------------------------------------------------------------------ behavior
def sampling_options_read() -> frozenset[str]:
    """Return the sampling options that the installed sampler reads; empty if unknown."""
    folder = _folder()
    return frozenset() if folder is None else sampling_options_in_config(folder) | sampling_options_kept(folder)


def sampling_options_in_config(package: Path) -> frozenset[str]:
    """Return the options that a package's samplers read from a request's sampling_config."""
    return _of_sampling_config(_attributes(package, SAMPLERS))


def sampling_options_kept(package: Path) -> frozenset[str]:
    """Return the options that a request keeps as attributes py_<option>, if a package's samplers read them."""
    read = {name for _, name in _attributes(package, SAMPLERS)}
    kept = _of_sampling_config(_attributes(package, REQUESTS))
    return frozenset(option for option in kept if f"{KEPT}{option}" in read)


def _of_sampling_config(attributes: frozenset[tuple[str, str]]) -> frozenset[str]:
    return frozenset(name for owner, name in attributes if owner.endswith(SAMPLING_CONFIG))


@cache
def _attributes(package: Path, patterns: tuple[str, ...]) -> frozenset[tuple[str, str]]:
    """Return the attributes that the code in the matching files reads, as pairs of owner and name.

    For example, both `a.b.c` and `getattr(b, "c")` give (b, c).
    """
    found = set()
    for file in [file for pattern in patterns for file in package.glob(pattern)]:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add((_last_name(node.value), node.attr))
            elif isinstance(node, ast.Call) and _called(node) == "getattr" and len(node.args) > 1:
                found.add((_last_name(node.args[0]), str(getattr(node.args[1], "value", ""))))
    return frozenset(found)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def generate_arguments() -> frozenset[str]:
    """Return the arguments of the engine's call for submitting a request; empty if unknown."""
    for defined in _definitions().values():
        for node in defined.body if isinstance(defined, ast.ClassDef) else ():
            if isinstance(node, ast.FunctionDef) and node.name == GENERATE:
                return frozenset(argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
    return frozenset()


# ------------------------------------------------------------------ files
def _folder() -> Path | None:
    spec = util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _definitions() -> dict[str, ast.AST]:
    """Return the top-level classes and assignments of the files, by name; the first definition of a name wins."""
    folder = _folder()
    return {} if folder is None else _parsed(folder)


@cache
def _parsed(folder: Path) -> dict[str, ast.AST]:
    found: dict[str, ast.AST] = {}
    for file in FILES:
        path = folder / file
        for node in ast.parse(path.read_text("utf-8")).body if path.is_file() else ():
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, node)
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found.setdefault(node.targets[0].id, node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                found.setdefault(node.target.id, node.value)
    return found
