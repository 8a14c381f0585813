"""Handles the settings of adaptive campaigns: shares such as 2%, default limits, and checks of combinations.

This module works on values alone; `lem.config.campaign` knows where they come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from typing import Any

from lem.config.problem import Problem
from lem.config.yamlfile import KeyPath
from lem.spec.campaign import FEWEST_ADAPTIVE_CYCLES, MOST_ADAPTIVE_CYCLES, PERCENTAGE, Campaign

# The default maximum number of cycles.
USUAL_MOST = 30


def share(value: Any) -> Any:
    """Return 0.02 for the text "2%", and anything else unchanged."""
    if isinstance(value, str) and re.match(PERCENTAGE, value):
        return float(Decimal(value.strip().rstrip("%").strip()) / 100)
    return value


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a campaign's values; if it is adaptive, add default limits where none are given."""
    found = dict(values)
    if found.get("until_ci") is None:
        return found
    found["until_ci"] = share(found["until_ci"])
    found.setdefault("cycles", FEWEST_ADAPTIVE_CYCLES)
    if found.get("max_cycles") is None and isinstance(found["cycles"], int):
        found["max_cycles"] = USUAL_MOST if found["cycles"] < USUAL_MOST else MOST_ADAPTIVE_CYCLES
    return found


def explained(problem: Problem) -> Problem:
    """Add the remedy to the message of a problem with `until_ci`."""
    return replace(problem, message=f"{problem.message.removesuffix('.')}; write a share, such as 2% or 0.02.")


def problems(campaign: Campaign | None) -> Iterator[tuple[KeyPath, Problem]]:
    """Yield the problems of values that are valid individually, but not in combination."""
    if campaign is None:
        return
    if campaign.until_ci is None:
        if campaign.max_cycles is not None:
            yield _problem(
                "max_cycles", "only adaptive campaigns have this limit; set until_ci as well, or leave it out."
            )
        return
    if campaign.structure == "grouped":
        text = "a grouped campaign cannot stop after a cycle, because it finishes one arm before the next; "
        yield _problem("structure", f"{text}choose another structure, or leave out until_ci.")
    if campaign.cycles < FEWEST_ADAPTIVE_CYCLES:
        text = f"a campaign with until_ci measures at least {FEWEST_ADAPTIVE_CYCLES} cycles, not {campaign.cycles}; "
        yield _problem("cycles", f"{text}leave out cycles, or give more.")
    elif campaign.max_cycles is not None and campaign.cycles >= campaign.max_cycles:
        text = f"must be greater than cycles ({campaign.cycles}), not {campaign.max_cycles}"
        if campaign.cycles >= MOST_ADAPTIVE_CYCLES:
            path, text = "cycles", f"must be less than {MOST_ADAPTIVE_CYCLES} with until_ci, not {campaign.cycles}"
        else:
            path = "max_cycles"
        yield _problem(path, f"{text}.")


def _problem(key: str, message: str) -> tuple[KeyPath, Problem]:
    return (key,), Problem("out_of_range", key, message)
