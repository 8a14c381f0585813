"""Handles the settings of adaptive campaigns: default limits, and checks of combinations.

This module works on values alone; `lem.config.campaign` knows where they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lem.config.problem import Problem
from lem.config.yamlfile import KeyPath
from lem.spec.campaign import FEWEST_ADAPTIVE_CYCLES, MOST_ADAPTIVE_CYCLES, Campaign

# The default maximum number of cycles.
USUAL_MOST = 30


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a campaign's values; for an adaptive campaign, add default limits where none are given."""
    found = dict(values)
    if found.get("until_ci") is None:
        return found
    found.setdefault("cycles", FEWEST_ADAPTIVE_CYCLES)
    if found.get("max_cycles") is None and isinstance(found["cycles"], int):
        found["max_cycles"] = USUAL_MOST if found["cycles"] < USUAL_MOST else MOST_ADAPTIVE_CYCLES
    return found


def problems(campaign: Campaign | None) -> Iterator[tuple[KeyPath, Problem]]:
    """Yield the problems of values that are valid individually, but not in combination."""
    if campaign is None:
        return
    if campaign.until_ci is None:
        if campaign.max_cycles is not None:
            yield _problem(
                "max_cycles", "only adaptive campaigns have this limit; set until_ci as well, or leave out max_cycles."
            )
        return
    if campaign.structure == "grouped":
        text = "a grouped campaign cannot stop after a cycle, because it finishes one arm before the next; "
        yield _problem("structure", f"{text}choose another structure, or leave out until_ci.")
    if campaign.cycles < FEWEST_ADAPTIVE_CYCLES:
        text = f"a campaign with until_ci measures at least {FEWEST_ADAPTIVE_CYCLES} cycles, not {campaign.cycles}; "
        yield _problem("cycles", f"{text}leave out cycles, or give a larger number.")
    elif campaign.max_cycles is not None and campaign.cycles >= campaign.max_cycles:
        text = f"must be greater than cycles ({campaign.cycles}), not {campaign.max_cycles}"
        if campaign.cycles >= MOST_ADAPTIVE_CYCLES:
            path, text = "cycles", f"must be less than {MOST_ADAPTIVE_CYCLES} with until_ci, not {campaign.cycles}"
        else:
            path = "max_cycles"
        yield _problem(path, f"{text}.")


def _problem(key: str, message: str) -> tuple[KeyPath, Problem]:
    return (key,), Problem("out_of_range", key, message)
