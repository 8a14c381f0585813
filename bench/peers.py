"""Compares lem with other tools that do the same work, side by side in one run.

Run with `python -m nox -s peers`, which creates an environment for each of the other tools, or directly:
`python -m bench.peers load` compares the load generators, and `python -m bench.peers job` compares whole jobs with a
bare script. The tools take turns; `--pairs` sets the number of turns. The result is printed as Markdown tables, with
the median of each figure and, for each other tool, the ratio to lem or to the bare script with its 95% interval.
`--json` writes the figures of every turn to a file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import peers_job, peers_load
from lem.machine.host import cpu_model
from lem.results.statistics import summarize

Turns = dict[str, list[dict[str, float | None]]]
DIRECTORY = Path(".nox")


def compare(turns: Turns, references: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return, for each tool and figure, the median, the extremes and the mean ratio to the tool's reference.

    The ratios are computed within each turn.
    """
    compared: dict[str, dict[str, Any]] = {}
    for tool, found in turns.items():
        compared[tool] = {}
        for name in found[0]:
            values = [each[name] for each in found]
            pairs = [(own, base[name]) for own, base in zip(values, turns[references[tool]], strict=True)]
            known = [value for value in values if value is not None]
            compared[tool][name] = {
                "median": statistics.median(known) if known else None,
                "least": min(known, default=None),
                "most": max(known, default=None),
                **_ratio([(own, base) for own, base in pairs if own is not None and base is not None]),
            }
    return compared


def _ratio(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """Return the geometric mean of the ratios of paired figures, with its 95% interval over the turns."""
    logs = [math.log(own / base) for own, base in pairs if own > 0 and base > 0]
    found = summarize(logs)
    return {
        "ratio": None if found.mean is None else math.exp(found.mean),
        "ratio_low": None if found.ci95_low is None else math.exp(found.ci95_low),
        "ratio_high": None if found.ci95_high is None else math.exp(found.ci95_high),
    }


def table(compared: Mapping[str, Mapping[str, Any]], references: Mapping[str, str]) -> str:
    """Return the comparison as a Markdown table with a row for each figure."""
    others = [tool for tool in compared if tool != references[tool]]
    head = ["figure", *compared, *(f"{tool} ÷ {references[tool]}" for tool in others)]
    lines = [head, ["---"] * len(head)]
    for name in next(iter(compared.values())):
        lines.append([
            f"`{name}`",
            *(_number(each[name]["median"]) for each in compared.values()),
            *(_ratio_text(compared[tool][name]) for tool in others),
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "not reported" if value is None else f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"


def _ratio_text(figure: Mapping[str, float | None]) -> str:
    if figure["ratio"] is None:
        return ""
    if figure["ratio_low"] is None:
        return f"{figure['ratio']:.3g}"
    return f"{figure['ratio']:.3g} ({figure['ratio_low']:.3g} to {figure['ratio_high']:.3g})"


def load(pairs: int, programs: Mapping[str, Path], *, is_ahead: bool) -> dict[str, Any]:
    """Compare the load generators: each tool takes `pairs` turns, and then climbs a ladder of rates once."""
    tools = {name: tool for name, tool in peers_load.TOOLS.items() if name == "lem" or name in programs}
    turns: Turns = {name: [] for name in tools}
    ladders: dict[str, Any] = {}
    with peers_load.paced(is_ahead=is_ahead) as server:
        for turn in range(pairs):
            for name, tool in _in_turn(tools, turn):
                found = peers_load.figures(tool, programs.get(name, Path()), server, is_ahead=is_ahead)
                turns[name].append(found)
                print(f"turn {turn + 1}, {name}: {json.dumps(found)}", file=sys.stderr, flush=True)
        for name, tool in tools.items():
            ladders[name] = peers_load.ladder(tool, programs.get(name, Path()), server, is_ahead=is_ahead)
            print(f"ladder, {name}: {json.dumps(ladders[name])}", file=sys.stderr, flush=True)
    return {"turns": turns, "compared": compare(turns, dict.fromkeys(turns, "lem")), "ladders": ladders}


def _in_turn(tools: Mapping[str, Any], turn: int) -> list[tuple[str, Any]]:
    """Return the tools, beginning with a different one in each turn."""
    names = list(tools)
    return [(name, tools[name]) for name in [*names[turn % len(names) :], *names[: turn % len(names)]]]


def ladder_table(ladders: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a Markdown table with the highest rate that each tool sustained and the next rate, which was too high."""
    lines = ["| tool | highest rate with p99 error below 1 ms | p99 error there | next rate tried | p99 error there |"]
    lines.append("|---|---|---|---|---|")
    for tool, rungs in ladders.items():
        good = [rung for rung in rungs if rung["is_sustained"]]
        bad = [rung for rung in rungs if not rung["is_sustained"]]
        cells = [_rung(each[-1] if each else None) for each in (good, bad)]
        lines.append(f"| {tool} | {' | '.join(text for pair in cells for text in pair)} |")
    return "\n".join(lines)


def _rung(rung: Mapping[str, Any] | None) -> tuple[str, str]:
    return ("none", "") if rung is None else (f"{rung['events_per_s']:,.0f}/s", f"{rung['error_p99_us']:,.0f} µs")


def main() -> int:
    """Compare, print the tables, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["load", "job"])
    parser.add_argument("--pairs", type=int, default=3, help="how many turns each tool takes (default: 3)")
    parser.add_argument("--json", type=Path, help="a file for the figures of every turn")
    parser.add_argument(
        "--environments", type=Path, default=DIRECTORY, help="the directory that contains an environment, peers-NAME, "
        "for each of the other tools (default: .nox); tools without an environment are left out",
    )  # fmt: skip
    parser.add_argument(
        "--ahead", action="store_true", help="run everything at the highest ordinary priority, which needs root"
    )
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error("--pairs must be at least 1.")
    if options.ahead and os.geteuid() != 0:
        parser.error("--ahead needs root; leave it out, or run as root.")
    peers = {"load": ["guidellm", "aiperf"], "job": ["optimum"]}[options.what]
    programs = {}
    for name in peers:
        folder = options.environments.resolve() / f"peers-{name}" / "bin"
        if folder.is_dir():
            programs[name] = folder
        else:
            print(f"{name} is left out: there is no environment {folder.parent}.", file=sys.stderr)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "bench.peers", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_average_before": os.getloadavg()[0],
    }
    if options.what == "load":
        found = load(options.pairs, programs, is_ahead=options.ahead)
        print(
            table(found["compared"], dict.fromkeys(found["compared"], "lem")),
            "",
            ladder_table(found["ladders"]),
            sep="\n",
        )
    else:
        found = peers_job.job(options.pairs, programs.get("optimum"), is_ahead=options.ahead)
        found["compared"] = {size: compare(turns, peers_job.REFERENCES) for size, turns in found["turns"].items()}
        for size, compared in found["compared"].items():
            print(f"Batch size {size}:\n\n{table(compared, peers_job.REFERENCES)}\n")
    if options.json:
        about["load_average_after"] = os.getloadavg()[0]
        options.json.write_text(json.dumps({"about": about, **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
