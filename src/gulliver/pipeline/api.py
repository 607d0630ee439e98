"""The commands that are not steps, and steps as plain functions: `gulliver.quantize(model, calibration=…, bits=4)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gulliver.core.errors import ConfigError, DataError
from gulliver.core.evidence.evidence import METRICS, Evidence
from gulliver.core.names import named
from gulliver.core.progress import Progress
from gulliver.core.quantities import checked_seed
from gulliver.core.store import artifact as artifacts
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.files import named_path
from gulliver.core.store.store import Store
from gulliver.pipeline.ask import own_name
from gulliver.pipeline.call import Call, call
from gulliver.pipeline.resolve import check_input, data_for, original, resolve_any, resolve_inputs, resolve_model
from gulliver.pipeline.steps import checked_config, fields_of, find

_LONG = ("format", "config", "seed", "files")
"""What `show` leaves out of the artifacts of a lineage."""


def step_function(name: str) -> Callable[..., Artifact]:
    """A step as a function: inputs by name or in the table's order, every field of its Config by name.

    It also takes `home`, `database_url`, `seed` and `progress`, and returns the Artifact.
    """
    row = find(name)

    def step(
        *inputs: Any,
        home: Path | str | None = None,
        database_url: str | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        **options: Any,
    ) -> Artifact:
        positions = (*row.needs, *row.optional) or tuple(fields_of(named(row.options)))
        if len(inputs) > len(positions):
            raise ConfigError(f"{name} takes at most {len(positions)} inputs by position: {', '.join(positions)}")
        options = {**dict(zip(positions, inputs, strict=False)), **options}
        given = {role: options.pop(role) for role in (*row.needs, *row.optional) if role in options}
        checked_seed(seed)
        store = Store(home, database_url)
        found = resolve_inputs(row, given, options, store, progress)
        return call(name, options, found, store=store, seed=seed, progress=progress, command=f"gulliver.{name}(…)")

    step.__name__ = step.__qualname__ = name
    step.__doc__ = f"{row.help[:1].upper()}{row.help[1:]}. Inputs: {', '.join((*row.needs, *row.optional)) or 'none'}."
    return step


def audit(
    model: str | Path | Artifact,
    data: str | Path | Artifact | None = None,
    parent: str | Path | Artifact | None = None,
    *,
    eval_data: str | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    include_path: str | None = None,
    home: Path | str | None = None,
    store: Store | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    command: str = "",
    log: list[Call] | None = None,
) -> list[Evidence]:
    """Measure quality, size, memory and speed now; returns the newest evidence about the model.

    `parent` defaults to the model it was made from; `data` to the held-out part of the data it was made with. `tasks`
    names tasks of lm-eval ("arc_easy,hellaswag"), of which `limit` items are scored, and `include_path` a folder with
    tasks of one's own. DataError if there is nothing to measure quality on. MissingExtra for tasks without lm-eval.
    """
    names = [name.strip() for name in tasks.split(",")] if isinstance(tasks, str) else list(tasks or ())
    harness = {"tasks": names, "limit": limit, "include_path": include_path}
    _check_audit(harness, data, eval_data, seed)
    store = store or Store(home)
    for kind, spec in (("model", model), ("model", parent), ("dataset", data), ("dataset", eval_data)):
        if spec is not None:
            check_input(kind, spec, store)
    target = resolve_model(model, store, progress=progress)
    older = original(target, store) if parent is None else resolve_model(parent, store, progress=progress)
    dataset = data_for(target, data, store, eval_data=eval_data, progress=progress)
    if dataset is None and not names:
        told = "was made without data, so there is nothing to measure its quality on"
        raise DataError(f"{target.id[:12]} {told}; add --data, or run `gulliver speed` alone")
    inputs = {"model": target, **({"parent": older} if older else {})}
    shared: dict[str, Any] = {"store": store, "seed": seed, "progress": progress, "command": command, "log": log}
    if names:
        call("harness", harness, inputs, **shared)
    if dataset is not None:
        call("quality", {}, {**inputs, "dataset": dataset}, **shared)
    call("speed", {}, {"model": target}, **shared)
    return newest(store.evidence(target.id))


def _check_audit(harness: Mapping[str, Any], data: Any, eval_data: str | None, seed: int) -> None:
    """ConfigError, before a model is looked for, for options that are wrong or that nothing would use."""
    checked_seed(seed)
    if harness["tasks"]:
        checked_config(find("harness"), harness)
    for name in ("limit", "include_path"):
        if harness[name] is not None and not harness["tasks"]:
            raise ConfigError(f"{name} is for tasks of lm-eval; name some with tasks, or leave it out")
    if eval_data is not None and data is None:
        raise ConfigError(f"eval_data is {eval_data!r}, but data is missing; give both, or leave it out")


def newest(evidence: list[Evidence]) -> list[Evidence]:
    """The last measurement of each metric on each data set, against each parent and on each machine, by metric."""
    last = {(item.metric, item.data_hash, item.parent_id or "", _place(item)): item for item in evidence}
    return [last[key] for key in sorted(last)]


def _place(item: Evidence) -> str:
    """The machine, where a number says nothing without it."""
    return item.machine if METRICS[item.metric].beside == "machine" else ""


def show(spec: str | Path | Artifact, *, home: Path | str | None = None, store: Store | None = None) -> dict[str, Any]:
    """Card, lineage and evidence of an artifact as a JSON object."""
    store = store or Store(home)
    found = resolve_any(spec, store)
    lineage = store.lineage(found.id)
    return {
        **lineage[0],
        "name": own_name(found.path),
        "path": str(found.path),
        "weight_bytes": found.weight_bytes,
        "lineage": [{key: value for key, value in row.items() if key not in _LONG} for row in lineage],
        "evidence": [item.to_json() for item in newest(store.evidence(found.id))],
    }


def verify(spec: str | Path | Artifact, *, home: Path | str | None = None, store: Store | None = None) -> Artifact:
    """Derive every hash of an artifact again; ArtifactError names the first file that differs."""
    if isinstance(spec, Artifact):
        found = spec
    elif named_path(spec).is_dir():
        found = artifacts.open_artifact(named_path(spec))
    else:
        found = resolve_any(spec, store or Store(home))
    artifacts.verify(found)
    return found


def verify_home(home: Path | str | None = None, *, store: Store | None = None) -> dict[str, int]:
    """Derive every hash of a home again: each row of its database against the one before, then each artifact.

    Returns the numbers of rows by table and of artifacts. StorageError names the first row that is not as it was
    written, ArtifactError the first file.
    """
    store = store or Store(home)
    counts = store.verify()
    for problem in store.damaged():
        raise problem
    found = store.artifacts()
    for one in found:
        artifacts.verify(one)
    return {**counts, "artifacts": len(found)}


def list_artifacts(*, home: Path | str | None = None, store: Store | None = None) -> list[Artifact]:
    """All artifacts in the store."""
    return (store or Store(home)).artifacts()
