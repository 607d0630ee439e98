"""One plotly figure as plain JSON, its caption and the same numbers as a table.

The page's script (page.js) draws it; colours are names of the style sheet's variables, so that one figure is right in
light and in dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


@dataclass(frozen=True)
class Table:
    """Plain texts; the first cell of a row is its head, and `numbers` are the indexes of columns of numbers."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """One plotly figure: `name` its id in the page, `says` the text in its place, `numbers` its table."""

    name: str
    title: str
    says: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    numbers: Table

    @property
    def figure(self) -> dict[str, Any]:
        """What plotly.js draws."""
        return {"data": self.data, "layout": self.layout}


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
