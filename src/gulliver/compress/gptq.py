"""Quantizing one weight matrix: round to nearest (RTN), and GPTQ, which passes rounding errors on.

Columns are quantized one after another; what each rounding got wrong is passed on to the columns not yet quantized so
that the layer's output changes least. With H = XᵀX + λI over calibration inputs X and U the upper Cholesky factor of
H⁻¹, quantizing column i with error e = w_i - ŵ_i changes the rest by -e U[i, j] / U[i, i] for j > i (Frantar et al.,
GPTQ, 2022, arXiv 2210.17323). Columns are taken in order of falling H_ii, whole groups first and then within each
group, so that a group's scale is known when its first column is rounded (Gafni et al., Dual precision quantization,
2025, arXiv 2505.14638, call this group-aware reordering). A group's grid is fitted to the already corrected weights,
weighted by diag(H).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gulliver.runtime.formats import Format
from gulliver.runtime.grid import (
    Grid,
    as_groups,
    fit_codebook_grid,
    fit_uniform_grid,
    learn_codebook,
    midpoints,
    nearest,
    row_factors,
    split_scales,
)
from gulliver.runtime.packed import RowGroup, joined

DAMPING = 0.02
CHUNK_ROWS = 8192
"""Rows that are rounded at once, and of which float32 copies are in memory."""
CODEBOOK_ROWS = 65_536


def quantize_matrix(weight: Tensor, fmt: Format, moment: Tensor | None, *, gptq: bool = True) -> RowGroup:
    """Quantize weight [rows, columns]; `moment` is H [columns, columns], its diagonal [columns], or None.

    Without a full H, or with `gptq=False`, codes are the nearest on grids fitted with diag(H) as importance.
    """
    rows, columns = weight.shape
    importance = torch.ones(columns) if moment is None else (moment.diagonal() if moment.dim() == 2 else moment)
    importance = importance / importance.mean().clamp_min(1e-20) + 1e-3
    weights_of_group = as_groups(importance[None], fmt)[0]
    codebook = None
    if fmt.kind == "codebook":
        step = max(1, rows * fmt.groups(columns) // CODEBOOK_ROWS)
        groups = as_groups(weight[::step].float(), fmt)
        spread = weights_of_group.expand_as(groups).reshape(-1, fmt.group_size)
        codebook = learn_codebook(groups.reshape(-1, fmt.group_size), spread, fmt.levels)
    solve = None
    if moment is not None and moment.dim() == 2 and gptq:
        order = column_order(importance, fmt.group_size)
        solve = order, inverse_factor(moment[order[:, None], order[None]])
    parts = []
    for start in range(0, rows, CHUNK_ROWS):
        some = weight[start : start + CHUNK_ROWS].float()
        groups = as_groups(some, fmt)
        if solve is None:
            grid = _fit_all(groups, weights_of_group, fmt, codebook)
            parts.append(_round(some, fmt, grid, row_factors(grid.scales), codebook))
        else:
            if codebook is not None:  # scales that just reach every weight: fitted ones hardly ever exceed them
                widest = groups.abs().amax(2) / codebook.float().abs().max()
            else:
                widest = (groups.amax(2).clamp_min(0) - groups.amin(2).clamp_max(0)) / (fmt.levels - 1)
            factors = row_factors(widest)
            parts.append(_solve(some, fmt, *solve, importance, factors, codebook))
    return joined(parts)


def _fitter(fmt: Format, codebook: Tensor | None) -> Callable[[Tensor, Tensor], Grid]:
    """(group [rows, group_size], importance [1, group_size]) -> its grid."""
    if codebook is None:
        return partial(fit_uniform_grid, levels=fmt.levels)
    return partial(fit_codebook_grid, codebook=codebook.float())


def _fit_all(groups: Tensor, importance: Tensor, fmt: Format, codebook: Tensor | None) -> Grid:
    fit = _fitter(fmt, codebook)
    grids = [fit(groups[:, index], importance[index][None]) for index in range(groups.shape[1])]
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return Grid(torch.stack([grid.scales for grid in grids], 1), torch.stack(zeros, 1) if zeros else None)


def _codes(scaled: Tensor, fmt: Format, zeros: Tensor, borders: Tensor | None) -> Tensor:
    """The code nearest to each of `scaled`, in units of the scale: by the codebook's borders, else plus `zeros`."""
    if borders is not None:
        return nearest(scaled, borders)
    return torch.round(scaled + zeros).clamp_(0, fmt.levels - 1)


def _round(weight: Tensor, fmt: Format, grid: Grid, factors: Tensor, codebook: Tensor | None) -> RowGroup:
    rows, columns = weight.shape
    codes_of_scale = split_scales(grid.scales, factors)
    scales = codes_of_scale.float() * factors.float()[:, None]
    zeros = torch.zeros(1) if grid.zeros is None else grid.zeros[:, :, None]
    borders = None if codebook is None else midpoints(codebook)
    codes = _codes(as_groups(weight, fmt) / scales[:, :, None], fmt, zeros, borders)
    codes = codes.to(torch.uint8).view(rows, -1)[:, :columns].contiguous()
    stored = None if grid.zeros is None else grid.zeros.to(torch.uint8)
    return RowGroup(fmt, codes, codes_of_scale, factors, stored, codebook)


def inverse_factor(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper Cholesky factor U [columns, columns] of (H + λI)⁻¹ = UᵀU, for H = `moment`, float32 of the same shape.

    λ grows until the factorisation exists. Overwrites H's diagonal.
    """
    diagonal = moment.diagonal()
    mean = float(diagonal.mean().clamp_min(1e-12))
    diagonal[diagonal == 0] = mean
    for _ in range(8):
        diagonal += damping * mean
        lower, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper
        damping *= 4
    raise AssertionError("the second moment of the inputs cannot be inverted even with strong damping")


def column_order(importance: Tensor, group_size: int) -> Tensor:
    """Columns by falling importance: groups by their largest entry, then inside each group. int64 [columns]."""
    columns = len(importance)
    groups = -(-columns // group_size)
    padded = torch.full((groups * group_size,), -1.0)
    padded[:columns] = importance
    table = padded.view(groups, group_size)
    inside = table.argsort(dim=1, descending=True, stable=True) + torch.arange(groups)[:, None] * group_size
    order = inside[table.amax(1).argsort(descending=True, stable=True)].flatten()
    return order[order < columns]


def _solve(
    weight: Tensor,
    fmt: Format,
    order: Tensor,
    upper: Tensor,
    importance: Tensor,
    factors: Tensor,
    codebook: Tensor | None,
) -> RowGroup:
    rows, columns = weight.shape
    # one column of the work matrix is contiguous, because columns are visited one at a time
    work = weight[:, order].t().contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    scale_codes = torch.ones(rows, fmt.groups(columns), dtype=torch.uint8)
    zero_codes = None if codebook is not None else torch.zeros(rows, fmt.groups(columns), dtype=torch.uint8)
    borders = None if codebook is None else midpoints(codebook)
    entries = None if codebook is None else codebook.float()
    fit, start = _fitter(fmt, codebook), 0
    while start < columns:
        group = int(order[start]) // fmt.group_size
        stop = min(start + fmt.group_size, columns)
        while stop > start and int(order[stop - 1]) // fmt.group_size != group:
            stop -= 1
        grid = fit(work[start:stop].t(), importance[order[start:stop]][None])
        scale_codes[:, group] = split_scales(grid.scales[:, None], factors)[:, 0]
        scale = scale_codes[:, group].float() * factors.float()
        zeros = torch.zeros(1) if grid.zeros is None else grid.zeros
        if zero_codes is not None:
            zero_codes[:, group] = zeros.to(torch.uint8)
        errors = torch.empty(stop - start, rows)
        local = work[start:stop]
        for index in range(stop - start):
            column = local[index]
            code = _codes(column / scale, fmt, zeros, borders)
            value = (code - zeros) * scale if entries is None else entries[code] * scale
            codes[start + index] = code.to(torch.uint8)
            error = (column - value) / upper[start + index, start + index]
            errors[index] = error
            if index + 1 < stop - start:
                local[index + 1 :].addr_(upper[start + index, start + index + 1 : stop], error, alpha=-1.0)
        if stop < columns:
            work[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1.0)
        start = stop
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)
    return RowGroup(fmt, codes[back].t().contiguous(), scale_codes, factors, zero_codes, codebook)
