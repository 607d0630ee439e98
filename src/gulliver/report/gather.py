"""The records about one model, read from a store: what the page, the card and the console show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from gulliver.core import machine
from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.evidence.evidence import Evidence
from gulliver.core.evidence.gate import Verdict
from gulliver.core.records import Asked, FitResult, Origin, PackedWeight, Packing, PartBits, Plan, TensorBits
from gulliver.core.store.artifact import WEIGHT_SUFFIXES, Artifact
from gulliver.core.store.store import Store
from gulliver.report.records import OtherGates, ReportData
from gulliver.report.units import short_id
from gulliver.runtime.formats import Format


def gather(
    model: Artifact,
    store: Store,
    memory: Sequence[tuple[float, str, int]] = (),
    verdicts: Sequence[Verdict] = (),
    others: Sequence[OtherGates] = (),
    evidence: Sequence[Evidence] | None = None,
    fit: Artifact | None = None,
) -> ReportData:
    """All records about `model` that the store holds. ArtifactError if a plan, fit or packing file is malformed.

    `memory` holds (seconds, stage, resident bytes) where no fit recorded any; `verdicts` those that a recipe judged on
    this model, and `others` those on its other models; `evidence` replaces the store's. `fit` is the report artifact
    with fit.json; by default the newest in the store that made this model. For an infeasible budget give the parent as
    `model` and the fit, whose fit.json then names the `nearest` point.
    """
    manifests = oldest_first(store.lineage(model.id))
    evidence = tuple(store.evidence(model.id) if evidence is None else evidence)
    parent_id = _parent_id(model, manifests, evidence)
    parent = next((manifest for manifest in manifests if manifest["id"] == parent_id), {})
    plans = [str(row["id"]) for row in reversed(manifests) if Plan.file in row.get("files", {})]
    plan = Plan.of(store.get(plans[0])) if plans else None
    told = (FitResult.of(fit) if fit is not None else _newest_fit(model, store)) or FitResult()
    if plan is not None and told.budget == Asked():
        told = told.model_copy(update={"budget": Asked(size_bytes=plan.budget_bytes)})
    judged = tuple(dict.fromkeys([*verdicts, *told.verdicts]))
    origin, origin_id = _origin(manifests, store)
    return ReportData(
        title=_called(origin.source) if origin is not None else short_id(model.id),
        artifact_id=model.id,
        task=model.task,
        step=str(model.step["name"]),
        size_bytes=model.weight_bytes or None,
        parent_id=parent_id,
        parent_size_bytes=_weight_bytes(parent) or None,
        evidence=evidence,
        parent_evidence=tuple(store.evidence(parent_id)) if parent_id else (),
        tensors=_tensors(model, plan),
        fit=told.model_copy(update={"memory": tuple(memory) or told.memory, "verdicts": judged}),
        manifests=tuple(manifests),
        machine=machine.kept(store.home),
        data_names=_data_names(store, {row.data_hash for row in evidence}),
        others=tuple(others),
        origin=origin,
        origin_id=origin_id,
    )


def oldest_first(manifests: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A lineage ordered so that every artifact comes after all it was made from."""
    known = {str(manifest["id"]): manifest for manifest in manifests}
    order = TopologicalSorter({one: manifest.get("parents", ()) for one, manifest in known.items()}).static_order()
    return [known[one] for one in order if one in known]


def _called(source: str) -> str:
    """What people call a source: "catalog:…" and "hf:…" as they are, of a path the last part."""
    return source if source.startswith(("catalog:", "hf:")) else Path(source).name


def _newest_fit(model: Artifact, store: Store) -> FitResult | None:
    """The newest fit.json in the store that tells how this model was made; not one that starts from it."""
    for found in reversed(store.artifacts()):
        if found.kind == "report" and model.id in found.parents and FitResult.file in found.files:
            result = FitResult.of(found)
            if result.nearest is None and result.artifact_id in (None, model.id):
                return result
    return None


def _tensors(model: Artifact, plan: Plan | None) -> tuple[TensorBits, ...]:
    """What the model holds, whatever the plan had wanted; the plan's choices where the model does not say."""
    planned = plan.tensors if plan is not None else ()
    if Packing.file not in model.files:
        return planned
    by_name = {tensor.name: tensor for tensor in planned}
    return tuple(_same_formats(by_name.get(tensor.name), tensor) for tensor in of_packing(Packing.of(model)))


def of_packing(packing: Packing) -> tuple[TensorBits, ...]:
    """The formats that a packed model itself lists: what is in the file, whatever a plan had wanted.

    Bits per weight are those of the tiles on disk, padding included. ArtifactError for a format that does not exist.
    """
    return tuple(_held(name, weight) for name, weight in packing.tensors.items())


def _held(name: str, weight: PackedWeight) -> TensorBits:
    columns, parts = math.prod(weight.shape[1:]), []
    for part in weight.parts:
        try:
            size = Format.parse(part.format).packed_bytes(part.rows, columns)
        except ConfigError as error:
            raise ArtifactError(f"{Packing.file}: {name!r}: {error}") from None
        bits = 8 * size / (part.rows * columns)
        parts.append(PartBits(rows=part.rows, format=part.format, bits_per_weight=bits, size_bytes=size))
    size = sum(part.size_bytes for part in parts)
    return TensorBits(name=name, shape=weight.shape, size_bytes=size, parts=tuple(parts))


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
            names |= dict.fromkeys(own, _called(source))
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
