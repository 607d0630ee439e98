"""Checkpoints of the loop: one safetensors file, its scalars as JSON in the header, replaced whole or not at all.

Tensors are written one after the other straight from their own memory, so that saving a model takes no second copy of
it. The file is written beside its name, synced, and renamed: a kill at any instant leaves the old checkpoint or the
new one. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gulliver.core.errors import ArtifactError
from gulliver.core.store.files import sync_folder, temporary_name
from gulliver.runtime.shards import write_tensors

FORMAT = 1
META_KEY = "gulliver.checkpoint"


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk: its scalars, and the names of its tensors."""

    path: Path
    meta: Mapping[str, Any]
    names: tuple[str, ...]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor of any shape) one at a time; each is a view of the file's pages, so copy what is kept.

        The file is opened anew for each, so that the pages of those already read do not stay in memory.
        """
        for name in self.names:
            with safe_open(self.path, framework="pt") as file:
                yield name, file.get_tensor(name)


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Replace `path` atomically. `meta` is any JSON value without NaN; no tensor is copied as long as it is dense.

    `tensors` have any shape and keep their dtype; TypeError for one that safetensors cannot hold.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    rows = {name: (tensors[name].dtype, tensors[name].shape) for name in order}
    text = json.dumps({"format": FORMAT, "meta": meta}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            write_tensors(file, rows, ((name, tensors[name]) for name in order), metadata={META_KEY: text})
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def open_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, or None where there is none. ArtifactError for a file that is not one of ours."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(META_KEY)
            names = tuple(file.keys())
        content = json.loads(text) if text else None
    except (SafetensorError, ValueError, OSError) as error:
        raise ArtifactError(f"the checkpoint {path} cannot be read ({error}); delete it to start afresh") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("meta"), dict):
        raise ArtifactError(f"{path} is not a checkpoint of format {FORMAT}; delete it to start afresh")
    return Checkpoint(path, content["meta"], names)
