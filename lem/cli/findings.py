"""The output of `lem doctor`: the findings about a machine, as a table for people or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lem import __version__
from lem.machine import host
from lem.results import show
from lem.runner.finding import CHECKS, GROUPS, Checkup, Finding

# The version of the JSON format. 1: the first version.
FORMAT_VERSION = 1
STYLES = {"ok": "green", "limited": "yellow", "missing": "red"}
COMPONENTS = {"gpu": "GPU", "cpu": "CPU", "dram": "memory"}
STATUS_WIDTH = max(map(len, STYLES))
TITLE_WIDTH = max(len(title) for _, title in CHECKS.values())
LEAST_FACT_WIDTH = 24


def show_checkup(results_dir: Path, *, as_json: bool = False) -> int:
    """Print what can be measured on this machine; return 0, or 1 if nothing can be measured."""
    from lem.runner.checkup import checkup

    found = checkup(host.look(), results_dir)
    if as_json:
        print(json.dumps(as_plain(found), indent=2, ensure_ascii=False))
    else:
        show.console().print(show.cell(verdict(found)))
        _print_table(found)
    return 1 if found.obstacles else 0


def as_plain(found: Checkup) -> dict[str, Any]:
    """Return a checkup as plain data, in the format that docs/how-to/doctor.md describes."""
    return {
        "format_version": FORMAT_VERSION,
        "lem_version": __version__,
        "can_measure": not found.obstacles,
        "energy": _kind_of_energy(found),
        "measured": list(found.measured),
        "estimated": list(found.estimated),
        "engines": list(found.engines),
        "verdict": verdict(found),
        "findings": [
            {
                "group": each.group,
                "check": each.check,
                "device": each.device,
                "status": each.status,
                "fact": each.fact,
                "remedy": each.remedy,
                "values": dict(each.values),
            }
            for each in found.findings
        ],
    }


def _kind_of_energy(found: Checkup) -> str:
    return "measured" if found.measured else "estimated" if found.estimated else "none"


def verdict(found: Checkup) -> str:
    """Return a summary of what can be measured, in one or two sentences."""
    if found.obstacles:
        return f"Nothing can be measured here: {'; '.join(found.obstacles)}."
    parts = [
        f"{what}: {' and '.join(COMPONENTS[each] for each in components)}"
        for what, components in (("measured", found.measured), ("estimated", found.estimated))
        if components
    ]
    return f"Energy {'; '.join(parts)}. Engines: {', '.join(found.engines)}."


def _print_table(found: Checkup) -> None:
    """Print a table for each group of findings; all tables have the same column widths."""
    for group, title in GROUPS.items():
        own = [each for each in found.findings if each.group == group]
        if own:
            print()
            show.console().print(f"[bold]{title}[/bold]")
            _print_group(own)


def _print_group(findings: Sequence[Finding]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", min_width=LEAST_FACT_WIDTH)
    for each, devices in merged(findings):
        table.add_row(*_cells(each, devices))
    show.print_table(table)


def merged(findings: Sequence[Finding]) -> Iterator[tuple[Finding, list[int]]]:
    """Yield findings; a finding that is the same for several GPUs appears once, with the GPUs' indices."""
    firsts: dict[tuple[str, ...], tuple[Finding, list[int]]] = {}
    for each in findings:
        said = (each.check, each.status, each.fact, each.remedy or "")
        _, devices = firsts.setdefault(said, (each, []))
        devices += [] if each.device is None else [each.device]
    return iter(firsts.values())


def _cells(finding: Finding, devices: Sequence[int]) -> tuple[str, str, str]:
    which = "" if not devices else f"GPU {', '.join(map(str, devices))}: "
    text = show.cell(f"{which}{finding.fact}")
    if finding.remedy and finding.status != "ok":
        text += f"\n[dim]→[/dim] {show.cell(finding.remedy)}"
    style = STYLES[finding.status]
    return f"[{style}]{finding.status:<{STATUS_WIDTH}}[/{style}]", f"{finding.title:<{TITLE_WIDTH}}", text
