"""Small artifacts for the tests, and a way to tamper with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gulliver.core.store.artifact import Artifact, create
from gulliver.core.store.manifest import manifest_id

CONTENT = {"config.json": b"{}", "model.safetensors": b"w" * 100, "head/more.safetensors": b"h" * 11}


def make(folder: Path, content: dict[str, bytes] = CONTENT, **changes: Any) -> Artifact:
    options: dict[str, Any] = {
        "kind": "model",
        "task": "language",
        "inputs": {"model": ["a" * 64]},
        "step": {"name": "quantize", "version": 2},
        "config": {"bits": 4, "damping": 0.01},
        "seed": 7,
    }
    with create(folder, **{**options, **changes}) as writer:
        for name, data in content.items():
            (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
            (writer.path / name).write_bytes(data)
        return writer.commit()


def rewrite(artifact: Artifact, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest on disk; its id is made to fit again, as an attacker would."""
    body = json.loads((artifact.path / "gulliver.json").read_bytes())
    change(body)
    body["id"] = manifest_id(body)
    (artifact.path / "gulliver.json").write_text(json.dumps(body))
