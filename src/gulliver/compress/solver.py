"""Choosing the codes of a matrix one column after another: GPTQ, then sweeps of coordinate descent.

GPTQ (compress/gptq.py) visits each column once and never comes back. A sweep visits every column again and takes what
is nearest to its best value given the codes of all others: with Δ = W - Ŵ, column j is best at ŵ_j + (Δ H)_j / H_jj.
Each visit lowers tr(Δ H Δᵀ) or leaves it (Behdin et al., QuantEase, 2023, arXiv 2309.01885). Grids stay as they are but
for the scales of tiles, which are fitted anew to the codes when a group is visited.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from gulliver.compress.choose import GroupGrid, chosen
from gulliver.nets.precision import quick
from gulliver.runtime.blocks import BlockRows
from gulliver.runtime.packed import RowGroup

DAMPING = 0.02
"""λ of H + λI as a share of the mean of diag(H)."""

Packed = TypeVar("Packed", RowGroup, BlockRows, covariant=True)


class Rounder(Protocol[Packed]):
    """The grids of some rows while their codes are being chosen."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        ...

    @property
    def block_size(self) -> int:
        """Columns, a multiple of the group size, about which something is fixed before their groups; 0 for none."""
        ...

    def open_block(self, block: int, weights: Tensor) -> None:
        """Fix what a block's groups share, for its `weights` [rows, columns of a block] in their natural order."""
        ...

    def open_group(self, group: int, weights: Tensor) -> GroupGrid:
        """Choose the grid of a group of an open block for its `weights` [rows, group size] in their natural order."""
        ...

    def grid(self, group: int) -> GroupGrid:
        """The grid of an open group."""
        ...

    def rescale(self, group: int, ratio: Tensor) -> Tensor | None:
        """Multiply the scales of an open group by about `ratio` [rows]; by what it was [rows], None where it cannot."""
        ...

    def finished(self, codes: Tensor) -> Packed:
        """The rows with these codes uint8 [rows, columns]."""
        ...


def solve(
    weight: Tensor, rounder: Rounder[Packed], moment: Tensor | None, order: Tensor, lower: Tensor | None, sweeps: int
) -> Packed:
    """The codes of weight [rows, columns], whose columns are visited from the last of `order` to the first.

    What rounding got wrong is passed on with `lower`, L of H + λI = L D Lᵀ in this order, H being `moment`; None: not
    at all. Then come so many `sweeps`.
    """
    rows, columns = weight.shape
    # one column of the work matrix is contiguous; those that are done hold what their rounding got wrong
    work = weight.t().contiguous().index_select(0, order)
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    numbers = (order // rounder.group_size).tolist()
    stop, block = columns, -1
    while stop > 0:
        group, start = numbers[stop - 1], max(stop - rounder.group_size, 0)
        while numbers[start] != group:
            start += 1
        if rounder.block_size and group * rounder.group_size // rounder.block_size != block:
            block, whole = group * rounder.group_size // rounder.block_size, slice(stop - rounder.block_size, stop)
            rounder.open_block(block, _natural(_unrounded(work, lower, whole)[0], order[whole]))
        inside = slice(start, stop)
        best, local = _unrounded(work, lower, inside)
        grid = rounder.open_group(group, _natural(best, order[inside]))
        effect = None if lower is None else -lower[inside, inside]
        codes[inside], values = chosen(local, work[inside], effect, grid, backwards=True)
        work[inside] -= values
        stop = start
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)
    codes = codes.index_select(0, back)
    if moment is not None and lower is not None and sweeps:
        errors = work.index_select(0, back)
        del work
        damping = DAMPING * float(moment.diagonal().mean().clamp_min(1e-12))
        half = quick(moment), quick(errors)
        for _ in range(sweeps):
            _sweep(weight, errors, codes, moment, half, damping, rounder)
    return rounder.finished(codes.t().contiguous())


def _unrounded(work: Tensor, lower: Tensor | None, inside: slice) -> tuple[Tensor, Tensor]:
    """Columns `inside` of `work` [columns, rows] as they would best be, and as the first of them is to be rounded.

    Both [columns inside, rows]: with all that the columns after them got wrong made up for, and, the former, with what
    that changes among themselves.
    """
    own = work[inside]
    if lower is None:
        return own, own.clone()
    added = lower[inside.stop :, inside].t() @ work[inside.stop :]
    best = torch.linalg.solve_triangular(lower[inside, inside].t(), added, upper=True, unitriangular=True)
    return best.add_(own), added.add_(own)


def _natural(columns: Tensor, order: Tensor) -> Tensor:
    """[rows, n] in the natural order of columns from `columns` [n, rows] in `order` int64 [n]."""
    return columns.index_select(0, order.argsort()).t().contiguous()


def _sweep(
    weight: Tensor,
    errors: Tensor,
    codes: Tensor,
    moment: Tensor,
    half: tuple[Tensor, Tensor],
    damping: float,
    rounder: Rounder[Any],
) -> None:
    """Choose every code of weight [rows, columns] again, given all others; `errors` Δ and `codes` [columns, rows].

    `half` are the moment and the errors in the type of the fastest products: what pulls at a group comes from them.
    """
    size = rounder.group_size
    for start in range(0, len(errors), size):
        inside = slice(start, start + size)
        own = moment[inside, inside].clone()
        own.diagonal().add_(damping)
        whole = weight[:, inside].t().contiguous()
        held, pull = whole - errors[inside], (half[0][inside] @ half[1]).float()
        pull.add_(errors[inside], alpha=damping)
        power = (held * (own @ held)).sum(0).clamp_min_(1e-30)
        ratio = rounder.rescale(start // size, 1 + (held * pull).sum(0) / power)
        if ratio is not None:
            moved = held * (ratio - 1)
            held += moved
            pull -= own @ moved
        diagonal = own.diagonal()
        local = pull.div_(diagonal[:, None]).add_(held)
        codes[inside], values = chosen(local, held, own / -diagonal, rounder.grid(start // size), backwards=False)
        errors[inside] = whole - values
        half[1][inside] = errors[inside]
