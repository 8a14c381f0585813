"""`lem datasets` and `lem presets`: what can be chosen by name, read from the YAML files in conf/ and a user's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lem.config.layers import option
from lem.config.options import CUSTOM, Options
from lem.config.problem import Faults, shown_path
from lem.results import show

USERS = "yours"


@dataclass(frozen=True)
class Choice:
    """An option of a config group: its name, its purpose (the file's first comment), and its values by path."""

    name: str
    purpose: str
    values: dict[str, Any]
    # The user's file in which it stands; None for a built-in one.
    file: Path | None = None
    shadows: bool = False

    @property
    def whose(self) -> str:
        """Whose it is, if it is not built in."""
        if self.file is None:
            return ""
        return f"{USERS}, in place of the built-in one" if self.shadows else USERS


def choices(group: str, options: Options | None = None) -> Iterator[Choice]:
    """Yield the options of a group, by name; raises `Faults` when a user's option is at fault."""
    options = options or Options()
    for name in options.names(group):
        yield choice(options, group, name)


def choice(options: Options, group: str, name: str) -> Choice:
    """Return one option with its purpose and values."""
    read = option(options, group, name)
    values = {inner: chosen.name for inner, chosen in read.choices.items() if chosen.name}
    for layer in (*read.bound.values(), *read.layers):
        if layer.kind != "default":
            values |= dict(_flat(layer.values))
    text = read.file.path.read_text(encoding="utf-8-sig")
    return Choice(name, _purpose(text), values, read.file.path if read.file.is_users else None, read.file.shadows)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _purpose(text: str) -> str:
    comments = (line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    return next((line for line in comments if line and not line.startswith(("@package", "yaml-language-server"))), "")


# ------------------------------------------------------------------ what the user sees
def show_datasets(config_dir: Path | None = None, *, as_json: bool = False) -> int:
    """Print the datasets that have a name; return 2 when a user's file is at fault."""
    found, faults = _readable("dataset", config_dir)
    if as_json:
        print(json.dumps([_as_data(choice, "dataset.") for choice in found], indent=2, ensure_ascii=False))
    else:
        rows = [_dataset_row(choice) for choice in found if (choice.name, choice.file) != (CUSTOM, None)]
        _table(("dataset", "source", "split", "column", "what it holds"), rows)
        print("\nA hub dataset (owner/name) or a json, jsonl, csv, parquet or txt file will do.")
        print("Without a choice it is ai-energy-score.")
        _name_folder(found)
    return _tell(faults)


def show_presets(config_dir: Path | None = None, *, as_json: bool = False) -> int:
    """Print the presets with the values they set; return 2 when a user's file is at fault."""
    found, faults = _readable("preset", config_dir)
    if as_json:
        print(json.dumps([_as_data(choice) for choice in found], indent=2, ensure_ascii=False))
    else:
        rows = [(c.name, _with(c.purpose, c.whose), ", ".join(_settings(c.values))) for c in found]
        _table(("preset", "purpose", "sets"), rows)
        _name_folder(found)
    return _tell(faults)


def _readable(group: str, config_dir: Path | None) -> tuple[list[Choice], list[Faults]]:
    options = Options.find(config_dir)
    found: list[Choice] = []
    faults: list[Faults] = []
    for name in options.names(group):
        try:
            found.append(choice(options, group, name))
        except Faults as fault:
            faults.append(fault)
    return found, faults


def _dataset_row(choice: Choice) -> tuple[str, ...]:
    values = {key.removeprefix("dataset."): value for key, value in choice.values.items()}
    config = f" ({values['config']})" if values.get("config") else ""
    source = f"{values.get('path') or '–'}{config}"
    return (
        choice.name,
        source,
        values.get("split") or "–",
        values.get("column") or "–",
        _with(choice.purpose, choice.whose),
    )


def _with(purpose: str, whose: str) -> str:
    return f"{purpose} ({whose})".strip() if whose else purpose


def _settings(values: dict[str, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield f"{key}={json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value}"


def _as_data(choice: Choice, prefix: str = "") -> dict[str, Any]:
    return {
        "name": choice.name,
        "purpose": choice.purpose,
        "values": {key.removeprefix(prefix): value for key, value in choice.values.items()},
        "file": shown_path(choice.file) if choice.file else None,
        "replaces_builtin": choice.shadows,
    }


def _name_folder(found: Sequence[Choice]) -> None:
    for folder in sorted({choice.file.parent for choice in found if choice.file}):
        print(f"\nYours are in {shown_path(folder)}.")


def _tell(faults: Sequence[Faults]) -> int:
    for fault in faults:
        for line in str(fault).splitlines():
            print(f"Error: {line}", file=sys.stderr)
    return 2 if faults else 0


def _table(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    show.print_table(table)
