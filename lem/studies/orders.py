"""The orders in which a campaign measures its arms: pure functions of (structure, arms, cycles, seed).

A cell is one arm in one cycle; a cycle contains every arm once. docs/how-to/campaigns.md explains how a structure
affects the comparison and why shuffled is the default. The order of a cycle does not depend on how many cycles follow,
so a campaign that is extended keeps its measurements. This module knows nothing about configurations.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lem.spec.campaign import Structure, square_size

# How many random orders to try for a cycle; if none differs enough (with many arms), the order of the
# previous cycle is reversed.
DRAWS = 200


@dataclass(frozen=True)
class Place:
    """A cell's cycle and its position in the cycle, both counted from 1, and its arm, counted from 0."""

    cycle: int
    position: int
    arm: int


def order(structure: Structure, arms: int, cycles: int, seed: int) -> list[Place]:
    """Return the places in the order in which they are measured.

    Args:
        structure: `shuffled`: a new random order in each cycle; `latin`: rows of Williams squares in random order;
            `interleaved`: the same order in each cycle; `grouped`: all cycles of one arm, then all of the next. With
            `shuffled`, no two arms keep their order in three successive cycles: if they did, a drift would look like a
            difference between them.
        arms: the number of arms, at least one.
        cycles: the number of cycles, at least one.
        seed: used by shuffled and latin; the same seed gives the same order on every machine.
    """
    if structure == "grouped":
        return [Place(cycle, arm + 1, arm) for arm in range(arms) for cycle in range(1, cycles + 1)]
    rows: list[Sequence[int]] = []
    for cycle in range(1, cycles + 1):
        rows.append(_cycle(structure, arms, cycle, seed, rows[-2:]))
    return [
        Place(cycle, position, arm)
        for cycle, row in enumerate(rows, start=1)
        for position, arm in enumerate(row, start=1)
    ]


def _cycle(structure: Structure, arms: int, cycle: int, seed: int, before: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the arms of a cycle in order, given the orders of up to two cycles before it."""
    if structure == "interleaved":
        return range(arms)
    if structure == "latin":
        square, row = divmod(cycle - 1, square_size(arms))
        return _relabeled(williams_square(arms), _random(seed, "square", square), row)
    chance = _random(seed, "cycle", cycle)
    found = list(range(arms))
    for _ in range(DRAWS):
        chance.shuffle(found)
        if len(before) < 2 or not _keeps_a_pair(*before, found):
            return found
    return before[-1][::-1]


def _keeps_a_pair(*rows: Sequence[int]) -> bool:
    """Return whether some pair of arms comes in the same order in every row."""
    places = [{arm: place for place, arm in enumerate(row)} for row in rows]
    arms = range(len(rows[0]))
    return any(all(place[one] < place[other] for place in places) for one in arms for other in arms if one != other)


def _random(seed: int, what: str, number: int) -> random.Random:
    # Python hashes every byte of a string seed, so neighboring seeds and cycles have unrelated random streams.
    return random.Random(f"{seed}/{what}/{number}")


def _relabeled(square: Sequence[Sequence[int]], chance: random.Random, row: int) -> list[int]:
    """Return a row of the square after shuffling its rows and renaming its arms at random."""
    rows, names = list(square), list(range(len(square[0])))
    chance.shuffle(rows)
    chance.shuffle(names)
    return [names[arm] for arm in rows[row]]


def williams_square(arms: int) -> list[list[int]]:
    """Return the rows of a Williams design: a Latin square balanced for predecessors, or two squares if `arms` is odd.

    Source: E. J. Williams, Experimental designs balanced for the estimation of residual effects of treatments,
    Australian Journal of Scientific Research A 2 (1949).
    """
    first = [0]
    for step in range(1, arms):
        first.append(step // 2 + 1 if step % 2 else arms - step // 2)
    rows = [[(arm + shift) % arms for arm in first] for shift in range(arms)]
    return rows if arms % 2 == 0 else rows + [row[::-1] for row in rows]
