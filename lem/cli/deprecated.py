"""The deprecated flags of `lem experiment`. They still work, but print a warning that names the replacement."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from lem.errors import ConfigError
from lem.spec.schema import leaf


@dataclass(frozen=True)
class Flag:
    """A deprecated flag, the path of the value that replaces it, and a function that returns the overrides to use."""

    name: str
    path: str
    overrides: Callable[[Any], list[str]]
    # Another value that the flag sets.
    also: str | None = None


def _gpus(text: str) -> list[str]:
    entries = [part.strip() for part in text.split(",")]
    if not all(entries):
        raise ConfigError(
            f"--gpu-list {text!r} is not a list of GPUs; separate indices or UUIDs with commas, as in 0,1."
        )
    return [f"gpus=[{','.join(entry if entry.isdecimal() else repr(entry) for entry in entries)}]"]


def _temperature(value: float) -> list[str]:
    # In other tools, a temperature of 0 means greedy decoding.
    if value == 0:
        return ["decoder.do_sample=false"]
    return ["decoder.do_sample=true", f"decoder.temperature={value}"]


FLAGS = {
    "batch_size": Flag("--batch-size", "batching.batch_size", lambda value: [f"batching.batch_size={value}"]),
    "precision": Flag("--precision", "fp_precision", lambda value: [f"fp_precision={value}"]),
    "num_processes": Flag("--num-processes", "num_processes", lambda value: [f"num_processes={value}"]),
    "gpu_list": Flag("--gpu-list", "gpus", _gpus),
    "temperature": Flag("--temperature", "decoder.temperature", _temperature, also="decoder.do_sample"),
    "quantization": Flag(
        "--quantization", "quantization.quantization", lambda on: [f"quantization.quantization={on}".lower()]
    ),
}


def option(name: str, *declarations: str) -> Any:
    """Return the typer option for a deprecated flag; its help text comes from the schema."""
    flag = FLAGS[name]
    instead = flag.path if flag.also is None else f"{flag.also} and {flag.path}"
    return typer.Option(
        *declarations, help=f"Deprecated; use {instead} instead. {leaf(flag.path).description}", show_default=False
    )


def overrides(given: Mapping[str, Any]) -> list[str]:
    """Return the overrides for the given flags, and warn about each flag; None means that a flag was not given."""
    result: list[str] = []
    for name, value in given.items():
        if value is None:
            continue
        flag = FLAGS[name]
        own = flag.overrides(value)
        lines, texts = " and ".join(f"`{_yaml(text)}`" for text in own), " ".join(own)
        instead = f"write {lines} in the config file, or {texts} on the command line."
        print(f"Warning: {flag.name} is deprecated; {instead}", file=sys.stderr)
        result += own
    return result


def _yaml(override: str) -> str:
    path, _, value = override.partition("=")
    *outer, last = path.split(".")
    text = f"{last}: {value}"
    for part in reversed(outer):
        text = f"{part}: {{{text}}}"
    return text
