"""Finds copies of schedules in another results directory, and puts that directory's names into the copies' files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import structs

from lem.errors import ResultsError
from lem.results import schedule
from lem.results.files import write_atomically
from lem.results.schedule import CUT, RunOutcome, ScheduleManifest, Start
from lem.results.store import Store


class Names(NamedTuple):
    """What the experiments and campaigns of one results directory are called in another."""

    ids: Mapping[str, str]
    campaigns: Mapping[str, str]

    def of(self, run: Start | RunOutcome) -> dict[str, str | None]:
        """Return the names that a run's experiment and campaign have in the other directory, keyed by field."""
        return {
            "experiment_id": self.ids.get(run.experiment_id or "", run.experiment_id),
            "campaign": self.campaigns.get(run.campaign or "", run.campaign),
        }


def renamed(manifest: ScheduleManifest, name: str, names: Names) -> ScheduleManifest:
    """Return a schedule's table with the names that another results directory uses."""
    starts = [structs.replace(start, **names.of(start)) for start in manifest.starts]
    return structs.replace(manifest, name=name, starts=starts)


def settled(manifest: ScheduleManifest) -> int:
    """Return how many starts have a final outcome."""
    return sum(not _is_open(start) for start in manifest.starts)


def same_schedule(found: ScheduleManifest, store: Store, candidates: list[str], names: Names) -> str | None:
    """Return the candidate that is the same schedule, perhaps in an earlier or a later state; None if none is.

    Args:
        found: the table of the schedule in its own results directory.
        store: the results directory of the candidates.
        candidates: names of schedules.
        names: what experiments and campaigns are called in the candidates' directory.
    """
    for name in candidates:
        try:
            there = schedule.read_manifest(schedule.folder_of(store, name))
        except ResultsError:  # a damaged table matches no schedule
            continue
        if _is_state_of(renamed(found, there.name, names), there):
            return name
    return None


def _is_state_of(one: ScheduleManifest, other: ScheduleManifest) -> bool:
    """Return whether two tables belong to the same schedule.

    They do if they are the same apart from the outcomes of their starts, and no start has two different final outcomes.
    """
    if structs.replace(one, starts=[]) != structs.replace(other, starts=[]) or len(one.starts) != len(other.starts):
        return False
    pairs = list(zip(one.starts, other.starts, strict=True))
    return all(
        (a.number, a.planned_at) == (b.number, b.planned_at) and (a == b or _is_open(a) or _is_open(b))
        for a, b in pairs
    )


def _is_open(start: Start) -> bool:
    return start.status in ("planned", *CUT)


def rename_files(folder: Path, root: Path, name: str, names: Names) -> None:
    """In the files of a schedule copied to the results directory `root`, use that directory's names and path."""
    schedule.write_manifest(folder, renamed(schedule.read_manifest(folder), name, names))
    for file in (folder / "runs").glob("*.json"):
        outcome = schedule.read_outcome(folder, int(file.stem)) if file.stem.isdecimal() else None
        if outcome is None:
            continue
        if outcome.status in CUT and outcome.experiment_id not in {None, *names.ids}:
            # The run's experiment was not copied, so the run starts over if the copied schedule is continued.
            file.unlink()
        else:
            write_atomically(file, msgspec.json.encode(structs.replace(outcome, **names.of(outcome))))
    _move_results(folder / schedule.WHAT, root)


def _move_results(file: Path, root: Path) -> None:
    """Change the description of the runs, so that the remaining runs store their results in `root`."""
    try:
        what: dict[str, Any] = json.loads(file.read_bytes())
        for each in [what.get("experiment"), *(arm["experiment"] for arm in what.get("arms", ()))]:
            if each:
                each["io"]["results_dir"] = str(root.resolve())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # whoever continues the schedule is told that the file is missing or damaged
    write_atomically(file, json.dumps(what, ensure_ascii=False))
