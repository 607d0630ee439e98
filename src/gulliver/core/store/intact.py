"""Whether the bytes of an artifact are still those that its id stands for.

Weights are hashed before they are measured, packed or exported. The file system's own stamps of every file (device,
inode, length, times of writing and of change) are kept, so that a process hashes nothing twice and sees whether a file
was touched while it was read.
"""

from __future__ import annotations

from collections.abc import Mapping

from gulliver.core.errors import ArtifactError
from gulliver.core.store.artifact import Artifact, verify
from gulliver.core.store.manifest import MANIFEST

Stamps = Mapping[str, tuple[int, ...]]

_verified: dict[tuple[str, str], Stamps] = {}


def require_intact(artifact: Artifact) -> Stamps:
    """The stamps of an artifact whose bytes are those of its id; hashed unless they bear the stamps of the last time.

    ArtifactError that names the first file that differs.
    """
    key, before = (str(artifact.path), artifact.id), stamps(artifact)
    if _verified.get(key) != before:
        try:
            verify(artifact)
        except ArtifactError as error:
            raise ArtifactError(f"{error}; delete the folder and make or get it again") from None
        _verified[key] = before
    return before


def require_untouched(artifact: Artifact, before: Stamps) -> None:
    """ArtifactError when a file of the artifact was touched since it had these stamps."""
    if stamps(artifact) != before:
        raise ArtifactError(
            f"artifact {artifact.id[:12]} in {artifact.path} was changed while it was read; what was found out about "
            "it holds for nothing, so nothing was kept. Run it again"
        )


def stamps(artifact: Artifact) -> Stamps:
    """What the file system says of every listed file; those that are missing have no stamp."""
    found: dict[str, tuple[int, ...]] = {}
    for name in (*artifact.files, MANIFEST):
        try:
            stat = (artifact.path / name).stat(follow_symlinks=False)
        except OSError:
            continue
        found[name] = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return found
