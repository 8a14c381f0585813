"""Archives: zip files with experiments, campaigns and schedules, and a manifest with the SHA-256 of each file.

An archive has the layout of a results directory, with `MANIFEST.json` as its last member. `lem results merge` reads
archives. An archive may come from someone else, so nothing in it is trusted: every name must fit the layout of a
results directory, every member must be a plain file of the size and digest that the manifest states, and nothing in it
is run.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path
from typing import IO

from msgspec import Struct

from lem import __version__
from lem.errors import ResultsError
from lem.quantities import is_printable, one_line, quantity, timestamp
from lem.results import schedule as schedule_files
from lem.results.choosing import Known
from lem.results.codec import from_json, to_json
from lem.results.files import needs_space, open_to_read, replacing
from lem.results.store import ID, Store
from lem.results.tables import KINDS, SHARED_FILE, RowLocation, Tables, file_name, read_file
from lem.spec.campaign import NAME

MANIFEST = "MANIFEST.json"
FORMAT, FORMAT_VERSION = "lem-archive", 1
CHUNK = 1 << 20
# Limits on what is read from an archive, far above any real one, so that a crafted archive ends in an error.
MOST_MANIFEST_BYTES, MOST_BYTES, MOST_FILES = 1 << 30, 1 << 43, 10_000_000
# Files of a campaign that are needed only on the cluster on which it ran; some of them contain code.
JOBS = "jobs"
# The suffix of files that are already compressed, so that compressing them again would gain nothing.
COMPRESSED = (".parquet",)


class Entry(Struct, frozen=True):
    """The size and the digest of a file in an archive."""

    size_bytes: int
    sha256: str


class Manifest(Struct, frozen=True, kw_only=True):
    """What an archive holds; `files` maps each member's name to its size and digest."""

    format: str
    format_version: int
    lem_version: str
    created_at: str
    experiments: list[str]
    campaigns: list[str]
    schedules: list[str] = []
    files: dict[str, Entry]

    @property
    def size_bytes(self) -> int:
        """The size of all files when unpacked."""
        return sum(entry.size_bytes for entry in self.files.values())


# ------------------------------------------------------------------ what to archive
@dataclass(frozen=True)
class Content:
    """What to put into an archive; `left_out` has a sentence for each experiment that cannot be archived yet."""

    ids: list[str]
    campaigns: list[str] = field(default_factory=list)
    schedules: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def content(
    store: Store, texts: Sequence[str], campaign: str | None, schedule: str | None = None, *, everything: bool
) -> Content:
    """Return the experiments, campaigns and schedules that a command is to archive.

    Raises:
        ResultsError: not exactly one kind of selection was given, there is nothing to archive, or a selected experiment
            is running or waiting for a Slurm job. With `everything`, such experiments are left out instead.
    """
    if sum((bool(texts), campaign is not None, schedule is not None, everything)) != 1:
        raise ResultsError(
            "Give one of these: the ids of the experiments to archive, --campaign NAME, --schedule NAME or --all."
        )
    known = Known(store)
    chosen = Content(known.named(texts)) if texts else _of_study(known, campaign, schedule)
    running = [name for name in chosen.ids if known.is_running(name)]
    sentences = [f"{name} is running or waiting for a Slurm job, so it cannot be archived yet" for name in running]
    if running and not everything:
        raise ResultsError(*(f"{sentence}; wait until it has ended." for sentence in sentences))
    if not (chosen.ids or chosen.campaigns or chosen.schedules):
        raise ResultsError(f"There are no experiments in {store.root}.")
    at_work = set(running)
    return replace(chosen, ids=[name for name in chosen.ids if name not in at_work], left_out=sentences)


def _of_study(known: Known, campaign: str | None, schedule: str | None) -> Content:
    """Return a campaign or a schedule with its experiments, or everything if neither is given."""
    from lem.results.campaign import folder_of, names_in, read_definition

    store = known.store
    if campaign is not None:
        read_definition(folder_of(store, campaign))  # raises if there is no such campaign
        return Content(known.of_campaign(campaign), [campaign])
    campaigns = names_in(store)
    if schedule is None:
        return Content(known.ids, campaigns, schedule_files.names(store))
    name = schedule_files.load_schedule(store, schedule).name
    ids = known.of_schedule(name)
    own = {known.campaign(each) for each in ids}
    return Content(ids, [each for each in campaigns if each in own], [name])


# ------------------------------------------------------------------ writing
@contextmanager
def plain_file(path: Path) -> Iterator[BufferedReader]:
    """Open a plain file for reading; raises `ResultsError` for anything else."""
    if path.is_symlink():
        raise ResultsError(f"{path} is a link, and its content is elsewhere; replace it with a plain file.")
    try:
        descriptor = open_to_read(str(path))
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror or error}.") from None
    with os.fdopen(descriptor, "rb") as file:
        yield file


class _Writer:
    """Adds files to a zip file and remembers their sizes and digests."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._zip = archive
        self.files: dict[str, Entry] = {}

    def add(self, name: str, source: IO[bytes], changed_s: float) -> None:
        """Add a file; `changed_s` is its modification time, in seconds since 1970."""
        # Zip files cannot store a time before 1980.
        info = zipfile.ZipInfo(name, time.localtime(max(changed_s, 315_619_200.0))[:6])
        info.external_attr = (stat.S_IFREG | 0o644) << 16
        info.compress_type = zipfile.ZIP_STORED if name.endswith(COMPRESSED) else zipfile.ZIP_DEFLATED
        digest, size = hashlib.sha256(), 0
        with self._zip.open(info, "w", force_zip64=True) as target:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                size += len(chunk)
                target.write(chunk)
        self.files[name] = Entry(size, digest.hexdigest())

    def add_file(self, name: str, path: Path) -> None:
        """Add a plain file.

        Raises:
            ResultsError: the file is a link, a pipe or a device, whose content may belong to someone else.
        """
        with plain_file(path) as source:
            self.add(name, source, os.fstat(source.fileno()).st_mtime)

    def add_folder(self, name: str, folder: Path, but_for: str | None = None) -> None:
        """Add the files of `folder` that `files_in` yields; their names in the archive begin with `name`."""
        for path in files_in(folder, but_for):
            self.add_file(f"{name}/{path.relative_to(folder).as_posix()}", path)


def files_in(folder: Path, but_for: str | None = None) -> Iterator[Path]:
    """Yield the files in a directory and its subdirectories, in a fixed order.

    Hidden files and directories (locks, scratch files) are left out, and so is the entry `but_for` at the top level.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name == but_for:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from files_in(folder / entry.name)
        else:
            yield folder / entry.name


def write(store: Store, chosen: Content, output: Path) -> Manifest:
    """Write an archive, completely or not at all; return its manifest.

    Raises:
        ResultsError: a file of the results directory cannot be read, or the archive cannot be written.
    """
    from lem.results.campaign import folder_of

    try:
        with (
            needs_space(output.parent),
            replacing(output) as scratch,
            zipfile.ZipFile(scratch, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive,
        ):
            writer = _Writer(archive)
            for experiment_id in chosen.ids:
                _add_experiment(writer, store, experiment_id)
            for name in chosen.campaigns:
                writer.add_folder(f"campaigns/{name}", folder_of(store, name), JOBS)
            for name in chosen.schedules:
                writer.add_folder(f"{schedule_files.FOLDER}/{name}", schedule_files.folder_of(store, name))
            _add_rows(writer, store, chosen.ids)
            manifest = Manifest(
                format=FORMAT, format_version=FORMAT_VERSION, lem_version=__version__, created_at=timestamp(),
                experiments=chosen.ids, campaigns=chosen.campaigns, schedules=chosen.schedules, files=writer.files,
            )  # fmt: skip
            archive.writestr(MANIFEST, to_json(manifest))
    except OSError as error:
        raise ResultsError(f"{output} cannot be written: {error.strerror or error}.") from None
    return manifest


def _add_experiment(writer: _Writer, store: Store, experiment_id: str) -> None:
    folder = store.directory(experiment_id).path
    if folder.is_dir():
        writer.add_folder(f"raw/{experiment_id}", folder)
    mark = store.root / "unfinished" / experiment_id
    if mark.is_file():
        writer.add_file(f"unfinished/{experiment_id}", mark)


def _add_rows(writer: _Writer, store: Store, ids: Sequence[str]) -> None:
    """Add the rows of the archived experiments.

    If all experiments in a file of a table are archived, the file is copied unchanged. Otherwise, a new file with only
    the wanted rows is added instead.
    """
    locations, wanted = Tables(store).locations(), set(ids)
    for file, names in by_file(locations).items():
        some = [name for name in names if name in wanted]
        for kind in KINDS:
            path = store.root / kind / file
            if not some or not path.is_file():  # the file of a table may be missing; lem aggregate rebuilds it
                continue
            if len(some) == len(names):
                writer.add_file(f"{kind}/{file}", path)
            else:
                writer.add(f"{kind}/{file_name(some)}", _rows_of(path, some), path.stat().st_mtime)


def by_file(locations: Mapping[str, RowLocation]) -> dict[str, list[str]]:
    """Group experiments by the file that contains their rows: return the ids, keyed by the file's name."""
    found: dict[str, list[str]] = {}
    for name, at in locations.items():
        found.setdefault(at.file, []).append(name)
    return found


def _rows_of(path: Path, ids: Sequence[str]) -> IO[bytes]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    rows = read_file(path)
    content = io.BytesIO()
    pq.write_table(rows.filter(pc.is_in(rows["experiment_id"], pa.array(ids, pa.string()))), content)
    content.seek(0)
    return content


# ------------------------------------------------------------------ reading
@contextmanager
def opened(file: Path) -> Iterator[tuple[zipfile.ZipFile, Manifest]]:
    """Open an archive, and check its manifest and its members' names, kinds and total size, but not their content.

    Raises:
        ResultsError: the file is not an archive of lem, was written by a newer lem, or is damaged or inconsistent.
    """
    if file.exists() and not file.is_file():  # opening a pipe could block forever
        raise ResultsError(f"{file} is not a plain file.")
    try:
        with file.open("rb") as source, zipfile.ZipFile(source) as archive:
            manifest = _manifest(file, archive)
            _check_members(archive, manifest)
            yield archive, manifest
    except OSError as error:
        raise ResultsError(f"{file} cannot be read: {error.strerror or error}.") from None
    # Whatever zipfile raises for damaged files, unknown compression and encryption.
    except (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise ResultsError(f"{file} is not an intact archive: {what}; get a new copy of it from its source.") from None


def _manifest(file: Path, archive: zipfile.ZipFile) -> Manifest:
    if MANIFEST not in archive.namelist():
        raise ValueError(f"it has no {MANIFEST}")
    with archive.open(MANIFEST) as source:
        content = source.read(MOST_MANIFEST_BYTES + 1)
    if len(content) > MOST_MANIFEST_BYTES:
        raise ValueError(f"{MANIFEST} is too large")
    manifest = from_json(Manifest, content)
    if manifest.format != FORMAT:
        raise ValueError(f"its format is {one_line(manifest.format[:100])!r} instead of '{FORMAT}'")
    if manifest.format_version > FORMAT_VERSION:
        raise ResultsError(
            f"{file} has the archive format {manifest.format_version}, which this version of lem cannot read; use a "
            "newer lem."
        )
    return manifest


def _check_members(archive: zipfile.ZipFile, manifest: Manifest) -> None:
    infos = [info for info in archive.infolist() if info.filename != MANIFEST]
    names = {info.filename for info in infos}
    if len(archive.infolist()) != len(names) + 1:
        raise ValueError("it has two files with the same name")
    for info in infos:
        kind = stat.S_IFMT(info.external_attr >> 16)
        if not is_safe(info.filename) or kind not in (0, stat.S_IFREG):
            raise ValueError(f"{one_line(info.filename[:100])!r} does not belong in a results directory")
    if odd := sorted(names ^ manifest.files.keys()):
        which = "missing" if odd[0] in manifest.files else "not in its manifest"
        raise ValueError(f"{one_line(odd[0][:100])} is {which}")
    if len(names) > MOST_FILES or manifest.size_bytes > MOST_BYTES:
        raise ValueError("it holds more files or bytes than a results directory can have")


def is_safe(name: str) -> bool:
    """Return whether a member's name fits the layout of a results directory and is harmless as a path."""
    parts = name.split("/")
    if any(part.startswith(".") or not part for part in parts) or "\\" in name or not is_printable(name):
        return False
    if "\n" in name or "\t" in name or len(parts) < 2 or len(name) > 1000:
        return False
    top, second, *rest = parts
    if top in KINDS:
        stem, dot, suffix = second.rpartition(".")
        return (
            not rest and (dot, suffix) == (".", "parquet") and bool(ID.fullmatch(stem) or SHARED_FILE.fullmatch(stem))
        )
    if top == "unfinished":
        return not rest and ID.fullmatch(second) is not None
    if top == "raw":
        return bool(rest) and ID.fullmatch(second) is not None
    return top in ("campaigns", schedule_files.FOLDER) and bool(rest) and re.fullmatch(NAME, second) is not None


def check(file: Path) -> Manifest:
    """Read an archive completely and compare every file with the manifest; return the manifest.

    Raises:
        ResultsError: the file is not an archive of lem, or is not intact.
    """
    with opened(file) as (archive, manifest):
        for name, entry in manifest.files.items():
            for _ in _chunks(archive, name, entry):
                pass
    return manifest


def unpack(file: Path, folder: Path) -> Manifest:
    """Unpack an archive into an empty directory, and compare every file with the manifest; return the manifest.

    Raises:
        ResultsError: the file is not an archive of lem or is not intact, or there is no space for its content.
    """
    with opened(file) as (archive, manifest):
        free = shutil.disk_usage(folder).free
        if manifest.size_bytes > free:
            wanted, there = quantity(manifest.size_bytes, "B"), quantity(free, "B")
            raise ResultsError(f"{file} needs {wanted} in {folder}, but only {there} are free.")
        for name, entry in manifest.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with needs_space(folder), path.open("xb") as target:
                for chunk in _chunks(archive, name, entry):
                    target.write(chunk)
    return manifest


def _chunks(archive: zipfile.ZipFile, name: str, entry: Entry) -> Iterator[bytes]:
    """Yield the content of a member; raises ValueError if its size or digest is not the one in the manifest."""
    digest, size = hashlib.sha256(), 0
    with archive.open(name) as source:
        while chunk := source.read(CHUNK):
            size += len(chunk)
            if size > entry.size_bytes:
                break
            digest.update(chunk)
            yield chunk
    if size != entry.size_bytes or digest.hexdigest() != entry.sha256:
        raise ValueError(f"{name} is not the file that {MANIFEST} describes")


# ------------------------------------------------------------------ the commands
def archive(store: Store, chosen: Content, output: Path) -> int:
    """Write an archive and print what it holds; return 1 if experiments had to be left out, else 0."""
    import sys

    manifest = write(store, chosen, output)
    print(one_line(f"{output}: {words(manifest)}, {quantity(output.stat().st_size, 'B', 3)}"))
    for sentence in chosen.left_out:
        print(f"Warning: {sentence}.", file=sys.stderr)
    return 1 if chosen.left_out else 0


def report_check(file: Path) -> int:
    """Check an archive and print what it holds; return 0.

    Raises:
        ResultsError: the file is not an archive of lem, or is not intact.
    """
    manifest = check(file)
    print(one_line(f"{file} is intact: {words(manifest)}, written by lem {manifest.lem_version}"))
    return 0


def words(manifest: Manifest) -> str:
    """Describe an archive in words, such as `3 experiments, 1 campaign, 24 files`."""
    counts = (
        ("experiment", len(manifest.experiments)),
        ("campaign", len(manifest.campaigns)),
        ("schedule", len(manifest.schedules)),
        ("file", len(manifest.files)),
    )
    return ", ".join(f"{count} {noun}{'s' * (count != 1)}" for noun, count in counts if count or noun == "experiment")
