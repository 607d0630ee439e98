"""What a report is drawn from: one frozen record made of those in core/records.py.

A part that is absent stays absent (an empty tuple or None): nothing is made up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gulliver.core.evidence.evidence import METRICS, Evidence
from gulliver.core.evidence.gate import Verdict
from gulliver.core.machine import Machine
from gulliver.core.records import FitResult, Origin, TensorBits

INFEASIBLE, REFUSED, PASS, NOT_JUDGED = "INFEASIBLE", "REFUSED", "PASS", "NOT JUDGED"


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
    tensors: tuple[TensorBits, ...] = ()
    fit: FitResult = field(default_factory=FitResult)
    manifests: tuple[Mapping[str, Any], ...] = ()
    machine: Machine | None = None
    data_names: Mapping[str, str] = field(default_factory=dict)
    others: tuple[OtherGates, ...] = ()
    origin: Origin | None = None
    origin_id: str = ""

    @property
    def outcome(self) -> str:
        """The verdict in one word. A gate that has no data refuses; no gate at all is NOT JUDGED."""
        if self.fit.nearest is not None:
            return INFEASIBLE
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
        gated_on = {gate.metric for gate in self.fit.verdicts}
        names = ("peak_ram_bytes", "compress_peak_ram_bytes")
        found = [name for name in names if name in gated_on] or [name for name in names if self.latest(name)]
        return found[0] if found else names[0]

    @property
    def speed_metric(self) -> str | None:
        """The metric of its speed: the one that a gate is on, else the first of METRICS that was measured."""
        gated_on = {gate.metric for gate in self.fit.verdicts}
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
        return max(newest.values(), key=lambda row: sign * row.worse_end if math.isfinite(row.worse_end) else math.inf)
