"""What a report is drawn from: the records about one model, read from a store, for the page and the card.

A part that is absent stays absent (an empty tuple or None): nothing is made up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.evidence.evidence import METRICS, Evidence
from gulliver.core.evidence.gate import Verdict
from gulliver.core.machine import Machine, kept
from gulliver.core.records import (
    Asked,
    FitResult,
    Origin,
    Packing,
    PartBits,
    PlainTensors,
    Plan,
    TensorBits,
    Training,
)
from gulliver.core.store.artifact import Artifact
from gulliver.core.store.manifest import rows_of
from gulliver.core.store.store import Store
from gulliver.report.units import short_id
from gulliver.runtime.formats import Format

INFEASIBLE, REFUSED, PASS, NOT_JUDGED = "INFEASIBLE", "REFUSED", "PASS", "NOT JUDGED"
DRY_RUN = "DRY RUN"

BROAD_SET = "the broad set"
"""What data are called that a model wrote itself."""


@dataclass(frozen=True)
class OtherGates:
    """The gates that a recipe judged on another of its models; `name` is the id of the call that made it."""

    name: str
    artifact_id: str
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class ReportData:
    """All that one page shows. `manifests` is the lineage, oldest first, this model last.

    `tensors` are its weights as stored, or as planned; `fit` what a run of `fit` tells about it, or a plan alone.
    `others` are the gates on other models of the same recipe: one that refused refuses the recipe and so this model.
    `origin` says what was downloaded, for the model `origin_id` of the lineage. `parent_evidence` is evidence about the
    model's parent (the baseline drawn beside ours); `data_names` maps data hashes to what people call the data;
    `training` is that of the model, or of the nearest one it was made from that was trained here.
    """

    title: str
    artifact_id: str
    task: str
    step: str
    size_bytes: int | None
    parent_id: str | None = None
    parent_size_bytes: int | None = None
    evidence: tuple[Evidence, ...] = ()
    parent_evidence: tuple[Evidence, ...] = ()
    tensors: tuple[TensorBits, ...] = ()
    fit: FitResult = field(default_factory=FitResult)
    manifests: tuple[Mapping[str, Any], ...] = ()
    machine: Machine | None = None
    data_names: Mapping[str, str] = field(default_factory=dict)
    others: tuple[OtherGates, ...] = ()
    origin: Origin | None = None
    origin_id: str = ""
    plain: PlainTensors | None = None
    training: Training | None = None

    @property
    def outcome(self) -> str:
        """The verdict in one word. A gate that has no data refuses; no gate at all is NOT JUDGED."""
        if self.fit.infeasible:
            return INFEASIBLE
        if self.fit.expected_seconds:
            return DRY_RUN
        judged = [*self.fit.verdicts, *(verdict for other in self.others for verdict in other.verdicts)]
        if not all(verdict.passed for verdict in judged):
            return REFUSED
        return PASS if self.fit.verdicts else NOT_JUDGED

    @property
    def parent_download_bytes(self) -> int | None:
        """Bytes of the parent as it was downloaded; None where that is not recorded, or the same as its weights."""
        came = self.origin.original_bytes if self.origin and self.origin_id == self.parent_id else None
        return came if came != self.parent_size_bytes else None

    @property
    def ram_metric(self) -> str:
        """The metric that the asked memory limits: the one that a gate is on, else what was measured."""
        return self._judged_or_measured("peak_ram_bytes", "compress_peak_ram_bytes") or "peak_ram_bytes"

    @property
    def speed_metric(self) -> str | None:
        """The metric of its speed: the one that a gate is on, else the first of METRICS that was measured."""
        return self._judged_or_measured(*(name for name, row in METRICS.items() if row.unit.endswith("/s")))

    def _judged_or_measured(self, *metrics: str) -> str | None:
        gated_on = {gate.metric for gate in self.fit.verdicts}
        return next((name for name in metrics if name in gated_on), next(filter(self.latest, metrics), None))

    def data_name(self, data_hash: str) -> str:
        """What people call the data with this hash; the hash's first figures when it has no name."""
        return self.data_names.get(data_hash, data_hash[:12])

    def latest(self, metric: str) -> Evidence | None:
        """The newest evidence of `metric` about this artifact; of several data sets the worst, as gates judge."""
        newest = {row.data_hash: row for row in self.evidence if row.metric == metric}
        if not newest:
            return None
        sign = -1.0 if next(iter(newest.values())).direction == "higher" else 1.0
        return max(newest.values(), key=lambda row: sign * row.worse_end if math.isfinite(row.worse_end) else math.inf)


def gather(
    model: Artifact,
    store: Store,
    memory: Sequence[tuple[float, str, int]] = (),
    verdicts: Sequence[Verdict] = (),
    others: Sequence[OtherGates] = (),
    fit: Artifact | None = None,
) -> ReportData:
    """All records about `model` that the store holds. ArtifactError if a plan, fit or packing file is malformed.

    `memory` holds (seconds, stage, resident bytes) where no fit recorded any; `verdicts` those that a recipe judged on
    this model, and `others` those on its other models. `fit` is the report artifact with fit.json; by default the
    newest in the store that made this model. For an infeasible budget give the parent as `model` and the fit, whose
    fit.json then names the `nearest` point.
    """
    manifests = oldest_first(store.lineage(model.id))
    recorded = store.evidence(model.id)
    parent_id = _parent_id(model, manifests, recorded, fit)
    evidence = _about(recorded, parent_id)
    parent = store.get(parent_id) if parent_id is not None and store.has(parent_id) else None
    plans = [str(row["id"]) for row in reversed(manifests) if Plan.file in row.get("files", {})]
    plan = Plan.of(store.get(plans[0])) if plans else None
    told = (FitResult.of(fit) if fit is not None else _newest_fit(model, store)) or FitResult()
    if plan is not None and told.budget == Asked():
        told = told.model_copy(update={"budget": Asked(size_bytes=plan.budget_bytes)})
    judged = tuple(dict.fromkeys([*verdicts, *told.verdicts]))
    origin, origin_id = _origin(manifests, store)
    return ReportData(
        title=origin.name or _called(origin.source) if origin is not None else short_id(model.id),
        artifact_id=model.id,
        task=model.task,
        step=str(model.step["name"]),
        size_bytes=model.weight_bytes or None,
        parent_id=parent_id,
        parent_size_bytes=(parent.weight_bytes if parent else 0) or None,
        evidence=evidence,
        parent_evidence=tuple(store.evidence(parent_id)) if parent_id else (),
        tensors=_tensors(model, plan),
        plain=PlainTensors.of(model) if PlainTensors.file in model.files else None,
        fit=told.model_copy(update={"memory": tuple(memory) or told.memory, "verdicts": judged}),
        manifests=tuple(manifests),
        machine=kept(store.home),
        data_names=_data_names(store, evidence),
        others=tuple(others),
        origin=origin,
        origin_id=origin_id,
        training=_training(manifests, store),
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
            if not result.infeasible and result.artifact_id in (None, model.id):
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
    tensors = []
    for name, weight in packing.tensors.items():
        columns = math.prod(weight.shape) // rows_of(weight.shape, weight.inputs)
        parts = []
        for part in weight.parts:
            try:
                size = Format.parse(part.format).packed_bytes(part.rows, columns)
            except ConfigError as error:
                raise ArtifactError(f"{Packing.file}: {name!r}: {error}") from None
            bits = 8 * size / (part.rows * columns)
            parts.append(PartBits(rows=part.rows, format=part.format, bits_per_weight=bits, size_bytes=size))
        size = sum(part.size_bytes for part in parts)
        tensors.append(TensorBits(name=name, shape=weight.shape, size_bytes=size, parts=tuple(parts)))
    return tuple(tensors)


def _same_formats(planned: TensorBits | None, held: TensorBits) -> TensorBits:
    """The plan's row, which knows the predicted loss increase, when it names the formats that the model holds."""
    if planned is None or [(p.rows, p.format) for p in planned.parts] != [(p.rows, p.format) for p in held.parts]:
        return held
    return planned


def _data_names(store: Store, evidence: Sequence[Evidence]) -> dict[str, str]:
    """Names of the measured data: as the evidence says, or from the data sets that hold files with these hashes."""
    names = {row.data_hash: str(row.detail["data"]) for row in evidence if "data" in row.detail}
    hashes = {row.data_hash for row in evidence}
    for found in store.artifacts():
        own = {entry.sha256 for entry in found.files.values()} & hashes if found.kind == "dataset" else set()
        source = found.config.get("eval_data") or found.config.get("data") or found.config.get("source")
        if own and isinstance(source, str):
            names |= dict.fromkeys(own, _called(source))
        elif own and (found.manifest.get("step") or {}).get("name") == "sample":
            names |= dict.fromkeys(own, BROAD_SET)
    return names


def _parent_id(
    model: Artifact, manifests: Sequence[Mapping[str, Any]], evidence: Sequence[Evidence], fit: Artifact | None
) -> str | None:
    """The model that this one stands for: the parent of the fit that made it; else, of those that it was made from,

    the one that it was measured against last, or the nearest; where it was made from none, any that it was measured
    against. Never itself.
    """
    meant = fit.inputs.get("parent", ()) if fit is not None else ()
    models = [str(row["id"]) for row in reversed(manifests) if row.get("kind") == "model" and row["id"] != model.id]
    named = [row.parent_id for row in evidence if row.parent_id and row.parent_id != model.id]
    own = [one for one in named if one in models]
    return next((one for one in (*meant, *own[-1:], *models[:1], *named[-1:]) if one != model.id), None)


def _about(evidence: Sequence[Evidence], parent_id: str | None) -> tuple[Evidence, ...]:
    """Evidence without comparisons with other models, and without times of other machines than that of the newest."""
    times = [row.machine for row in evidence if METRICS[row.metric].beside == "machine"]
    beside = {"parent": (parent_id, None), "machine": times[-1:]}
    found = ((row, METRICS[row.metric].beside) for row in evidence)
    return tuple(
        row for row, kind in found if not kind or (row.parent_id if kind == "parent" else row.machine) in beside[kind]
    )


def _training(manifests: Sequence[Mapping[str, Any]], store: Store) -> Training | None:
    """How the model, or the nearest that it was made from, was trained here; None where none was."""
    for manifest in reversed(manifests):
        if Training.file in manifest.get("files", {}):
            return Training.of(store.get(str(manifest["id"])))
    return None


def _origin(manifests: Sequence[Mapping[str, Any]], store: Store) -> tuple[Origin | None, str]:
    """What was downloaded, and the id of the model made of it: the first of the lineage that has a record."""
    for manifest in manifests:
        if Origin.file in manifest.get("files", {}):
            return Origin.of(store.get(str(manifest["id"]))), str(manifest["id"])
    return None, ""
