"""Finds out after each cycle of an adaptive campaign whether to continue, and describes the plan beforehand.

The stopping rule and its level are defined in `lem.results.stopping` and applied in `lem.results.campaign`; this module
only supplies the states of the cells. The decision depends only on the completed cells, so killing and resuming a
campaign does not change the cycle after which it stops.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from lem.quantities import percent
from lem.results.campaign import NOT_NEEDED, CellEntry, Definition, is_enough
from lem.results.compare import expected_degrees_of_freedom
from lem.results.statistics import t_quantile
from lem.results.stopping import ANALYSES, Rule
from lem.studies.manifest import CellState
from lem.studies.orders import Place


def is_over(
    definition: Definition,
    places: Sequence[Place],
    states: Sequence[CellState],
    cycle: int,
    given_up: Collection[str] = (),
) -> bool:
    """Return whether an adaptive campaign ends after a cycle; False if a later cycle has begun and must be completed.

    Args:
        definition: the campaign.
        places: the place of each cell.
        states: the state of each cell.
        cycle: the cycle that has just ended.
        given_up: arms that are no longer measured.
    """
    rule = definition.rule
    if rule is None or cycle not in rule.looks or _last_begun(places, states) > cycle:
        return False
    return is_enough(
        definition, [_entry(definition, *each) for each in zip(places, states, strict=True)], cycle, given_up
    )


def settled(definition: Definition, places: Sequence[Place], states: Sequence[CellState]) -> list[CellState]:
    """Return the states of a resumed campaign; if the campaign is over, mark its remaining cells as not needed."""
    last = _last_begun(places, states)
    done = all(state.status == "completed" for place, state in zip(places, states, strict=True) if place.cycle <= last)
    if not done or not is_over(definition, places, states, last):
        return list(states)
    later = set(after(places, last))
    return [replace(state, status=NOT_NEEDED) if i in later else state for i, state in enumerate(states)]


def after(places: Sequence[Place], cycle: int) -> Iterator[int]:
    """Yield the numbers of the cells in the cycles after the given one."""
    return (number for number, place in enumerate(places) if place.cycle > cycle)


def _last_begun(places: Sequence[Place], states: Sequence[CellState]) -> int:
    begun = (place.cycle for place, state in zip(places, states, strict=True) if state.directory is not None)
    return max(begun, default=0)


def _entry(definition: Definition, place: Place, state: CellState) -> CellEntry:
    row = state.row if state.row is not None and state.row.status == "completed" else None
    return CellEntry(definition.arms[place.arm].name, place.cycle, place.position, None, state.status, row)


# ------------------------------------------------------------------ before it runs
def plan_words(rule: Rule) -> str:
    """Return sentences that say when a campaign will stop."""
    when = f"after {rule.least} to {rule.most} cycles"
    if rule.looks[1] - rule.looks[0] > 1:
        when = f"after {', '.join(map(str, rule.looks[:-1]))} or {rule.most} cycles (complete Latin squares)"
    return (
        f"Adaptive: the campaign stops {when}, as soon as the half-width of each interval is at most "
        f"{percent(rule.half_width)} of the ratio. The intervals have a nominal level of {percent(rule.level)}, so "
        "that they contain the true ratio in 95% of campaigns."
    )


def expected_words(definition: Definition, rule: Rule, sd_log: float) -> str:
    """Return a sentence that estimates how many cycles the campaign will take.

    Args:
        definition: the campaign.
        rule: when the campaign stops.
        sd_log: the standard deviation of the logarithm of a cell's metric.
    """
    arms, analysis = len(definition.arms), ANALYSES[definition.campaign.structure]
    level = 1 - (1 - rule.level) / (arms - 1)
    for cycles in rule.looks:
        degrees_of_freedom = expected_degrees_of_freedom(analysis, cycles, arms)
        half = t_quantile(0.5 + level / 2, degrees_of_freedom) * math.sqrt(2) * sd_log / math.sqrt(cycles)
        if math.sinh(half) <= rule.half_width:
            return f"Judging by the spread of earlier runs, about {cycles} cycles will be needed."
    return f"Judging by the spread of earlier runs, even {rule.most} cycles will not make the intervals narrow enough."
