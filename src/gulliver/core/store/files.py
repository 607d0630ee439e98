"""Files that are either whole or absent: write under a temporary name in the same folder, fsync, rename. And locks."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from gulliver.core.errors import ConfigError

TEMPORARY = ".tmp-"
"""Names that contain this are unfinished work: never listed, never part of an artifact."""


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


def write_atomic(path: Path | str, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) so that a reader, or a crash, sees the old file or the new one, never half."""
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = temporary_name(target)
    try:
        with open(temporary, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes `target` (absent or empty) when the block ends well, else is deleted.

    Files are the caller's to sync (`sync_file`).
    """
    temporary = temporary_name(target)
    try:
        temporary.mkdir()
        yield temporary
        os.rename(temporary, target)
        sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
def file_lock(path: Path, timeout_s: float | None = None) -> Iterator[None]:
    """Hold an exclusive lock between processes and threads. ConfigError when it is not free within `timeout_s`.

    The kernel frees it when the process dies, however it dies; the file itself stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if timeout_s is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        else:
            _wait_for(descriptor, path, time.monotonic() + timeout_s)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, path: Path, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ConfigError(f"another process holds {path}; wait for it to finish, or stop it") from None
            time.sleep(0.05)
