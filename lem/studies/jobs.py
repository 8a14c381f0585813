"""`lem jobs`: lists, follows and cancels studies whose jobs were submitted to a Slurm cluster earlier.

Looking at a study also collects its jobs that have ended, as described in `lem.studies.continuing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lem.errors import BadInput, ResultsError, did_you_mean
from lem.results import campaign as campaigns
from lem.results import jobs as ledgers
from lem.results import show
from lem.results.jobs import InJob, Ledger, awaited
from lem.results.store import Store, results_flag
from lem.studies import continuing
from lem.studies.ask import RunOptions, confirmed, print_warnings
from lem.studies.campaign import campaign_at
from lem.studies.continuing import Seen, Submitted, name_of, sweep_at
from lem.studies.manifest import CellState

# The statuses in the order in which they are listed; cells in jobs that have not started are pending.
STATUSES = ("pending", "running", "completed", "failed", "interrupted", "not run", "not needed")
RUNNING_AT_MOST = 10


def list_jobs(store: Store, text: str | None, *, as_json: bool) -> int:
    """Look once at a study or, if none is named, at all studies whose outcome has not been shown; print the states.

    Raises:
        ResultsError: no study matches `text`, or several do.
    """
    store = Store(store.root.resolve())
    studies = [_found(store, text)] if text else [_study_at(ledger.directory) for ledger in awaited(store)]
    seen = [continuing.look_at(each, submits=True) for each in studies]
    if as_json:
        print(show.as_json([_plain(each) for each in seen]))
        return 0
    if not seen:
        print(f"No study in {store.root} has jobs to wait for.")
    for each in seen:
        for line in _lines(each):
            show.say(line)
    return 0


def follow(store: Store, text: str) -> int:
    """Wait until the jobs of a study have ended, and show its outcome; return the exit code.

    Raises:
        ResultsError: no study matches `text`, or several do.
    """
    return continuing.follow(_found(Store(store.root.resolve()), text), RunOptions(yes=True))


def cancel(store: Store, text: str, *, yes: bool) -> int:
    """Cancel the jobs of a study, after confirmation unless `yes` is True; finished requests are kept.

    Raises:
        ResultsError: no study matches `text`, or several do.
    """
    study = _found(Store(store.root.resolve()), text)
    if not (yes or confirmed(f"Cancel the jobs of {study.directory}?")):
        return 0
    seen = continuing.cancel(study)
    if seen is None:
        print("The jobs have been canceled; the command that follows them will record their end.")
    else:
        print(f"{_counts(seen)}. To resume what is unfinished, repeat the command that started the study.")
    return 0


def look_at_all(store: Store) -> dict[Path, InJob]:
    """Collect the jobs that have ended, without submitting any; return what Slurm says about the other jobs.

    The keys are the directories of the experiments that have not ended. A study that cannot be read is reported in a
    warning, so that it does not hide the other studies.
    """
    found: dict[Path, InJob] = {}
    for ledger in awaited(store):
        if ledger.is_over:
            continue
        try:
            found |= continuing.look_at(_study_at(ledger.directory), submits=False).in_jobs
        except BadInput as error:
            print_warnings(error)
    return found


# ------------------------------------------------------------------ finding
def _study_at(directory: Path) -> Submitted:
    is_campaign = (directory / campaigns.DEFINITION).is_file()
    return campaign_at(directory) if is_campaign else sweep_at(directory)


def _found(store: Store, text: str) -> Submitted:
    """Find a study by its directory, its name or the beginning of its name.

    Raises `ResultsError` if there is no such study, or more than one.
    """
    if not text:
        raise ResultsError("The name of the study is empty; lem jobs lists the studies.")
    if (Path(text) / ledgers.FILE).is_file():
        return _study_at(Path(text).resolve())
    ledgers_by_name: dict[str, list[Ledger]] = {}
    for ledger in awaited(store):
        ledgers_by_name.setdefault(ledger.directory.name, []).append(ledger)
    names = [text] if text in ledgers_by_name else [name for name in ledgers_by_name if name.startswith(text)]
    found = [ledger for name in names for ledger in ledgers_by_name[name]]
    if len(found) == 1:
        return _study_at(found[0].directory)
    if found:
        raise ResultsError(
            f"'{text}' matches {' and '.join(str(each.directory) for each in found)}. Give more of the name."
        )
    hint = did_you_mean(text, ledgers_by_name) or f" lem jobs{results_flag(store)} lists the studies."
    raise ResultsError(f"No study '{text}' in {store.root} has jobs to wait for.{hint}")


# ------------------------------------------------------------------ showing
def _status(state: CellState, seen: Seen) -> str:
    if state.status == "queued" or (state.status == "not run" and _in_job(state, seen) is not None):
        return "pending"
    return state.status


def _in_job(state: CellState, seen: Seen) -> InJob | None:
    return None if state.directory is None else seen.in_jobs.get(state.directory.path)


def _counts(seen: Seen) -> str:
    counts = Counter(_status(state, seen) for state in seen.manifest.states)
    return ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])


def _lines(seen: Seen) -> Iterator[str]:
    """Yield the study's name and counts, its running cells, why jobs are waiting, and what is left to do."""
    states, name = seen.manifest.states, name_of(seen.ledger)
    count = "1 experiment" if len(states) == 1 else f"{len(states)} experiments"
    yield f"{seen.ledger.directory.name}: {count}, {_counts(seen)}"
    running = [state for state in states if state.status == "running"]
    for state in running[:RUNNING_AT_MOST]:
        in_job = _in_job(state, seen)
        place = f" in {in_job.words}" if in_job else ""
        yield f"  {state.cell.label}: {state.directory.id if state.directory else ''} is running{place}"
    if len(running) > RUNNING_AT_MOST:
        yield f"  and {len(running) - RUNNING_AT_MOST} more; lem results list{_flag(seen)} lists all"
    reasons = Counter(each.reason for each in seen.in_jobs.values() if each.job_id and not each.node and each.reason)
    if waiting := ", ".join(f"{count} for {reason}" for reason, count in reasons.most_common() if reason != "None"):
        yield f"  waiting: {waiting}"
    if left := sum(not each.job_id for each in seen.in_jobs.values()):
        yield f"  experiments not submitted yet: {left}; the next lem jobs submits them if Slurm accepts more jobs"
    yield f"  {'to see the outcome' if seen.ledger.is_over else 'to follow them'}: lem jobs {name}"


def _flag(seen: Seen) -> str:
    return results_flag(Store(seen.ledger.terms.results_dirs[0]))


def _plain(seen: Seen) -> Mapping[str, Any]:
    job_ids = {number: job_id for job_id, cells in seen.ledger.accepted for number in cells}
    states = enumerate(seen.manifest.states)
    return {
        "name": seen.ledger.directory.name,
        "directory": str(seen.ledger.directory),
        "is_over": seen.ledger.is_over,
        "experiments": [_plain_cell(state, job_ids.get(number), seen) for number, state in states],
    }


def _plain_cell(state: CellState, job_id: str | None, seen: Seen) -> Mapping[str, Any]:
    in_job = _in_job(state, seen)
    return {
        "label": state.cell.label,
        "experiment_id": state.directory.id if state.directory else None,
        "status": _status(state, seen),
        "slurm_job_id": job_id,
        "slurm_node": in_job.node or None if in_job else None,
        "reason": in_job.reason or None if in_job else None,
        "error": state.error,
    }
