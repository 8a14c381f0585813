"""Shows the noise found in a campaign that compares one configuration with itself: as text, and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lem.results import show
from lem.results.campaign import MEASURES
from lem.results.campaign_show import sentence
from lem.results.noise import LEAST_PAIRS, Change, Correlation, Floor, Noise, percent

# The version of the JSON format. 1: the first version.
FORMAT_VERSION = 1
NONE_SEEN = "none seen"
FALSE_ALARM = (
    "FALSE ALARM: {sentence} Both arms are the same configuration. One campaign in twenty raises such an alarm by "
    "chance; if it happens again, the order of the cells or a drift affects the results."
)


def show_noise(noise: Noise) -> None:
    """Print the noise found in a campaign, and the advice."""
    answer, campaign = noise.answer, noise.answer.definition.campaign
    done = sum(cell.row is not None for cell in answer.cells)
    experiment = answer.definition.arms[0].experiment
    _print(
        f"Noise {answer.definition.name}: {experiment.model} ({experiment.backend.name}) against itself, {done} of "
        f"{len(answer.cells)} cells completed, {campaign.structure}"
    )
    if not done:
        print("No cell has completed yet, so nothing is known about the noise.")
        return
    words = MEASURES[campaign.primary][1]
    _print(f"{words[0].upper()}{words[1:]}{_kind(noise)}")
    print()
    show.print_pairs(_lines(noise))
    others = [floor for floor in noise.floors if floor is not noise.floor]
    if others:
        print("\nOther metrics")
        show.print_pairs((MEASURES[floor.measure][1], _short(floor)) for floor in others)
    print("\nRecommended")
    show.print_pairs((advice.about, f"{advice.setting}: {advice.why}") for advice in noise.advice)
    if answer.warnings:
        print()
        show.print_pairs(("Warning", f"{note.code}: {note.text}") for note in answer.warnings)


def _print(text: str) -> None:
    """Print a line; if the terminal is too narrow for it, break the line between words."""
    show.console().print(show.cell(text))


def _kind(noise: Noise) -> str:
    sources = {cell.row.energy_source for cell in noise.answer.cells if cell.row is not None and cell.row.energy_source}
    if noise.is_estimate:
        kind, what = ("simulated", "simulation") if sources == {"simulated"} else ("estimated", "estimate")
        return f", {show.ESTIMATE} {kind}: this is the noise of the {what}; no sensor measured the energy"
    rests_on_energy = noise.floor.measure.startswith(("energy", "average_power"))
    return f" ({', '.join(sorted(sources))})" if sources and rests_on_energy else ""


def _lines(noise: Noise) -> Iterator[tuple[str, str]]:
    mark = show.ESTIMATE if noise.is_estimate else ""
    yield "Noise floor", f"{mark if noise.floor.sd is not None else ''}{_floor(noise.floor)}"
    yield "Would find", _finds(noise.floor)
    yield "False alarm", _alarm(noise)
    yield "Drift", _drift(noise)
    yield "First cell", _change(noise.first, "against a line through all other cells")
    yield "Position", _change(noise.position, "from the first to the second cell of a cycle")
    yield "Carry-over", _correlation(noise.neighbors)


def _floor(floor: Floor) -> str:
    if floor.sd is None or floor.low is None or floor.high is None:
        return _short(floor)
    return (
        f"{percent(floor.sd)} between the two cells of a cycle (standard deviation of the log ratio, 95% interval "
        f"{percent(floor.low)} to {percent(floor.high)}, {floor.pairs} pairs)"
    )


def _short(floor: Floor) -> str:
    if floor.sd is None or floor.low is None or floor.high is None:
        return f"not known: {floor.reason}"
    return f"{percent(floor.sd)} ({percent(floor.low)} to {percent(floor.high)})"


def _finds(floor: Floor) -> str:
    """Return, as text, the smallest differences that campaigns would detect; empty if the noise is not known."""
    if not floor.finds:
        return ""
    known = ", ".join(f"{percent(found)} with {cycles}" for cycles, found in floor.finds)
    return f"a difference of {known} cycles, with a probability of 80%, if the noise is as above"


def _alarm(noise: Noise) -> str:
    if noise.pair is None or noise.pair.ratio is None:
        return "not known: no cycle has both cells"
    said = sentence(noise.pair, noise.answer.definition.campaign.structure)
    if noise.is_false_alarm:
        return FALSE_ALARM.format(sentence=said)
    if noise.pair.ci_low is None or noise.pair.cycles < LEAST_PAIRS:
        return f"not known: {noise.pair.cycles} cycle{'s' * (noise.pair.cycles != 1)} cannot reveal a false alarm"
    ratios = (noise.pair.ratio, noise.pair.ci_low, noise.pair.ci_high)
    change, low, high = (percent((each or 1.0) - 1, "+") for each in ratios)
    return f"none: the two arms differ by {change} (95% interval {low} to {high})"


def _drift(noise: Noise) -> str:
    text = _change(noise.drift, "over the whole campaign")
    if noise.drift_per_cycle.change is None:
        return text
    return f"{text}; {percent(noise.drift_per_cycle.change, '+')} a cycle"


def _change(found: Change, over: str) -> str:
    if found.change is None or found.low is None or found.high is None:
        return f"not known: {found.reason}"
    words = f"{percent(found.change, '+')} {over} (95% interval {percent(found.low, '+')} to {percent(found.high, '+')}"
    return f"SEEN: {words}, p = {found.p_value:.2g})" if found.is_seen else f"{NONE_SEEN}: {words})"


def _correlation(found: Correlation) -> str:
    if found.r is None:
        return f"not known: {found.reason}"
    words = f"correlation of {found.r:+.2f} between neighboring cells (p = {found.p_value:.2g}, {found.n} cells)"
    return f"SEEN: {words}" if found.is_seen else f"{NONE_SEEN}: {words}"


def as_plain(noise: Noise) -> dict[str, Any]:
    """Return the noise as plain data, for programs; docs/how-to/doctor.md describes the format."""
    definition = noise.answer.definition
    return {
        "format_version": FORMAT_VERSION,
        "campaign": definition.name,
        "primary": definition.campaign.primary,
        "is_estimate": noise.is_estimate,
        "cells": len(noise.answer.cells),
        "cells_completed": sum(cell.row is not None for cell in noise.answer.cells),
        "difference": noise.difference,
        "false_alarm": noise.is_false_alarm,
        "floors": [
            {**asdict(floor), "finds": [{"cycles": n, "difference": found} for n, found in floor.finds]}
            for floor in noise.floors
        ],
        "drift": asdict(noise.drift),
        "drift_per_cycle": asdict(noise.drift_per_cycle),
        "first_cell": asdict(noise.first),
        "position": asdict(noise.position),
        "carry_over": asdict(noise.neighbors),
        "advice": [asdict(each) for each in noise.advice],
        "warnings": [{"code": note.code, "text": note.text} for note in noise.answer.warnings],
    }
