"""Grids of the tile formats (runtime/packed.py) while a matrix's codes are being chosen; a `Rounder` (solver.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from gulliver.compress.choose import GroupGrid
from gulliver.runtime.formats import Format
from gulliver.runtime.grid import (
    Grid,
    Lookup,
    fit_codebook_grid,
    fit_symmetric_grid,
    fit_uniform_grid,
    split_scales,
)
from gulliver.runtime.packed import RowGroup

Fitter = Callable[[Tensor, Tensor], Grid]
"""(group [rows, group_size], importance [1, group_size]) -> its grid."""


def fitter(fmt: Format, lookup: Lookup | None, factors: Tensor) -> Fitter:
    """What fits the grids of a format; `factors` [rows] are those of the rows."""
    if lookup is not None:
        return partial(fit_codebook_grid, codebook=lookup)
    if fmt.kind == "symmetric":
        return partial(fit_symmetric_grid, fmt=fmt, factors=factors)
    return partial(fit_uniform_grid, levels=fmt.levels)


@dataclass
class TileRounder:
    """Rows with these `factors` [rows]; `importance` float32 [columns]; `lookup` of a codebook, where there is one."""

    fmt: Format
    importance: Tensor
    factors: Tensor
    fit: Fitter
    lookup: Lookup | None
    block_size: int = 0
    scales: Tensor = field(init=False)
    zeros: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        shape = len(self.factors), self.fmt.groups(len(self.importance))
        self.scales = torch.ones(shape, dtype=torch.uint8)
        self.zeros = None if self.lookup is not None else torch.zeros(shape, dtype=torch.uint8)

    @property
    def group_size(self) -> int:
        return self.fmt.group_size

    def open_block(self, block: int, weights: Tensor) -> None:
        """Nothing for `weights` [rows, columns of a block]: groups share the row's factor alone."""

    def open_group(self, group: int, weights: Tensor) -> GroupGrid:
        """Fit the grid of a group to its `weights` [rows, group size]."""
        first = group * self.group_size
        grid = self.fit(weights, self.importance[first : first + self.group_size][None])
        self.scales[:, group] = split_scales(grid.scales[:, None], self.factors)[:, 0]
        if self.zeros is not None and grid.zeros is not None:
            self.zeros[:, group] = grid.zeros.to(torch.uint8)
        return self.grid(group)

    def grid(self, group: int) -> GroupGrid:
        scale = self.scales[:, group].float() * self.factors.float()
        none = torch.zeros_like(scale)
        zero = none if self.zeros is None else self.zeros[:, group].float()
        return GroupGrid(scale, zero, none, self.lookup or self.fmt.levels)

    def rescale(self, group: int, ratio: Tensor) -> Tensor | None:
        """Scales times about `ratio` [rows], as codes: what they were multiplied by, [rows]."""
        before = self.scales[:, group].float()
        after = (before * ratio).round_().clamp_(1, self.fmt.top_scale)
        self.scales[:, group] = after.to(torch.uint8)
        return after / before

    def finished(self, codes: Tensor) -> RowGroup:
        """The rows with these codes uint8 [rows, columns]."""
        codebook = None if self.lookup is None else self.lookup.codebook
        return RowGroup(self.fmt.tiles, codes, self.scales, self.factors, self.zeros, codebook)
