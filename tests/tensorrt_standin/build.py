"""Makes the stand-in for TensorRT-LLM: a package of its name whose classes of arguments are those of signatures.json.

A field that is not there fails as it does in the original, and so does a value of another type. Types of the original
that are not arguments (tensors, tokenizers, …) may be anything here. `build(folder)` writes the package into a folder
that is to stand on the path; what it runs the model with is `engine.py`, beside this file.
"""

from __future__ import annotations

import ast
import builtins
import json
import shutil
import typing
from pathlib import Path

from tests.tensorrt_standin.extract import SIGNATURES

HERE = Path(__file__).parent
HEAD = """from __future__ import annotations

import enum
import pathlib
from enum import Enum
from pathlib import Path
from typing import *

import pydantic
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

class StrEnum(str, Enum):
    pass

class StrictBaseModel(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

"""
OF_HEAD = {"Path", "Enum", "StrEnum", "StrictBaseModel", "Field", "NonNegativeFloat", "NonNegativeInt", "PositiveInt"}
DATACLASSES = ("sampling_params.py", "executor/request.py")


def build(folder: Path, *, drop: typing.Sequence[str] = (), version: str | None = None) -> Path:
    """Write the package, and what says that it is installed, into a folder; return the folder.

    Args:
        folder: is to stand on the path of those that import it.
        drop: arguments, sampling options or parameters of a call that this version is not to have.
        version: what it calls itself; None is the version that was read.
    """
    declared = json.loads(SIGNATURES.read_text(encoding="utf-8"))
    version = version or declared["version"]
    package = folder / "tensorrt_llm"
    for file, definitions in declared["classes"].items():
        text = _rendered(definitions, drop) if file not in DATACLASSES else _dataclasses(definitions, drop)
        _write(package / file, text)
    _write(package / "__init__.py", "from .llmapi import LLM\nfrom .sampling_params import SamplingParams\n")
    _write(package / "llmapi/__init__.py", "from .llm import LLM\n")
    for each in ("executor", "_torch", "_torch/peft", "_torch/peft/lora"):
        _write(package / each / "__init__.py", "")
    parameters = [name for name in declared["calls"]["llmapi/llm.py"] if name not in drop]
    _write(package / "llmapi/llm.py", _call(parameters))
    read = [name for name in declared["sampling_options_read"] if name not in drop]
    lines = "".join(f"        request.sampling_config.{name}\n" for name in read)
    _write(package / "_torch/pyexecutor/sampler.py", f"class TorchSampler:\n    def reads(self, request):\n{lines}")
    shutil.copy(HERE / "engine.py", package / "engine.py")
    metadata = f"Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: {version}\n"
    _write(folder / f"tensorrt_llm-{version}.dist-info" / "METADATA", metadata)
    return folder


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def _call(parameters: list[str]) -> str:
    """Return a class whose call takes these parameters and no others, and leaves the rest to the engine."""
    taken = ", ".join(parameters[:2] + [f"{name}=None" for name in parameters[2:]])
    passed = ", ".join(f"{name}={name}" for name in parameters[1:])
    return (
        "from ..engine import Engine\n\n\n"
        f"class BaseLLM(Engine):\n    def generate_async({taken}):\n        return self.take({passed})\n\n\n"
        "class LLM(BaseLLM):\n    pass\n"
    )


# ------------------------------------------------------------------ classes
def _rendered(definitions: list[dict], drop: typing.Sequence[str]) -> str:
    """Return the source of classes of arguments."""
    parts = [HEAD + "from .._torch.peft.lora.config import LoraConfig\n"]
    if all(d.get("class") == "LoraConfig" for d in definitions):
        parts = [HEAD]
    known = {d.get("class", d.get("alias")) for d in definitions} | {"LoraConfig"}
    strange = sorted({name for d in definitions for name in _strange(d, known)})
    parts += [f"{name} = Any\n" for name in strange]
    for definition in definitions:
        parts.append(_alias(definition) if "alias" in definition else _class(definition, known | set(strange), drop))
    names = [d["class"] for d in definitions if "fields" in d]
    parts.append("\n".join(f"{name}.model_rebuild()" for name in names) + "\n")
    return "\n".join(parts)


def _alias(definition: dict) -> str:
    return f"{definition['alias']} = {definition['type']}\n"


def _class(definition: dict, known: set[str], drop: typing.Sequence[str]) -> str:
    bases = [base for base in definition["bases"] if base in known | OF_HEAD] or ["StrictBaseModel"]
    lines = [f"class {definition['class']}({', '.join(bases)}):"]
    lines += [f"    {name} = {value!r}" for name, value in definition.get("members", {}).items()]
    for name, (annotation, default) in definition.get("fields", {}).items():
        if name not in drop:
            lines.append(f"    {name}: {_plain(annotation)}{_default(default, known)}")
    return "\n".join([*lines, "    pass", ""])


def _default(default: str | None, known: set[str]) -> str:
    """Return a default; of a class that is not here the default is nothing."""
    if default is None:
        return ""
    names = {node.id for node in ast.walk(ast.parse(default)) if isinstance(node, ast.Name)}
    is_known = names <= known | OF_HEAD | set(dir(builtins)) and not any(name == "CpType" for name in names)
    return f" = {default}" if is_known and "TelemetryConfig" not in names else " = None"


def _plain(annotation: str) -> str:
    """Return a type, of which what belongs to other modules may be anything."""
    tree = ast.parse(annotation, mode="eval")
    return "Any" if any(isinstance(node, ast.Attribute) for node in ast.walk(tree)) else annotation


def _strange(definition: dict, known: set[str]) -> set[str]:
    """Return the names in a definition that nothing here defines."""
    types = [annotation for annotation, _ in definition.get("fields", {}).values()] + [definition.get("type", "None")]
    names = {node.id for t in types for node in ast.walk(ast.parse(_plain(t))) if isinstance(node, ast.Name)}
    return names - known - OF_HEAD - set(dir(builtins)) - set(typing.__all__)


def _dataclasses(definitions: list[dict], drop: typing.Sequence[str]) -> str:
    lines = ["from dataclasses import dataclass", "from typing import *", ""]
    for definition in definitions:
        lines += ["", "@dataclass(slots=True)", f"class {definition['class']}:"]
        for name, (_, default) in definition["fields"].items():
            if name not in drop:
                lines.append(f"    {name}: Any" + ("" if default is None else f" = {default}"))
    return "\n".join([*lines, ""])
