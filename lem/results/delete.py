"""Deletes experiments and campaigns: `lem results delete`, and finishing a deletion that was cut short.

    <results>/.deleted/<id>     the raw files of an experiment that is being deleted

Moving the raw files there is a single step that happens either completely or not at all; from then on, the experiment
counts as deleted. Its rows and its mark in `unfinished/` are removed next, and the raw files last. If a deletion is
killed at any moment, the next `lem results` or `lem aggregate` command therefore finds and finishes it. This module
handles files and rows, but does not know their meaning.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lem.errors import ResultsError
from lem.quantities import one_line, quantity
from lem.results.choosing import Known, check_status
from lem.results.files import try_to_lock
from lem.results.store import ID, Store, results_flag
from lem.results.tables import Tables

FOLDER = ".deleted"
# The number of experiments that are listed before the user is asked to confirm.
LISTED = 10
NOTHING = "Nothing was deleted."


@dataclass(frozen=True)
class Deletion:
    """What a command would delete: experiments, with their statuses, and the directories of campaigns."""

    store: Store
    statuses: dict[str, str]
    campaigns: tuple[Path, ...] = ()

    @property
    def size_bytes(self) -> int:
        """The size of the raw files and of the campaigns' files; the tables' rows are not counted."""
        return sum(_size(folder) for folder in [*self._raw(), *self.campaigns])

    def _raw(self) -> Iterator[Path]:
        return (self.store.directory(name).path for name in self.statuses)

    def words(self) -> str:
        """Describe in words what would be deleted, such as `2 experiments (1.2 MB)`."""
        count = len(self.statuses)
        of_campaigns = "".join(f" and campaign {folder.name}" for folder in self.campaigns)
        return f"{count} experiment{'s' * (count != 1)}{of_campaigns} ({quantity(self.size_bytes, 'B', 3)})"

    def carry_out(self) -> None:
        """Delete the experiments and campaigns.

        Raises:
            ResultsError: a campaign is in use; then nothing has been deleted. Or an experiment is in use; then the
                experiments before it in `statuses` have been deleted.
        """
        root = self.store.root / FOLDER
        if root.is_symlink():
            raise ResultsError(f"{root}, to which deleted files are moved, is a link; remove the link.")
        try:
            with ExitStack() as locks:
                for folder in self.campaigns:  # a campaign that is being measured keeps its cells
                    locks.enter_context(_unused(folder))
                locks.enter_context(Tables(self.store).locked())
                root.mkdir(exist_ok=True)
                for experiment_id in self.statuses:
                    _move(self.store, experiment_id, root / experiment_id)
                for folder in self.campaigns:
                    os.rename(folder, root / folder.name)
        finally:
            finish(self.store)


def _size(folder: Path) -> int:
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a run has just removed the file
                found += os.lstat(os.path.join(place, name)).st_size
    return found


# ------------------------------------------------------------------ what to delete
def planned(store: Store, texts: Sequence[str], campaign: str | None, status: str | None, *, force: bool) -> Deletion:
    """Return what a command would delete.

    Args:
        store: the results directory.
        texts: ids or beginnings of ids; if there are none, the selection is made from all experiments.
        campaign: only cells of this campaign; without other conditions, the campaign itself is deleted too.
        status: only experiments with this status.
        force: accept single cells of a campaign.

    Raises:
        ResultsError: nothing was selected, an experiment is running, or a cell would be deleted without its campaign.
    """
    check_status(status)
    if not texts and campaign is None and status is None:
        raise ResultsError("Say what to delete: give the ids of experiments, --campaign or --status.")
    known = Known(store)
    ids = known.named(texts) if texts else known.ids
    whole: tuple[Path, ...] = ()
    if campaign is not None:
        folder = _folder(store, campaign)
        ids = [each for each in ids if known.campaign(each) == folder.name]
        whole = () if texts or status else (folder,)
        if not ids and not folder.is_dir():
            raise ResultsError(f"There is no campaign '{campaign}' in {store.root}.")
    statuses = {each: known.status(each) for each in ids}
    if status is not None:
        statuses = {each: found for each, found in statuses.items() if found == status}
    _refuse_running([each for each in statuses if known.is_running(each)])
    if not force:
        _refuse_cells(known, [each for each in statuses if not whole])
    return Deletion(store, statuses, tuple(folder for folder in whole if folder.is_dir()))


def _folder(store: Store, campaign: str) -> Path:
    from lem.results.campaign import folder_named

    folder = folder_named(campaign, store)
    if folder.parent.resolve() != (store.root / "campaigns").resolve():
        raise ResultsError(
            f"--campaign: {folder} is not in {store.root}; give the campaign's results directory with -o."
        )
    return folder


def _refuse_running(running: Sequence[str]) -> None:
    if running:
        if len(running) == 1:
            which, stop = f"{running[0]} is", "it"
        else:
            which, stop = f"{running[0]} and {len(running) - 1} more are", "them"
        raise ResultsError(f"{which} running and cannot be deleted; stop {stop} first. {NOTHING}")


def _refuse_cells(known: Known, ids: Sequence[str]) -> None:
    from lem.results.campaign import DEFINITION

    for each in ids:
        name = known.campaign(each)
        if name and (known.store.root / "campaigns" / name / DEFINITION).is_file():
            flag = results_flag(known.store)
            raise ResultsError(
                f"{each} is a cell of campaign '{name}', whose results need it. To delete the whole campaign, "
                f"use lem results delete --campaign {name}{flag}; to delete single cells, add --force. {NOTHING}"
            )


# ------------------------------------------------------------------ deleting
def finish(store: Store) -> None:
    """Finish all deletions that have begun: remove the experiments' rows and marks, and all files in `.deleted/`."""
    waiting = store.root / FOLDER
    # A link would lead to files that lem did not put there.
    if waiting.is_symlink() or not waiting.is_dir():
        return
    tables = Tables(store)
    with tables.locked():
        names = os.listdir(waiting)
        ids = [name for name in names if ID.fullmatch(name)]
        tables.remove(ids)
    for experiment_id in ids:
        store.mark_finished(experiment_id)
    for name in names:
        _remove(waiting / name)
    # Removing the folder needs the lock, because another process may be about to move a directory into it. If a file
    # could not be removed, the folder stays, and the next command tries again.
    with tables.locked(), suppress(OSError):
        waiting.rmdir()


def _remove(folder: Path) -> None:
    """Remove a directory; if it is a link, remove only the link."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _move(store: Store, experiment_id: str, target: Path) -> None:
    directory = store.directory(experiment_id)
    if not directory.path.is_dir():  # only its row is left
        target.mkdir(exist_ok=True)
        return
    with _unused(directory.path):
        directory.free_state()  # the experiment may have been started since it was selected
        os.rename(directory.path, target)


@contextmanager
def _unused(folder: Path) -> Iterator[None]:
    """Hold the lock of an experiment or a campaign; raises `ResultsError` if a process is using it."""
    with try_to_lock(folder / ".lock") as is_free:
        if not is_free:
            raise ResultsError(f"{folder} is in use by a running process; wait until it has ended, or stop it.")
        yield


# ------------------------------------------------------------------ the command
def delete(deletion: Deletion, *, yes: bool, dry_run: bool) -> int:
    """List what a command would delete, ask for confirmation, and delete it; return 1 if the answer was no, else 0.

    Raises:
        ResultsError: there is no terminal to ask on, or an experiment or a campaign is in use.
    """
    if not deletion.statuses and not deletion.campaigns:
        print("No matching experiments; nothing was deleted.")
        return 0
    _show(deletion, len(deletion.statuses) if dry_run else LISTED)
    if dry_run:
        print(f"Would delete {deletion.words()}.")
        return 0
    if not yes and not _agreed(f"Delete {deletion.words()}? This cannot be undone."):
        print(NOTHING)
        return 1
    words = deletion.words()
    deletion.carry_out()
    print(f"Deleted {words}.")
    return 0


def _show(deletion: Deletion, most: int) -> None:
    for name, status in list(deletion.statuses.items())[:most]:
        print(one_line(f"{name}  {status}"))
    if len(deletion.statuses) > most:
        print(f"… and {len(deletion.statuses) - most} more")


def _agreed(question: str) -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise ResultsError(
            f"Deleting needs your consent, but there is no terminal on which to ask; add --yes. {NOTHING}"
        )
    import typer

    sys.stdout.flush()  # the list comes before the question
    return typer.confirm(one_line(question), default=False, err=True)
