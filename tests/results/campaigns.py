"""Campaigns made by hand: two arms, two cycles, four cells that have run."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from lem.results import campaign as results
from lem.results.aggregate import aggregate_all
from lem.results.campaign import Arm, Definition, Machine
from lem.results.codec import to_json
from lem.results.files import write_atomically
from lem.results.store import Store
from lem.spec.campaign import Campaign, CampaignCell
from lem.studies.manifest import Cell, CellState
from tests.records import finished, phases, plan, reading


def campaign(store: Store, name: str, energy_j: float = 100.0) -> list[str]:
    """Write a campaign with rows and its answer; return the ids of its cells."""
    arms = tuple(Arm(each, plan(max_output_tokens=length).experiment) for each, length in (("a", 10), ("b", 20)))
    definition = Definition(
        Campaign(name=name, arms=("a.yaml", "b.yaml"), cycles=2),
        arms,
        ("0" * 64,) * 2,
        Machine("h", None, (), {}, None),
    )
    states = []
    for number in range(4):
        arm, cycle = arms[number % 2], number // 2 + 1
        place = CampaignCell(name, arm.name, cycle, number % 2 + 1, number + 1, 4)
        energy = (reading(energy_j=energy_j * (1 + number % 2) + number),)
        directory = finished(store, datetime(2026, 3, 1) + timedelta(seconds=number), phases=phases(energy=energy))
        own = replace(directory.plan(), campaign=place)
        write_atomically(directory.path / "spec.json", to_json(own))
        cell = Cell(f"{arm.name}, cycle {cycle}", own.experiment, (), None, "", campaign=place)
        states.append(CellState(cell, "completed", directory, log=directory.log_file(0)))
    folder = results.folder_of(store, name)
    from lem.results import show

    write_atomically(folder / results.CELLS, show.as_json([state.plain() for state in states]))
    write_atomically(folder / results.DEFINITION, to_json(definition))
    ids = [state.directory.id for state in states if state.directory]
    assert all(one.kind == "written" for one in aggregate_all(store, ids))
    results.write_answer(folder, results.answer(definition, results.read_cells(store, folder)))
    return ids
