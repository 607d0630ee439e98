"""What a report is drawn from, as frozen records, and the strict readers of plan.json and fit.json.

A part that is absent stays absent (an empty tuple or None): nothing is made up. A part that is there but malformed is
an ArtifactError that names the file and the place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gulliver.core.errors import ArtifactError
from gulliver.core.evidence.evidence import METRICS, Evidence
from gulliver.core.evidence.gate import Verdict
from gulliver.core.store.manifest import read_json

INFEASIBLE, REFUSED, PASS, NOT_JUDGED = "INFEASIBLE", "REFUSED", "PASS", "NOT JUDGED"


@dataclass(frozen=True)
class PartBits:
    """Some rows of a weight in one format. `damage` is the predicted damage (the plan's unit), None if unknown."""

    rows: int
    format: str
    bits_per_weight: float
    size_bytes: int
    damage: float | None = None


@dataclass(frozen=True)
class TensorBits:
    """One weight of `shape` and the parts it is stored in."""

    name: str
    shape: tuple[int, ...]
    size_bytes: int
    parts: tuple[PartBits, ...]

    @property
    def bits_per_weight(self) -> float:
        """Mean over the rows."""
        rows = sum(part.rows for part in self.parts)
        return sum(part.bits_per_weight * part.rows for part in self.parts) / rows if rows else math.nan

    @property
    def damage(self) -> float | None:
        """Sum over the parts; None when no part has one."""
        known = [part.damage for part in self.parts if part.damage is not None]
        return sum(known) if known else None


@dataclass(frozen=True)
class Point:
    """One point of the size-quality plane; drops are fractions of quality given up."""

    size_bytes: int
    predicted_drop: float | None = None
    measured_drop: float | None = None


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
class Asked:
    """The budget, as stated by the user; None where nothing was asked."""

    size_bytes: int | None = None
    max_ram_bytes: int | None = None
    min_tokens_per_s: float | None = None
    max_drop: float | None = None


@dataclass(frozen=True)
class FitRecord:
    """What plan.json and fit.json hold: choices per tensor, frontier, rounds, damage per block, memory over time.

    `memory` is (seconds, stage, resident bytes); `nearest` is the nearest feasible point of an infeasible budget;
    `artifact_id` is the model that was made, "" where the file names none.
    """

    tensors: tuple[TensorBits, ...] = ()
    frontier: tuple[Point, ...] = ()
    rounds: tuple[Point, ...] = ()
    blocks: tuple[tuple[str, float], ...] = ()
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
    `parent_evidence` is evidence about the model's parent (the baseline drawn beside ours); `data_names` maps data
    hashes to what people call the data.
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

    @property
    def outcome(self) -> str:
        """The verdict in one word. A gate that has no data refuses; no gate at all is NOT JUDGED."""
        if self.fit.nearest is not None:
            return INFEASIBLE
        if any(gate.outcome != "PASS" for gates in (self.fit.gates, *(o.gates for o in self.others)) for gate in gates):
            return REFUSED
        return PASS if self.fit.gates else NOT_JUDGED

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


def read_fit(path: Path) -> FitRecord:
    """The record in a plan.json or fit.json. ArtifactError names what is malformed."""
    return parse_fit(read_json(path.read_bytes(), path.name), path.name)


def parse_fit(body: object, what: str) -> FitRecord:
    """The record in the JSON object `body`; keys that are absent give empty parts. ArtifactError names `what`."""
    top = _object(body, what)
    budget = _object(top.get("budget", {}), f"{what}: budget")
    size = budget.get("size_bytes", top.get("budget_bytes"))
    nearest = top.get("nearest")
    return FitRecord(
        tensors=tuple(_tensor(row, at) for row, at in _rows(top, "tensors", what)),
        frontier=tuple(_point(row, at) for row, at in _rows(top, "frontier", what)),
        rounds=tuple(_point(row, at) for row, at in _rows(top, "rounds", what)),
        blocks=tuple((_text(row, "name", at), _real(row, "damage", at)) for row, at in _rows(top, "blocks", what)),
        memory=_memory(top.get("memory", []), f"{what}: memory"),
        asked=Asked(
            size_bytes=None if size is None else _whole({"size_bytes": size}, "size_bytes", f"{what}: budget"),
            max_ram_bytes=_optional(budget, "max_ram_bytes", f"{what}: budget", whole=True),
            min_tokens_per_s=_optional(budget, "min_tokens_per_s", f"{what}: budget"),
            max_drop=_optional(budget, "max_drop", f"{what}: budget"),
        ),
        gates=tuple(_gated(row, at) for row, at in _rows(top, "verdicts", what)),
        nearest=None if nearest is None else _point(_object(nearest, f"{what}: nearest"), f"{what}: nearest"),
        seconds=_optional(top, "seconds", what),
        reason=_text(top, "reason", what) if "reason" in top else "",
        artifact_id=_text(top, "artifact_id", what) if "artifact_id" in top else "",
    )


def parse_packing(body: object, what: str = "packing.json") -> tuple[TensorBits, ...]:
    """The formats that a packed model's own packing.json lists: what is in the file, whatever a plan had wanted.

    Bits per weight are those of the format: code, scale and zero point of 8 bits a group, 16 bits a row.
    """
    tensors = _object(_object(body, what).get("tensors", {}), f"{what}: tensors")
    found = []
    for name, row in tensors.items():
        at = f"{what}: {name!r}"
        row = _object(row, at)
        shape = _shape(row.get("shape"), at)
        columns = math.prod(shape[1:])
        parts = []
        for part, part_at in _rows(row, "parts", at):
            rows, fmt = int(_whole(part, "rows", part_at)), _text(part, "format", part_at)
            bits = format_bits(fmt, columns)
            if bits is None:
                raise ArtifactError(f"{part_at}: format {fmt!r} is not one like u4g64 or c4g64")
            parts.append(PartBits(rows, fmt, bits, round(bits * rows * columns / 8)))
        found.append(TensorBits(name, shape, sum(part.size_bytes for part in parts), tuple(parts)))
    return tuple(found)


def format_bits(name: str, columns: int) -> float | None:
    """Bits per weight of a packed format's short name ("c4g64") for rows of `columns`, or None for another name."""
    kind, (bits, separator, group) = name[:1], name[1:].partition("g")
    if kind not in ("u", "c") or not separator or not bits.isdecimal() or not group.isdecimal():
        return None
    if not 1 <= int(bits) <= 8 or not 1 <= int(group) <= 4096 or columns < 1:
        return None
    groups = -(-columns // int(group))
    return (groups * int(group) * int(bits) + groups * (16 if kind == "u" else 8) + 16) / columns


def gated(verdict: Verdict) -> Gated:
    """The row of a judged gate."""
    return _gated(verdict.to_json(), "verdict")


def _gated(row: Mapping[str, Any], at: str) -> Gated:
    """A row from the JSON of a Verdict (core/gate.py)."""
    limit = "at_most" if row.get("at_most") is not None else "at_least"
    outcome = _text(row, "outcome", at)
    if outcome not in ("PASS", "FAIL", "NO_DATA"):
        raise ArtifactError(f"{at}: outcome is {outcome!r}; it must be PASS, FAIL or NO_DATA")
    found = row.get("evidence")
    return Gated(
        metric=_text(row, "metric", at),
        limit=limit.replace("_", " "),
        threshold=_real(row, limit, at),
        outcome=outcome,
        reason=_text(row, "reason", at) if "reason" in row else "",
        evidence=None if found is None else Evidence.from_json(_object(found, f"{at}.evidence")),
    )


def _tensor(row: Mapping[str, Any], at: str) -> TensorBits:
    parts = tuple(
        PartBits(
            rows=_whole(part, "rows", where),
            format=_text(part, "format", where),
            bits_per_weight=_real(part, "bits_per_weight", where),
            size_bytes=_whole(part, "bytes", where),
            damage=_optional(part, "damage", where),
        )
        for part, where in _rows(row, "parts", at)
    )
    return TensorBits(_text(row, "name", at), _shape(row.get("shape"), at), _whole(row, "bytes", at), parts)


def _point(row: Mapping[str, Any], at: str) -> Point:
    return Point(
        _whole(row, "size_bytes", at), _optional(row, "predicted_drop", at), _optional(row, "measured_drop", at)
    )


def _memory(rows: object, at: str) -> tuple[tuple[float, str, int], ...]:
    samples = []
    for index, row in enumerate(_list(rows, at)):
        sample = _list(row, f"{at}[{index}]")
        if len(sample) != 3:
            raise ArtifactError(f"{at}[{index}] has {len(sample)} values; it must be [seconds, stage, bytes]")
        named: dict[str, Any] = dict(zip(("seconds", "stage", "rss_bytes"), sample, strict=True))
        where = f"{at}[{index}]"
        samples.append(
            (_real(named, "seconds", where), _text(named, "stage", where), _whole(named, "rss_bytes", where))
        )
    return tuple(samples)


def _rows(body: Mapping[str, Any], key: str, what: str) -> list[tuple[Mapping[str, Any], str]]:
    at = f"{what}: {key}" if ":" not in what else f"{what}.{key}"
    return [
        (_object(row, f"{at}[{index}]"), f"{at}[{index}]") for index, row in enumerate(_list(body.get(key, []), at))
    ]


def _object(value: object, at: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ArtifactError(f"{at} must be a JSON object, not {type(value).__name__}")
    return value


def _list(value: object, at: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple):
        raise ArtifactError(f"{at} must be a list, not {type(value).__name__}")
    return value


def _text(row: Mapping[str, Any], key: str, at: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise ArtifactError(f"{at}: {key} is {value!r}; it must be text")
    return value


def _real(row: Mapping[str, Any], key: str, at: str) -> float:
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ArtifactError(f"{at}: {key} is {value!r}; it must be a finite number")
    return value


def _whole(row: Mapping[str, Any], key: str, at: str) -> int:
    value = _real(row, key, at)
    if value < 0 or value != int(value):
        raise ArtifactError(f"{at}: {key} is {value!r}; it must be a whole number that is not negative")
    return int(value)


def _optional(row: Mapping[str, Any], key: str, at: str, whole: bool = False) -> Any:
    if row.get(key) is None:
        return None
    return _whole(row, key, at) if whole else _real(row, key, at)


def _shape(value: object, at: str) -> tuple[int, ...]:
    return tuple(_whole({"shape": size}, "shape", at) for size in _list(value, f"{at}.shape"))
