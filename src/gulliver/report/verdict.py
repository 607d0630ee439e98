"""The verdict in words: what was asked, what was reached, which gate refused, and the figures that matter most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gulliver.core.evidence.evidence import METRICS, Evidence
from gulliver.core.evidence.gate import NEVER_SO_GOOD, Verdict, suspicion, too_good
from gulliver.report.gather import DRY_RUN, INFEASIBLE, NOT_JUDGED, ReportData
from gulliver.report.rows import latest_evidence, measured_texts
from gulliver.report.units import NOT_MEASURED, format_limit, format_measured, format_seconds, format_value, short_id

_RAM_TILES = {"peak_ram_bytes": "Memory to answer", "compress_peak_ram_bytes": "Memory to compress"}


@dataclass(frozen=True)
class Figure:
    """One large number of a page: what was reached, with what was asked as its note."""

    name: str
    text: str
    note: str

    @property
    def number(self) -> str:
        """The text without its unit; the whole text where it is not one number and one unit."""
        return self.text.partition("\u00a0")[0] if self.unit else self.text

    @property
    def unit(self) -> str:
        parts = self.text.split("\u00a0")
        return parts[1] if len(parts) == 2 else ""


def sentences(data: ReportData) -> list[str]:
    """What was asked, what was reached, and why it was refused, as plain text."""
    asked = _asked(data)
    lines = [f"Asked for {asked}." if asked else "No budget was stated."]
    near = data.fit.nearest
    if near is not None:
        how = "measured" if near.measured_drop is not None else "predicted"
        loss = f", {format_value(near.drop, 'fraction')} quality loss ({how})" if near.drop is not None else ""
        lines.append(f"No model meets this budget. The nearest feasible point: {_bytes(near.size_bytes)}{loss}.")
    elif data.outcome == INFEASIBLE:
        lines.append("No model meets this budget.")
    elif data.outcome == DRY_RUN:
        lines.append(f"No model was made: {_forecast(data)}.")
    else:
        lines.append(f"Reached {_reached(data)}.")
    if data.outcome == NOT_JUDGED:
        where = " on this model" if data.others else ""
        lines.append(f"No gate was judged{where}, so nothing is proven; the numbers below are measurements only.")
    judged = [("", gate) for gate in data.fit.verdicts]
    for other in data.others:
        where = f" on {other.name} ({short_id(other.artifact_id)}), another model of this recipe"
        judged += [(where, gate) for gate in other.verdicts]
    refused = [(where, gate) for where, gate in judged if not gate.passed]
    lines += [f"Gate refused: {gate_rule(gate)}{where}; {gate_reason(gate)}." for where, gate in refused]
    lines += [f"To be doubted: {suspicion(row)}." for row in latest_evidence(data.evidence) if too_good(row)][:1]
    if data.fit.reason:
        lines.append(data.fit.reason)
    return lines


def key_figures(data: ReportData) -> list[Figure]:
    """Size, quality loss, memory, speed and time; of a dry run the time that each stage is expected to take."""
    if data.outcome == INFEASIBLE:
        return []
    if data.outcome == DRY_RUN:
        expected = data.fit.expected_seconds
        figures = [Figure("Expected time", format_seconds(sum(expected.values())), "for all stages")]
        longest = sorted(expected.items(), key=lambda row: -row[1])
        return [*figures, *(Figure(stage, format_seconds(seconds), "") for stage, seconds in longest)]
    asked, ram, speed = data.fit.budget, data.ram_metric, data.speed_metric
    figures = [
        Figure("Size", _bytes(data.size_bytes), _limit("at most", asked.size_bytes, "bytes")),
        Figure("Quality loss", *_loss(data)),
        Figure(_RAM_TILES[ram], _shown(data.latest(ram)), _limit("at most", asked.max_ram_bytes, "bytes")),
    ]
    if speed is not None:
        figures.append(
            Figure("Speed", _shown(data.latest(speed)), _limit("at least", asked.min_tokens_per_s, METRICS[speed].unit))
        )
    compress = data.latest("compress_peak_ram_bytes") if ram != "compress_peak_ram_bytes" else None
    note = f"peak memory {_bytes(compress.value)}" if compress else ""
    return [*figures, Figure("Time to make it", format_seconds(seconds_taken(data)), note)]


def seconds_taken(data: ReportData) -> float | None:
    """Seconds that making the model took: as stated, or the span of the memory samples; else None."""
    if data.fit.seconds is not None:
        return data.fit.seconds
    return data.fit.memory[-1][0] - data.fit.memory[0][0] if len(data.fit.memory) > 1 else None


def downloaded(data: ReportData) -> str:
    """ "94.1 MB GGUF Q4_1; 269 MB in bfloat16": the first model as it came and in full; "" where not recorded."""
    origin = data.origin
    if origin is None or origin.original_bytes is None:
        return ""
    came = f"{_bytes(origin.original_bytes)} {origin.original_format or ''}".rstrip()
    return came + (f"; {_bytes(origin.bfloat16_bytes)} in bfloat16" if origin.bfloat16_bytes else "")


def gate_rule(gate: Verdict) -> str:
    """ "perplexity ratio at most 1.05"."""
    return f"{metric_name(gate.metric)} {gate.limit} {format_limit(gate.threshold, METRICS[gate.metric].unit)}"


def gate_reason(gate: Verdict) -> str:
    """Why a gate did not pass, with its numbers as people read them; "" for one that passed."""
    found = gate.evidence
    if gate.passed:
        return ""
    judged = (
        found is not None and found.metric == gate.metric and found.is_number and not too_good(found, NEVER_SO_GOOD)
    )
    if gate.outcome == "NO_DATA" or found is None or not judged:
        return gate.reason or gate.outcome
    value, bounds = format_measured(found.value, found.low, found.high, found.unit)
    if bounds == "single value":
        return f"measured {value}, which does not meet the limit"
    worst = format_value(found.worse_end, found.unit)
    return f"measured {value}, interval {bounds}; its worse end, {worst}, does not meet the limit"


def metric_name(name: str) -> str:
    """A metric's name as words."""
    return name.replace("_per_s", " per s").replace("_bytes", "").replace("_", " ")


def _asked(data: ReportData) -> str:
    asked = data.fit.budget
    speed = METRICS[data.speed_metric].unit if data.speed_metric else "per s"
    parts = [
        ("at most", asked.size_bytes, "bytes", ""),
        ("at most", asked.max_drop, "fraction", " quality loss"),
        ("at most", asked.max_ram_bytes, "bytes", " of memory"),
        ("at least", asked.min_tokens_per_s, speed, ""),
    ]
    return _listed([f"{side} {format_limit(value, unit)}{of}" for side, value, unit, of in parts if value is not None])


def _reached(data: ReportData) -> str:
    loss, parts = data.latest("quality_loss"), [_bytes(data.size_bytes) + _shares(data)]
    value, bounds = measured_texts(loss)
    parts.append(f"{value} quality loss (95 % interval {bounds})" if loss else f"quality loss {NOT_MEASURED}")
    ram, speed = data.latest(data.ram_metric), data.latest(data.speed_metric or "")
    parts += [f"{_bytes(ram.value)} peak memory"] if ram else []
    parts += [_shown(speed)] if speed else []
    taken = seconds_taken(data)
    return _listed(parts) + (f", in {format_seconds(taken)}" if taken is not None else "")


def _forecast(data: ReportData) -> str:
    """What a dry run predicts of the size that was asked for, or of the smallest and the largest."""
    points = [point for point in data.fit.frontier if point.predicted_drop is not None]
    size = data.fit.budget.size_bytes
    if size is not None and points:
        within = [point for point in points if point.size_bytes <= size] or points
        points = [max(within, key=lambda point: point.size_bytes)]
    told = [
        f"{_bytes(one.size_bytes)} for {format_value(one.predicted_drop, 'fraction')}"
        for one in points[:: max(1, len(points) - 1)]
    ]
    predicted = (
        f"predicted are {_listed(told)} quality loss" if told else "what sizes cost shows when they are measured"
    )
    return f"{predicted}, and making one is expected to take {format_seconds(sum(data.fit.expected_seconds.values()))}"


def _loss(data: ReportData) -> tuple[str, str]:
    value, bounds = measured_texts(data.latest("quality_loss"))
    limit = _limit("at most", data.fit.budget.max_drop, "fraction")
    return value, "; ".join(filter(None, [f"95 % interval {bounds}" if bounds else "", limit]))


def _shares(data: ReportData) -> str:
    """ " (76 % of the download, 27 % of bfloat16)"; "" where neither is recorded."""
    size, origin = data.size_bytes, data.origin
    if not size or origin is None or origin.original_bytes is None:
        return ""
    wholes = ((origin.original_bytes, "the download"), (origin.bfloat16_bytes, "its size in bfloat16"))
    return f" ({', '.join(f'{size / whole:.0%} of {name}' for whole, name in wholes if whole)})".replace("%", "\u00a0%")


def _shown(row: Evidence | None) -> str:
    return format_value(row.value, row.unit) if row else NOT_MEASURED


def _bytes(size: float | None) -> str:
    return format_value(size, "bytes")


def _limit(limit: str, value: float | None, unit: str) -> str:
    return f"asked {limit} {format_limit(value, unit)}" if value is not None else ""


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else ""
