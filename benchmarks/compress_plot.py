"""Size against quality given up, as an SVG that is readable on light and dark pages. Plain text, no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 52, 52
LOSSES = (0.005, 0.5)
"""What is shown: quality given up between these fractions."""
TICKS = (0.5, 1, 2, 5, 10, 20, 50)
LETTER, LINE = 6.6, 13
STYLE = """
  text { font-family: system-ui, sans-serif; font-size: 12px; fill: #24292f; }
  .title { font-size: 15px; font-weight: 600; }
  .grid { stroke: #d0d7de; stroke-width: 1; }
  .peer { fill: #57606a; stroke: none; }
  .peers { fill: none; stroke: #57606a; stroke-width: 1.2; stroke-dasharray: 4 3; }
  .label { font-size: 11px; fill: #57606a; }
  .ours { fill: #0969da; stroke: none; }
  .line { fill: none; stroke: #0969da; stroke-width: 2; }
  .mine { font-size: 12px; font-weight: 600; fill: #0969da; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .grid { stroke: #3d444d; }
    .peer { fill: #9198a1; }
    .peers { stroke: #9198a1; }
    .label { fill: #9198a1; }
    .ours, .mine { fill: #4493f8; }
    .line { stroke: #4493f8; }
  }"""


def plot(ours: Sequence[Any], peers: Sequence[Any], frontier: Sequence[Any]) -> str:
    """SVG of points with `name`, `size_bytes`, `ratio`; those of the peers' `frontier` are joined and labelled."""
    ours, peers, frontier = ([point for point in part if _shown(point)] for part in (ours, peers, frontier))
    sizes = [point.size_bytes / 1e6 for point in (*ours, *peers)]
    low, high = 5 * math.floor(min(sizes) / 5), 5 * math.ceil((max(sizes) + 1) / 5)
    place = _Place(low, high)
    parts = [*_frame(place, low, high), f'<path class="peers" d="{_path(place, frontier)}"/>']
    efforts = sorted({point.name for point in ours})
    lines = [[point for point in ours if point.name == effort] for effort in efforts]
    parts += [f'<path class="line" d="{_path(place, line)}"/>' for line in lines if len(line) > 1]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in map(place.of, (*ours, *peers))]
    taken += [box for line in (*lines, frontier) for box in _along(place, line)]
    labelled = [*((point, "ours", "mine") for point in ours), *((point, "peer", "label") for point in frontier)]
    others = [point for point in peers if point not in frontier]
    parts += [_dot(place, point, "peer") for point in others]
    for point, dot, label in labelled:
        parts += [_dot(place, point, dot), _label(place, point, label, taken)]
    told = "Perplexity lost against the parent over megabytes of weights, for Gulliver and for other tools"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{told}">'
    return "\n".join([head, f"<style>{STYLE}\n</style>", *parts, "</svg>", ""])


def _shown(point: Any) -> bool:
    return LOSSES[0] <= point.ratio - 1 <= LOSSES[1]


class _Place:
    """From megabytes and loss to pixels."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high

    def x(self, megabytes: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (megabytes - self._low) / (self._high - self._low)

    def y(self, loss: float) -> float:
        bottom, top = (math.log(value) for value in LOSSES)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (math.log(loss) - bottom) / (top - bottom)

    def of(self, point: Any) -> tuple[float, float]:
        return round(self.x(point.size_bytes / 1e6), 1), round(self.y(point.ratio - 1), 1)


def _frame(place: _Place, low: int, high: int) -> list[str]:
    """Title, axes with their ticks, legend."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<text class="title" x="{LEFT}" y="24">Quality given up by size</text>']
    for tick in TICKS:
        y = round(place.y(tick / 100), 1)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{tick} %</text>')
    for tick in range(low, high + 1, 5):
        x = round(place.x(tick), 1)
        parts.append(f'<line class="grid" x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 5}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{tick}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 10}" text-anchor="middle">MB of weights</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 10}">perplexity above the parent’s (log scale)</text>')
    parts.append(f'<circle class="ours" cx="{right - 190}" cy="20" r="5"/>')
    parts.append(f'<text x="{right - 180}" y="24">Gulliver</text>')
    parts.append(f'<circle class="peer" cx="{right - 110}" cy="20" r="3.5"/>')
    parts.append(f'<text x="{right - 100}" y="24">llama.cpp, others</text>')
    return parts


def _path(place: _Place, points: Sequence[Any]) -> str:
    return "M" + " L".join(f"{x} {y}" for x, y in map(place.of, points)) if points else ""


def _along(place: _Place, points: Sequence[Any]) -> list[tuple[float, float, float, float]]:
    """Small boxes along a line, which labels keep clear of."""
    found, corners = [], [place.of(point) for point in points]
    for (x1, y1), (x2, y2) in pairwise(corners):
        steps = max(1, round(math.hypot(x2 - x1, y2 - y1) / 6))
        middles = [(x1 + (x2 - x1) * i / steps, y1 + (y2 - y1) * i / steps) for i in range(steps + 1)]
        found += [(x - 1, y - 1, x + 1, y + 1) for x, y in middles]
    return found


def _dot(place: _Place, point: Any, style: str) -> str:
    x, y = place.of(point)
    told = escape(f"{point.name}: {point.size_bytes / 1e6:.1f} MB, {point.ratio - 1:.2%} lost")
    return (
        f'<circle class="{style}" cx="{x}" cy="{y}" r="{5 if style == "ours" else 3.5}"><title>{told}</title></circle>'
    )


def _label(place: _Place, point: Any, style: str, taken: list[tuple[float, float, float, float]]) -> str:
    """The point's name at the first of the places around it where least stands; that place is then taken."""
    x, y = place.of(point)
    name = point.name.removeprefix("llama.cpp ").removeprefix("gulliver ").replace(", embedding ", " + ")
    name = f"{name}, {point.size_bytes / 1e6:.0f} MB" if style == "mine" else name
    wide = LETTER * len(name) * (1.15 if style == "mine" else 1)
    beyond = [(x + 9, y + 4), (x - 9 - wide, y + 4)]
    below = [(x - 6 - wide, y + 18), (x - wide / 2, y + 18), (x + 6, y + 18)]
    above = [(x + 6, y - 9), (x - wide / 2, y - 9), (x - 6 - wide, y - 9)]
    choices = [*below, *beyond, *above] if style == "mine" else [*above, *beyond, *below]
    boxes = [(left, base - LINE + 3, left + wide, base + 3) for left, base in choices]
    inside = [box for box in boxes if box[0] >= LEFT and box[2] <= WIDTH - 2 and box[3] <= HEIGHT - BOTTOM]
    box = min(inside or boxes, key=lambda one: sum(_meet(one, other) for other in taken))
    taken.append(box)
    return f'<text class="{style}" x="{box[0]:.1f}" y="{box[3] - 3:.1f}">{escape(name)}</text>'


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
