"""The records about one model, read from a store: what the page, the card and the console show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gulliver.core.evidence.evidence import Evidence
from gulliver.core.evidence.gate import Verdict
from gulliver.core.records import FitResult, Origin, Packing, Plan, TensorBits
from gulliver.core.store.artifact import WEIGHT_SUFFIXES, Artifact
from gulliver.core.store.manifest import read_json
from gulliver.core.store.store import Store
from gulliver.report.records import FitRecord, OtherGates, ReportData, gated, of_fit, of_packing, of_plan
from gulliver.report.units import short_id


def gather(
    model: Artifact,
    store: Store,
    memory: Sequence[tuple[float, str, int]] = (),
    verdicts: Sequence[Verdict] = (),
    others: Sequence[OtherGates] = (),
    evidence: Sequence[Evidence] | None = None,
    fit: Artifact | None = None,
) -> ReportData:
    """All records about `model` that the store holds, as one frozen record; `evidence` replaces the store's."""
    manifests = oldest_first(store.lineage(model.id))
    evidence = tuple(store.evidence(model.id) if evidence is None else evidence)
    parent_id = _parent_id(model, manifests, evidence)
    parent = next((manifest for manifest in manifests if manifest["id"] == parent_id), {})
    record = _fit_record(model, store, manifests, fit)
    origin, origin_id = _origin(manifests, store)
    if memory:
        record = replace(record, memory=tuple(memory))
    if verdicts:
        record = replace(record, gates=tuple(dict.fromkeys([*map(gated, verdicts), *record.gates])))
    return ReportData(
        title=model_name(manifests) or short_id(model.id),
        artifact_id=model.id,
        task=model.task,
        step=str(model.step["name"]),
        size_bytes=model.weight_bytes or None,
        parent_id=parent_id,
        parent_size_bytes=_weight_bytes(parent) or None,
        evidence=evidence,
        parent_evidence=tuple(store.evidence(parent_id)) if parent_id else (),
        fit=record,
        manifests=tuple(manifests),
        machine=_machine(store.home / "machine.json"),
        data_names=_data_names(store, {row.data_hash for row in evidence}),
        others=tuple(others),
        origin=origin,
        origin_id=origin_id,
    )


def oldest_first(manifests: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A lineage ordered so that every artifact comes after all it was made from."""
    waiting = {str(manifest["id"]): manifest for manifest in reversed(manifests)}
    ordered: dict[str, Mapping[str, Any]] = {}

    def place(identifier: str) -> None:
        manifest = waiting.pop(identifier, None)
        if manifest is not None:
            for parent in manifest.get("parents", ()):
                place(parent)
            ordered[identifier] = manifest

    while waiting:
        place(next(iter(waiting)))
    return list(ordered.values())


def model_name(manifests: Sequence[Mapping[str, Any]]) -> str:
    """The name under which the first model of a lineage was fetched: "catalog:…", "hf:…", or a file's last part."""
    for manifest in manifests:
        source = manifest.get("config", {}).get("source")
        if manifest.get("kind") == "model" and isinstance(source, str):
            return source if source.startswith(("catalog:", "hf:")) else Path(source).name
    return ""


def _fit_record(
    model: Artifact, store: Store, manifests: Sequence[Mapping[str, Any]], fit: Artifact | None
) -> FitRecord:
    """The plan nearest in the lineage, overlaid with the fit about this model and with what the model holds."""
    record = FitRecord()
    plans = [str(row["id"]) for row in reversed(manifests) if Plan.file in row.get("files", {})]
    if plans:
        record = of_plan(Plan.of(store.get(plans[0])))
    newer = of_fit(FitResult.of(fit)) if fit is not None else _newest_fit(model, store)
    if newer is not None:
        empty = FitRecord()
        changed = {name: value for name, value in vars(newer).items() if value != getattr(empty, name)}
        record = replace(record, **changed)
    if Packing.file in model.files:
        held = of_packing(Packing.of(model))
        planned = {tensor.name: tensor for tensor in record.tensors}
        record = replace(record, tensors=tuple(_same_formats(planned.get(tensor.name), tensor) for tensor in held))
    return record


def _newest_fit(model: Artifact, store: Store) -> FitRecord | None:
    """The newest fit.json in the store that tells how this model was made; not one that starts from it."""
    for found in reversed(store.artifacts()):
        if found.kind == "report" and model.id in found.parents and FitResult.file in found.files:
            record = of_fit(FitResult.of(found))
            if record.nearest is None and record.artifact_id in ("", model.id):
                return record
    return None


def _same_formats(planned: TensorBits | None, held: TensorBits) -> TensorBits:
    """The plan's row, which knows the predicted loss increase, when it names the formats that the model holds."""
    if planned is None or [(p.rows, p.format) for p in planned.parts] != [(p.rows, p.format) for p in held.parts]:
        return held
    return planned


def _data_names(store: Store, hashes: set[str]) -> dict[str, str]:
    """Names of the measured data, from the data sets of the store that hold files with these hashes."""
    names = {}
    for found in store.artifacts():
        own = {entry.sha256 for entry in found.files.values()} & hashes if found.kind == "dataset" else set()
        source = found.config.get("eval_data") or found.config.get("data") or found.config.get("source")
        if own and isinstance(source, str):
            shown = source if source.startswith(("catalog:", "hf:")) else Path(source).name
            names |= dict.fromkeys(own, shown)
    return names


def _parent_id(model: Artifact, manifests: Sequence[Mapping[str, Any]], evidence: Sequence[Evidence]) -> str | None:
    """The model that this one was measured against; else its nearest ancestor that is a model."""
    named = [row.parent_id for row in evidence if row.parent_id]
    if named:
        return named[-1]
    models = [str(row["id"]) for row in reversed(manifests) if row.get("kind") == "model" and row["id"] != model.id]
    return models[0] if models else None


def _origin(manifests: Sequence[Mapping[str, Any]], store: Store) -> tuple[Origin | None, str]:
    """What was downloaded, and the id of the model made of it: the first of the lineage that has a record."""
    for manifest in manifests:
        if Origin.file in manifest.get("files", {}):
            return Origin.of(store.get(str(manifest["id"]))), str(manifest["id"])
    return None, ""


def _weight_bytes(manifest: Mapping[str, Any]) -> int:
    files = manifest.get("files", {})
    return sum(entry["size_bytes"] for name, entry in files.items() if name.endswith(WEIGHT_SUFFIXES))


def _machine(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    found = read_json(path.read_bytes(), path.name)
    return found if isinstance(found, dict) else {}
