"""Run one step: reuse by hash, run, record.

The reuse key of a call is the hash of step, version, resolved config, ids of its inputs, contents of the local files it
reads, and seed; never the mere existence of a file. A memory limit is not in the key: what it decides is resolved into
the config before, and a run is found again only if the memory that it held is within the limit asked now. Scratch work
lives under the key, so a call that was killed resumes.

The bytes of every input are hashed before a step runs, and none may have been touched when it ends or records
evidence: what is written down under an id is true of that content.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gulliver.core import machine, memory
from gulliver.core.context import LIMIT, Context, beyond, noted_peak
from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.evidence.gate import Meant
from gulliver.core.foreign import files_below
from gulliver.core.names import did_you_mean, named
from gulliver.core.progress import Progress
from gulliver.core.quantities import checked_seed
from gulliver.core.store.artifact import (
    Artifact,
    another_artifact,
    canonical_json,
    check_target,
    hash_file,
    held_artifact,
    open_artifact,
    renew_annotations,
)
from gulliver.core.store.disk import storage_errors
from gulliver.core.store.files import named_path, sweep
from gulliver.core.store.intact import require_intact, require_untouched
from gulliver.core.store.store import RunRecord, Store
from gulliver.pipeline.steps import INPUT_KINDS, Step, checked_config, find
from gulliver.tasks import options_of
from gulliver.tasks.options import checked_options

Inputs = Mapping[str, Artifact | tuple[Artifact, ...]]
"""What a step is given: one artifact by role; several, in order, where the step's row says so."""


@dataclass(frozen=True)
class Call:
    """What one call did: the artifact it made or found; the peak and `made_in` are those of the run which made it.

    `seconds` are those of this call, near zero where it was found.
    """

    id: str
    step: str
    artifact: Artifact
    reused: bool
    seconds: float
    peak_rss_bytes: int
    made_in: float = 0.0


def call(
    name: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Artifact | str | Sequence[Artifact | str]],
    *,
    store: Store,
    seed: int = 0,
    progress: Progress | None = None,
    command: str = "",
    log: list[Call] | None = None,
    call_id: str = "",
    out: Path | str | None = None,
) -> Artifact:
    """The artifact of one step: found when the same call was made before, made now otherwise.

    `inputs` are artifacts or their ids by role, a sequence of them where the step's row allows several. What was done
    is appended to `log`. `out`, where the caller will copy it, is checked before the work. Raises ConfigError for a
    wrong config or input, BudgetError for a memory limit that was not held, StorageError for a disk that is full or
    refuses, and whatever the step raises.
    """
    row = find(name)
    checked_seed(seed)
    asked = checked_config(row, config)
    given = checked_inputs(row, inputs, store)
    cfg = resolved(asked, given)
    key = reuse_key(row, cfg, given, seed, _here(store) if row.here else "")
    limit = asked.model_dump().get(LIMIT)
    started = time.monotonic()
    with storage_errors(store.home), store.lock(key):
        run = store.find_run(key, limit)
        reused = run is not None and store.has(run.artifact_id)  # which may be gone, or damaged
        if out is not None:
            _check_out(out, store, row, cfg, _ids(given), seed, run.artifact_id if run is not None and reused else None)
        if run is None or not reused:
            sweep(store.work(key))
            if limit is not None and noted_peak(store.work(key)) > limit:
                store.clear_work(key)  # what a killed call left there took more memory than is allowed now
            context = Context(
                store=store,
                progress=progress or Progress(),
                work=store.work(key),
                step=row.name,
                version=row.version,
                inputs=_ids(given),
                seed=seed,
                command=command or f"gulliver {name}",
                max_ram_bytes=limit,
                machine_name=machine.describe(store.home, measure=False).name,
                untouched=_untouched(given),
            )
            run = _run(row, key, asked, cfg, given, context)
        else:
            store.clear_work(key)  # left by a call that was killed just after it was recorded
    artifact = store.get(run.artifact_id)
    if log is not None:
        seconds = time.monotonic() - started
        log.append(Call(call_id or name, name, artifact, reused, seconds, run.peak_rss_bytes, run.seconds))
    return artifact


def _untouched(inputs: Inputs) -> Callable[[], None]:
    """ArtifactError unless every input holds the bytes of its id; what is returned raises it for one touched since."""
    given = [one for value in inputs.values() for one in (value if isinstance(value, tuple) else (value,))]
    stamps = [(one, require_intact(one)) for one in given]

    def check() -> None:
        for one, before in stamps:
            require_untouched(one, before)

    return check


def _run(row: Step, key: str, asked: Any, cfg: Any, inputs: Inputs, context: Context) -> RunRecord:
    """Run a step; the record of it and of what it made. BudgetError when it took more memory than its limit."""
    store, limit = context.store, context.max_ram_bytes
    memory.reset_peak_rss()
    begun = time.monotonic()
    artifact = named(row.function)(cfg, inputs, context)
    context.untouched()
    seconds = time.monotonic() - begun
    assert artifact.kind in row.makes, f"step {row.name} made a {artifact.kind}; the table says {row.makes}"
    run = store.finish_run(
        key,
        step=row.name,
        config=asked.model_dump(mode="json"),
        inputs=context.inputs,
        artifact_id=artifact.id,
        seconds=seconds,
        peak_rss_bytes=context.peak_rss_bytes(),
    )
    store.clear_work(key)  # after the run is recorded, so that a kill between the two loses nothing
    renew_cards(context.recorded, store, context.progress)
    if limit is not None and run.peak_rss_bytes > limit:
        raise beyond(limit, run.peak_rss_bytes, f"in step {row.name}")
    return run


def _check_out(
    out: Path | str, store: Store, row: Step, cfg: Any, ids: Mapping[str, list[str]], seed: int, known: str | None
) -> None:
    """ArtifactError when `out` holds another artifact than this call will make: `known`, or one that was asked so."""
    there = held_artifact(check_target(out, store.home))
    if there is None:
        return
    asked = {name: value for name, value in cfg.model_dump(mode="json").items() if name not in row.reads}
    other = [
        name
        for name, value in asked.items()
        if isinstance(value, int | float | str) and value != "auto" and there.config.get(name, value) != value
    ]
    made_so = there.step == {"name": row.name, "version": row.version} and there.seed == seed and not other
    inputs = {role: list(several) for role, several in there.inputs.items()}
    if there.id != known if known is not None else not (made_so and inputs == ids):
        raise another_artifact(there)


def renew_cards(artifact_ids: Iterable[str], store: Store, progress: Progress) -> None:
    """Write the card and evidence.json beside each of these models that is in the store, from all evidence by now.

    The same goes into the folder outside the store that the user named. A card that cannot be written (something in
    the lineage is damaged, a folder may not be written into) is told, and fails nothing.
    """
    from gulliver.report import card  # here, because most calls record no evidence

    for one in sorted(artifact_ids):
        if store.has(one) and store.get(one).kind == "model":
            try:
                with store.lock(f"card-{one[:32]}"):
                    card.write_card(store.get(one), store)
                    if one in store.copies:
                        renew_annotations(store.get(one), open_artifact(store.copies[one]))
            except (ArtifactError, OSError) as failure:
                progress.print(f"the card of {one[:12]} was not renewed: {failure}")


def resolved(asked: Any, inputs: Inputs) -> Any:
    """Options with "auto", what a limit decides, and all that the model's family leaves to its defaults filled in.

    ConfigError for an option that the family does not have.
    """
    cfg = asked.resolved(inputs)
    values = dict(cfg)
    if "family" not in values:
        return cfg
    given = (one for value in inputs.values() for one in (value if isinstance(value, tuple) else (value,)))
    of_kind = {one.kind: one for one in reversed(list(given))}
    task = values.get("task") or (of_kind.get("model") or of_kind["dataset"]).task
    family = checked_options(task, options_of(task), values["family"])
    return cfg.model_copy(update={"family": family.model_dump(mode="json")})


def _here(store: Store) -> str:
    """What a time depends on beside the model: this machine, the cores that may be used, and what runs models here."""
    return f"{machine.describe(store.home, measure=False).name}; native: {has_native()}"


def has_native() -> bool:
    """Whether there is native code here to run models."""
    from gulliver.runtime.decode import native_reason  # here, because most calls time nothing

    return native_reason() is None


def meant(store: Store, parent: Artifact | None) -> Meant:
    """What evidence must have been measured against and on to count here."""
    found = machine.describe(store.home, measure=False)
    return Meant(None if parent is None else parent.id, found.name, found.cores, has_native())


def reuse_key(row: Step, cfg: Any, inputs: Inputs, seed: int, place: str = "") -> str:
    """SHA-256 over all that decides the result of a call; `cfg` is resolved, `place` where that holds."""
    values = cfg.model_dump(mode="json", exclude={LIMIT})
    parts = {"step": row.name, "version": row.version, "config": values, "inputs": _ids(inputs), "seed": seed}
    parts["files"] = {field: _contents(cfg.files(field)) for field in row.reads}
    if place:
        parts["place"] = place
    return hashlib.sha256(canonical_json(parts)).hexdigest()


def checked_inputs(
    row: Step, inputs: Mapping[str, Artifact | str | Sequence[Artifact | str]], store: Store
) -> dict[str, Any]:
    """The artifacts of `inputs` by role: one, or a tuple of them where the row allows several.

    ConfigError if one is unknown, missing, given twice or of another kind.
    """
    known = (*row.needs, *row.optional)
    given: dict[str, Any] = {}
    for role, value in inputs.items():
        if role not in known:
            raise ConfigError(f"step {row.name!r} takes no input {role!r}{did_you_mean(role, known)}")
        kind = INPUT_KINDS[role]
        if role not in row.several and not isinstance(value, (Artifact, str)):
            raise ConfigError(f"input {role} of step {row.name!r} must be one {kind}, not several")
        several = [value] if isinstance(value, (Artifact, str)) else value
        artifacts = tuple(store.get(one) if isinstance(one, str) else one for one in several)
        for other in artifacts:
            if other.kind != kind:
                told = f"input {role} of step {row.name!r} must be a {kind}"
                raise ConfigError(f"{told}; {other.id[:12]} is a {other.kind}")
        if len({artifact.id for artifact in artifacts}) < len(artifacts):
            raise ConfigError(f"input {role} of step {row.name!r} holds the same {kind} twice")
        if artifacts:
            given[role] = artifacts if role in row.several else artifacts[0]
    for role in row.needs:
        if role not in given:
            raise ConfigError(f"step {row.name!r} needs the input {role!r} (a {INPUT_KINDS[role]})")
    return given


def _ids(inputs: Inputs) -> dict[str, list[str]]:
    """Content ids by role, in the order in which several were given."""
    return {
        role: [artifact.id for artifact in (value if isinstance(value, tuple) else (value,))]
        for role, value in inputs.items()
    }


def _contents(value: Any) -> Any:
    """Hashes of the local files that a config value names; None for names that are not local."""
    if isinstance(value, (list, tuple)):
        return [_contents(part) for part in value]
    if not isinstance(value, str):
        return None
    path = named_path(value)
    try:
        if path.is_file():
            return hash_file(path)
        files = files_below(path, None) if path.is_dir() else None
        return files and {part.relative_to(path).as_posix(): hash_file(part) for part in files}
    except OSError as failure:
        raise ConfigError(f"{failure.filename} cannot be read: {failure.strerror}") from None
