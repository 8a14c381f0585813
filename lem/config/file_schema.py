"""The JSON Schema of config files, for editors: the schema of `lem.spec`'s dataclasses, relaxed for partial files.

Unlike a whole `Experiment`, a file may leave any value unset, choose options by name alone (`dataset: alpaca`), contain
`defaults:` and `preset:`, and give any value as an interpolation (`${max_output_tokens}`). The schema does not cover
the rules that relate values to each other; `lem config validate` checks those.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from lem.config.options import Options
from lem.spec.campaign import Campaign
from lem.spec.engines import BACKENDS
from lem.spec.experiment import Experiment
from lem.spec.schema import GROUPS, Leaf

# Written beside the config files that refer to it, so that editors find it without a network and in every clone of the
# repository. The pattern *.yaml does not match this name.
SCHEMA_FILE = ".lem-schema.json"
EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}"
# The newest JSON Schema draft that the YAML language server supports in full.
DRAFT = "http://json-schema.org/draft-07/schema#"
TYPE_NAMES = {
    "integer": "whole number", "string": "text", "boolean": "true | false", "array": "list", "object": "mapping",
}  # fmt: skip
INTERPOLATION = {"$ref": "#/$defs/Interpolation"}


def file_schema(options: Options) -> dict[str, Any]:
    """Return the JSON Schema of a config file that may choose among these options."""
    schema = TypeAdapter(Experiment).json_schema()
    definitions = {name: _part(part) for name, part in schema["$defs"].items()}
    properties = _part(schema)["properties"]
    for group in GROUPS:
        properties[group] = _group(group, properties.get(group), options)
    for name, backend in BACKENDS.items():
        others = {other for other in BACKENDS if other != name}
        names = [option for option in options.names("backend") if option not in others]
        definitions[backend.__name__]["properties"]["name"]["enum"] = names
    definitions["Energy"]["properties"]["name"]["enum"] = list(options.names("energy"))
    definitions["Interpolation"] = {"type": "string", "pattern": r"\$\{.+\}", "description": "Another key's value."}
    return {
        "$schema": DRAFT,
        "title": "lem experiment",
        "description": "A lem config file: the values that differ from the defaults.",
        "type": "object",
        "additionalProperties": False,
        "properties": {"defaults": _defaults(), **properties},
        "$defs": definitions,
    }


def _part(part: dict[str, Any]) -> dict[str, Any]:
    """Return an object's schema adapted to files: without required keys or titles, and with interpolations allowed."""
    properties = {key: _value(value) for key, value in part["properties"].items()}
    kept = {key: part[key] for key in ("type", "description", "additionalProperties")}
    return {**kept, "properties": properties}


def _value(value: dict[str, Any]) -> dict[str, Any]:
    """Return a value's schema, extended to allow an interpolation."""
    if "$ref" in value or "oneOf" in value:
        return {"anyOf": _alternatives(value)}
    if "const" in value:
        return {"type": "string", "description": value["description"]}
    about: dict[str, Any] = {key: value[key] for key in ("description", "default") if key in value}
    ways = _alternatives(value)
    # A schema that allows any string already allows an interpolation.
    return {**about, "anyOf": ways} if {"type": "string"} in ways else {**about, "anyOf": [*ways, INTERPOLATION]}


def _alternatives(value: dict[str, Any]) -> list[dict[str, Any]]:
    if several := value.get("anyOf") or value.get("oneOf"):
        return list(several)
    return [{key: item for key, item in value.items() if key not in ("title", "description", "default", "env")}]


def _group(group: str, mapping: dict[str, Any] | None, options: Options) -> dict[str, Any]:
    """Return a group's schema, which allows an option's name or a mapping of values, possibly with a `name`."""
    names: dict[str, Any] = {"enum": list(options.names(group))}
    if group == "dataset":
        # A hub id or a local file is allowed as well.
        names = {"examples": names["enum"], "minLength": 1}
    ways = [{"type": "string", **names}, *(mapping["anyOf"] if mapping else [{"type": "null"}])]
    return {"description": f"The {group}, chosen by name.", "anyOf": ways}


def _defaults() -> dict[str, Any]:
    choice = {
        "type": "object",
        "patternProperties": {rf"^(override )?/?({'|'.join(GROUPS)})$": {"type": "string"}},
        "additionalProperties": False,
    }
    return {
        "description": "Files to inherit from, relative to this one (base means base.yaml beside it).",
        "type": "array",
        "items": {"anyOf": [{"type": "string"}, choice]},
    }


def write_beside(file: Path, options: Options) -> None:
    """Write the schema to the directory of a config file that refers to it."""
    (file.parent / SCHEMA_FILE).write_text(as_text(options), encoding="utf-8")


def as_text(options: Options) -> str:
    """Return the schema as JSON text."""
    return json.dumps(file_schema(options), indent=2, ensure_ascii=False) + "\n"


def campaign_as_text() -> str:
    """Return the JSON Schema of a campaign file as text; no key is required, and the file may inherit from others."""
    schema = TypeAdapter(Campaign).json_schema()
    inherits = {
        "description": "Campaign files to inherit from, relative to this one (base means base.yaml beside it).",
        "type": "array",
        "items": {"type": "string"},
    }
    whole = {
        "$schema": DRAFT,
        "title": "lem campaign",
        "description": "A lem campaign file: the arms, and the settings that differ from the defaults.",
        "type": "object",
        "additionalProperties": False,
        "properties": {"defaults": inherits, **schema["properties"]},
        "$defs": schema["$defs"],
    }
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def type_words(leaf: Leaf) -> str:
    """Describe a value's type and range, as in `whole number from 1 to 65536`, `auto | cpu | cuda`, `text, or null`."""
    schema = TypeAdapter(leaf.annotation).json_schema()
    return ", or ".join(map(_way_words, schema.get("anyOf", [schema])))


def _way_words(way: dict[str, Any]) -> str:
    if "enum" in way or "const" in way:
        return " | ".join(way.get("enum", [way.get("const")]))
    kind = str(way["type"])
    return TYPE_NAMES.get(kind, kind) + _range_words(way)


def _range_words(way: dict[str, Any]) -> str:
    if "minimum" in way and "maximum" in way:
        return f" from {way['minimum']} to {way['maximum']}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "pattern": "like"}
    return ",".join(f" {sign} {way[key]}" for key, sign in signs.items() if key in way)
