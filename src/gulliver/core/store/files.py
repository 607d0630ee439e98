"""Files that are either whole or absent: write under a temporary name in the same folder, fsync, rename.

Unfinished work is locked while its process lives, so that the next one can tell it from the leavings of a killed one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from gulliver.core.errors import ConfigError
from gulliver.core.store.locks import IDLE_S, acquire

TEMPORARY = ".tmp-"
"""Names that contain this are unfinished work: never listed, never part of an artifact."""
_OWN = re.compile(r".*\.tmp-[0-9a-f]{12,16}")
"""Those that are ours, and may be deleted; a user's folder may have a name like it."""


def named_path(name: str | Path) -> Path:
    """The path that a user wrote, "~" expanded; it need not exist. ConfigError for a name that no file can have."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as failure:
        told = failure.strerror if isinstance(failure, OSError) else str(failure)
        raise ConfigError(f"{str(name)[:80]!r} cannot be the name of a file or folder: {told}") from None
    if not str(name):
        raise ConfigError("a name is empty; give the path of a file or folder, or the id of an artifact")
    return path


def hash_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, 64 hex digits. Reads in pieces; the file may exceed memory."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def temporary_name(path: Path) -> Path:
    """A fresh name beside `path` for work in progress."""
    return path.with_name(f"{path.name}{TEMPORARY}{secrets.token_hex(6)}")


def write_atomic(path: Path | str, content: bytes | str, mode: int = 0o666) -> None:
    """Write `content` (text as UTF-8) so that a reader, or a crash, sees the old file or the new one, never half.

    `mode`: the rights of the file, less the umask. What a killed process left of the same write is deleted.
    """
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    sweep(target.parent, f"{target.name}{TEMPORARY}")
    temporary, descriptor = unfinished(lambda: temporary_name(target), folder=False, mode=mode)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(descriptor)
        os.replace(temporary, target)
    except OSError as failure:
        failure.filename, failure.filename2 = str(target), None  # which a failing write does not say
        raise
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def check_writable(path: Path, what: str) -> None:
    """ConfigError, before long work, when a file could not be written at `path`, which is tried; `what` names it."""
    try:
        trial, descriptor = unfinished(lambda: temporary_name(path), folder=False)
        os.close(descriptor)
        trial.unlink()
    except OSError as failure:
        raise ConfigError(f"{what} {path} cannot be written: {failure.strerror}; give another place") from None


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `target` (absent or empty) when the block ends well, else is deleted.

    Files are the caller's to sync (`sync_file`).
    """
    with unfinished_folder(target) as temporary:
        yield temporary
        os.rename(temporary, target)
        sync_folder(target.parent)


@contextlib.contextmanager
def unfinished_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, deleted at the end. What a killed process left of the same is deleted."""
    sweep(target.parent, f"{target.name}{TEMPORARY}")
    temporary, descriptor = unfinished(lambda: temporary_name(target))
    try:
        yield temporary
    finally:
        os.close(descriptor)
        shutil.rmtree(temporary, ignore_errors=True)


def unfinished(name: Callable[[], Path], *, folder: bool = True, mode: int = 0o666) -> tuple[Path, int]:
    """A new folder or file for work in progress under a fresh `name()`, and a descriptor that holds its lock.

    The lock tells `sweep` that its process lives. A sweep that comes between making and locking takes it away; then
    there is another.
    """
    while True:
        path = name()
        if folder:
            path.mkdir()
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(path, flags, mode)
        except FileNotFoundError:
            if folder:  # it was there a moment ago
                continue
            raise
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink and path.exists():
            return path, descriptor
        os.close(descriptor)


def sweep(folder: Path, prefix: str = "") -> list[Path]:
    """Delete unfinished folders and files in `folder` whose process is dead; returns what was deleted.

    `prefix`: only those whose names begin so.

    What a living process owns is locked, and stays; a folder that may not be read or changed is left as it is.
    """
    swept = []
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.name.startswith(prefix))
    except OSError:
        return []
    for path in (folder / name for name in found if _OWN.fullmatch(name)):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                swept.append(path)
            finally:
                os.close(descriptor)
    return swept


def sync_file(path: Path) -> None:
    """Force a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


sync_folder = sync_file
"""Force a folder's entries to the disk (the same call on POSIX), so that a rename survives a power cut."""


@contextlib.contextmanager
def file_lock(path: Path, timeout_s: float | None = None, idle_s: float = IDLE_S) -> Iterator[None]:
    """Hold an exclusive lock between processes and threads; the kernel frees it when the process dies, however it dies.

    Without `timeout_s` a holder is waited for as long as it works; StorageError, naming it, when it does nothing for
    `idle_s`, or is stopped. ConfigError when the lock is not free within `timeout_s`. The file stays, and holds the
    process id of its last holder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        acquire(descriptor, path, timeout_s, idle_s)
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same
            os.pwrite(descriptor, f"{os.getpid():<20}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
