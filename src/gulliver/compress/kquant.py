"""Grids of GGUF's block types (runtime/blocks.py) while a matrix's codes are being chosen; a `Rounder` (solver.py).

A block's float16 scale d and minimum e are fixed when its first column is reached, from the best float scale and
minimum of each of its groups. Each group's scale and minimum codes are then chosen again when its own first column is
reached, on weights that carry the errors passed on by then. A group x with importances w is approximated by s·level[q]
minus m: over candidates of s, codes q are the nearest, and s and m follow in closed form (weighted least squares).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gulliver.compress.choose import GroupGrid
from gulliver.runtime.blocks import BlockRows, encode
from gulliver.runtime.formats import BLOCK_TYPES, BlockType, Format
from gulliver.runtime.grid import Lookup

SHRINKS = tuple(1.06 - 0.07 * step for step in range(7))
SMALLEST_HALF = 6e-8


@dataclass
class BlockRounder:
    """Rows in one block type; `importance` float32 [columns]."""

    fmt: Format
    rows: int
    importance: Tensor
    kind: BlockType = field(init=False)
    levels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.kind = BLOCK_TYPES[self.fmt.kind]
        columns = len(self.importance)
        self.levels = torch.tensor(self.kind.levels, dtype=torch.float32)
        self.lookup = None if bool((self.levels.diff() == 1).all()) else Lookup(self.levels)
        groups, blocks = columns // self.kind.group_size, columns // self.kind.columns
        self.scales = torch.ones(self.rows, groups, dtype=torch.int16)
        self.minima = torch.ones(self.rows, groups, dtype=torch.int16)
        self.d = torch.zeros(self.rows, blocks, dtype=torch.float16)
        self.e = torch.zeros(self.rows, blocks, dtype=torch.float16)

    @property
    def group_size(self) -> int:
        return self.kind.group_size

    @property
    def block_size(self) -> int:
        return self.kind.columns

    def open_block(self, block: int, weights: Tensor) -> None:
        """Fix d and e of a block for its `weights` [rows, columns of a block] in their natural order."""
        groups = weights.view(self.rows, -1, self.kind.group_size)
        first = block * self.kind.columns
        importance = self.importance[first : first + self.kind.columns].view(1, -1, self.kind.group_size)
        scales, minima = self.fit(groups, importance)
        low, high = self.kind.scale_codes
        if (low, high) == (1, 1):
            d = scales[:, 0]
        elif low == 0:
            d = scales.amax(1) / high
        else:  # the widest group gets the end of the range that reaches further
            d = scales.gather(1, scales.abs().argmax(1, keepdim=True))[:, 0] / low
        self.d[:, block] = _half(d)
        if self.kind.minimum_codes is not None:
            least = minima[:, 0] if (low, high) == (1, 1) else minima.amax(1) / self.kind.minimum_codes[1]
            self.e[:, block] = least.clamp(-65504, 65504).half()

    def open_group(self, group: int, weights: Tensor) -> GroupGrid:
        """Choose the scale and minimum codes of a group of an open block for its `weights` [rows, group size]."""
        kind, block = self.kind, self._block(group)
        first = group * kind.group_size
        importance = self.importance[first : first + kind.group_size][None]
        if kind.scale_codes != (1, 1):
            d, e = self.d[:, block].float(), self.e[:, block].float()
            scales, _ = self.fit(weights[:, None], importance[None])
            self.scales[:, group], self.minima[:, group] = self._codes(weights, importance, scales[:, 0], d, e)
        return self.grid(group)

    def grid(self, group: int) -> GroupGrid:
        block = self._block(group)
        scale = self.d[:, block].float() * self.scales[:, group].float()
        minimum = self.e[:, block].float() * self.minima[:, group].float()
        zero = torch.zeros_like(scale) if self.lookup else (-self.levels[0]).expand(self.rows).contiguous()
        return GroupGrid(scale, zero, minimum, self.lookup or len(self.levels))

    def rescale(self, group: int, ratio: Tensor) -> Tensor | None:
        """Scales times about `ratio` [rows]; what they were multiplied by. None for types with a minimum."""
        if self.kind.minimum_codes is not None:
            return None
        if self.kind.scale_codes == (1, 1):
            before = self.d[:, group].float()
            self.d[:, group] = _half(before * ratio)
            after = self.d[:, group].float()
        else:
            before = self.scales[:, group].float()
            after = (before * ratio).round_().clamp_(*self.kind.scale_codes)
            after = torch.where(after == 0, before, after)
            self.scales[:, group] = after.to(torch.int16)
        return torch.where(before == 0, 1.0, after / torch.where(before == 0, 1.0, before))

    def _block(self, group: int) -> int:
        return group * self.kind.group_size // self.kind.columns

    def nearest(self, scaled: Tensor) -> Tensor:
        """Codes, float32, of values of any shape in units of the scale."""
        if self.lookup is None:
            return torch.round(scaled - self.levels[0]).clamp_(0, len(self.levels) - 1)
        return self.lookup.codes.index_select(0, self.lookup.places(scaled)).view_as(scaled).float()

    def fit(self, groups: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
        """The best float scale and minimum, [rows, n] each, of groups [rows, n, size]; importance [1, n, size]."""
        if self.kind.minimum_codes is None:
            return self._symmetric(groups, importance), torch.zeros(groups.shape[:2])
        sums = _Sums.of(groups, importance)
        low, high = groups.amin(2), groups.amax(2)
        free = self.kind.scale_codes == (1, 1)  # its minimum has a sign
        if not free:
            low = low.clamp_max(0.0)
        width, top = (high - low).clamp_min(1e-12), len(self.levels) - 1
        best_scale, best_minimum = width / top, -low
        best = torch.full_like(width, torch.inf)
        for shrink in SHRINKS:
            codes = self.nearest((groups - (low * shrink)[:, :, None]) * (top / (width * shrink))[:, :, None])
            scale, minimum, error = sums.solved(codes, groups, importance, free)
            better = (error < best) & (scale > 0)
            best_scale, best_minimum = (
                torch.where(better, scale, best_scale),
                torch.where(better, minimum, best_minimum),
            )
            best = torch.where(better, error, best)
        return best_scale, best_minimum

    def _symmetric(self, groups: Tensor, importance: Tensor) -> Tensor:
        peak = groups.gather(2, groups.abs().argmax(2, keepdim=True))[:, :, 0]
        peak = torch.where(peak.abs() < 1e-12, 1e-12, peak)
        weighted = importance * groups
        best_scale, best = peak / self.levels[0], torch.full_like(peak, -1.0)
        for edge in (self.levels[0], self.levels[-1]):
            for shrink in SHRINKS:
                values = self.levels[self.nearest(groups * (edge / (peak * shrink))[:, :, None]).int()]
                product = (weighted * values).sum(2)
                square = (importance * values * values).sum(2).clamp_min(1e-30)
                gain = product * product / square
                better = gain > best
                best_scale = torch.where(better, product / square, best_scale)
                best = torch.where(better, gain, best)
        return best_scale

    def _codes(self, group: Tensor, importance: Tensor, scales: Tensor, d: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and minimum codes [rows] of a group [rows, size] whose best float scale is near `scales` [rows]."""
        low, high = self.kind.scale_codes
        middle = torch.round(scales / torch.where(d == 0, torch.inf, d))
        best = torch.full_like(d, torch.inf)
        best_scale, best_minimum = torch.ones_like(d), torch.zeros_like(d)
        total = importance.sum(1)
        for step in (-2, -1, 0, 1, 2):
            code = (middle + step).clamp(low, high)
            scale = d * code
            safe = torch.where(scale == 0, torch.inf, scale)[:, None]
            minimum_code = torch.zeros_like(d)
            if self.kind.minimum_codes is not None:
                minimum = -group.amin(1).clamp_max(0.0)
                for _ in range(3):
                    values = self.levels[self.nearest((group + minimum[:, None]) / safe).int()] * scale[:, None]
                    minimum = ((values - group) * importance).sum(1) / total
                    minimum_code = torch.round(minimum / torch.where(e == 0, torch.inf, e))
                    minimum_code = minimum_code.clamp(*self.kind.minimum_codes)
                    minimum = minimum_code * e
            else:
                minimum = torch.zeros_like(d)
            values = self.levels[self.nearest((group + minimum[:, None]) / safe).int()] * scale[:, None]
            error = ((values - minimum[:, None] - group) ** 2 * importance).sum(1)
            better = error < best
            best_scale, best = torch.where(better, code, best_scale), torch.where(better, error, best)
            best_minimum = torch.where(better, minimum_code, best_minimum)
        return best_scale.to(torch.int16), best_minimum.to(torch.int16)

    def finished(self, codes: Tensor) -> BlockRows:
        """The rows with these codes uint8 [rows, columns]."""
        parts = (self.scales.numpy(), self.minima.numpy(), self.d.numpy(), self.e.numpy())
        return BlockRows(self.fmt, torch.from_numpy(encode(self.fmt, codes.numpy(), *parts)))


@dataclass(frozen=True)
class _Sums:
    """Weighted sums over each group: of the importances, of x and of x², [rows, n] each."""

    one: Tensor
    x: Tensor
    xx: Tensor

    @staticmethod
    def of(groups: Tensor, importance: Tensor) -> _Sums:
        weighted = importance * groups
        return _Sums(importance.sum(2).expand(groups.shape[:2]), weighted.sum(2), (weighted * groups).sum(2))

    def solved(self, codes: Tensor, groups: Tensor, importance: Tensor, free: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, minimum (at least 0 unless `free`) and error of the least squares for these codes."""
        weighted = importance * codes
        q, qq, xq = weighted.sum(2), (weighted * codes).sum(2), (weighted * groups).sum(2)
        determinant = (self.one * qq - q * q).clamp_min(1e-30)
        scale = (self.one * xq - self.x * q) / determinant
        minimum = (q * xq - self.x * qq) / determinant
        if not free:
            through_zero = minimum < 0
            scale = torch.where(through_zero, xq / qq.clamp_min(1e-30), scale)
            minimum = torch.where(through_zero, 0.0, minimum)
        error = self.xx - 2 * scale * xq + 2 * minimum * self.x
        error += scale**2 * qq - 2 * scale * minimum * q + minimum**2 * self.one
        return scale, minimum, error


def _half(scale: Tensor) -> Tensor:
    """float16 of the same shape; what would vanish or overflow becomes the nearest that does not."""
    bounded = scale.clamp(-65504, 65504).half()
    return torch.where((bounded == 0) & (scale != 0), scale.sign() * SMALLEST_HALF, bounded.float()).half()


def nested_order(importance: Tensor, fmt: Format) -> Tensor:
    """Columns by rising importance: blocks by their largest, groups in a block, columns in a group. int64 [columns]."""
    kind, values = BLOCK_TYPES[fmt.kind], importance.double().numpy()
    keys = [-values]
    for size in (kind.group_size, kind.columns):
        number = np.arange(len(values)) // size
        keys += [number, -values.reshape(-1, size).max(1)[number]]
    return torch.from_numpy(np.lexsort(keys)).flip(0)
