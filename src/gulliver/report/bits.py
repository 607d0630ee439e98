"""Bits per tensor as pictures: a map of the blocks, and bars for tensors outside them or cut by rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gulliver.core.records import PartBits, TensorBits
from gulliver.report.picture import Picture, Table, base_layout, label
from gulliver.report.units import format_value

_BITS_COLOURS = {2: "#440154", 3: "#414487", 4: "#2a788e", 5: "#22a884", 6: "#7ad151", 9: "#fde725"}
"""One colour for a number of bits, the same in every report. From viridis, which any colour vision can tell apart."""
_COLOUR_BAR = {
    "type": "scatter", "mode": "markers", "x": [None], "y": [None], "hoverinfo": "skip",
    "marker": {"color": [min(_BITS_COLOURS)], "coloraxis": "coloraxis"},
}  # fmt: skip
"""A trace without a point: it makes plotly draw the scale of colours beside bars that have theirs already."""
_DARK_BELOW_BITS = 4.6
"""Colours of fewer bits than this are dark and take white text."""
_MAX_BARS = 40
_BLOCK = re.compile(r"^(?P<before>(?:[^.]*[^.\d][^.]*\.)*)(?P<index>\d+)\.(?P<role>.+)$")


@dataclass(frozen=True)
class BlockGrid:
    """Tensors placed by block and role; `names` are those placed."""

    blocks: tuple[str, ...]
    roles: tuple[str, ...]
    cells: Mapping[tuple[str, str], TensorBits]

    @property
    def names(self) -> set[str]:
        return {tensor.name for tensor in self.cells.values()}


def block_grid(tensors: Sequence[TensorBits]) -> BlockGrid:
    """Tensors whose name holds a block's number ("model.layers.3.mlp.up_proj.weight": block 3, role up_proj).

    The first whole number in the dotted name is the block; what follows is the role, shortened to its last part where
    that stays unique. Models with several stacks ("encoder.0", "decoder.0") keep the stack's name in the role.
    """
    found = [(tensor, match) for tensor in tensors if tensor.parts and (match := _BLOCK.match(tensor.name))]
    several = len({match["before"] for _, match in found}) > 1
    keys = [(match["before"] if several else "", match["role"].removesuffix(".weight")) for _, match in found]
    owners: dict[str, set[tuple[str, str]]] = {}
    for key in keys:
        owners.setdefault(key[1].rpartition(".")[2], set()).add(key)
    cells, roles = {}, {}
    for (tensor, match), (stack, role) in zip(found, keys, strict=True):
        short = role.rpartition(".")[2]
        shown = short if len(owners[short]) == 1 else f"{stack}{role}"
        cells[(match["index"], shown)] = tensor
        roles[shown] = None
    blocks = sorted({match["index"] for _, match in found}, key=int)
    return BlockGrid(tuple(blocks), tuple(roles), cells)


def bits(tensors: Sequence[TensorBits]) -> Picture | None:
    """Bits per weight of every tensor in a block: one column a block, one row a role."""
    grid = block_grid(tensors)
    if not grid.roles:
        return None
    values = [[grid.cells.get((block, role)) for block in grid.blocks] for role in grid.roles]
    trace = {
        "type": "heatmap",
        "x": [label(block) for block in grid.blocks],
        "y": [label(role) for role in grid.roles],
        "z": [[tensor.bits_per_weight if tensor else None for tensor in row] for row in values],
        "customdata": [[label(_formats(tensor)) if tensor else "" for tensor in row] for row in values],
        "hovertemplate": "block %{x}, %{y}<br>%{z:.2f} bits a weight<br>%{customdata}<extra></extra>",
        "coloraxis": "coloraxis",
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
    }
    layout = base_layout(150 + 26 * len(grid.roles))
    layout["xaxis"] |= {"type": "category", "title": {"text": "block"}, "showgrid": False}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False, "automargin": True}
    layout["coloraxis"] = _bits_axis()
    columns = [[f"{tensor.bits_per_weight:.2f}" if tensor else "–" for tensor in row] for row in values]
    rows = [list(cells) for cells in zip(grid.blocks, *columns, strict=True)]
    heads = ["block", *grid.roles]
    numbers = Table("Bits per weight, by block and role", heads, rows, numbers=range(1, len(heads)))
    says = "Bits a weight of each tensor in the blocks, scales included; a darker cell is stored in fewer bits."
    return Picture("bits", "Bits per weight in the blocks", says, [trace], layout, numbers)


def rows_bits(tensors: Sequence[TensorBits]) -> Picture | None:
    """Tensors outside the blocks and tensors cut by rows: bytes of every part, coloured by its bits."""
    grid = block_grid(tensors)
    shown = [tensor for tensor in tensors if tensor.name not in grid.names or len(tensor.parts) > 1]
    shown = sorted(shown, key=lambda tensor: -tensor.size_bytes)[:_MAX_BARS]
    if not shown:
        return None
    layout = base_layout(150 + 34 * len(shown)) | {"barmode": "stack", "showlegend": False}
    layout["uniformtext"] = {"mode": "hide", "minsize": 9}
    layout["xaxis"] |= {"title": {"text": "MB (10⁶ bytes)"}, "rangemode": "tozero"}
    layout["yaxis"] |= {"type": "category", "autorange": "reversed", "showgrid": False, "automargin": True}
    layout["coloraxis"] = _bits_axis()
    parts = [(tensor.name, part) for tensor in shown for part in tensor.parts]
    traces = [*(_bar(name, part) for name, part in parts), _COLOUR_BAR]
    rows = [
        [name, f"{part.rows:,}", part.format, f"{part.bits_per_weight:.2f}", format_value(part.size_bytes, "bytes")]
        for name, part in parts
    ]
    heads = ["tensor", "rows", "format", "bits a weight", "size"]
    says = "Tensors outside the blocks, and tensors whose rows are stored in several formats; width is bytes."
    numbers = Table("Parts of these tensors", heads, rows, numbers=(1, 3, 4))
    return Picture("rows", "Bits per weight by rows", says, traces, layout, numbers)


def _bar(name: str, part: PartBits) -> dict[str, Any]:
    """One part of a tensor as a piece of its bar."""
    return {
        "type": "bar",
        "orientation": "h",
        "y": [label(_short_name(name))],
        "x": [part.size_bytes / 1e6],
        "text": [label(f"{part.format}, {part.rows:,} rows")],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "textfont": {"color": "#ffffff" if part.bits_per_weight < _DARK_BELOW_BITS else "#111111"},
        "marker": {"color": _colour(part.bits_per_weight), "line": {"color": "var(--panel)", "width": 1}},
        "customdata": [[label(part.format), part.rows, part.bits_per_weight]],
        "hovertemplate": "%{customdata[1]:,} rows as %{customdata[0]}<br>%{customdata[2]:.2f} bits a weight"
        "<br>%{x:.2f} MB<extra></extra>",
    }


def _colour(bits_per_weight: float) -> str:
    """The colour of a number of bits, between those of _BITS_COLOURS."""
    known = sorted(_BITS_COLOURS)
    place = min(max(bits_per_weight, known[0]), known[-1])
    above = next(bits for bits in known[1:] if place <= bits)
    below = max(bits for bits in known if bits < above)
    share = (place - below) / (above - below)
    ends = [[int(_BITS_COLOURS[bits][at : at + 2], 16) for at in (1, 3, 5)] for bits in (below, above)]
    return "#" + "".join(f"{round(low + share * (high - low)):02x}" for low, high in zip(*ends, strict=True))


def loss_by_block(tensors: Sequence[TensorBits]) -> list[tuple[str, float]]:
    """Predicted loss increase summed by block; a tensor outside the blocks counts as a block of its own."""
    sums: dict[str, float] = {}
    for tensor in tensors:
        if tensor.loss_increase is not None:
            match = _BLOCK.match(tensor.name)
            name = f"{match['before']}{match['index']}" if match else _short_name(tensor.name)
            sums[name] = sums.get(name, 0.0) + tensor.loss_increase
    return list(sums.items())


def _short_name(name: str) -> str:
    return ".".join(name.removesuffix(".weight").split(".")[-2:]).removeprefix("model.")


def _formats(tensor: TensorBits) -> str:
    return ", ".join(f"{part.format} × {part.rows:,} rows" for part in tensor.parts)


def _bits_axis() -> dict[str, Any]:
    low, high = min(_BITS_COLOURS), max(_BITS_COLOURS)
    scale = [[(bits - low) / (high - low), colour] for bits, colour in _BITS_COLOURS.items()]
    title = {"text": f"bits a weight ({high} and more alike)", "side": "top", "font": {"size": 12}}
    bar = {
        "orientation": "h",
        "y": 1.02,
        "yanchor": "bottom",
        "thickness": 10,
        "len": 1.0,
        "outlinewidth": 0,
        "dtick": 1,
    }
    return {"colorscale": scale, "cmin": low, "cmax": high, "colorbar": bar | {"title": title}}
