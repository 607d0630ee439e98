"""What every command is given beside its options, and what one that made an artifact prints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gulliver.cli.text import megabytes
from gulliver.core.progress import Progress

if TYPE_CHECKING:
    from gulliver.core.store.artifact import Artifact
    from gulliver.core.store.store import Store


@dataclass(frozen=True)
class Session:
    """The store, the progress bars, and the command line that repeats it; `json` says that a document is printed."""

    home: str | None
    database: str | None
    progress: Progress
    command: str
    json: bool = False

    @cached_property
    def store(self) -> Store:
        """The store, opened when it is first needed: answering with a local folder needs none."""
        from gulliver.pipeline.call import open_store

        return open_store(self.home, self.database)


def described(artifact: Artifact, session: Session, out: str | None, *, reused: bool = False) -> tuple[Any, list[str]]:
    """What a command that made an artifact prints; copies it to `out` first."""
    from gulliver.core.store.artifact import copy_artifact

    if out:
        artifact = copy_artifact(artifact, Path(out))
    document = {
        "id": artifact.id,
        "kind": artifact.kind,
        "task": artifact.task,
        "path": str(artifact.path),
        "weight_bytes": artifact.weight_bytes,
        "parents": list(artifact.parents),
        "reused": reused,
        "evidence": [item.to_json() for item in session.store.evidence(artifact.id)],
    }
    size = f", {megabytes(artifact.weight_bytes)} of weights" if artifact.kind == "model" else ""
    again = ", made before" if reused else ""
    return document, [artifact.id, f"{artifact.kind} of task {artifact.task}{size}{again}: {artifact.path}"]
