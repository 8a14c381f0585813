"""Writes files so that they exist either completely or not at all."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from lem.errors import RunError

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT)
# The beginning of every message about a full disk, including the message in a worker's record.
NO_SPACE = "No space left"

# An unlocked scratch file older than this is abandoned: a living writer would have locked the file long before.
ABANDONED_S = 1.0


class DiskFull(RunError):
    """A disk is full; everything written before is kept. Exit code 1."""

    def __init__(self, folder: Path, remedy: str = "") -> None:
        """Make the message; `remedy` says how to continue, and a study may replace it with advice of its own."""
        self.folder = folder
        reason = f"{NO_SPACE} in {folder} (the disk at {_mount_point(folder)}); everything written so far is kept."
        super().__init__(" ".join(filter(None, (reason, remedy))))


@contextmanager
def needs_space(folder: Path, remedy: str = "") -> Iterator[None]:
    """Within the block, turn an error about a full disk into `DiskFull`, which names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise DiskFull(folder, remedy) from None


def _mount_point(folder: Path) -> Path:
    path = folder.absolute()
    return next((each for each in (path, *path.parents) if os.path.ismount(each)), path)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file completely or not at all, even if the machine crashes."""
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as scratch:
        scratch.write_bytes(data)


_synced_later = ContextVar("synced_later", default=False)


@contextmanager
def synced_later() -> Iterator[None]:
    """Within the block, write each file completely or not at all, but without waiting for the disk.

    The files survive a crash of the machine only once `sync` has been called. Waiting takes milliseconds for each file,
    which adds up if a study writes thousands of plans.
    """
    token = _synced_later.set(True)
    try:
        yield
    finally:
        _synced_later.reset(token)


def sync(folder: Path) -> None:
    """Wait until everything written so far to the file system of a folder would survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None).syncfs(descriptor):
            os.fsync(descriptor)
    except AttributeError:  # not Linux
        os.sync()
    finally:
        os.close(descriptor)


class replacing:  # noqa: N801 - reads as a statement
    """Yield a path next to `path` for a scratch file; at the end, the file replaces `path` or, on error, is removed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._handle, name = tempfile.mkstemp(prefix=f".{self._path.name}-", dir=self._path.parent)
        self._scratch = Path(name)
        with suppress(OSError):  # the lock shows that the writer is alive
            fcntl.flock(self._handle, fcntl.LOCK_EX)
        return self._scratch

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self._end(error)
        finally:
            os.close(self._handle)

    def _end(self, error: object) -> None:
        if error is not None:
            self._scratch.unlink(missing_ok=True)
            return
        self._scratch.chmod(0o644)
        if not _synced_later.get():
            os.fsync(self._handle)
        self._scratch.replace(self._path)
        log.debug("wrote %s", self._path)


def open_to_read(path: str) -> int:
    """Return a descriptor of a plain file, possibly reached through a link; raises OSError for anything else.

    Reading a pipe or a device in a results directory could block forever.
    """
    return _opened(path)[0]


def content_of(path: str) -> bytes:
    """Return the content of a plain file; raises OSError for anything else.

    This takes a quarter of the time that Path.read_bytes takes. The difference matters, because `lem aggregate --all`
    may read tens of thousands of small files.
    """
    descriptor, size = _opened(path)
    try:
        content = os.read(descriptor, size)
        # One read returns less if the file is huge, or has just become shorter.
        while len(content) < size and (more := os.read(descriptor, size)):
            content += more
        return content
    finally:
        os.close(descriptor)


def _opened(path: str) -> tuple[int, int]:
    """Open a plain file; return its descriptor and its size."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode):
        return descriptor, status.st_size
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a plain file")


@contextmanager
def try_to_lock(file: Path) -> Iterator[bool]:
    """Try to lock a file exclusively, creating it if it is missing; yield whether this succeeded."""
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def remove_if_abandoned(scratch: Path) -> None:
    """Remove a scratch file if its writer was killed; a living writer holds a lock on the file.

    A file younger than `ABANDONED_S` is left alone. Its age is measured with the clock of the file system, which is not
    this machine's clock if the file system is shared.
    """
    with suppress(OSError), scratch.open("rb") as file, tempfile.TemporaryFile(dir=scratch.parent) as fresh:
        if os.fstat(fresh.fileno()).st_mtime - scratch.stat().st_mtime > ABANDONED_S:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            scratch.unlink()
