"""The rows of the evidence and machine tables: which numbers, in what order, and what they are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gulliver.core.evidence.evidence import METRICS, Evidence
from gulliver.core.machine import Machine
from gulliver.report.gather import ReportData
from gulliver.report.picture import Table
from gulliver.report.units import NOT_MEASURED, format_measured, format_value

_MACHINE_LABELS = {
    "cpu": "processor", "cores": "cores", "isa": "instruction sets", "ram_bytes": "memory",
    "cgroup_ram_bytes": "memory limit of the control group", "bandwidth_gb_s": "memory bandwidth, GB/s",
    "fp32_gflop_s": "fp32 peak, GFLOP/s", "bf16_gflop_s": "bf16 peak, GFLOP/s", "int8_gop_s": "int8 peak, GOP/s",
    "load_average": "load while measuring", "os": "operating system", "python": "Python", "versions": "versions",
}  # fmt: skip


@dataclass(frozen=True)
class EvidenceRow:
    """One row of the evidence table: `data` names what was measured on where it is not the same for all rows."""

    row: Evidence
    data: str
    limit: float | None
    beside: Sequence[str]


@dataclass(frozen=True)
class IntervalBar:
    """Places in a small bar, in per cent of its width; `limit` is a gate's threshold, None without one."""

    label: str
    low: float
    width: float
    value: float
    limit: float | None


def evidence(data: ReportData) -> list[EvidenceRow]:
    """The rows of the evidence table."""
    rows, beside = latest_evidence(data.evidence), baselines(data)
    limits = {gate.metric: gate.threshold for gate in data.fit.verdicts}
    several = len({row.data_hash for row in rows if row.data_hash}) > 1
    return [
        EvidenceRow(
            row,
            data.data_name(row.data_hash) if several and row.data_hash else "",
            limits.get(row.metric),
            beside.get((row.metric, row.data_hash), ()),
        )
        for row in rows
    ]


def latest_evidence(rows: Sequence[Evidence]) -> list[Evidence]:
    """The newest evidence for each metric and data set, in the order of METRICS.

    The baseline of a listed metric is shown beside it and has no row of its own.
    """
    newest = {(row.metric, row.data_hash): row for row in rows}
    measured = {metric for metric, _ in newest}
    order = {name: index for index, name in enumerate(METRICS)}
    kept = [row for row in newest.values() if row.metric.removeprefix("baseline_") not in measured - {row.metric}]
    return sorted(kept, key=lambda row: (order.get(row.metric, len(order)), row.data_hash))


def baselines(data: ReportData) -> dict[tuple[str, str], list[str]]:
    """(metric, data hash) -> texts of the parent's value and of the simplest baseline's on the same data."""
    found: dict[tuple[str, str], list[str]] = {}
    for label, rows in (("parent", data.parent_evidence), ("baseline", data.evidence)):
        for row in {(row.metric, row.data_hash): row for row in rows}.values():
            name = row.metric.removeprefix("baseline_")
            if (label == "baseline") == (name != row.metric):
                found.setdefault((name, row.data_hash), []).append(f"{label} {format_value(row.value, row.unit)}")
    size, origin = ("size_bytes", ""), data.origin
    if data.parent_size_bytes and size not in found:
        found[size] = [f"parent {format_value(data.parent_size_bytes, 'bytes')}"]
    if origin is not None and origin.original_bytes is not None:
        whole = [f"in bfloat16 {format_value(origin.bfloat16_bytes, 'bytes')}"] if origin.bfloat16_bytes else []
        found.setdefault(size, []).extend([f"downloaded {format_value(origin.original_bytes, 'bytes')}", *whole])
    return found


def measured_texts(row: Evidence | None) -> tuple[str, str]:
    """Texts of a value and of its interval; "not measured" without evidence."""
    return format_measured(row.value, row.low, row.high, row.unit) if row else (NOT_MEASURED, "")


def interval_bar(row: Evidence, threshold: float | None = None) -> IntervalBar | None:
    """The interval on an axis around the value, and a gate's threshold; None without either."""
    if not all(map(math.isfinite, (row.value, row.low, row.high))) or (row.low == row.high and threshold is None):
        return None
    reach = max(abs(row.value) * 0.1, (row.high - row.low) * 0.75, 1e-12)
    ends = [row.value - reach, row.value + reach]
    label = f"interval {measured_texts(row)[1]}"
    if threshold is not None:
        ends = [min(ends[0], threshold - reach * 0.2), max(ends[1], threshold + reach * 0.2)]
        label += f", limit {format_value(threshold, row.unit)}"

    def place(value: float) -> float:
        return round(100 * (value - ends[0]) / (ends[1] - ends[0]), 2)

    low, width = place(row.low), round(place(row.high) - place(row.low), 2)
    return IntervalBar(label, low, width, place(row.value), None if threshold is None else place(threshold))


def machine(found: Machine | None) -> Table:
    """The table of what is known about the machine of this home."""
    known = [(label, name, getattr(found, name, None)) for name, label in _MACHINE_LABELS.items()]
    lines = [(label, _plain(name, value)) for label, name, value in known if value is not None]
    return Table("This machine, as measured by `gulliver doctor`", ("Property", "Value"), lines)


def _plain(name: str, value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{package} {version}" for package, version in sorted(value.items()))
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if name.endswith("_bytes") and isinstance(value, int):
        return format_value(value, "bytes")
    return f"{value:,.1f}".replace(",", "\u202f") if isinstance(value, float) else str(value)
