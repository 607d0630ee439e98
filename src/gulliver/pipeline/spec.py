"""What users name a model by, as far as that is told without a store, a download or a conversion. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from gulliver.core.errors import ConfigError
from gulliver.core.foreign import check_folder
from gulliver.core.store.artifact import MANIFEST, Artifact, open_artifact
from gulliver.core.store.files import named_path
from gulliver.runtime.packing import is_packed
from gulliver.tasks import converter, detect_task, foreign_files, rewriter

ID = re.compile(r"[0-9a-f]{6,64}")
"""An artifact's id, or how it begins."""
Spec = str | Path | Artifact
"""What users name a model by: an artifact, its id, a folder, a .gguf file, catalog:… or hf:…"""


def local_folder(spec: Spec) -> tuple[Path, str] | None:
    """(folder, family) of a model that needs no looking up and no conversion; None for every other name.

    ConfigError when it is an artifact of another kind; ArtifactError, before any weight is read, for what no family
    reads and no converter converts.
    """
    path = spec.path if isinstance(spec, Artifact) else named_path(spec)
    if isinstance(spec, Artifact) or (path / MANIFEST).is_file():
        artifact = spec if isinstance(spec, Artifact) else open_artifact(path)
        check_model(artifact, spec)
        check_folder(path)
        return None if is_foreign(path) else (path, artifact.task)
    if not (path / "config.json").is_file() or not any(path.glob("*.safetensors")):
        foreign_files(path)  # one that cannot be converted is refused here, before the store is imported
        return None
    task = detect_task(path)
    return None if is_foreign(path) else (path, task)


def check_spec(spec: Spec) -> bool:
    """Refuse what cannot name a model, as far as that can be told without a store, a download or a conversion.

    False when it may be the id of an artifact, which only a store knows. ConfigError for what does not exist or is no
    model, ArtifactError for one that cannot be read.
    """
    if isinstance(spec, Artifact):
        check_model(spec, spec)
        return True
    if str(spec).startswith("catalog:"):
        from gulliver.core.catalog import lookup  # here, because it takes a tenth of the time to a first word

        if (kind := lookup(str(spec)).kind) != "model":
            raise ConfigError(f"{spec} is a {kind}; a model is needed here")
    elif (path := named_path(spec)).exists():
        if local_folder(path) is None and not foreign_files(path):
            (detect_task if path.is_dir() else converter)(path)  # which say what it is instead
    elif ID.fullmatch(str(spec)):
        return False
    elif not str(spec).startswith("hf:"):
        told = "give a folder, a GGUF file, catalog:NAME or hf:ORG/NAME, or the id of an artifact"
        raise ConfigError(f"{spec} does not exist; {told}")
    return True


def is_foreign(folder: Path) -> bool:
    """Whether the model in `folder` must be converted before it is used, as what `export` writes for other tools."""
    if not (folder / "config.json").is_file():
        return bool(foreign_files(folder))
    return not is_packed(folder) and rewriter(folder) is not None


def check_model(artifact: Artifact, spec: object) -> None:
    """ConfigError when the artifact that `spec` names is not a model."""
    if artifact.kind != "model":
        name = spec.id[:12] if isinstance(spec, Artifact) else spec
        raise ConfigError(f"{name} is a {artifact.kind}; a model is needed here")
