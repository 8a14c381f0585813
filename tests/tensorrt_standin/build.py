"""Builds the stand-in for TensorRT-LLM: a package of the same name with the argument classes of signatures.json.

An unknown field fails as it does in the original, and so does a value of the wrong type. Types of the original that are
not arguments (tensors, tokenizers, …) may be anything here, and a default that is made from something that is not here
is None. `build(folder)` writes the package into a folder that must be on the import path; `engine.py`, in the same
folder as this file, runs the model.
"""

from __future__ import annotations

import ast
import builtins
import json
import shutil
import typing
from pathlib import Path, PurePosixPath

import pydantic

from tests.tensorrt_standin.extract import SIGNATURES

HERE = Path(__file__).parent
HEAD = """from __future__ import annotations

from enum import Enum, IntEnum
from pathlib import Path
from typing import *

import pydantic
from pydantic import Field, Field as PydanticField

class StrEnum(str, Enum):
    pass

class StrictBaseModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

"""
OF_HEAD = {"Enum", "Field", "IntEnum", "Path", "PydanticField", "StrEnum", "StrictBaseModel"}
DATACLASSES = ("sampling_params.py", "executor/request.py")
# What is defined, and the names that can be looked up in each definition.
Known = dict[str, set[str]]


def build(
    folder: Path,
    *,
    drop: typing.Sequence[str] = (),
    ignore: typing.Sequence[str] = (),
    version: str | None = None,
    declared: dict | None = None,
) -> Path:
    """Write the package, with metadata that marks it as installed, into a folder; return the folder.

    Args:
        folder: a folder that the importing process will have on its path.
        drop: arguments, sampling options or parameters of a call that this version should lack.
        ignore: sampling options that this version's sampler should ignore.
        version: the version that it reports; None is the version that signatures.json was extracted from.
        declared: the declarations extracted from a package; None means those of signatures.json.
    """
    declared = declared or json.loads(SIGNATURES.read_text(encoding="utf-8"))
    version = version or declared["version"]
    package = folder / "tensorrt_llm"
    lora = next(file for file, definitions in declared["classes"].items() if _defines(definitions, "LoraConfig"))
    for file, definitions in declared["classes"].items():
        text = _dataclasses(definitions, drop) if file in DATACLASSES else _rendered(definitions, drop, lora)
        _write(package / file, text)
        for above in list(PurePosixPath(file).parents)[:-1]:
            _write(package / above / "__init__.py", "")
    _write(package / "__init__.py", "from .llmapi import LLM\nfrom .sampling_params import SamplingParams\n")
    _write(package / "llmapi/__init__.py", "from .llm import LLM\n")
    _write(package / "llmapi/llm.py", _call([name for name in declared["calls"]["llmapi/llm.py"] if name not in drop]))
    _write_sampler(package / "_torch/pyexecutor", declared, {*drop, *ignore})
    shutil.copy(HERE / "engine.py", package / "engine.py")
    metadata = f"Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: {version}\n"
    _write(folder / f"tensorrt_llm-{version}.dist-info" / "METADATA", metadata)
    return folder


def _defines(definitions: list[dict], name: str) -> bool:
    return any(definition.get("class") == name for definition in definitions)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _write_sampler(folder: Path, declared: dict, without: set[str]) -> None:
    """Write code that looks up sampling options, in the two ways of the original."""
    looked_at = [name for name in declared["sampling_options_looked_at"] if name not in without]
    kept = [name for name in declared["sampling_options_kept"] if name not in without]
    lines = [f"request.sampling_config.{name}" for name in looked_at]
    lines += [f'getattr(request, "py_{name}", None)' for name in kept]
    _write(folder / "sampler/sampler.py", _method("TorchSampler", "reads(self, request)", lines))
    lines = [f"self.py_{name} = sampling_config.{name}" for name in declared["sampling_options_kept"]]
    _write(folder / "llm_request.py", _method("LlmRequest", "__init__(self, sampling_config)", lines))


def _method(of: str, head: str, lines: list[str]) -> str:
    body = "".join(f"        {line}\n" for line in [*lines, "pass"])
    return f"class {of}:\n    def {head}:\n{body}"


def _call(parameters: list[str]) -> str:
    """Return a class whose call takes exactly these parameters, and leaves the rest to the engine."""
    taken = ", ".join(parameters[:2] + [f"{name}=None" for name in parameters[2:]])
    passed = ", ".join(f"{name}={name}" for name in parameters[1:])
    return (
        "from ..engine import Engine\n\n\n"
        f"class BaseLLM(Engine):\n    def generate_async({taken}):\n        return self.take({passed})\n\n\n"
        "class LLM(BaseLLM):\n    pass\n"
    )


# ------------------------------------------------------------------ classes
def _rendered(definitions: list[dict], drop: typing.Sequence[str], lora: str) -> str:
    """Return the source of classes of arguments; `lora` is the file that has LoraConfig."""
    known: Known = {_name(definition): _attributes(definition) for definition in definitions}
    parts = [HEAD]
    if "LoraConfig" not in known:
        module = lora.removesuffix(".py").replace("/", ".")
        parts.append(f"from tensorrt_llm.{module} import LoraConfig\n")
        known["LoraConfig"] = set()
    named = {name for definition in definitions for name in _named(definition)}
    of_pydantic = named & set(pydantic.__all__) - OF_HEAD - known.keys()
    parts += [f"from pydantic import {name}\n" for name in sorted(of_pydantic)]
    known |= {name: set() for name in OF_HEAD | of_pydantic}
    elsewhere = named - known.keys() - set(dir(builtins)) - set(typing.__all__)
    parts += [f"{name} = Any\n" for name in sorted(elsewhere)]
    for definition in definitions:
        is_class = "class" in definition
        parts.append(_class(definition, known, drop) if is_class else f"{_name(definition)} = {_type_of(definition)}\n")
    names = [definition["class"] for definition in definitions if "fields" in definition]
    return "\n".join([*parts, *(f"{name}.model_rebuild()" for name in names), ""])


def _name(definition: dict) -> str:
    return definition.get("class") or definition["alias"]


def _attributes(definition: dict) -> set[str]:
    return {*definition.get("members", ()), *(each["class"] for each in definition.get("classes", ()))}


def _type_of(alias: dict) -> str:
    return _plain(alias["type"])


def _named(definition: dict) -> set[str]:
    """Return the names in a definition's types that it does not define itself."""
    inside = definition.get("classes", [])
    types = [annotation for annotation, _ in definition.get("fields", {}).values()] + [definition.get("type", "None")]
    names = {node.id for t in types for node in ast.walk(ast.parse(_plain(t))) if isinstance(node, ast.Name)}
    return (names | {name for each in inside for name in _named(each)}) - {each["class"] for each in inside}


def _class(definition: dict, known: Known, drop: typing.Sequence[str]) -> str:
    inside = definition.get("classes", [])
    known = known | {each["class"]: _attributes(each) for each in inside}
    bases = [base for base in definition["bases"] if base in known] or ["StrictBaseModel"]
    lines = [f"class {definition['class']}({', '.join(bases)}):"]
    lines += [f"    {line}" for each in inside for line in _class(each, known, drop).splitlines()]
    lines += [f"    {name} = {value!r}" for name, value in definition.get("members", {}).items()]
    for name, (annotation, default) in definition.get("fields", {}).items():
        if name not in drop:
            lines.append(f"    {name}: {_plain(annotation)}{_default(default, known)}")
    return "\n".join([*lines, "    pass", ""])


def _default(default: str | None, known: Known) -> str:
    """Return a default; it is None if it is made from something that is not part of the stand-in."""
    if default is None:
        return ""
    return f" = {default}" if _can_be_made(ast.parse(default), known) else " = None"


def _can_be_made(default: ast.AST, known: Known) -> bool:
    nodes = list(ast.walk(default))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    own = {node.arg for node in nodes if isinstance(node, ast.arg)}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    looked_up = [(node.value, node.attr) for node in nodes if isinstance(node, ast.Attribute)]
    return names - own <= known.keys() | set(dir(builtins)) and all(
        isinstance(owner, ast.Name) and attribute in known.get(owner.id, dir(getattr(builtins, owner.id, None)))
        for owner, attribute in looked_up
    )


def _plain(annotation: str) -> str:
    """Return a type in which names from other modules may be anything."""
    tree = ast.parse(annotation, mode="eval")
    return "Any" if any(isinstance(node, ast.Attribute) for node in ast.walk(tree)) else annotation


def _dataclasses(definitions: list[dict], drop: typing.Sequence[str]) -> str:
    lines = ["from dataclasses import dataclass, field as Field", "from typing import *", ""]
    for definition in definitions:
        lines += ["", "@dataclass(slots=True)", f"class {definition['class']}:"]
        for name, (_, default) in definition["fields"].items():
            if name not in drop:
                lines.append(f"    {name}: Any{_default(default, {'Field': set()})}")
    return "\n".join([*lines, ""])
