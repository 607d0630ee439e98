"""Run one step: reuse by hash, run, record.

The reuse key of a call is the hash of step, version, config, ids of its inputs, contents of the local files it reads,
and seed; never the mere existence of a file. Scratch work lives under the key, so a call that was killed resumes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gulliver.core import machine, memory
from gulliver.core.context import Context
from gulliver.core.errors import ConfigError
from gulliver.core.progress import Progress
from gulliver.core.store.artifact import Artifact, canonical_json, hash_file
from gulliver.core.store.store import Store
from gulliver.pipeline.steps import INPUT_KINDS, Step, checked_config, did_you_mean, find, function


@dataclass(frozen=True)
class Call:
    """What one call did: the artifact it made or found, and what making it took."""

    id: str
    step: str
    artifact: Artifact
    reused: bool
    seconds: float
    peak_rss_bytes: int


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
