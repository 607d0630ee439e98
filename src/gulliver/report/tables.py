"""Sections of a page that are text and tables. Each function takes records and returns HTML; user text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from gulliver.core.evidence.evidence import METRICS, Evidence
from gulliver.report.records import INFEASIBLE, NOT_JUDGED, PASS, Asked, Gated, ReportData
from gulliver.report.units import NOT_MEASURED, format_measured, format_seconds, format_value, short_id

_BETTER = {"lower": "↓ lower is better", "higher": "↑ higher is better", "none": "for comparison"}
_MACHINE_LABELS = {
    "cpu": "processor",
    "cores": "cores",
    "isa": "instruction sets",
    "ram_bytes": "memory",
    "cgroup_ram_bytes": "memory limit of the control group",
    "bandwidth_gb_s": "memory bandwidth, GB/s",
    "fp32_gflop_s": "fp32 peak, GFLOP/s",
    "bf16_gflop_s": "bf16 peak, GFLOP/s",
    "int8_gop_s": "int8 peak, GOP/s",
    "load_average": "load while measuring",
    "os": "operating system",
    "python": "Python",
}
_RAM_TILES = {"peak_ram_bytes": "Memory to answer", "compress_peak_ram_bytes": "Memory to make it"}
_OUTCOME_CLASS = {"PASS": "pass-text", "FAIL": "fail-text", "NO_DATA": "none-text"}


def table(
    caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = (), css: str = ""
) -> str:
    """A table with a caption; the first cell of a row is its head. Heads are plain text; cells are HTML already.

    `numbers` are the indexes of columns of numbers. With css "stack" rows become cards on a narrow screen.
    """
    kinds = [' class="number"' if index in numbers else "" for index in range(len(heads))]
    head = "".join(f'<th scope="col"{kind}>{escape(text)}</th>' for text, kind in zip(heads, kinds, strict=True))
    lines = []
    for row in rows:
        cells = [f'<th scope="row" role="rowheader">{row[0]}</th>']
        for index, cell in enumerate(row[1:], 1):
            label = f' data-label="{escape(heads[index])}"' if "stack" in css else ""
            cells.append(f'<td role="cell"{kinds[index]}{label}>{cell}</td>')
        lines.append(f'<tr role="row">{"".join(cells)}</tr>')
    name = f' class="{css}"' if css else ""
    return (
        f'<table role="table"{name}><caption>{escape(caption)}</caption><thead><tr role="row">{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table>"
    )


def scroll(inner: str, label: str) -> str:
    """A region that scrolls sideways, reachable by keyboard, for a wide table."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{inner}</div>'


def verdict(data: ReportData) -> str:
    """The verdict, the sentence of what was asked and what was reached, and the four figures that matter most."""
    css = {PASS: "pass", NOT_JUDGED: "open", INFEASIBLE: "infeasible"}.get(data.outcome, "refused")
    sentences = "".join(f"<p>{escape(text)}</p>" for text in verdict_sentences(data))
    return (
        f'<section class="verdict {css}" aria-label="Verdict"><strong>{data.outcome}</strong>{sentences}</section>'
        f"{'' if data.outcome == INFEASIBLE else key_figures(data)}"
    )


def verdict_sentences(data: ReportData) -> list[str]:
    """What was asked, what was reached, and why it was refused, as plain text."""
    asked, reached = _asked(data.fit.asked), _reached(data)
    lines = [f"Asked for {asked}." if asked else "No budget was stated."]
    if data.fit.nearest is not None:
        near = data.fit.nearest
        drop = near.measured_drop if near.measured_drop is not None else near.predicted_drop
        how = "measured" if near.measured_drop is not None else "predicted"
        given_up = f", {format_value(drop, 'fraction')} of the quality given up ({how})" if drop is not None else ""
        lines.append(
            f"No model that can be made meets it. The nearest: {format_value(near.size_bytes, 'bytes')}{given_up}."
        )
    else:
        lines.append(f"Reached {reached}.")
    if data.outcome == NOT_JUDGED:
        lines.append("No gate was judged, so nothing is proven; the numbers below are measurements only.")
        if data.others:
            lines[-1] = "No gate was judged on this model, so nothing is proven about it; the numbers are measurements."
    if data.outcome not in (PASS, NOT_JUDGED):
        lines.extend(f"{gate_rule(gate)}: {gate_reason(gate)}." for gate in data.fit.gates if gate.outcome != PASS)
        lines.extend(
            f"{gate_rule(gate)} on {other.name} ({short_id(other.artifact_id)}), another model of this recipe: "
            f"{gate_reason(gate)}."
            for other in data.others
            for gate in other.gates
            if gate.outcome != PASS
        )
    if data.fit.reason:
        lines.append(data.fit.reason)
    return lines


def key_figures(data: ReportData) -> str:
    """Size, quality given up, memory and time: what was reached large, what was asked below it."""
    asked = data.fit.asked
    tiles = [
        _tile("Size", _size(data), _limit("at most", asked.size_bytes, "bytes")),
        _tile("Quality given up", *_loss_tile(data)),
        _tile(
            _RAM_TILES[data.ram_metric], _value(data, data.ram_metric), _limit("at most", asked.max_ram_bytes, "bytes")
        ),
    ]
    if asked.min_tokens_per_s is not None or data.latest("decode_tokens_per_s"):
        limit = _limit("at least", asked.min_tokens_per_s, "tokens/s")
        tiles.append(_tile("Speed", _value(data, "decode_tokens_per_s"), limit))
    compress = data.latest("compress_peak_ram_bytes") if data.ram_metric != "compress_peak_ram_bytes" else None
    note = f"peak memory {format_value(compress.value, 'bytes')}" if compress else ""
    tiles.append(_tile("Time to make it", format_seconds(seconds_taken(data)), note))
    return f'<dl class="figures">{"".join(tiles)}</dl>'


def seconds_taken(data: ReportData) -> float | None:
    """Seconds that making the model took: as stated, or the span of the memory samples; else None."""
    if data.fit.seconds is not None:
        return data.fit.seconds
    return data.fit.memory[-1][0] - data.fit.memory[0][0] if len(data.fit.memory) > 1 else None


def gate_rule(gate: Gated) -> str:
    """ "perplexity ratio at most 1.05"."""
    unit = METRICS[gate.metric].unit if gate.metric in METRICS else ""
    return f"{metric_name(gate.metric)} {gate.limit} {format_value(gate.threshold, unit)}"


def gate_reason(gate: Gated) -> str:
    """Why a gate did not pass, with its numbers as people read them; "" for one that passed."""
    found = gate.evidence
    if gate.outcome == "PASS":
        return ""
    if gate.outcome == "NO_DATA" or found is None or found.metric != gate.metric or not found.is_number:
        return gate.reason or gate.outcome
    value, bounds = format_measured(found.value, found.low, found.high, found.unit)
    if bounds == "single value":
        return f"measured {value}, which misses it"
    return f"measured {value}, interval {bounds}; the bad end, {format_value(found.bad_end, found.unit)}, misses it"


def gates(data: ReportData) -> str:
    """The gates on this model, and below them those that its recipe judged on other models."""
    own = _gates(data.fit.gates) if data.fit.gates else "<p>No gate was judged on this model.</p>"
    return own + "".join(
        f"<h3>Gates on {escape(other.name)}, another model of this recipe "
        f"(<code>{escape(short_id(other.artifact_id))}</code>)</h3>{_gates(other.gates)}"
        for other in data.others
    )


def _gates(rows: Sequence[Gated]) -> str:
    lines, all_pass = [], all(gate.outcome == "PASS" for gate in rows)
    for gate in rows:
        value, bounds = _measured(gate.evidence)
        outcome = f'<b class="{_OUTCOME_CLASS[gate.outcome]}">{gate.outcome.replace("_", " ")}</b>'
        shown = interval_bar(gate.evidence, gate.threshold) if gate.evidence else ""
        why = [] if all_pass else [escape(gate_reason(gate))]
        lines.append([escape(gate_rule(gate)), outcome, value, f"{bounds}{shown}", *why])
    caption = "A gate passes when the bad end of the 95 % interval meets its limit (dashed line); no data refuses."
    heads = ["Gate", "Outcome", "Measured", "95 % interval", *([] if all_pass else ["Why"])]
    return table(caption, heads, lines, css="stack pair")


def evidence(data: ReportData) -> str:
    """The table of evidence: value, interval, n, unit, meaning, direction, and what stands beside it."""
    rows = latest_evidence(data.evidence)
    if not rows:
        return f"<p>Evidence: {NOT_MEASURED}.</p>"
    limits = {gate.metric: gate.threshold for gate in data.fit.gates}
    beside = baselines(data)
    names = {row.data_hash for row in rows if row.data_hash}
    lines = []
    for row in rows:
        value, bounds = _measured(row)
        where = f", on {data.data_name(row.data_hash)}" if len(names) > 1 and row.data_hash else ""
        about = f"{METRICS[row.metric].help} ({_BETTER[row.direction]}{where})"
        lines.append(
            [
                f'{escape(metric_name(row.metric))}<span class="soft help">{escape(about)}</span>',
                value,
                f"{bounds}{interval_bar(row, limits.get(row.metric))}",
                f"{row.n:,}".replace(",", "\u202f"),
                "<br>".join(escape(text) for text in beside.get((row.metric, row.data_hash), ())),
            ]
        )
    caption = (
        "Every number is about this exact artifact. The bar is the 95 % interval on a scale of ±10 % around the value, "
        "wider where the interval or a gate's limit (dashed) needs it; the line is the value."
    )
    return table(caption, ["What", "Value", "95 % interval", "n", "Beside it"], lines, numbers=(1, 3), css="stack")


def latest_evidence(rows: Sequence[Evidence]) -> list[Evidence]:
    """The newest evidence for each metric and data set, in the order of METRICS; baselines of a listed metric are not

    rows of their own (they stand beside it).
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
            if (label == "baseline") != (name != row.metric):
                continue
            found.setdefault((name, row.data_hash), []).append(f"{label} {format_value(row.value, row.unit)}")
    size = ("size_bytes", "")
    if data.parent_size_bytes and size not in found:
        found[size] = [f"parent {format_value(data.parent_size_bytes, 'bytes')}"]
    return found


def interval_bar(row: Evidence, threshold: float | None = None) -> str:
    """A small bar: the interval on an axis around the value, the value as a line, a gate's threshold dashed.

    Empty when there is neither an interval nor a threshold to see.
    """
    if not all(map(math.isfinite, (row.value, row.low, row.high))) or (row.low == row.high and threshold is None):
        return ""
    reach = max(abs(row.value) * 0.1, (row.high - row.low) * 0.75, 1e-12)
    ends = [row.value - reach, row.value + reach]
    if threshold is not None:
        ends = [min(ends[0], threshold - reach * 0.2), max(ends[1], threshold + reach * 0.2)]

    def place(value: float) -> float:
        return round(100 * (value - ends[0]) / (ends[1] - ends[0]), 2)

    low, high = place(row.low), place(row.high)
    label = f"interval {format_measured(row.value, row.low, row.high, row.unit)[1]}"
    mark = ""
    if threshold is not None:
        label += f", limit {format_value(threshold, row.unit)}"
        mark = f'<u style="left:{place(threshold)}%"></u>'
    bar = f'<i style="left:{low}%;width:{round(high - low, 2)}%"></i><b style="left:{place(row.value)}%"></b>'
    return f'<span class="interval" role="img" aria-label="{escape(label)}">{bar}{mark}</span>'


def lineage(manifests: Sequence[Mapping[str, Any]], here: str) -> str:
    """The chain of artifacts from the first to this one: what made each, from what, with which options."""
    if not manifests:
        return "<p>Lineage: not recorded.</p>"
    items = []
    for manifest in manifests:
        identifier = str(manifest["id"])
        if manifest.get("missing"):
            items.append(f"<li><code>{escape(short_id(identifier))}</code> is not in this store</li>")
            continue
        step = manifest["step"]
        marks = ' class="here" aria-current="true"' if identifier == here else ""
        parents = ", ".join(f"<code>{escape(short_id(parent))}</code>" for parent in manifest["parents"])
        config = "\n".join(f"{key} = {value!r}" for key, value in sorted(manifest["config"].items()))
        options = f"<details><summary>options</summary><pre>{escape(config)}</pre></details>" if config else ""
        items.append(
            f"<li{marks}><b>{escape(str(step['name']))}</b> made {escape(str(manifest['kind']))} "
            f'<code title="{escape(identifier)}">{escape(short_id(identifier))}</code>'
            f"{' (this artifact)' if identifier == here else ''}"
            f'<div class="soft">step version {escape(str(step["version"]))}, seed {escape(str(manifest["seed"]))}, '
            f"from {parents or 'outside'}</div>{options}</li>"
        )
    return f'<ol class="lineage">{"".join(items)}</ol>'


def machine(description: Mapping[str, Any], rows: Sequence[Evidence]) -> str:
    """The machine of the measurements: its description when there is one, and the names in the evidence."""
    names = sorted({row.machine for row in rows if row.machine})
    order = {name: index for index, name in enumerate(_MACHINE_LABELS)}
    lines = [
        [escape(_MACHINE_LABELS.get(key, key.replace("_", " "))), escape(_plain(key, value))]
        for key, value in sorted(description.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
        if value is not None
    ]
    parts = [f"<p>Measured on: {escape('; '.join(names))}</p>"] if names else []
    if lines:
        parts.append(table("The machine of this home, as `gulliver doctor` measured it", ["Property", "Value"], lines))
    return "".join(parts) or f"<p>Machine: {NOT_MEASURED}.</p>"


def commands(rows: Sequence[Evidence]) -> str:
    """The commands that repeat the measurements, each once."""
    found = list(dict.fromkeys(row.command for row in rows if row.command))
    if not found:
        return "<p>No command was recorded.</p>"
    return f"<pre><code>{escape(chr(10).join(found))}</code></pre>"


def metric_name(name: str) -> str:
    """A metric's name as words."""
    return name.replace("_per_s", " per s").replace("_bytes", "").replace("_", " ")


def _asked(asked: Asked) -> str:
    parts = [
        (asked.size_bytes, lambda value: f"at most {format_value(value, 'bytes')}"),
        (asked.max_drop, lambda value: f"at most {format_value(value, 'fraction')} of the quality given up"),
        (asked.max_ram_bytes, lambda value: f"at most {format_value(value, 'bytes')} of memory"),
        (asked.min_tokens_per_s, lambda value: f"at least {format_value(value, 'tokens/s')}"),
    ]
    return _listed([text(value) for value, text in parts if value is not None])


def _reached(data: ReportData) -> str:
    loss, parts = data.latest("quality_loss"), [_size(data)]
    if loss is not None:
        value, bounds = format_measured(loss.value, loss.low, loss.high, loss.unit)
        parts.append(f"{value} of the quality given up (95 % interval {bounds})")
    else:
        parts.append(f"quality given up {NOT_MEASURED}")
    for metric, text in ((data.ram_metric, "of memory at the peak"), ("decode_tokens_per_s", "when decoding")):
        row = data.latest(metric)
        if row is not None:
            parts.append(f"{format_value(row.value, row.unit)} {text}")
    taken = seconds_taken(data)
    return _listed(parts) + (f", in {format_seconds(taken)}" if taken is not None else "")


def _loss_tile(data: ReportData) -> tuple[str, str]:
    row, limit = data.latest("quality_loss"), _limit("at most", data.fit.asked.max_drop, "fraction")
    if row is None:
        return NOT_MEASURED, limit
    value, bounds = format_measured(row.value, row.low, row.high, row.unit)
    return value, "; ".join(filter(None, [f"95 % interval {bounds}", limit]))


def _size(data: ReportData) -> str:
    row = data.latest("size_bytes")
    return format_value(row.value if row else data.size_bytes, "bytes")


def _value(data: ReportData, metric: str) -> str:
    row = data.latest(metric)
    return format_value(row.value, row.unit) if row else NOT_MEASURED


def _measured(row: Evidence | None) -> tuple[str, str]:
    if row is None:
        return NOT_MEASURED, ""
    value, bounds = format_measured(row.value, row.low, row.high, row.unit)
    return escape(value), escape(bounds)


def _limit(limit: str, value: float | None, unit: str) -> str:
    return f"asked {limit} {format_value(value, unit)}" if value is not None else ""


def _tile(name: str, big: str, small: str) -> str:
    note = f'<dd class="soft">{escape(small)}</dd>' if small else ""
    number, space, unit = big.partition("\u00a0")
    if space and "\u00a0" not in unit:
        shown = f'{escape(number)} <span class="unit">{escape(unit)}</span>'
    else:
        shown = escape(big)
    return f'<div><dt>{escape(name)}</dt><dd class="big">{shown}</dd>{note}</div>'


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1] if parts else ""


def _plain(key: str, value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    if key.endswith("_bytes") and isinstance(value, int | float):
        return format_value(value, "bytes")
    return f"{value:,.1f}".replace(",", "\u202f") if isinstance(value, float) else str(value)
