"""What a report is drawn from, as frozen records made of those in core/records.py.

A part that is absent stays absent (an empty tuple or None): nothing is made up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gulliver.core.errors import ArtifactError, ConfigError
from gulliver.core.evidence.evidence import METRICS, Evidence
from gulliver.core.evidence.gate import Verdict
from gulliver.core.records import Asked, FitResult, Origin, PackedWeight, Packing, PartBits, Plan, Point, TensorBits
from gulliver.runtime.formats import Format

INFEASIBLE, REFUSED, PASS, NOT_JUDGED = "INFEASIBLE", "REFUSED", "PASS", "NOT JUDGED"


@dataclass(frozen=True)
class Gated:
    """One judged gate: `threshold` in the metric's unit; `evidence` is what decided, or None."""

    metric: str
    limit: str  # "at most" or "at least"
    threshold: float
    outcome: str  # PASS, FAIL or NO_DATA
    reason: str
    evidence: Evidence | None = None


@dataclass(frozen=True)
class FitRecord:
    """What plan and fit tell about a model: choices per tensor, frontier, rounds, memory over time.

    `memory` is (seconds, stage, resident bytes); `nearest` is the nearest feasible point of an infeasible budget;
    `artifact_id` is the model that was made, "" where the file names none.
    """

    tensors: tuple[TensorBits, ...] = ()
    frontier: tuple[Point, ...] = ()
    rounds: tuple[Point, ...] = ()
    memory: tuple[tuple[float, str, int], ...] = ()
    asked: Asked = field(default_factory=Asked)
    gates: tuple[Gated, ...] = ()
    nearest: Point | None = None
    seconds: float | None = None
    reason: str = ""
    artifact_id: str = ""


@dataclass(frozen=True)
class OtherGates:
    """The gates that a recipe judged on another of its models; `name` is the id of the call that made it."""

    name: str
    artifact_id: str
    gates: tuple[Gated, ...]


@dataclass(frozen=True)
class ReportData:
    """All that one page shows. `manifests` is the lineage, oldest first, this model last.

    `others` are the gates on other models of the same recipe: one that refused refuses the recipe and so this model.
    `origin` says what was downloaded, for the model `origin_id` of the lineage. `parent_evidence` is evidence about the
    model's parent (the baseline drawn beside ours); `data_names` maps data hashes to what people call the data.
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
    fit: FitRecord = field(default_factory=FitRecord)
    manifests: tuple[Mapping[str, Any], ...] = ()
    machine: Mapping[str, Any] = field(default_factory=dict)
    data_names: Mapping[str, str] = field(default_factory=dict)
    others: tuple[OtherGates, ...] = ()
    origin: Origin | None = None
    origin_id: str = ""

    @property
    def outcome(self) -> str:
        """The verdict in one word. A gate that has no data refuses; no gate at all is NOT JUDGED."""
        if self.fit.nearest is not None:
            return INFEASIBLE
        if any(gate.outcome != "PASS" for gates in (self.fit.gates, *(o.gates for o in self.others)) for gate in gates):
            return REFUSED
        return PASS if self.fit.gates else NOT_JUDGED

    @property
    def parent_download_bytes(self) -> int | None:
        """Bytes of the parent as it was downloaded; None where that is not recorded, or the same as its weights."""
        came = self.origin.original_bytes if self.origin and self.origin_id == self.parent_id else None
        return came if came != self.parent_size_bytes else None

    @property
    def ram_metric(self) -> str:
        """The metric that the asked memory limits: the one that a gate is on, else what was measured."""
        gated_on = {gate.metric for gate in self.fit.gates}
        names = ("peak_ram_bytes", "compress_peak_ram_bytes")
        found = [name for name in names if name in gated_on] or [name for name in names if self.latest(name)]
        return found[0] if found else names[0]

    @property
    def speed_metric(self) -> str | None:
        """The metric of its speed: the one that a gate is on, else the first of METRICS that was measured."""
        gated_on = {gate.metric for gate in self.fit.gates}
        speeds = [name for name, row in METRICS.items() if row.unit.endswith("/s")]
        return next((name for name in speeds if name in gated_on), next(filter(self.latest, speeds), None))

    def data_name(self, data_hash: str) -> str:
        """What people call the data with this hash; the hash's first figures when it has no name."""
        return self.data_names.get(data_hash, data_hash[:12])

    def latest(self, metric: str) -> Evidence | None:
        """The newest evidence of `metric` about this artifact; of several data sets the worst, as gates judge."""
        newest = {row.data_hash: row for row in self.evidence if row.metric == metric}
        if not newest:
            return None
        sign = -1.0 if next(iter(newest.values())).direction == "higher" else 1.0
        return max(newest.values(), key=lambda row: sign * row.bad_end if math.isfinite(row.bad_end) else math.inf)


def of_plan(plan: Plan) -> FitRecord:
    """What a plan tells: the choices and the size that was asked for."""
    return FitRecord(tensors=plan.tensors, asked=Asked(size_bytes=plan.budget_bytes))


def of_fit(fit: FitResult) -> FitRecord:
    """What a run of `fit` tells."""
    return FitRecord(
        frontier=fit.frontier,
        rounds=fit.rounds,
        memory=fit.memory,
        asked=fit.budget,
        gates=tuple(map(gated, fit.verdicts)),
        nearest=fit.nearest,
        seconds=fit.seconds,
        reason=fit.reason or "",
        artifact_id=fit.artifact_id or "",
    )


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


def gated(verdict: Verdict) -> Gated:
    """The row of a judged gate."""
    gate = verdict.gate
    limit, threshold = ("at most", gate.at_most) if gate.at_most is not None else ("at least", gate.at_least)
    assert threshold is not None
    return Gated(gate.metric, limit, threshold, verdict.outcome, verdict.reason, verdict.evidence)
