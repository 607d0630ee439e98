"""Run steps: reuse by hash, run, record. And the recipe loop: run each call, judge each gate, stop if refused.

The reuse key of a call is the hash of step, version, config, ids of its inputs, contents of the local files it reads,
and seed; never the mere existence of a file. Scratch work lives under the key, so a call that was killed goes on where
it stopped.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gulliver.core import machine, memory
from gulliver.core.artifact import Artifact, canonical_json, copy_artifact, hash_file, open_artifact, verify
from gulliver.core.context import Context
from gulliver.core.errors import ArtifactError, ConfigError, GateRefused
from gulliver.core.gate import Verdict, require
from gulliver.core.progress import Progress
from gulliver.core.store import Store
from gulliver.recipe import Recipe, StepCall, load
from gulliver.steps import INPUT_KINDS, Step, checked_config, did_you_mean, find, function

_ID = re.compile(r"[0-9a-f]{6,64}")


@dataclass(frozen=True)
class Call:
    """What one call did: the artifact it made or found, and what making it took."""

    id: str
    step: str
    artifact: Artifact
    reused: bool
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class RecipeRun:
    """What a recipe did; `report` is the HTML file, or None when no model was made."""

    name: str
    calls: tuple[Call, ...]
    verdicts: tuple[Verdict, ...]
    report: Path | None


def open_store(home: Path | str | None = None, database_url: str | None = None) -> Store:
    """The store under `home` (default ~/.gulliver), with its database there or at `database_url`."""
    return Store(home, database_url)


# ---- one call ----------------------------------------------------------------------------------------------------


def call(
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Artifact | str],
    *,
    home: Path | str | None = None,
    store: Store | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    command: str = "",
    max_ram_bytes: int | None = None,
    log: list[Call] | None = None,
    call_id: str = "",
) -> Artifact:
    """The artifact of one step: found when the same call was made before, made now otherwise.

    `inputs` are artifacts or their ids by input name. What was done is appended to `log`. Raises ConfigError for a
    wrong config or input, and whatever the step raises.
    """
    row = find(name)
    cfg = checked_config(row, config)
    store = store or open_store(home)
    given = checked_inputs(row, inputs, store)
    key = reuse_key(row, cfg, given, seed)
    progress = progress or Progress()
    with store.lock(key):
        artifact, started, peak_rss_bytes = _found(store, key), time.monotonic(), 0
        reused = artifact is not None
        if artifact is None:
            context = Context(
                store=store,
                progress=progress,
                work=store.work(key),
                seed=seed,
                command=command or f"gulliver {name}",
                max_ram_bytes=max_ram_bytes or getattr(cfg, "max_ram_bytes", None),
                machine_name=machine.describe(store.home, measure=False).name,
                step_version=row.version,
            )
            memory.reset_peak_rss()
            artifact = function(row)(cfg, given, context)
            peak_rss_bytes = memory.peak_rss_bytes()
            assert artifact.kind in row.makes, f"step {name} made a {artifact.kind}; the table says {row.makes}"
            _finish(store, key, row, cfg, given, artifact, time.monotonic() - started, peak_rss_bytes)
    if log is not None:
        log.append(Call(call_id or name, name, artifact, reused, time.monotonic() - started, peak_rss_bytes))
    return artifact


def reuse_key(row: Step, cfg: Any, inputs: Mapping[str, Artifact], seed: int) -> str:
    """SHA-256 over all that decides the result of a call."""
    values = cfg.model_dump(mode="json")
    return hashlib.sha256(
        canonical_json(
            {
                "step": row.name,
                "version": row.version,
                "config": values,
                "inputs": {role: artifact.id for role, artifact in inputs.items()},
                "seed": seed,
                "files": {field: _contents(values.get(field)) for field in row.reads},
            }
        )
    ).hexdigest()


def checked_inputs(row: Step, inputs: Mapping[str, Artifact | str], store: Store) -> dict[str, Artifact]:
    """The artifacts of `inputs` by name. ConfigError if one is unknown, missing or of another kind."""
    known = (*row.needs, *row.optional)
    given = {}
    for role, value in inputs.items():
        if role not in known:
            raise ConfigError(f"step {row.name!r} takes no input {role!r}{did_you_mean(role, known)}")
        artifact = store.get(value) if isinstance(value, str) else value
        if artifact.kind != INPUT_KINDS[role]:
            told = f"input {role} of step {row.name!r} must be a {INPUT_KINDS[role]}"
            raise ConfigError(f"{told}; {artifact.id[:12]} is a {artifact.kind}")
        given[role] = artifact
    for role in row.needs:
        if role not in given:
            raise ConfigError(f"step {row.name!r} needs the input {role!r} (a {INPUT_KINDS[role]})")
    return given


def _contents(value: Any) -> Any:
    """Hashes of the local files that a config value names; None for names that are not local."""
    if isinstance(value, (list, tuple)):
        return [_contents(part) for part in value]
    if not isinstance(value, str) or not value:
        return None
    path = Path(value).expanduser()
    if path.is_file():
        return hash_file(path)
    if path.is_dir():
        files = sorted(part for part in path.rglob("*") if part.is_file())
        return {part.relative_to(path).as_posix(): hash_file(part) for part in files}
    return None


def _found(store: Store, key: str) -> Artifact | None:
    """The artifact of an earlier run with this key, unless it is gone or damaged."""
    identity = store.find_run(key)
    return store.get(identity) if identity is not None and store.has(identity) else None


def _finish(
    store: Store,
    key: str,
    row: Step,
    cfg: Any,
    inputs: Mapping[str, Artifact],
    artifact: Artifact,
    seconds: float,
    peak_rss_bytes: int,
) -> None:
    """Record the run, then delete its scratch: in this order, so that a kill between the two loses nothing."""
    store.finish_run(
        key,
        step=row.name,
        config=cfg.model_dump(mode="json"),
        inputs={role: given.id for role, given in inputs.items()},
        artifact_id=artifact.id,
        seconds=seconds,
        peak_rss_bytes=peak_rss_bytes,
    )
    store.clear_work(key)


# ---- what users call a model or a dataset -> an artifact ------------------------------------------------------------


def resolve_model(spec: str | Path | Artifact, store: Store, *, progress: Progress | None = None) -> Artifact:
    """A model from an artifact, its id or prefix, a folder, a .gguf file, catalog:… or hf:…

    A folder that is an artifact is verified and copied into the store; what is not an artifact goes through the step
    `pull`. ConfigError if it is something else than a model.
    """
    found = _known_artifact(spec, store)
    artifact = found or call("pull", {"source": str(spec)}, {}, store=store, progress=progress)
    if artifact.kind != "model":
        raise ConfigError(f"{spec} is a {artifact.kind}; a model is needed here")
    return artifact


def resolve_data(
    spec: str | Path | Artifact,
    store: Store,
    *,
    eval_data: str | None = None,
    task: str = "language",
    progress: Progress | None = None,
) -> Artifact:
    """A dataset from an artifact, its id or prefix, its folder; or made by the step `read` from files or catalog:…

    `eval_data` names the held-out part; without it a part of `spec` is held out. ConfigError if it is no dataset.
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


def resolve_any(spec: str | Path | Artifact, store: Store) -> Artifact:
    """An artifact that exists: an Artifact, an id or prefix, or a folder."""
    artifact = _known_artifact(spec, store)
    if artifact is None:
        told = "is neither the id nor the folder of an artifact; `gulliver list` shows the ids"
        raise ArtifactError(f"{str(spec)!r} {told}")
    return artifact


def ancestors(artifact: Artifact, store: Store) -> list[Artifact]:
    """What an artifact was made from, nearest first, as far as it is in the store."""
    return [store.get(manifest["id"]) for manifest in store.lineage(artifact.id)[1:] if "missing" not in manifest]


def first_of_kind(artifacts: list[Artifact], kind: str) -> Artifact | None:
    """The first artifact of a kind, None where there is none."""
    return next((artifact for artifact in artifacts if artifact.kind == kind), None)


def _known_artifact(spec: str | Path | Artifact, store: Store) -> Artifact | None:
    """The artifact that `spec` is or names in the store; None when it is not the name of an artifact at all."""
    if isinstance(spec, Artifact):
        return spec
    path = Path(spec).expanduser()
    if (path / "gulliver.json").is_file():
        artifact = open_artifact(path)
        verify(artifact)
        return copy_artifact(artifact, store.artifacts_folder / artifact.id)
    if not path.exists() and _ID.fullmatch(str(spec)):
        return store.get(str(spec))
    return None


# ---- a recipe ------------------------------------------------------------------------------------------------------


def run_recipe(
    path: Path | str,
    *,
    home: Path | str | None = None,
    store: Store | None = None,
    progress: Progress | None = None,
    command: str = "",
    report: Path | str | None = None,
) -> RecipeRun:
    """Run a recipe file; what was done before is found, not done again. GateRefused if a gate refuses.

    An HTML report is written beside the last model, or to `report`, also when a gate refuses.
    """
    recipe = load(path)
    store = store or open_store(home or recipe.home)
    progress = progress or Progress()
    made: dict[str, Artifact] = {}
    log: list[Call] = []
    verdicts: list[Verdict] = []
    refused: GateRefused | None = None
    for item in recipe.calls:
        if isinstance(item, StepCall):
            inputs = {role: made[identity] for role, identity in item.inputs.items()}
            made[item.id] = call(
                item.use,
                item.config.model_dump(),
                inputs,
                store=store,
                seed=item.seed,
                progress=progress,
                command=command or f"gulliver run {path}",
                log=log,
                call_id=item.id,
            )
            continue
        target = made[item.on]
        verdicts.append(item.gate.judge(store.evidence(target.id), target.id))
        try:
            require(verdicts[-1:])
        except GateRefused as failure:
            refused = failure
            break
    written = _write_report(recipe, log, store, progress, report)
    if refused is not None:
        raise refused
    return RecipeRun(recipe.name, tuple(log), tuple(verdicts), written)


def _write_report(
    recipe: Recipe, log: list[Call], store: Store, progress: Progress, report: Path | str | None
) -> Path | None:
    """The HTML report about the last model that the recipe made."""
    models = [entry.artifact for entry in log if entry.artifact.kind == "model"]
    if not models:
        return None
    from gulliver.report.html import write_report

    path = Path(report) if report else models[-1].path / "report.html"
    write_report(path, models[-1], store, memory=progress.memory)
    return path
