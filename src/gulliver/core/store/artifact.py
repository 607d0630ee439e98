"""Artifacts: immutable folders whose id is the hash of what they hold. The format is written down in docs/artifact.md.

An artifact is written in a temporary folder beside its final place, hashed, made durable, and renamed: it is there
whole or not at all. `open_artifact` believes nothing it reads; `verify` derives every hash again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gulliver.core.errors import ArtifactError
from gulliver.core.store.disk import check_room
from gulliver.core.store.files import (
    TEMPORARY,
    hash_file,
    named_path,
    sync_file,
    sync_folder,
    unfinished,
    unfinished_folder,
    whole_folder,
    write_atomic,
)
from gulliver.core.store.manifest import (
    ANNOTATIONS,
    FORMAT,
    MANIFEST,
    MAX_MANIFEST_BYTES,
    FileEntry,
    Manifest,
    canonical_json,
    check_file_name,
    manifest_id,
    parse,
)

WEIGHT_SUFFIXES = (".safetensors", ".gguf")
"""How the names of weight files end."""


HOME_FOLDERS = ("artifacts", "work", "cache", "locks")
"""What a home keeps its own files in."""


@dataclass(frozen=True)
class Artifact(Manifest):
    """One immutable folder. Two artifacts are equal when path and content id are."""

    path: Path

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files (*.safetensors, *.gguf). This is what "size" means everywhere."""
        return sum(entry.size_bytes for name, entry in self.files.items() if name.endswith(WEIGHT_SUFFIXES))

    def paths(self) -> dict[str, Path]:
        """Every listed file by name, checked as `file` does."""
        return {name: self.file(name) for name in self.files}

    def file(self, name: str) -> Path:
        """Path of a listed file. ArtifactError if it is not listed, is missing, is cut short or lies elsewhere."""
        check_file_name(name, f"artifact {self.id[:12]}")
        entry = self.files.get(name)
        if entry is None:
            known = ", ".join(sorted(self.files))
            raise ArtifactError(f"artifact {self.id[:12]} has no file {name!r}; it has: {known}")
        path = self.path / name
        problem = _shape_problem(self.path, name, entry)
        if problem:
            raise ArtifactError(f"artifact {self.id[:12]} in {self.path}: {problem}")
        return path


@dataclass
class ArtifactWriter:
    """A temporary folder `path`, made by `create`; put files there, then call `commit()` once."""

    path: Path
    _body: dict[str, Any]
    _lock: int | None

    def commit(self) -> Artifact:
        """Hash every file, write `gulliver.json`, make all of it durable and move it to its place.

        Returns the artifact already there when the same content was written before. ArtifactError if a file has a name
        or form an artifact may not hold; AssertionError outside the `with` block.
        """
        assert self._lock is not None, "commit() belongs inside the writer's with block, once"
        files: dict[str, dict[str, Any]] = {}
        with ThreadPoolExecutor(1) as disk:
            for name in sorted(_walk(self.path)):
                if name in ANNOTATIONS:
                    continue
                path = self.path / name
                written = disk.submit(sync_file, path)
                files[name] = {"sha256": hash_file(path), "size_bytes": path.stat().st_size}
                written.result()
        body = {**self._body, "files": files}
        body["id"] = manifest_id(body)
        data = canonical_json(body)
        parse(data, MANIFEST)
        write_atomic(self.path / MANIFEST, data + b"\n")
        for folder in {(self.path / name).parent for name in files}:
            sync_folder(folder)
        final = self.path.with_name(body["id"])
        _place(self.path, final)
        self.release()
        return open_artifact(final)

    def release(self) -> None:
        """Give up the lock; what was not committed may then be swept."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@contextlib.contextmanager
def create(
    parent_folder: Path | str,
    *,
    kind: str,
    task: str,
    inputs: Mapping[str, Sequence[str]] | None = None,
    step: Mapping[str, Any],
    config: Mapping[str, Any],
    seed: int = 0,
) -> Iterator[ArtifactWriter]:
    """A writer of the artifact `parent_folder/<id>`; `inputs` are lists of ids by role.

    Leaving the `with` block without a commit deletes its folder, which is locked while its process lives, so that
    `sweep` can tell unfinished work from the leavings of a killed process.
    """
    named = {role: list(ids) for role, ids in (inputs or {}).items()}
    made = {"inputs": named, "step": dict(step), "config": dict(config), "seed": seed}
    body = {"format": FORMAT, "kind": kind, "task": task, **made}
    parse(canonical_json({**body, "files": {}, "id": manifest_id({**body, "files": {}})}), "new artifact")
    parent = Path(parent_folder)
    parent.mkdir(parents=True, exist_ok=True)
    path, lock = unfinished(lambda: parent / f"{TEMPORARY}{secrets.token_hex(8)}")
    writer = ArtifactWriter(path, body, lock)
    try:
        yield writer
    finally:
        writer.release()
        shutil.rmtree(path, ignore_errors=True)


def open_artifact(folder: Path | str) -> Artifact:
    """Read `gulliver.json` strictly. Checks no file contents (see `verify`). ArtifactError names what is wrong."""
    path = Path(folder)
    source = path / MANIFEST
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a folder; give the folder of an artifact")
    if source.is_symlink() or not source.is_file():
        raise ArtifactError(f"{path} holds no {MANIFEST}, so it is not an artifact; use `gulliver pull` to make one")
    with open(source, "rb") as stream:
        data = stream.read(MAX_MANIFEST_BYTES + 1)
    return Artifact(**vars(parse(data, str(source))), path=path)


def verify(artifact: Artifact) -> None:
    """Derive every hash again. ArtifactError names the first file (sorted) that differs, is missing or is extra."""
    where = f"artifact {artifact.id[:12]} in {artifact.path}"
    now = open_artifact(artifact.path)
    if now.id != artifact.id:
        raise ArtifactError(f"{where}: {MANIFEST} was replaced; the folder now holds {now.id[:12]}")
    present = set(_walk(artifact.path)) - set(ANNOTATIONS) - {MANIFEST}
    for name in sorted(present | set(now.files)):
        entry = now.files.get(name)
        if entry is None:
            raise ArtifactError(f"{where}: {name} is extra; it is not listed in {MANIFEST}")
        problem = _shape_problem(artifact.path, name, entry)
        if problem:
            raise ArtifactError(f"{where}: {problem}")
        digest = hash_file(artifact.path / name)
        if digest != entry.sha256:
            raise ArtifactError(f"{where}: {name} differs; SHA-256 is {digest[:12]}…, listed is {entry.sha256[:12]}…")


def copy_artifact(artifact: Artifact, folder: Path | str) -> Artifact:
    """A verified copy in `folder`, annotations included; atomic.

    An empty folder is filled; the same artifact is kept and its annotations renewed; any other folder is refused with
    an ArtifactError.
    """
    target = check_target(folder)
    if (there := held_artifact(target)) is not None:
        if there.id != artifact.id:
            raise another_artifact(there)
        verify(there)
        renew_annotations(artifact, there)
        return there
    listed = [*artifact.files, MANIFEST, *_annotations(artifact.path)]
    size = sum((artifact.path / name).stat().st_size for name in listed if (artifact.path / name).is_file())
    check_room(target, size, "the copy")
    with whole_folder(target) as temporary:
        for name in listed:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            source = artifact.file(name) if name in artifact.files else artifact.path / name
            shutil.copyfile(source, temporary / name)
            sync_file(temporary / name)
        verify(open_artifact(temporary))
    return open_artifact(target)


def check_target(folder: Path | str, home: Path | None = None) -> Path:
    """The folder that a copy is to go to; the one around it is made. Asked before long work, and again before the copy.

    ArtifactError for a file, for a folder that holds something else than an artifact, for one within a folder that
    `home` keeps its own files in, and where none can be made, which is tried. What a killed copy to the same folder
    left is deleted.
    """
    target = named_path(folder)
    remedy = "give another folder"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink() and not target.exists():
            raise ArtifactError(f"{target} is a symbolic link to nothing; {remedy}")
        target = target.resolve() if target.is_symlink() else target
        if target.exists() and not target.is_dir():
            raise ArtifactError(f"{target} is a file; give a new or empty folder")
        if target.is_dir() and any(target.iterdir()) and not _is_artifact(target):
            raise ArtifactError(f"{target} is not empty and is not an artifact; give a new or empty folder")
        own = [home.resolve() / name for name in HOME_FOLDERS] if home is not None else []
        if any(target.resolve().is_relative_to(folder) for folder in own):
            raise ArtifactError(f"{target} lies in the home {home}, where artifacts are kept already; {remedy}")
        if home is not None and home.resolve().is_relative_to(target.resolve()):
            raise ArtifactError(f"the home {home} lies in {target}; {remedy}")
        if target.is_mount():
            raise ArtifactError(f"{target} is a disk of its own, which no folder can take the place of; {remedy} in it")
        if not os.access(target if target.is_dir() else target.parent, os.W_OK):
            raise ArtifactError(f"{target} may not be written into; {remedy}")
        with unfinished_folder(target) as trial:
            (trial / MANIFEST).touch()
    except OSError as failure:
        raise ArtifactError(f"{target} cannot be made: {failure.strerror}; {remedy}") from None
    return target


def held_artifact(target: Path) -> Artifact | None:
    """The artifact that a target of `check_target` holds; None for one that is new or empty."""
    return open_artifact(target) if target.is_dir() and any(target.iterdir()) else None


def another_artifact(there: Artifact) -> ArtifactError:
    """The error for a target that holds something else than what is to be copied there."""
    told = f"{there.path} holds another artifact ({there.step['name']}, {there.id[:12]})"
    return ArtifactError(f"{told}; give a new or empty folder")


def _is_artifact(folder: Path) -> bool:
    try:
        open_artifact(folder)
    except ArtifactError:
        return False
    return True


def write_annotation(artifact: Artifact, name: str, content: bytes | str) -> Path:
    """Write or renew one of ANNOTATIONS in the artifact's folder; its content id does not change. Returns the path."""
    assert name in ANNOTATIONS, f"{name} is not one of {ANNOTATIONS}"
    write_atomic(artifact.path / name, content)
    return artifact.path / name


def _walk(folder: Path) -> Iterator[str]:
    """Relative POSIX names of all regular files below `folder`. ArtifactError for links and special files."""
    unfinished = tuple(f"{name}{TEMPORARY}" for name in (*ANNOTATIONS, MANIFEST))
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise ArtifactError(f"{folder}: {name} is a symbolic link; an artifact may hold plain files only")
        if path.is_dir() or name.startswith(unfinished):
            continue
        if not path.is_file():
            raise ArtifactError(f"{folder}: {name} is neither a file nor a folder")
        yield name


def _shape_problem(folder: Path, name: str, entry: FileEntry) -> str | None:
    """What is wrong with a listed file, without reading it: missing, a link, not a file, or another length."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{name} is a symbolic link that leaves the folder"
    parts = Path(name).parts
    if any(folder.joinpath(*parts[: depth + 1]).is_symlink() for depth in range(len(parts))):
        return f"{name} is a symbolic link; an artifact may hold plain files only"
    if not path.exists():
        return f"{name} is missing"
    if not path.is_file():
        return f"{name} is not a file"
    size = path.stat().st_size
    if size != entry.size_bytes:
        return f"{name} differs; it has {size} bytes, listed are {entry.size_bytes}"
    return None


def _place(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`; keep what is there if it is the same and whole, replace it if it is damaged."""
    try:
        os.rename(temporary, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        try:
            verify(open_artifact(final))
            shutil.rmtree(temporary)
        except ArtifactError:
            aside = temporary.with_name(f"{temporary.name}-damaged")
            os.rename(final, aside)
            os.rename(temporary, final)
            shutil.rmtree(aside, ignore_errors=True)
    sync_folder(final.parent)


def renew_annotations(artifact: Artifact, there: Artifact) -> None:
    """Write the annotations of an artifact beside the same artifact in another folder."""
    for name in _annotations(artifact.path):
        if (artifact.path / name).resolve() != (there.path / name).resolve():
            write_annotation(there, name, (artifact.path / name).read_bytes())


def _annotations(folder: Path) -> list[str]:
    return [name for name in ANNOTATIONS if (folder / name).is_file() and not (folder / name).is_symlink()]
