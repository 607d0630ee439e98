"""What users name -> an artifact: an id, a folder, a .gguf file, catalog:… or hf:…; text files or a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gulliver.core import catalog
from gulliver.core.errors import ArtifactError, ConfigError, DataError
from gulliver.core.foreign import foreign
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact, copy_artifact, open_artifact, verify
from gulliver.core.store.files import named_path
from gulliver.core.store.manifest import MANIFEST, UNNAMED
from gulliver.core.store.store import Store
from gulliver.pipeline import steps
from gulliver.pipeline.call import call
from gulliver.pipeline.spec import ID, check_model, check_spec, is_foreign
from gulliver.pipeline.steps import INPUT_KINDS, Step
from gulliver.tasks import DEFAULT


def resolve_inputs(
    row: Step, given: Mapping[str, Any], config: Mapping[str, Any], store: Store, progress: Progress | None = None
) -> dict[str, Any]:
    """What users wrote for a step's inputs -> artifacts by role, a tuple of them where the row allows several.

    A dataset is read for the task of the model beside it. ConfigError for several where one is wanted. Wrong options
    and inputs that do not exist are found first, before a model is downloaded.
    """
    steps.checked_config(row, config)
    specs = {role: _several(row, role, value) for role, value in given.items() if value is not None}
    for role, several in specs.items():
        for spec in several:
            check_input(INPUT_KINDS[role], spec, store)
    found: dict[str, Any] = {}
    task = str(config.get("task") or DEFAULT)
    for role in sorted(specs, key=lambda role: INPUT_KINDS[role] == "dataset"):
        artifacts = []
        for spec in specs[role]:
            if INPUT_KINDS[role] == "model":
                artifacts.append(resolve_model(spec, store, progress=progress))
                task = artifacts[-1].task
            elif INPUT_KINDS[role] == "dataset":
                artifacts.append(resolve_data(spec, store, task=task, progress=progress))
            else:
                artifacts.append(resolve_any(spec, store))
        found[role] = tuple(artifacts) if role in row.several else artifacts[0]
    return found


def _several(row: Step, role: str, value: Any) -> list[Any]:
    """What was written for an input, as a list."""
    if not isinstance(value, (list, tuple)):
        return [value]
    if role not in row.several:
        raise ConfigError(f"step {row.name!r} takes one {role}, not {len(value)}")
    return list(value)


def check_input(kind: str, spec: str | Path | Artifact, store: Store) -> None:
    """Return if `spec` may be an input of this kind, as far as that can be told without a download or a conversion.

    ConfigError, ArtifactError or DataError if not.
    """
    if kind == "dataset":
        check_data(spec, store)
    elif kind != "model":
        resolve_any(spec, store)
    elif not check_spec(spec):
        check_model(store.get(str(spec)), spec)


def resolve_model(spec: str | Path | Artifact, store: Store, *, progress: Progress | None = None) -> Artifact:
    """A model from an artifact, its id or prefix, a folder, a .gguf file, catalog:… or hf:…

    A folder that is an artifact is verified and copied into the store; what is not an artifact, or is one that `export`
    wrote for another tool, goes through the step `pull`. ConfigError if it is something else than a model.
    """
    artifact = _named_artifact(spec, store)
    if artifact is not None:
        check_model(artifact, spec)
        if not is_foreign(artifact.path):
            return artifact if artifact is spec else _in_store(artifact, store)
    source = str(spec if artifact is None else artifact.path)
    made = call("pull", {"source": source}, {}, store=store, progress=progress)
    check_model(made, spec)
    return made


def resolve_data(
    spec: str | Path | Artifact,
    store: Store,
    *,
    eval_data: str | None = None,
    task: str = DEFAULT,
    progress: Progress | None = None,
) -> Artifact:
    """A dataset from an artifact, its id or prefix, its folder; or made by the step `read` from files or catalog:…

    `eval_data` names the held-out part; without it a part of `spec` is held out. ConfigError for another kind.
    """
    artifact = _known_artifact(spec, store)
    if artifact is None:
        config = {"data": str(spec), "eval_data": eval_data, "task": task}
        return call("read", config, {}, store=store, progress=progress)
    if artifact.kind != "dataset":
        raise ConfigError(f"{spec} is a {artifact.kind}; a dataset is needed here")
    if eval_data:
        raise ConfigError(f"{spec} is a dataset that is split already; leave out --eval-data {eval_data}")
    return artifact


def check_data(spec: str | Path | Artifact, store: Store) -> None:
    """Return if `spec` names data that exist; DataError, ConfigError or ArtifactError if not."""
    if isinstance(spec, Artifact):
        return
    path = named_path(spec)
    if str(spec).startswith(catalog.PREFIX):
        catalog.lookup(str(spec))
    elif not path.exists():
        if not ID.fullmatch(str(spec)):
            raise DataError(f"{spec} does not exist; give a file, a folder or catalog:NAME")
        store.get(str(spec))
    elif not path.is_file() and not path.is_dir():
        raise DataError(f"{spec} is a pipe, a socket or a device; give a file, a folder or catalog:NAME")
    else:
        with foreign(f"{spec} cannot be read", DataError):
            empty = not (path.stat().st_size if path.is_file() else any(path.iterdir()))
        if empty:
            raise DataError(f"{spec} is empty; give a file, a folder or catalog:NAME with data in it")


def resolve_any(spec: str | Path | Artifact, store: Store) -> Artifact:
    """An artifact that exists: an Artifact, an id or prefix, or a folder."""
    artifact = _known_artifact(spec, store)
    if artifact is None and not isinstance(spec, Artifact) and (path := named_path(spec)).exists():
        check_spec(path)  # which says what is wrong with what no command takes
        raise ArtifactError(f"{spec} is a model that is not in the store; `gulliver pull {spec}` brings it in")
    if artifact is None:
        told = "is neither the id nor the folder of an artifact; `gulliver list` shows the ids"
        raise ArtifactError(f"{str(spec)!r} {told}")
    return artifact


def data_for(
    model: Artifact,
    data: str | Path | Artifact | None,
    store: Store,
    *,
    eval_data: str | None = None,
    progress: Progress | None = None,
) -> Artifact | None:
    """The dataset `data`; by default that which the model, or else the nearest of what it was made from, was made with.

    None when that is not here.
    """
    if data is not None:
        return resolve_data(data, store, eval_data=eval_data, task=model.task, progress=progress)
    for manifest in store.lineage(model.id):
        if "missing" not in manifest:
            for dataset in _in_roles(store.get(manifest["id"]), ("dataset",), store):
                if dataset.kind == "dataset":
                    return dataset
    return None


def original(model: Artifact, store: Store) -> Artifact | None:
    """What a model must be as good as: its teacher, or what it was made from, back to one that no step compressed."""
    compressing = {row.name for row in steps.STEPS if row.compresses}
    for one in _in_roles(model, ("parent", "model"), store):
        found = original(one, store) if one.step["name"] in compressing else one
        if found is not None and found.kind == "model":
            return found
    return None


def _in_roles(artifact: Artifact, roles: tuple[str, ...], store: Store) -> list[Artifact]:
    """The inputs of an artifact in these roles that are in the store; any input where no roles were recorded."""
    ids = [one for role in (*roles, UNNAMED) for one in artifact.inputs.get(role, ())]
    return [store.get(one) for one in ids if store.has(one)]


def _known_artifact(spec: str | Path | Artifact, store: Store) -> Artifact | None:
    """The artifact that `spec` is or names, in the store; None when it is not the name of an artifact at all."""
    artifact = _named_artifact(spec, store)
    return artifact if artifact is None or artifact is spec else _in_store(artifact, store)


def _named_artifact(spec: str | Path | Artifact, store: Store) -> Artifact | None:
    """The artifact that `spec` is or names, where it lies; verified if that is a folder. None as above."""
    if isinstance(spec, Artifact):
        return spec
    path = named_path(spec)
    if (path / MANIFEST).is_file():
        artifact = open_artifact(path)
        verify(artifact)
        return artifact
    if not path.exists() and ID.fullmatch(str(spec)):
        return store.get(str(spec))
    return None


def _in_store(artifact: Artifact, store: Store) -> Artifact:
    """The same artifact in the store, verified there, or copied into it."""
    if artifact.path == store.artifacts_folder / artifact.id:
        return artifact
    store.copies[artifact.id] = artifact.path
    if not store.has(artifact.id):
        return copy_artifact(artifact, store.artifacts_folder / artifact.id)
    verify(there := store.get(artifact.id))
    return there
