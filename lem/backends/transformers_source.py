"""The model families that the installed transformers supports, read from its source code.

Importing transformers' models takes seconds, whereas parsing its tables takes about 20 ms. If the source has an unknown
layout, nothing is known about the families, and problems are found only when the model is loaded. This module knows
nothing about experiments.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from functools import cache
from importlib import util
from pathlib import Path

from lem.machine.host import installed_version

AUTO = "models/auto"
# Part of the warning that transformers gives if a model trained to read in both directions is used as a decoder.
READS_BOTH_WAYS = "as a standalone, add `is_decoder=True"


def version() -> str:
    """Return the version of the installed transformers."""
    return installed_version("transformers") or "unknown"


def language_models() -> Mapping[str, str]:
    """Return, for each model type, the name of its class for text generation; empty if unknown."""
    return _table("modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")


def model_types() -> frozenset[str]:
    """Return all model types, for any task; empty if unknown."""
    known = _table("auto_mappings.py", "CONFIG_MAPPING_NAMES") or _table(
        "configuration_auto.py", "CONFIG_MAPPING_NAMES"
    )
    return frozenset(known) | (frozenset(language_models()) if known else frozenset())


def takes_tokenizer_as_it_is(model_type: str) -> bool:
    """Return whether transformers keeps to the tokenizer class that a model's files name; False if unknown.

    For some model types, transformers uses a different class instead. If it keeps to the named class, and that class is
    a general one, the tokenizer is loaded from tokenizer.json alone.
    """
    exceptions = _names("tokenization_auto.py", "MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS")
    classes = _expressions("tokenization_auto.py", "TOKENIZER_MAPPING_NAMES")
    return bool(exceptions and classes) and not (
        model_type in exceptions or "MistralCommonBackend" in classes.get(model_type, "")
    )


def modeling(model_type: str) -> str | None:
    """Return the source code of a model type's layers (`modeling_….py`); None if it is not found."""
    return _source("modeling", model_type)


def default(model_type: str, name: str) -> int | None:
    """Return the default of an integer field in a model type's configuration; None if it cannot be determined."""
    text = _source("configuration", model_type) or ""
    values = {int(value) for value in re.findall(rf"\b{name}(?:: [\w\s|]+)? ?= ?(\d[\d_]*)\b", text)}
    return values.pop() if len(values) == 1 else None


def value_types(model_type: str) -> dict[str, str]:
    """Return the type annotation (such as `int | None`) of each value in a model type's configuration, if found."""
    for node in ast.parse(_source("configuration", model_type) or "").body:
        if isinstance(node, ast.ClassDef) and _has_model_type(node, model_type):
            return {
                field.target.id: ast.unparse(field.annotation)
                for field in node.body
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            }
    return {}


def _has_model_type(config_class: ast.ClassDef, model_type: str) -> bool:
    for node in config_class.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value == model_type:
            return [target.id for target in node.targets if isinstance(target, ast.Name)] == ["model_type"]
    return False


@cache
def _source(kind: str, model_type: str) -> str | None:
    folder, module = _folder(), _module_of(model_type)
    if folder is None:
        return None
    # Some files are named after the module, others after the type.
    names = dict.fromkeys([module, model_type.replace("-", "_")])
    files = [folder / "models" / module / f"{kind}_{name}.py" for name in names]
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), None)


def _module_of(model_type: str) -> str:
    special = _table("auto_mappings.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME") or _table(
        "configuration_auto.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"
    )
    return special.get(model_type, model_type.replace("-", "_"))


def _folder() -> Path | None:
    found = util.find_spec("transformers")
    return None if found is None or found.origin is None else Path(found.origin).parent


@cache
def _table(file: str, name: str) -> dict[str, str]:
    """Return the table that the source assigns to a name as `OrderedDict([(…, …), …])`; empty if it is not found."""
    value = _assigned(file, name)
    return _pairs(value.args[0]) if isinstance(value, ast.Call) and value.args else {}


@cache
def _expressions(file: str, name: str) -> dict[str, str]:
    """Return a table as `_table` does, but with the source text of each value, which may be any expression."""
    value = _assigned(file, name)
    pairs = value.args[0] if isinstance(value, ast.Call) and value.args else None
    if not isinstance(pairs, ast.List):
        return {}
    return {
        str(pair.elts[0].value): ast.unparse(pair.elts[1])
        for pair in pairs.elts
        if isinstance(pair, ast.Tuple) and len(pair.elts) == 2 and isinstance(pair.elts[0], ast.Constant)
    }


@cache
def _names(file: str, name: str) -> frozenset[str]:
    """Return the set of strings that the source assigns to a name; empty if it is not found."""
    value = _assigned(file, name)
    elements = value.elts if isinstance(value, ast.Set) else ()
    return frozenset(str(each.value) for each in elements if isinstance(each, ast.Constant))


def _assigned(file: str, name: str) -> ast.expr | None:
    """Return the expression that a source file of the folder `auto` assigns to a name; None if it is not found.

    Only the lines of the assignment are parsed, up to the first line that begins with a closing bracket.
    """
    found = re.search(rf"^{name}\b[^\n]*=.*?^[)\]}}]+$", _text(file), re.MULTILINE | re.DOTALL)
    try:
        nodes = ast.parse(found[0]).body if found else []
    except SyntaxError:  # an unknown layout
        return None
    return next((node.value for node in nodes if isinstance(node, ast.Assign | ast.AnnAssign)), None)


@cache
def _text(file: str) -> str:
    folder = _folder()
    path = None if folder is None else folder / AUTO / file
    return path.read_text(encoding="utf-8") if path is not None and path.is_file() else ""


def _pairs(node: ast.expr) -> dict[str, str]:
    """Return the pairs of strings in a literal list; if a model type has several classes, the first one is used."""
    try:
        pairs = ast.literal_eval(node)
        return {key: value if isinstance(value, str) else value[0] for key, value in pairs}
    except (ValueError, TypeError, IndexError):
        return {}
