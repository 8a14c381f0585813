"""Merges results directories and archives into one results directory: `lem results merge`.

    <target>/.merging/                 what is being copied; if the merge is killed, the next merge removes it
    <target>/raw/<id>/merged.json      if the experiment's files were changed: its id and its digest in the source

An experiment is copied completely and then moved to its place, so the target contains either all of it or none of it.
Rows are written next, then campaigns, and then schedules. What the target already contains is recognized by its content
and left alone, so repeating an interrupted merge completes it. The sources are only read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct, structs

from lem.errors import ResultsError
from lem.quantities import one_line
from lem.results import archive, parquet, schedule, schedule_copy
from lem.results.archive import plain_file
from lem.results.choosing import Known
from lem.results.codec import from_json, to_json
from lem.results.directory import AGGREGATED
from lem.results.files import needs_space, sync, try_to_lock, write_atomically
from lem.results.schedule_copy import Names
from lem.results.schema import ExperimentRow
from lem.results.store import Store, age
from lem.results.tables import KINDS, RowLocation, Tables, file_name, read_file

FOLDER, LOCK, ORIGIN = ".merging", ".merging.lock", "merged.json"
# The number of experiments that are copied before waiting for the disk to store them.
TOGETHER = 500
# Files that are ignored when two experiments are compared: they record what was done with the results.
NOT_ITS_OWN = frozenset({AGGREGATED, ORIGIN})
# The files that contain the id of their experiment.
NAMING = re.compile(r"spec\.json|process_\d+_c\d+_a\d+\.json|journal_\d+_a\d+\.jsonl")


class Origin(Struct, frozen=True):
    """The id and the digest, in the source, of an experiment whose id or study was renamed."""

    experiment_id: str
    sha256: str


@dataclass
class Merged:
    """What a merge did with one source."""

    source: Path
    copied: int = 0
    there: int = 0
    campaigns: list[str] = field(default_factory=list)
    schedules: list[str] = field(default_factory=list)
    # Sentences about experiments, campaigns and schedules that have other names in the target.
    renamed: list[str] = field(default_factory=list)
    # Sentences about what could not be merged.
    left_out: list[str] = field(default_factory=list)


def merge(target: Store, sources: Sequence[Path]) -> Iterator[Merged]:
    """Merge sources into a results directory, one after another; yield what was done with each.

    Raises:
        ResultsError: a source cannot be used, or another merge into the same directory is running.
    """
    for source in sources:
        _check_source(source, target)
    with _only_merge(target) as scratch:
        for source in sources:
            with _as_directory(source, scratch) as store:
                yield _Merge(target, store, source, scratch).run()


def _check_source(source: Path, target: Store) -> None:
    if source.is_file():
        with archive.opened(source):
            return
    if not source.is_dir():
        raise ResultsError(f"{source} is neither a results directory nor an archive.")
    if not any((source / name).is_dir() for name in ("raw", "experiments")):
        raise ResultsError(f"{source} is not a results directory: it has neither raw/ nor experiments/.")
    here, there = source.resolve(), target.root.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ResultsError(f"{source} and the target {target.root} overlap; choose another target with -o.")


@contextmanager
def _only_merge(target: Store) -> Iterator[Path]:
    """Keep other merges out of a results directory, and yield an empty scratch directory in it."""
    try:
        target.root.mkdir(parents=True, exist_ok=True)
        lock = target.root / LOCK
        lock.touch()
    except OSError as error:
        raise ResultsError(f"The results directory {target.root} cannot be used: {error.strerror}.") from None
    with try_to_lock(lock) as is_free, needs_space(target.root):
        if not is_free:
            raise ResultsError(f"Another merge into {target.root} is running; wait until it has ended.")
        scratch = target.root / FOLDER
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _as_directory(source: Path, scratch: Path) -> Iterator[Store]:
    """Yield a source as a results directory, unpacking it first if it is an archive."""
    if source.is_dir():
        yield Store(source)
        return
    unpacked = scratch / "archive"
    unpacked.mkdir()
    archive.unpack(source, unpacked)
    yield Store(unpacked)
    shutil.rmtree(unpacked)


class _Merge:
    """The merge of one source into the target."""

    def __init__(self, target: Store, source: Store, shown: Path, scratch: Path) -> None:
        self._target, self._source, self._scratch = target, source, scratch
        self._there, self._here = Known(target), Known(source)
        self._done = Merged(shown)
        # The names that the source's experiments, campaigns and schedules have in the target.
        self._ids: dict[str, str] = {}
        self._campaigns: dict[str, str] = {}
        self._schedules: dict[str, str] = {}
        # The digests of the experiments that are to be copied.
        self._new: dict[str, str] = {}
        self._names = _by_start([*self._there.ids, *self._here.ids])

    def run(self) -> Merged:
        """Merge the source, and return what was done."""
        for experiment_id in self._here.ids:
            self._place(experiment_id)
        self._place_campaigns()
        self._place_schedules()
        waiting = iter(self._new)
        while copies := [(self._copy(name), self._place_of(name)) for name in islice(waiting, TOGETHER)]:
            sync(self._scratch)
            for copy, place in copies:
                place.parent.mkdir(exist_ok=True)
                os.rename(copy, place)
        self._copy_rows()
        for name, new in self._campaigns.items():
            self._copy_campaign(name, new)
        for name, new in self._schedules.items():
            self._copy_schedule(name, new)
        self._done.copied += len(self._new)
        return self._done

    def _place_of(self, old: str) -> Path:
        return self._target.directory(self._ids[old]).path

    # -------------------------------------------------------------- names in the target
    def _place(self, old: str) -> None:
        """Decide what an experiment of the source is called in the target, and whether it has to be copied."""
        directory = self._source.directory(old)
        if old not in self._here.raw:
            self._place_row(old)
            return
        if self._here.is_running(old):
            self._done.left_out.append(f"{old} is running or waiting for a Slurm job; merge again when it has ended")
            return
        try:
            digest = digest_of(directory.path)
        except ResultsError as error:
            self._done.left_out.append(str(error).rstrip("."))
            return
        if (found := self._found(old, digest)) is not None:
            self._ids[old] = found
            self._done.there += 1
            return
        self._ids[old] = self._free(old)
        self._new[old] = digest

    def _place_row(self, old: str) -> None:
        """Do what `_place` does, for an experiment that has only rows because its raw files have been removed."""
        for name in self._siblings(old):
            if name not in self._there.rows:
                continue
            theirs, ours = (_row(store, each) for store, each in ((self._source, old), (self._target, name)))
            if structs.replace(ours, experiment_id=old, campaign=theirs.campaign, schedule=theirs.schedule) == theirs:
                self._ids[old] = name
                self._done.there += 1
                return
        self._ids[old] = self._free(old)
        self._done.copied += 1

    def _found(self, old: str, digest: str) -> str | None:
        """Return the id that an experiment of the source has in the target; None if the target lacks the experiment."""
        for name in self._siblings(old):
            if name in self._there.raw:
                folder = self._target.directory(name).path
                origin = _origin(folder)
                same = origin == Origin(old, digest) if origin else name == old and digest_of(folder) == digest
                if same:
                    return name
        return None

    def _siblings(self, old: str) -> list[str]:
        """Return the ids in the target that equal `old`, or differ from `old` only in their suffix."""
        there = self._there.raw | self._there.rows.keys()
        return [name for name in self._names[_start(old)] if name in there]

    def _free(self, old: str) -> str:
        """Return `old` or, if the target has another experiment with this id, `old` with an unused suffix."""
        if old not in self._there.raw and old not in self._there.rows:
            return old
        names = self._names[_start(old)]
        new = f"{_start(old)}_{max(age(name)[1] for name in names) + 1}"
        names.append(new)
        self._done.renamed.append(f"{old} is called {new} here, because the target already has another {old}")
        return new

    def _place_campaigns(self) -> None:
        """Decide what the campaigns of the source are called in the target."""
        from lem.results.campaign import names_in

        theirs, there = names_in(self._source), {*names_in(self._target)}
        # A schedule and a campaign with the same name could not be told apart.
        others = {*schedule.names(self._target)}
        for name in theirs:
            taken = {*there, *self._campaigns.values()}
            same = self._same_campaign(name, there)
            self._campaigns[name] = same or self._name("campaign", name, taken, others, theirs)

    def _place_schedules(self) -> None:
        """Decide what the schedules of the source are called in the target."""
        from lem.results.campaign import names_in

        theirs, there = schedule.names(self._source), schedule.names(self._target)
        others = {*names_in(self._target), *self._campaigns.values()}
        for name in theirs:
            try:
                found = schedule.read_manifest(schedule.folder_of(self._source, name))
            except ResultsError as error:
                self._done.left_out.append(str(error).rstrip("."))
                continue
            candidates = [each for each in there if _is_variant(each, name)]
            same = schedule_copy.same_schedule(found, self._target, candidates, self._new_names)
            self._schedules[name] = same or self._name(
                "schedule", name, {*there, *self._schedules.values()}, others, theirs
            )

    def _name(
        self, kind: str, name: str, taken: Collection[str], others: Collection[str], theirs: Collection[str]
    ) -> str:
        """Return the name under which to copy a campaign or schedule: its own or, if the target uses it, a new one.

        Args:
            kind: "campaign" or "schedule".
            name: the name in the source.
            taken: the names of the same kind in the target.
            others: the names of the other kind in the target.
            theirs: the names of the same kind in the source.
        """
        if name not in taken and name not in others:
            return name
        used = {*taken, *others, *theirs}
        new = next(each for n in count(2) if (each := f"{name[:90]}_{n}") not in used)
        what = f"another {kind}" if name in taken else {"campaign": "a schedule", "schedule": "a campaign"}[kind]
        self._done.renamed.append(f"{kind} {name} is called {new} here, because the target already has {what} {name}")
        return new

    @property
    def _new_names(self) -> Names:
        return Names(self._ids, self._campaigns)

    def _same_campaign(self, name: str, candidates: Collection[str]) -> str | None:
        """Return the name that a campaign of the source has in the target; None if the target lacks the campaign.

        One of the two copies may have more cells than the other.
        """
        from lem.results.campaign import folder_of

        source = folder_of(self._source, name)
        cells = {self._ids.get(cell, cell) for cell in _cells(source)}
        for there in sorted(candidates):
            if _is_variant(there, name):
                folder = folder_of(self._target, there)
                others = _cells(folder)
                if (others <= cells or cells <= others) and _definition(folder) == _definition(source):
                    return there
        return None

    # -------------------------------------------------------------- copying
    def _copy(self, old: str) -> Path:
        """Copy an experiment's files into a scratch directory named by the new id, and return that directory."""
        directory, new = self._source.directory(old), self._ids[old]
        copy = self._scratch / new
        copy.mkdir()
        copy_files(directory.path, copy)
        campaign = _new_name(self._here.campaign(old), self._campaigns)
        of_schedule = _new_name(self._here.schedule(old), self._schedules)
        if new != old or campaign or of_schedule:
            _rename(copy, old, new, campaign, of_schedule)
            write_atomically(copy / ORIGIN, to_json(Origin(old, self._new[old])))
        mark = self._source.root / "unfinished" / old
        if mark.is_file():
            self._target.mark_unfinished(new, mark.read_text())
        return copy

    def _copy_rows(self) -> None:
        """Copy the rows that the target lacks."""
        tables = Tables(self._target)
        with tables.locked():
            there = tables.locations()
            for file, names in archive.by_file(Tables(self._source).locations()).items():
                wanted = [name for name in names if name in self._ids and self._ids[name] not in there]
                if not wanted:
                    continue
                try:
                    found = {kind: self._rows(self._source.root / kind / file, kind, wanted) for kind in KINDS}
                except ResultsError as error:
                    which = f"{', '.join(wanted[:3])}{', …' if len(wanted) > 3 else ''}"
                    self._done.left_out.append(f"the rows of {which} were not copied: {str(error).rstrip('.')}")
                    continue
                tables.add(file_name([self._ids[name] for name in wanted]), found)

    def _rows(self, file: Path, kind: str, wanted: Sequence[str]) -> Any:
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = read_file(file)
        rows = parquet.aligned(rows.filter(pc.is_in(rows["experiment_id"], pa.array(wanted))), KINDS[kind])
        rows = _mapped(rows, "experiment_id", self._ids)
        if kind != "experiments":
            return rows
        return _mapped(_mapped(rows, "campaign", self._campaigns), "schedule", self._schedules)

    def _copy_campaign(self, old: str, new: str) -> None:
        """Copy a campaign's files, unless the target has the same or a later state; an earlier state is replaced."""
        from lem.results.campaign import CELLS, folder_of

        source, place = folder_of(self._source, old), folder_of(self._target, new)
        if place.is_dir() and {self._ids.get(cell, cell) for cell in _cells(source)} <= _cells(place):
            return
        copy = self._scratch / "campaign"
        copy.mkdir()
        copy_files(source, copy, archive.JOBS)
        self._rename_campaign(copy, old, new)
        self._put(copy, place, CELLS)
        self._done.campaigns.append(new)

    def _copy_schedule(self, old: str, new: str) -> None:
        """Copy a schedule's files, unless the target has the same or a later state; an earlier state is replaced."""
        source, place = schedule.folder_of(self._source, old), schedule.folder_of(self._target, new)
        there = schedule.read_manifest(place) if schedule.exists(self._target, new) else None
        if there and schedule_copy.settled(schedule.read_manifest(source)) <= schedule_copy.settled(there):
            return
        copy = self._scratch / "schedule"
        copy.mkdir()
        try:
            copy_files(source, copy)
            schedule_copy.rename_files(copy, self._target.root, new, self._new_names)
            with schedule.held(place):  # raises if a process is running the schedule in the target
                self._put(copy, place, schedule.TABLE)
            self._done.schedules.append(new)
        except ResultsError as error:
            self._done.left_out.append(str(error).rstrip("."))
            shutil.rmtree(copy)

    def _put(self, copy: Path, place: Path, last: str) -> None:
        """Move copied files to their place; the file `last` goes last, so a directory with this file is complete."""
        sync(self._scratch)
        place.parent.mkdir(exist_ok=True)
        if not place.is_dir():
            os.rename(copy, place)
            return
        for path in sorted(archive.files_in(copy), key=lambda path: path.name == last):
            (place / path.relative_to(copy)).parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place / path.relative_to(copy))
        shutil.rmtree(copy)

    def _rename_campaign(self, folder: Path, old: str, name: str) -> None:
        """Write the names, ids and paths that the target uses into a campaign's files."""
        from lem.results.campaign import CELLS, DEFINITION

        if name != old:
            _set_name(folder / DEFINITION, "campaign", "name", name)
        for file in folder.glob("*.parquet"):
            rows = read_file(file)
            if "campaign" in rows.column_names:
                parquet.write_table(file, _mapped(rows, "campaign", self._campaigns))
        if (folder / CELLS).is_file():
            entries = [self._entry(entry, name) for entry in json.loads((folder / CELLS).read_bytes())]
            write_atomically(folder / CELLS, json.dumps(entries, indent=2, ensure_ascii=False) + "\n")

    def _entry(self, entry: dict[str, Any], campaign: str) -> dict[str, Any]:
        """Return a cell's entry with the id and the paths that the cell's experiment has in the target."""
        place = entry["campaign"] | {"name": campaign}
        old = entry["experiment_id"]
        if old is None:
            return entry | {"campaign": place}
        new = self._ids.get(old, old)
        folder = str(self._target.directory(new).path.resolve())
        before, log = entry.get("directory"), entry.get("log")
        if log and before and log.startswith(f"{before}/"):
            log = folder + log.removeprefix(before)
        return entry | {"experiment_id": new, "directory": folder, "log": log, "campaign": place}


def _row(store: Store, experiment_id: str) -> ExperimentRow:
    tables = Tables(store)
    return tables.row(experiment_id, tables.location(experiment_id) or RowLocation(f"{experiment_id}.parquet"))


def _start(experiment_id: str) -> str:
    """Return an id without its suffix."""
    return "_".join(experiment_id.split("_")[:3])


def _by_start(ids: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(ids):
        found.setdefault(_start(name), []).append(name)
    return found


def _is_variant(name: str, of: str) -> bool:
    """Return whether `name` is the same as `of`, or differs only in a suffix of the kind that a merge adds."""
    return name == of or re.fullmatch(rf"{re.escape(of[:90])}_\d+", name) is not None


def _new_name(name: str | None, names: Mapping[str, str]) -> str | None:
    """Return the new name of a campaign or schedule in the target, or None if it keeps its name or has none."""
    new = names.get(name or "")
    return new if new != name else None


def _origin(folder: Path) -> Origin | None:
    try:
        return from_json(Origin, (folder / ORIGIN).read_bytes())
    except (OSError, ValueError):
        return None


# ------------------------------------------------------------------ files
def digest_of(folder: Path) -> str:
    """Return a digest of an experiment's files; all unchanged copies of an experiment have the same digest.

    Raises:
        ResultsError: a file cannot be read, or is a link, a pipe or a device.
    """
    whole = hashlib.sha256()
    for path in archive.files_in(folder):
        name = path.relative_to(folder).as_posix()
        if name not in NOT_ITS_OWN:
            with plain_file(path) as file:
                whole.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def copy_files(source: Path, target: Path, but_for: str | None = None) -> None:
    """Copy the files in `source` to `target`, which must exist; `archive.files_in` says which files are copied.

    Raises:
        ResultsError: a file cannot be read, or is a link, a pipe or a device.
    """
    for path in archive.files_in(source, but_for):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        with plain_file(path) as file, place.open("xb") as copy:
            shutil.copyfileobj(file, copy)


def _rename(folder: Path, old: str, new: str, campaign: str | None, of_schedule: str | None) -> None:
    """Put an experiment's new id into its files and, if given, the new names of its campaign and schedule."""
    # This cannot match inside a JSON string, in which quotation marks are escaped.
    before, after = re.compile(rb'("experiment_id"\s*:\s*)"' + old.encode() + b'"'), rb'\1"' + new.encode() + b'"'
    for path in archive.files_in(folder):
        if NAMING.fullmatch(path.name):
            path.write_bytes(before.sub(after, path.read_bytes()))
        elif path.suffix == ".parquet":
            parquet.write_table(path, _mapped(read_file(path), "experiment_id", {old: new}))
    if campaign is not None:
        _set_name(folder / "spec.json", "campaign", "name", campaign)
    if of_schedule is not None:
        _set_name(folder / "spec.json", "schedule", "schedule", of_schedule)


def _set_name(file: Path, part: str, key: str, name: str) -> None:
    """Change the name under `key` in `part` of a JSON file, and leave everything else as it is."""
    whole = msgspec.json.decode(file.read_bytes(), type=dict[str, msgspec.Raw])
    values = msgspec.json.decode(whole[part], type=dict[str, msgspec.Raw])
    values[key] = msgspec.Raw(msgspec.json.encode(name))
    whole[part] = msgspec.Raw(msgspec.json.encode(values))
    write_atomically(file, msgspec.json.format(msgspec.json.encode(whole)))


def _mapped(rows: Any, column: str, names: Mapping[str, str]) -> Any:
    """Return an Arrow table in which the values of a column have been replaced as `names` says."""
    import pyarrow as pa

    at = rows.schema.get_field_index(column)
    values = [names.get(value, value) for value in rows[column].to_pylist()]
    return rows.set_column(at, rows.schema.field(at), pa.array(values, rows.schema.field(at).type))


# ------------------------------------------------------------------ campaigns
def _cells(folder: Path) -> set[str]:
    """Return the ids of the experiments in a campaign's list of cells; empty if it has no list."""
    from lem.results.campaign import CELLS, read_entries

    if not (folder / CELLS).is_file():
        return set()
    return {entry["experiment_id"] for entry in read_entries(folder) if entry["experiment_id"]}


def _definition(folder: Path) -> Any:
    """Return a campaign's definition as plain data, without its name, which may differ between copies."""
    from lem.results.campaign import DEFINITION, read_definition

    read_definition(folder)  # raises if it is damaged
    found = json.loads((folder / DEFINITION).read_bytes())
    return found | {"campaign": found["campaign"] | {"name": None}}


# ------------------------------------------------------------------ the command
def report(target: Store, sources: Sequence[Path]) -> int:
    """Merge sources, and print what was done with each; return 1 if something was left out, else 0."""
    import sys

    code = 0
    for done in merge(target, sources):
        there = f"; {done.there} already there" if done.there else ""
        campaigns = f", campaigns: {', '.join(done.campaigns)}" if done.campaigns else ""
        schedules = f", schedules: {', '.join(done.schedules)}" if done.schedules else ""
        copied = f"{done.copied} experiment{'s' * (done.copied != 1)} copied"
        print(one_line(f"{done.source}: {copied}{there}{campaigns}{schedules}"))
        for sentence in done.renamed:
            print(one_line(f"  {sentence}"))
        for sentence in done.left_out:
            print(one_line(f"Warning: {done.source}: {sentence}."), file=sys.stderr)
        code = code or int(bool(done.left_out))
    return code
