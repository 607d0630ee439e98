"""Quantizing one weight matrix: round to nearest (RTN), and GPTQ, which passes rounding errors on.

Columns are quantized one after another; what each rounding got wrong is made up for by the columns not yet quantized so
that the layer's output changes least. With H = XᵀX + λI over calibration inputs X and H = L D Lᵀ, L unit lower
triangular, columns are visited from the last to the first, and column i is rounded after Σ_{j>i} (w_j - ŵ_j) L[j, i]
was added to it (Chee et al., QuIP, 2023, arXiv 2307.13304, who prove it the same as GPTQ: Frantar et al., 2022, arXiv
2210.17323; it needs no H⁻¹). Columns are in order of rising H_ii, whole groups first and then within each group, so
that a group's scale is known when its first column is rounded (Gafni et al., Dual precision quantization, 2025, arXiv
2505.14638, call this group-aware reordering). A group's grid is fitted to what its columns would best be if they were
not rounded, weighted by diag(H).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gulliver.compress.kquant import BlockRounder, nested_order
from gulliver.compress.solver import DAMPING, solve
from gulliver.compress.tiles import Fitter, TileRounder, fitter
from gulliver.runtime.blocks import BlockRows
from gulliver.runtime.formats import Format
from gulliver.runtime.grid import (
    Grid,
    Lookup,
    as_groups,
    learn_codebook,
    power_factors,
    row_factors,
    split_scales,
)
from gulliver.runtime.packed import RowGroup, joined

CHUNK_ROWS = 8192
"""Rows that are rounded at once, and of which float32 copies are in memory."""
CODEBOOK_ROWS = 65_536


def codebook_of(weight: Tensor, fmt: Format, moment: Tensor | None) -> Tensor:
    """The values int8 [levels] that codes of `fmt` stand for in weight [rows, columns]; `moment` as below."""
    spread = as_groups(_importance(moment, weight.shape[1])[None], fmt)[0]
    step = max(1, len(weight) * fmt.groups(weight.shape[1]) // CODEBOOK_ROWS)
    groups = as_groups(weight[::step].float(), fmt)
    return learn_codebook(
        groups.reshape(-1, fmt.group_size), spread.expand_as(groups).reshape(-1, fmt.group_size), fmt.levels
    )


def _importance(moment: Tensor | None, columns: int) -> Tensor:
    """How much each column's errors count, float32 [columns], mean 1."""
    found = torch.ones(columns) if moment is None else (moment.diagonal() if moment.dim() == 2 else moment)
    return found / found.mean().clamp_min(1e-20) + 1e-3


def quantize_matrix(
    weight: Tensor,
    fmt: Format,
    moment: Tensor | None,
    *,
    gptq: bool = True,
    sweeps: int = 0,
    codebook: Tensor | None = None,
) -> RowGroup | BlockRows:
    """Quantize weight [rows, columns]; `moment` is H [columns, columns], its diagonal [columns], or None.

    `codebook`: the values that codes stand for; learned from the weight where none is given and the format has one.
    Without a full H, or with `gptq=False`, codes are the nearest on grids fitted with diag(H) as importance; else codes
    are chosen again in so many `sweeps` after GPTQ.
    """
    rows, columns = weight.shape
    importance = _importance(moment, columns)
    solver: tuple[Tensor, Tensor] | None = None
    if moment is not None and moment.dim() == 2 and gptq:
        order = nested_order(importance, fmt) if fmt.block else column_order(importance, fmt.group_size)
        solver = order, feedback(moment, order)
    if fmt.block is not None:
        order, lower = solver or (torch.arange(columns), None)
        blocks = []
        for start in range(0, rows, CHUNK_ROWS):
            some = weight[start : start + CHUNK_ROWS].float()
            blocks.append(solve(some, BlockRounder(fmt, len(some), importance), moment, order, lower, sweeps).blocks)
        return BlockRows(fmt, torch.cat(blocks))
    weights_of_group = as_groups(importance[None], fmt)[0]
    lookup = None
    if fmt.kind == "codebook":
        lookup = Lookup(codebook_of(weight, fmt, moment) if codebook is None else codebook)
    parts = []
    for start in range(0, rows, CHUNK_ROWS):
        some = weight[start : start + CHUNK_ROWS].float()
        groups = as_groups(some, fmt)
        if lookup is not None:  # scales that just reach every weight: fitted ones hardly ever exceed them
            widest = groups.abs().amax(2) / lookup.top
        else:
            widest = (groups.amax(2).clamp_min(0) - groups.amin(2).clamp_max(0)) / (fmt.levels - 1)
        factors = power_factors(widest, fmt) if fmt.kind == "symmetric" else row_factors(widest)
        fit = fitter(fmt, lookup, factors)
        if solver is None:
            grid = _fit_all(groups, weights_of_group, fit)
            factors = factors if fmt.kind == "symmetric" else row_factors(grid.scales)
            parts.append(_round(some, fmt, grid, factors, lookup))
        else:
            rounder = TileRounder(fmt, importance, factors, fit, lookup)
            parts.append(solve(some, rounder, moment, *solver, sweeps))
    return joined(parts)


def _fit_all(groups: Tensor, importance: Tensor, fit: Fitter) -> Grid:
    grids = [fit(groups[:, index], importance[index][None]) for index in range(groups.shape[1])]
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return Grid(torch.stack([grid.scales for grid in grids], 1), torch.stack(zeros, 1) if zeros else None)


def _round(weight: Tensor, fmt: Format, grid: Grid, factors: Tensor, lookup: Lookup | None) -> RowGroup:
    rows, columns = weight.shape
    codes_of_scale = split_scales(grid.scales, factors)
    scales = codes_of_scale.float() * factors.float()[:, None]
    scaled = as_groups(weight, fmt) / scales[:, :, None]
    if lookup is not None:
        codes = lookup.codes.index_select(0, lookup.places(scaled))
    else:
        assert grid.zeros is not None
        codes = torch.round(scaled + grid.zeros[:, :, None]).clamp_(0, fmt.levels - 1).to(torch.uint8)
    codes = codes.view(rows, -1)[:, :columns].contiguous()
    stored = None if grid.zeros is None else grid.zeros.to(torch.uint8)
    return RowGroup(fmt.tiles, codes, codes_of_scale, factors, stored, None if lookup is None else lookup.codebook)


def feedback(moment: Tensor, order: Tensor) -> Tensor:
    """L [columns, columns] of H + λI = L D Lᵀ, unit lower triangular, H being `moment` with its columns in `order`."""
    lower = _factor(moment, order)
    return lower.div_(lower.diagonal().clone()[None])


def left_by_feedback(moment: Tensor, group_size: int) -> Tensor:
    """D of H + λI = L D Lᵀ, float32 [columns], H being `moment` with its columns in the order of rounding.

    An error in column i costs D_i once the columns after it have made up for what they can: GPTQ's loss is Σ_i D_i e_i²
    over the errors e of rounding (Chee et al.), where that of rounding to nearest is e H eᵀ.
    """
    order = column_order(_importance(moment, len(moment)), group_size)
    found = torch.empty(len(moment))
    found[order] = _factor(moment, order).diagonal().square()
    return found


def _factor(moment: Tensor, order: Tensor, damping: float = DAMPING) -> Tensor:
    """The lower Cholesky factor of `moment` + λI with its columns in `order`; λ grows until there is one."""
    diagonal = moment.diagonal()[order]
    mean = float(diagonal.mean().clamp_min(1e-12))
    diagonal[diagonal == 0] = mean
    for _ in range(8):
        diagonal += damping * mean
        damped = moment[order[:, None], order[None]].mT
        damped.diagonal().copy_(diagonal)
        lower, failed = torch.linalg.cholesky_ex(damped, out=(damped, torch.empty((), dtype=torch.int32)))
        if not failed:
            return lower
        damping *= 4
    raise AssertionError("the second moment of the inputs cannot be factored even with strong damping")


def column_order(importance: Tensor, group_size: int) -> Tensor:
    """Columns by rising importance: groups by their largest entry, then inside each group. int64 [columns]."""
    columns = len(importance)
    groups = -(-columns // group_size)
    padded = torch.full((groups * group_size,), -1.0)
    padded[:columns] = importance
    table = padded.view(groups, group_size)
    inside = table.argsort(dim=1, descending=True, stable=True) + torch.arange(groups)[:, None] * group_size
    order = inside[table.amax(1).argsort(descending=True, stable=True)].flatten()
    return order[order < columns].flip(0)
