"""Writes signatures.json: names, types and defaults of TensorRT-LLM's arguments, read off its source.

`python -m tests.tensorrt_standin.extract FOLDER VERSION` reads an unpacked wheel or a checkout (FOLDER holds
tensorrt_llm/). Only declarations are taken: no code, no descriptions, no checks. What was read for the file that is
here is told in docs/tensorrt.md.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

SIGNATURES = Path(__file__).parent / "signatures.json"
CLASSES = {
    "llmapi/llm_args.py": None,  # all that can be arguments
    "_torch/peft/lora/config.py": ("LoraConfig",),
    "sampling_params.py": ("SamplingParams",),
    "executor/request.py": ("LoRARequest",),
}
CALLS = {"llmapi/llm.py": ("BaseLLM", "generate_async")}
SAMPLERS = ("_torch/pyexecutor/sampler.py", "_torch/pyexecutor/sampler/*.py")


def extract(package: Path, version: str) -> dict:
    """Return the declarations of the package in a folder."""
    found = {
        file: [d for node in _body(package / file) if (d := _declared(node, wanted)) is not None]
        for file, wanted in CLASSES.items()
    }
    calls = {file: _parameters(package / file, *names) for file, names in CALLS.items()}
    return {"version": version, "classes": found, "calls": calls, "sampling_options_read": _read(package)}


def _body(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text(encoding="utf-8")).body


def _declared(node: ast.stmt, wanted: tuple[str, ...] | None) -> dict | None:
    """Return a class with its fields or members, or an alias of a type; None for anything else."""
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and (wanted is None or node.name in wanted):
        fields, members = _fields(node), _members(node)
        bases = [ast.unparse(base) for base in node.bases if isinstance(base, ast.Name)]
        declared = {"class": node.name, "bases": bases} | ({"fields": fields} if fields else {})
        return declared | ({"members": members} if members else {}) if fields or members else None
    value = getattr(node, "value", None)
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    is_alias = isinstance(value, ast.Subscript) or (isinstance(value, ast.Name) and value.id.endswith("Config"))
    if wanted is None and isinstance(target, ast.Name) and is_alias:
        return {"alias": target.id, "type": ast.unparse(value)}
    return None


def _fields(node: ast.ClassDef) -> dict[str, list[str | None]]:
    """Return the type and the default of each public field, as they stand there; null for a required one."""
    found = {}
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        name, annotation = each.target.id, ast.unparse(each.annotation)
        if not name.startswith("_") and ("ClassVar" not in annotation or name == "decoding_type"):
            found[name] = [annotation, _default(each.value)]
    return found


def _default(value: ast.expr | None) -> str | None:
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        named = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default_factory" in named:
            return f"Field(default_factory={ast.unparse(named['default_factory'])})"
        value = named.get("default", value.args[0] if value.args else None)
    return None if value is None else ast.unparse(value)


def _members(node: ast.ClassDef) -> dict[str, str | int]:
    """Return the members of an enumeration."""
    if not any(ast.unparse(base) in ("Enum", "StrEnum") for base in node.bases):
        return {}
    plain = [each for each in node.body if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant)]
    return {ast.unparse(each.targets[0]): each.value.value for each in plain}


def _parameters(file: Path, of: str, name: str) -> list[str]:
    for node in _body(file):
        for each in node.body if isinstance(node, ast.ClassDef) and node.name == of else ():
            if isinstance(each, ast.FunctionDef) and each.name == name:
                return [argument.arg for argument in (*each.args.args, *each.args.kwonlyargs)]
    return []


def _read(package: Path) -> list[str]:
    """Return the attributes of a request's sampling_config that the samplers look at."""
    found = set()
    for pattern in SAMPLERS:
        for file in package.glob(pattern):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("sampling_config"):
                    found.add(node.attr)
    return sorted(found)


if __name__ == "__main__":
    declared = extract(Path(sys.argv[1]) / "tensorrt_llm", sys.argv[2])
    SIGNATURES.write_text(json.dumps(declared, indent=1) + "\n", encoding="utf-8")
