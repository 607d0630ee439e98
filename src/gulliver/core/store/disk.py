"""What the operating system refuses -> one StorageError that says where, why and what to do.

A full or read-only disk, a quota, a limit on the size of a file or on open files: none is a bug of ours, and none of
the libraries that write for us says it in the same way. Everything else passes through as it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from gulliver.core.errors import GulliverError, StorageError

_ELSEWHERE = "give another place with --home or --out"
_KEPT = "then repeat the command, which resumes"
REMEDIES = {
    errno.ENOSPC: f"free some there, or {_ELSEWHERE}; {_KEPT}",
    errno.EDQUOT: f"free some there, or {_ELSEWHERE}; {_KEPT}",
    errno.EFBIG: f"raise the limit (`ulimit -f`), or {_ELSEWHERE}; {_KEPT}",
    errno.EROFS: f"make it writable, or {_ELSEWHERE}",
    errno.EMFILE: f"raise the limit (`ulimit -n`); {_KEPT}",
    errno.ENFILE: f"end other programs; {_KEPT}",
    errno.EACCES: f"change its permissions, or {_ELSEWHERE}",
    errno.EPERM: f"change its permissions, or {_ELSEWHERE}",
    errno.EIO: f"check the disk (`dmesg`), or {_ELSEWHERE}",
    errno.ENOLCK: f"the file system has no locks; {_ELSEWHERE}",
    errno.ESTALE: f"the network's file system lost it; {_KEPT}",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "give a name that does not lead to itself",
}
"""What the system's refusals are remedied by; any other code is a bug of ours."""
_BY_TEXT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EMFILE, errno.ENFILE)
"""Those that are known by their words too, where a library tells them as an error of its own."""
_HALF_WRITTEN = re.compile(r"\d+ requested and \d+ written")  # numpy, which gives no code


@contextlib.contextmanager
def storage_errors(*places: Path | str | None) -> Iterator[None]:
    """Within the block, what a disk refuses is a StorageError. `places` are where the block writes, for a library that

    does not say which file it was.
    """
    try:
        yield
    except GulliverError:
        raise
    except Exception as failure:
        told = storage_error(failure, *places)
        if told is None:
            raise
        raise told from failure


def storage_error(failure: BaseException, *places: Path | str | None) -> StorageError | None:
    """The one line about a failure that the disk or a limit of the system caused; None for any other."""
    code = _code(failure)
    if code is None or isinstance(failure, GulliverError | BrokenPipeError):
        return None
    where = _where(failure, code, places)
    at = "" if where is None else f"{where}: "
    return StorageError(f"{at}{_reason(code, where)}; {REMEDIES[code]}")


def free_bytes(path: Path) -> int | None:
    """What is free on the disk of `path`, which need not exist; None where that cannot be told."""
    try:
        return shutil.disk_usage(_existing(path)).free
    except OSError:
        return None


def check_room(path: Path, size_bytes: int, what: str) -> None:
    """StorageError when `size_bytes` do not fit on the disk of `path`; `what` is what is to be written there."""
    free = free_bytes(path)
    if free is not None and free < size_bytes:
        told = f"{path}: {what} needs {size_bytes:,} bytes and {free:,} are free"
        raise StorageError(f"{told}; {REMEDIES[errno.ENOSPC]}")


def _code(failure: BaseException) -> int | None:
    """The system's code for a failure, where it is one of REMEDIES."""
    if isinstance(failure, OSError) and failure.errno is not None:
        return failure.errno if failure.errno in REMEDIES else None
    text = str(failure)
    if isinstance(failure, OSError) and _HALF_WRITTEN.search(text):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        return errno.ENOSPC if limit == resource.RLIM_INFINITY else errno.EFBIG
    if "database or disk is full" in text:  # SQLite
        return errno.ENOSPC
    return next((code for code in _BY_TEXT if os.strerror(code) in text or f"(os error {code})" in text), None)


def _where(failure: BaseException, code: int, places: tuple[Path | str | None, ...]) -> Path | None:
    """The file that was written, or of the places where the work writes the one that is fullest."""
    named = getattr(failure, "filename2", None) or getattr(failure, "filename", None)
    if isinstance(named, str | bytes | os.PathLike):
        return Path(os.fsdecode(named))
    known = [Path(place) for place in places if place is not None]
    if code in (errno.ENOSPC, errno.EDQUOT):
        known.append(Path(os.environ.get("TMPDIR", "/tmp")))
        return min(known, key=lambda place: free_bytes(place) or 0)
    return known[0] if known and code not in (errno.EMFILE, errno.ENFILE) else None


def _reason(code: int, where: Path | None) -> str:
    if code == errno.ENOSPC:
        free = None if where is None else free_bytes(where)
        return "no space is left on this disk" + ("" if free is None else f" ({free:,} bytes are free)")
    if code == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        bound = "" if limit == resource.RLIM_INFINITY else f" ({limit:,} bytes)"
        return f"a file may not grow beyond the limit of this process or disk{bound}"
    if code == errno.EMFILE:
        return f"too many files are open; this process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"
    said = os.strerror(code)
    return said[:1].lower() + said[1:]


def _existing(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
