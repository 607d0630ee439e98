"""Files of strangers are data: which of them are opened, how much of them is read, and what their readers may raise.

A folder that was downloaded can hold a symbolic link to any file of this machine, a pipe that never ends, or a device.
Only regular files are opened. A link is followed where it stays inside the folder, or where it leads to the `blobs` of
the Hugging Face cache that the folder is a snapshot of. A path that the user wrote is the user's own choice, and its
links are followed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gulliver.core.errors import ArtifactError, GulliverError, first_line

OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE)
"""What is wrong with this machine's disk or process, whatever file is read meanwhile."""
HUB = ("models--", "datasets--")
"""How the folders of the Hugging Face cache begin."""
SUBFOLDERS = ("1_Pooling", "additional_chat_templates")
"""The folders inside a model's folder of which files are read."""


@contextmanager
def foreign(what: object, error: type[GulliverError] = ArtifactError, remedy: str = "") -> Iterator[None]:
    """The one boundary around a library that reads a stranger's file: all that it raises becomes one line, `error`.

    `what` begins the line, `remedy` ends it. That is `BaseException`, since a panic of a library in Rust is no
    `Exception`; but for our own errors, the user's interrupt, and a disk that is full.
    """
    try:
        yield
    except (GulliverError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as failure:
        if isinstance(failure, OSError) and failure.errno in OF_DISKS:
            raise
        told = first_line(failure)
        if isinstance(failure, RecursionError):
            told = "it is nested too deep to read"
        elif isinstance(failure, MemoryError):
            told = "reading it takes more memory than there is"
        raise error(f"{what}: {told}{remedy}") from failure


# ---- which files are opened -----------------------------------------------------------------------------------------
def check_file(path: Path, folder: Path, error: type[GulliverError] = ArtifactError) -> bool:
    """Whether a path inside `folder` is a regular file (True) or a folder (False).

    `error` for a link that leads out of the folder or to nothing, for a pipe, a socket and a device.
    """
    if path.is_symlink():
        target = os.path.realpath(path)
        if not any(Path(target).is_relative_to(home) for home in _homes(folder)):
            told = f"{path} is a symbolic link that leads out of its folder, to {target}"
            raise error(f"{told}, and is not followed; put the file itself there, or remove the link")
        if not os.path.exists(target):
            raise error(f"{path} is a symbolic link to nothing; download the file again, or remove the link")
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise error(f"{path} is a pipe, a socket or a device, not a file; remove it")
    return stat.S_ISREG(mode)


def _homes(folder: Path) -> Iterator[Path]:
    """Where the links in a folder may lead: into itself, and from a snapshot of the hub's cache to its blobs."""
    own = Path(os.path.realpath(folder))
    yield own
    for snapshot in (own, *own.parents):
        if snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith(HUB):
            yield snapshot.parent.parent / "blobs"


def check_folder(folder: Path, error: type[GulliverError] = ArtifactError) -> None:
    """Return if all that is read of a model's folder are plain files; names with a dot in front are never read."""
    with foreign(f"{folder} cannot be read", error):
        for inside in (folder, *(folder / name for name in SUBFOLDERS)):
            if inside is not folder and (inside.is_symlink() or inside.is_dir()):
                check_file(inside, folder, error)
            for path in sorted(inside.iterdir()) if inside.is_dir() else ():
                if not path.name.startswith(".") and not (path.is_dir() and path.name not in SUBFOLDERS):
                    check_file(path, folder, error)


def files_below(folder: Path, error: type[GulliverError] | None = ArtifactError) -> list[Path]:
    """The regular files in a folder and the folders in it, sorted, but for hidden ones.

    A link out of it, a pipe and a device are an `error`; with None they are left out.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            with foreign(f"{path} cannot be read", error or ArtifactError):
                found += [path] if check_file(path, folder, error or ArtifactError) else []
        except ArtifactError:
            if error is not None:
                raise
    return found


def read_bytes(path: Path, most: int, error: type[GulliverError] = ArtifactError) -> bytes:
    """The bytes of a file that has at most `most`. `error` for a larger one and for one that cannot be opened.

    The path may be a pipe that the user named, of which no more is read.
    """
    try:
        with open(path, "rb") as stream:
            data = stream.read(most + 1)
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}") from None
    if len(data) > most:
        raise error(f"{path} has more than the {most:,} bytes that are allowed")
    return data
