"""Writes signatures.json: the names, types and defaults of TensorRT-LLM's arguments, extracted from its source.

`python -m tests.tensorrt_standin.extract FOLDER VERSION` reads an unpacked wheel or a checkout (FOLDER contains
tensorrt_llm/). Only declarations are extracted: no code, no descriptions, and only the checks that are part of a type.
docs/how-to/tensorrt.md lists the sources of the current signatures.json.
"""

from __future__ import annotations

import ast
import json
import sys
import typing
from pathlib import Path

from lem.backends.tensorrt_source import sampling_options_in_config, sampling_options_kept

SIGNATURES = Path(__file__).parent / "signatures.json"
# The classes to read, and where this and older versions define them; None means all classes that can be arguments.
CLASSES: tuple[tuple[tuple[str, ...], tuple[str, ...] | None], ...] = (
    (("llmapi/llm_args.py",), None),
    (("_torch/peft/lora/config.py", "lora_helper.py", "lora_manager.py"), ("LoraConfig",)),
    (("sampling_params.py",), ("SamplingParams",)),
    (("executor/request.py",), ("LoRARequest",)),
)
CALLS = {"llmapi/llm.py": ("BaseLLM", "generate_async")}
ENUMERATIONS = {"Enum", "IntEnum", "StrEnum"}
FIELDS = {"Field", "PydanticField", "field"}
CONSTRAINTS = {"discriminator", "ge", "gt", "le", "lt", "max_length", "min_length", "multiple_of", "pattern", "strict"}
GENERIC = {*typing.__all__, "dict", "frozenset", "list", "set", "tuple", "type"}


def extract(package: Path, version: str) -> dict:
    """Return the declarations of the package in a folder.

    Raises:
        LookupError: a file, a class or a call is not in any of the places where known versions have it.
    """
    classes = {}
    for places, wanted in CLASSES:
        file = next((place for place in places if (package / place).is_file()), None)
        if file is None:
            raise LookupError(f"{package} has no {' and no '.join(places)}")
        classes[file] = _definitions(_body(package / file), wanted)
        missing = set(wanted or ("TorchLlmArgs",)) - {d.get("class") for d in classes[file]}
        if missing:
            raise LookupError(f"{file} has no {', '.join(sorted(missing))}")
    return {
        "version": version,
        "classes": classes,
        "calls": {file: _parameters(package / file, *names) for file, names in CALLS.items()},
        "sampling_options_looked_at": sorted(sampling_options_in_config(package)),
        "sampling_options_kept": sorted(sampling_options_kept(package)),
    }


def _body(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text(encoding="utf-8")).body


# ------------------------------------------------------------------ classes
def _definitions(body: list[ast.stmt], wanted: tuple[str, ...] | None) -> list[dict]:
    """Return the wanted definitions of a module's or class's body; private ones only if they are bases of others."""
    bases = {name for node in body if isinstance(node, ast.ClassDef) for name in _bases(node)}
    found = (_class(node) if isinstance(node, ast.ClassDef) else _alias(node) for node in body)
    return [d for d in found if d is not None and _is_wanted(d, wanted, bases)]


def _is_wanted(definition: dict, wanted: tuple[str, ...] | None, bases: set[str]) -> bool:
    if "alias" in definition:
        return wanted is None
    name = definition["class"]
    return name in wanted if wanted is not None else not name.startswith("_") or name in bases


def _class(node: ast.ClassDef) -> dict | None:
    """Return a class with its fields or members, and with its nested classes; None for a class without any."""
    parts = {"fields": _fields(node), "members": _members(node), "classes": _definitions(node.body, None)}
    parts["classes"] = [d for d in parts["classes"] if "class" in d]
    if not parts["fields"] and not parts["members"]:
        return None
    return {"class": node.name, "bases": _bases(node)} | {name: part for name, part in parts.items() if part}


def _alias(node: ast.stmt) -> dict | None:
    """Return another name for a type; None for any other statement."""
    value = getattr(node, "value", None)
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    is_alias = isinstance(node, ast.AnnAssign) and ast.unparse(node.annotation).endswith("TypeAlias")
    is_generic = isinstance(value, ast.Subscript) and ast.unparse(value.value) in GENERIC
    is_config = isinstance(value, ast.Name) and value.id.endswith("Config")
    if isinstance(target, ast.Name) and isinstance(value, ast.expr) and (is_alias or is_generic or is_config):
        return {"alias": target.id, "type": _typed(value)}
    return None


def _bases(node: ast.ClassDef) -> list[str]:
    return [base.id for base in node.bases if isinstance(base, ast.Name)]


def _fields(node: ast.ClassDef) -> dict[str, list[str | None]]:
    """Return the type and the default of each public field, as written; the default is null for a required field."""
    found = {}
    for each in node.body:
        if not isinstance(each, ast.AnnAssign) or not isinstance(each.target, ast.Name):
            continue
        name, annotation = each.target.id, _typed(each.annotation)
        if not name.startswith("_") and ("ClassVar" not in annotation or name == "decoding_type"):
            found[name] = [annotation, _default(each.value)]
    return found


def _default(value: ast.expr | None) -> str | None:
    if isinstance(value, ast.Call) and ast.unparse(value.func) in FIELDS:
        named = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default_factory" in named:
            return f"Field(default_factory={ast.unparse(named['default_factory'])})"
        value = named.get("default", value.args[0] if value.args else None)
    is_required = value is None or (isinstance(value, ast.Constant) and value.value is ...)
    return None if is_required else ast.unparse(value)


def _members(node: ast.ClassDef) -> dict[str, str | int]:
    """Return the members of an enumeration whose values are literals."""
    if not ENUMERATIONS & set(_bases(node)):
        return {}
    plain = [each for each in node.body if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant)]
    return {ast.unparse(each.targets[0]): each.value.value for each in plain}


# ------------------------------------------------------------------ types
def _typed(annotation: ast.expr) -> str:
    """Return a type as written, without quotes, and with only those calls that are constraints."""
    return ast.unparse(_Plain().visit(annotation))


class _Plain(ast.NodeTransformer):
    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        return node if ast.unparse(node.value).endswith("Literal") else self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        node.keywords = [keyword for keyword in node.keywords if keyword.arg in CONSTRAINTS]
        return node

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        try:
            return ast.parse(node.value, mode="eval").body if isinstance(node.value, str) else node
        except SyntaxError:  # a comment on a type
            return node


# ------------------------------------------------------------------ calls
def _parameters(file: Path, of: str, name: str) -> list[str]:
    for node in _body(file):
        for each in node.body if isinstance(node, ast.ClassDef) and node.name == of else ():
            if isinstance(each, ast.FunctionDef) and each.name == name:
                return [argument.arg for argument in (*each.args.args, *each.args.kwonlyargs)]
    raise LookupError(f"{file} has no {of}.{name}")


if __name__ == "__main__":
    declared = extract(Path(sys.argv[1]) / "tensorrt_llm", sys.argv[2])
    SIGNATURES.write_text(json.dumps(declared, indent=1) + "\n", encoding="utf-8")
