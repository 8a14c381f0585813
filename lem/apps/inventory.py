"""`lem datasets` and `lem presets`: what can be chosen by name, read from the YAML files in conf/."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lem import report

CONFIG_MODULE = "lem.conf"


@dataclass(frozen=True)
class Choice:
    """An option of a config group: its name, its purpose (the file's first comment), and its values."""

    name: str
    purpose: str
    values: dict[str, Any]


def choices(group: str) -> Iterator[Choice]:
    """Yield the options of a group, by name."""
    import yaml

    folder = resources.files(CONFIG_MODULE) / group
    for file in sorted(folder.iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            text = file.read_text(encoding="utf-8")
            yield Choice(file.name.removesuffix(".yaml"), _purpose(text), yaml.safe_load(text) or {})


def _purpose(text: str) -> str:
    comments = (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return next((line for line in comments if not line.startswith("@package")), "")


def show_datasets() -> int:
    """Print the built-in datasets."""
    rows = []
    for choice in choices("dataset"):
        values = choice.values
        if "path" in values:
            place = values["path"] + (f" ({values['config']})" if "config" in values else "")
            rows.append((choice.name, place, values.get("split", "–"), values["column"], choice.purpose))
    _table(("dataset", "source", "split", "column", "what it holds"), rows)
    print("\nAny hub dataset (owner/name) or local json, jsonl, csv, parquet or txt file will do as well.")
    return 0


def show_presets() -> int:
    """Print the built-in presets with the values they set."""
    rows = [(c.name, c.purpose, ", ".join(_settings(c.values))) for c in choices("preset")]
    _table(("preset", "purpose", "sets"), rows)
    return 0


def _settings(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if key == "defaults":
            for entry in value:
                yield from (f"{k.removeprefix('override ').lstrip('/')}={v}" for k, v in dict(entry).items())
        elif isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value}"


def _table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*row)
    report.print_table(table)
