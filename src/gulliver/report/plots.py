"""Pictures of a report: size and quality, predicted loss increase per block, memory over time.

Where there are no data there is no picture: the functions return None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gulliver.core.records import Point
from gulliver.report.bits import loss_by_block
from gulliver.report.gather import ReportData
from gulliver.report.picture import Picture, Table, base_layout, label
from gulliver.report.units import format_seconds, format_value

_STAGE_COLOURS = ("blue", "orange", "green", "violet", "teal", "soft")
_MAX_POINTS = 600

MOST_PREDICTED = 1.0
"""Where nothing is measured, what a plot shows of predicted losses: beyond, they say that the model is broken."""


def size_quality(data: ReportData) -> Picture | None:
    """The size-quality plane: what the plan could choose, the rounds, the chosen point, the parent, the budget."""
    fit, loss = data.fit, data.latest("quality_loss")
    if not fit.frontier and not fit.rounds and (loss is None or not data.size_bytes):
        return None
    line = {"color": "var(--soft)", "width": 1.5, "dash": "dot"}
    traces = [_points("menu, predicted", fit.frontier, "predicted_drop", "circle-open", "soft", line)]
    traces.append(_points("rounds, predicted", fit.rounds, "predicted_drop", "diamond-open", "orange"))
    traces.append(_points("rounds, measured", fit.rounds, "measured_drop", "diamond", "orange"))
    if data.parent_size_bytes:
        traces.append(_point("parent", data.parent_size_bytes, 0.0, "square", "violet"))
    if data.parent_download_bytes:
        traces.append(_point("parent as downloaded", data.parent_download_bytes, 0.0, "square-open", "violet"))
    if fit.infeasible:
        if fit.nearest is not None and fit.nearest.drop is not None:
            point = _point("nearest feasible point", fit.nearest.size_bytes, fit.nearest.drop, "star", "green")
            traces.append(point)
    elif data.size_bytes and loss is not None and loss.is_number:
        point = _point("this artifact", data.size_bytes, loss.value, "star", "green")
        if math.isfinite(loss.low) and math.isfinite(loss.high):
            ends = {"array": [100 * (loss.high - loss.value)], "arrayminus": [100 * (loss.value - loss.low)]}
            point["error_y"] = {"type": "data", "color": "var(--green)", **ends}
        traces.append(point)
    traces = [trace for trace in traces if trace["x"]]
    if not traces:
        return None
    sizes = [x for trace in traces for x in trace["x"]] + (
        [fit.budget.size_bytes / 1e6] if fit.budget.size_bytes else []
    )
    top = _top_drop(data)
    layout = base_layout(400)
    layout["xaxis"] |= _log_axis(sizes) | {"title": {"text": "size, MB (10⁶ bytes, logarithmic)"}}
    layout["yaxis"] |= {"title": {"text": "quality loss, %"}, "range": [-0.06 * top, top]}
    if fit.budget.size_bytes:
        _draw_limit(layout, "x", fit.budget.size_bytes / 1e6, f"budget {format_value(fit.budget.size_bytes, 'bytes')}")
    if fit.budget.max_drop is not None:
        text = f"at most {format_value(fit.budget.max_drop, 'fraction')}"
        _draw_limit(layout, "y", 100 * fit.budget.max_drop, text)
    cut = any(y > top for trace in traces for y in trace["y"])
    says = "Each point is one way to store the model; further left is smaller, further down is closer to the parent."
    if cut:
        says += f" Points above {top:.0f} % are cut off; all are in the table."
    return Picture("size-quality", "Size and quality", says, traces, layout, _points_table(data))


def loss_increase(data: ReportData) -> Picture | None:
    """What the plan predicted that each block adds to the loss."""
    pairs = loss_by_block(data.tensors)
    if not pairs:
        return None
    short = [name.rpartition(".")[2] for name, _ in pairs]
    names = short if len(set(short)) == len(short) else [name for name, _ in pairs]
    trace = {
        "type": "bar",
        "x": [label(name) for name in names],
        "y": [value for _, value in pairs],
        "marker": {"color": "var(--blue)"},
        "hovertemplate": "block %{x}<br>loss + %{y:.4g}<extra></extra>",
    }
    layout = base_layout(300)
    layout["xaxis"] |= {"type": "category", "title": {"text": "block"}, "showgrid": False}
    layout["yaxis"] |= {"title": {"text": "predicted loss increase"}, "rangemode": "tozero"}
    rows = [[name, f"{value:.4g}"] for name, value in pairs]
    says = "What packing each block was predicted to add to the loss when the plan was made; higher is worse."
    numbers = Table(says, ["block", "predicted loss increase"], rows, numbers=(1,))
    return Picture("loss-increase", "Predicted loss increase per block", says, [trace], layout, numbers)


def memory(data: ReportData) -> Picture | None:
    """Resident memory over time, one colour a stage, with the cap when one was asked for."""
    samples, cap = data.fit.memory, data.fit.budget.max_ram_bytes
    if len(samples) < 2:
        return None
    stages = list(dict.fromkeys(stage for _, stage, _ in samples))
    unit, unit_name = (60.0, "min") if samples[-1][0] > 300 else (1.0, "s")
    traces = []
    for index, stage in enumerate(stages):
        times, sizes = _stage_line(samples, stage)
        again, colour = divmod(index, len(_STAGE_COLOURS))
        line = {"color": f"var(--{_STAGE_COLOURS[colour]})", "width": 2, "dash": "dash" if again else "solid"}
        drawn = {"type": "scatter", "mode": "lines", "name": label(stage), "line": line}
        drawn["x"] = [None if time is None else time / unit for time in times]
        drawn["y"] = [None if size is None else size / 1e6 for size in sizes]
        traces.append(drawn | {"hovertemplate": "%{x:.1f} " + unit_name + "<br>%{y:.0f} MB"})
    layout = base_layout(340)
    layout["xaxis"] |= {"title": {"text": f"time, {unit_name}"}}
    layout["yaxis"] |= {"title": {"text": "resident memory, MB"}, "rangemode": "tozero"}
    peak = max(size for _, _, size in samples)
    if cap is not None:
        _draw_limit(layout, "y", cap / 1e6, f"cap {format_value(cap, 'bytes')}")
        layout["yaxis"] |= {"range": [0, 1.12 * max(cap, peak) / 1e6]}
    rows = []
    for stage in stages:
        own = [(time, size) for time, name, size in samples if name == stage]
        top = format_value(max(size for _, size in own), "bytes")
        rows.append([stage, format_seconds(own[0][0]), format_seconds(own[-1][0]), top])
    says = f"Memory of the process while the model was made; the highest sample is {format_value(peak, 'bytes')}."
    numbers = Table("Memory by stage", ["stage", "from", "to", "peak"], rows, numbers=(1, 2, 3))
    return Picture("memory", "Memory over time", says, traces, layout, numbers)


def _stage_line(samples: Sequence[tuple[float, str, int]], stage: str) -> tuple[list[Any], list[Any]]:
    """Times and sizes of a stage, a None where it paused; thinned so that every peak stays."""
    line: list[tuple[float | None, int | None]] = []
    bucket = max(1, len(samples) // _MAX_POINTS)
    for start in range(0, len(samples), bucket):
        own = [(time, size) for time, name, size in samples[start : start + bucket + 1] if name == stage]
        if own:
            line.append(max(own, key=lambda pair: pair[1]))
        elif line and line[-1] != (None, None):
            line.append((None, None))
    return [time for time, _ in line], [size for _, size in line]


def _points(
    name: str, points: Sequence[Point], key: str, symbol: str, colour: str, line: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The points that have the drop `key`, by size; joined where there is a `line`."""
    own = sorted((p.size_bytes / 1e6, 100 * getattr(p, key)) for p in points if getattr(p, key) is not None)
    style = {"line": dict(line)} if line else {}
    size = 5 if line else 8
    return _trace(name, own, symbol, size, colour) | style | {"mode": "lines+markers" if line else "markers"}


def _point(name: str, size_bytes: float, drop: float, symbol: str, colour: str) -> dict[str, Any]:
    return _trace(name, [(size_bytes / 1e6, 100 * drop)], symbol, 13, colour)


def _trace(name: str, at: Sequence[tuple[float, float]], symbol: str, size: int, colour: str) -> dict[str, Any]:
    """Markers at (MB, per cent)."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [x for x, _ in at],
        "y": [y for _, y in at],
        "marker": {"symbol": symbol, "size": size, "color": f"var(--{colour})"},
        "hovertemplate": "%{x:.2f} MB, %{y:.2f} %",
    }


def _top_drop(data: ReportData) -> float:
    """Per cent at the top of the plane: what was reached and asked fits; hopeless menu points need not."""
    loss, asked = data.latest("quality_loss"), data.fit.budget.max_drop
    points = [*data.fit.rounds, *([data.fit.nearest] if data.fit.nearest else [])]
    drops = [point.measured_drop for point in points] + [point.predicted_drop for point in points]
    drops.append(1.5 * asked if asked is not None else None)
    drops.append(loss.high if loss is not None and math.isfinite(loss.high) else None)
    known = [drop for drop in drops if drop is not None]
    frontier = [point.predicted_drop for point in data.fit.frontier if point.predicted_drop is not None]
    if known and max(known) > 0:
        return 100 * min(2 * max(known), max([*known, *frontier])) * 1.1
    return 110 * min(MOST_PREDICTED, max([*frontier, 0.01]))


def _draw_limit(layout: dict[str, Any], axis: str, at: float, text: str) -> None:
    """A dashed line across the plane where `axis` (x is logarithmic) has the value `at`, with a text beside it."""
    other, line = "y" if axis == "x" else "x", {"color": "var(--red)", "width": 1.5, "dash": "dash"}
    ends = {f"{axis}0": at, f"{axis}1": at, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    place = {axis: math.log10(at) if axis == "x" else at, other: 1, f"{axis}ref": axis, f"{other}ref": "paper"}
    anchor = {"xanchor": "left", "yanchor": "top"} if axis == "x" else {"xanchor": "right", "yanchor": "bottom"}
    style = {"showarrow": False, "font": {"color": "var(--red)", "size": 12}, "bgcolor": "var(--paper)"}
    layout.setdefault("shapes", []).append({"type": "line", "line": line, **ends})
    layout.setdefault("annotations", []).append({"text": label(text), **place, **anchor, **style})


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    low, high = math.log10(min(values)) - 0.04, math.log10(max(values)) + 0.04
    low, high = (low, high) if high - low > 0.3 else ((low + high) / 2 - 0.15, (low + high) / 2 + 0.15)
    steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high - low < 1.2 else (1, 2, 5)
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return {"type": "log", "range": [low, high], "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _points_table(data: ReportData) -> Table:
    def drop(value: float | None) -> str:
        return "–" if value is None else format_value(value, "fraction")

    nearest = (data.fit.nearest,) if data.fit.nearest else ()
    groups = (("menu", data.fit.frontier), ("round", data.fit.rounds), ("nearest", nearest))
    rows = [
        [name, format_value(point.size_bytes, "bytes"), drop(point.predicted_drop), drop(point.measured_drop)]
        for name, points in groups
        for point in points
    ]
    loss = data.latest("quality_loss")
    if not data.fit.infeasible:
        rows.append(["this artifact", format_value(data.size_bytes, "bytes"), "–", drop(loss.value if loss else None)])
    for name, size in (("parent", data.parent_size_bytes), ("parent as downloaded", data.parent_download_bytes)):
        if size:
            rows.append([name, format_value(size, "bytes"), "–", drop(0.0)])
    heads = ["point", "size", "predicted", "measured"]
    return Table("Size and quality loss", heads, rows, numbers=(1, 2, 3))
