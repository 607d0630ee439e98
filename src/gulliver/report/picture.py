"""One plotly figure as plain JSON, its caption and the same numbers as a table, turned into HTML.

The page's script (theme.py) draws it; colours are names of the style sheet's variables, so that one figure is right in
light and in dark.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from typing import Any

from gulliver.report.tables import scroll


@dataclass(frozen=True)
class Picture:
    """One plotly figure: `name` its id in the page, `says` the text in its place, `numbers` a table (HTML)."""

    name: str
    title: str
    says: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    numbers: str


def figure_html(picture: Picture) -> str:
    """The picture, its caption, and its numbers behind a disclosure."""
    height = picture.layout["height"]
    body = json.dumps({"data": picture.data, "layout": picture.layout}, allow_nan=False, sort_keys=True)
    body = body.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return (
        f'<figure id="{picture.name}"><figcaption>{escape(picture.says)}</figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(picture.title)}. {escape(picture.says)}" '
        f'style="height:{height}px"></div><script type="application/json">{body}</script>'
        f"<details><summary>{escape(picture.title)}: the numbers</summary>{scroll(picture.numbers, picture.title)}"
        "</details></figure>"
    )


def label(text: str) -> str:
    """User text for a plotly label: plotly reads a little HTML there, so it is escaped."""
    return escape(text, quote=False)


def base_layout(height: int) -> dict[str, Any]:
    """The layout that all figures start from; `height` in CSS pixels."""
    axis = {"gridcolor": "var(--line)", "linecolor": "var(--line)", "zerolinecolor": "var(--line)", "automargin": True}
    return {
        "height": height,
        "autosize": True,
        "margin": {"l": 8, "r": 8, "t": 16, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink)", "size": 12, "family": "system-ui, sans-serif"},
        "hoverlabel": {"bgcolor": "var(--panel)", "font": {"color": "var(--ink)"}, "bordercolor": "var(--line)"},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        "dragmode": False,
        "xaxis": dict(axis),
        "yaxis": dict(axis),
    }
